"""Matrix products of packed bits."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit_ext import _native, _oplib
from lowbit_ext._native import pointer
from lowbit_ext.binary.ops.convolution import contiguous
from lowbit_ext.binary.ops.geometry import ENCODINGS
from lowbit_ext.packed import words_for

_OUTPUT_KINDS = {
    getattr(torch, name): kind for name, kind in _native.cpu.CONV_OUTPUTS.items() if hasattr(torch, name)
}
MOST_DEPTH = 2**30  # sums of both factors' rows, as 0 and 1 need them, fit int32


def _outputs(
    a: Tensor, b: Tensor, scale: Tensor | None, depth: int, a_encoding: str, b_encoding: str, out_dtype: torch.dtype
) -> Tensor:
    op = "binary_matmul"
    for name, words in (("a", a), ("b", b)):
        if words.dtype != torch.int64 or words.dim() != 3 or words.shape[2] != words_for(depth):
            raise ValueError(
                f"{op}: {name} must be int64 words (batch, rows, {words_for(depth)}) for depth {depth}, got "
                f"{words.dtype} {tuple(words.shape)}"
            )
    if a.shape[0] != b.shape[0]:
        raise ValueError(f"{op}: a and b must have one batch, got {tuple(a.shape)} and {tuple(b.shape)}")
    if not 1 <= depth < MOST_DEPTH:
        raise ValueError(f"{op}: depth must be at least 1 and below 2^30, got {depth}")
    for name, encoding in (("a_encoding", a_encoding), ("b_encoding", b_encoding)):
        if encoding not in ENCODINGS:
            raise ValueError(f"{op}: {name} must be 'sign' or 'step', got {encoding!r}")
    if out_dtype not in _OUTPUT_KINDS:
        raise TypeError(f"{op}: out_dtype must be int32, float32, bfloat16 or float16, got {out_dtype}")
    if scale is not None and (scale.dtype != torch.float32 or scale.shape != (1,) or out_dtype == torch.int32):
        raise ValueError(
            f"{op}: scale must be float32 of shape (1,), with a float out_dtype, got {scale.dtype} "
            f"{tuple(scale.shape)} and {out_dtype}"
        )
    return a.new_empty((a.shape[0], a.shape[1], b.shape[1]), dtype=out_dtype)


def _matmul(
    a: Tensor, b: Tensor, scale: Tensor | None, depth: int, a_encoding: str, b_encoding: str, out_dtype: torch.dtype
) -> Tensor:
    op = "binary_matmul"
    output = _outputs(a, b, scale, depth, a_encoding, b_encoding, out_dtype)
    native = _native.kernels(a)
    a, b, scale = a.contiguous(), b.contiguous(), contiguous(scale)
    # With b of 0 and 1 the kernel writes 4 bytes an element.
    wide = b_encoding == "sign" or out_dtype.itemsize == 4
    written = output if wide else torch.empty_like(output, dtype=torch.float32)
    call = (*output.shape, depth, ENCODINGS[a_encoding], ENCODINGS[b_encoding], _OUTPUT_KINDS[written.dtype])
    size = native.binary_matmul_workspace_bytes(*call)
    workspace = _native.workspace(size, a)
    status = native.binary_matmul(
        *call, pointer(a, a, f"{op}: a"), pointer(b, a, f"{op}: b"), pointer(scale, a, f"{op}: scale"),
        written.data_ptr(), workspace.data_ptr(), size,
    )
    _native.check(op, status)
    return written if wide else output.copy_(written)


# Words (batch, M, W) and (batch, N, W) of `depth` bits a row -> (batch, M, N). csrc/core/ops/binary_matmul.h.
binary_matmul = _oplib.define(
    "binary_matmul(Tensor a, Tensor b, Tensor? scale, SymInt depth, str a_encoding, str b_encoding, "
    "ScalarType out_dtype) -> Tensor",
    outputs=_outputs,
    launcher=_matmul,
)
