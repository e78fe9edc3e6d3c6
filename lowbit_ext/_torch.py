"""What the package uses of torch without torch's promise: where to look when another version of torch breaks something.

A name that torch no longer has fails here, when the package is imported; `.ci/run other_torch` tests other versions.
Methods and attributes with a leading underscore (`Module._apply`, `Module._load_from_state_dict`, `Tensor._version`,
`UntypedStorage._cdata`) are named where they are used.
"""

from torch import _batch_norm_impl_index as batch_norm_impl_index  # F.batch_norm, which returns its statistics as well
from torch import nn
from torch._C._autograd import _top_saved_tensors_default_hooks as innermost_saved_tensors_hooks  # since torch 2.8
from torch._C._functorch import peek_interpreter_stack as innermost_transform  # of vmap, grad, jvp; None outside
from torch.utils import _pytree as pytree

MODULE_CALL = nn.Module._call_impl.__code__  # code object of the frames in which a module's forward runs

__all__ = ["MODULE_CALL", "batch_norm_impl_index", "innermost_saved_tensors_hooks", "innermost_transform", "pytree"]
