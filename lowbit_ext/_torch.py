"""What the package uses of torch without torch's promise: where to look when another version of torch breaks something.

A name that torch no longer has fails here, when the package is imported; `.ci/run other_torch` tests other versions.
Methods and attributes with a leading underscore (`Module._apply`, `Module._load_from_state_dict`, `Tensor._version`,
`UntypedStorage._cdata`) are named where they are used.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import _batch_norm_impl_index as batch_norm_impl_index  # F.batch_norm, which returns its statistics as well
from torch import nn

# Below the rules that count writes and make views, and the keys that are left there: what torch.library.custom_op uses.
from torch._C import _after_ADInplaceOrView_keyset as keys_below_write_counting
from torch._C import _AutoDispatchBelowADInplaceOrView as below_write_counting
from torch._C import _get_tracing_state as jit_tracing_state  # of torch.jit.trace; None outside
from torch._C import _len_torch_dispatch_stack as dispatch_modes  # how many torch dispatch modes are entered
from torch._C import _len_torch_function_stack as torch_function_modes  # the same of torch function modes
from torch._C._autograd import _profiler_enabled as is_profiling
from torch._C._autograd import _top_saved_tensors_default_hooks as innermost_saved_tensors_hooks  # since torch 2.8
from torch._C._functorch import peek_interpreter_stack as innermost_transform  # of vmap, grad, jvp; None outside
from torch.nn.common_types import _size_1_t as Size1  # an int, or a tuple of one
from torch.nn.common_types import _size_2_t as Size2  # an int, or a tuple of two
from torch.nn.modules._functions import SyncBatchNorm as synchronised_batch_norm  # the function, not the layer
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm  # of one to three dimensions, and SyncBatchNorm
from torch.nn.modules.batchnorm import _NormBase as StatisticsNorm  # these and instance norms
from torch.nn.modules.conv import _ConvNd as Convolution  # of one to three dimensions, and transposed
from torch.nn.modules.instancenorm import _InstanceNorm as InstanceNorm  # of one to three dimensions
from torch.utils import _pytree as pytree

MODULE_CALL = nn.Module._call_impl.__code__  # code object of the frames in which a module's forward runs

fused_rms_norm = torch.ops.aten._fused_rms_norm  # F.rms_norm, which returns its statistic as well

# Handle of a device's current stream: torch.cuda.current_stream(index).cuda_stream without the objects made on the way.
# A torch for CPUs has none.
current_cuda_stream: Any = torch._C._cuda_getCurrentRawStream if torch.backends.cuda.is_built() else None


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile made it. Its class is known by the name: importing it takes as long as all of torch."""
    return type(module).__module__.startswith("torch._dynamo")


def mkldnn_convolution(module: nn.Conv2d, input: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """The module's convolution by oneDNN, if that is where torch sends it; None otherwise.

    torch decides by the sizes of the batch and by the number of threads as well, and its kernels round differently.
    """
    padding = module.padding
    if module.padding_mode != "zeros" or isinstance(padding, str):
        return None
    geometry = (module.stride, padding, module.dilation)
    backend = torch._C._select_conv_backend(input, module.weight, module.bias, *geometry, False, (0, 0), module.groups)
    if backend != torch._C._ConvBackend.Mkldnn:  # type: ignore[attr-defined]
        return None

    def convolution(input: torch.Tensor) -> torch.Tensor:
        return torch.mkldnn_convolution(
            input, module.weight, module.bias, padding, module.stride, module.dilation, module.groups
        )

    return convolution


def register_tree(
    kind: type[Any], tensors: Sequence[str], settings: Sequence[str], unflatten: Callable[[Any, Any], Any]
) -> None:
    """Makes a class of tensors transparent to torch.compile, torch.export and torch.func.

    Args:
        kind: the class; it is `lowbit_ext.<its name>` in an exported program.
        tensors: names of the attributes that are tensors or None: the leaves.
        settings: names of the other attributes, which JSON can hold; a tuple among them comes back as a list.
        unflatten: makes an object from the values of both.
    """

    def flatten(value: Any) -> tuple[list[Any], Any]:
        return [getattr(value, name) for name in tensors], tuple([getattr(value, name) for name in settings])

    def flatten_with_keys(value: Any) -> tuple[list[Any], Any]:
        leaves, context = flatten(value)
        return [(pytree.GetAttrKey(name), leaf) for name, leaf in zip(tensors, leaves, strict=True)], context

    pytree.register_pytree_node(
        kind,
        flatten,
        unflatten,
        serialized_type_name=f"lowbit_ext.{kind.__name__}",
        to_dumpable_context=list,
        from_dumpable_context=tuple,
        flatten_with_keys_fn=flatten_with_keys,
    )


__all__ = [
    "MODULE_CALL", "BatchNorm", "Convolution", "InstanceNorm", "Size1", "Size2", "StatisticsNorm",
    "batch_norm_impl_index", "below_write_counting", "current_cuda_stream", "dispatch_modes", "fused_rms_norm",
    "innermost_saved_tensors_hooks", "innermost_transform", "is_compiled", "is_profiling", "jit_tracing_state",
    "keys_below_write_counting", "mkldnn_convolution", "pytree", "register_tree", "synchronised_batch_norm",
    "torch_function_modes",
]
