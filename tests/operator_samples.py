"""Calls of every operator, for tests that go over all of them."""

import torch

from conftest import generator
from lowbit_ext import lowmem
from lowbit_ext.binary import binarize, pack_weight

GEOMETRY = (5, [3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1])  # filters; kernel, stride, padding, dilation, groups


def samples(layout):
    """One call of each operator, {name: arguments}."""
    rng = generator(0)
    x = torch.randn(2, 70, 6, 7, generator=rng)
    if layout == "permuted":
        x = torch.randn(7, 6, 70, 2, generator=rng).permute(3, 2, 1, 0)
    elif layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    words = binarize(x).words
    weight = pack_weight(torch.randn(5, 70, 3, 3, generator=rng))
    grad = torch.randn(2, 5, 6, 7, generator=rng)
    thresholds = torch.zeros(2, 5, dtype=torch.int32)
    conv = (70, *GEOMETRY, "sign", 0)
    a, b = words.flatten(1, 2), words.flatten(1, 2)[:, ::3]
    logits = torch.randn(70, 6, generator=rng).t() if layout == "permuted" else torch.randn(6, 70, generator=rng)
    statistics, affine = (torch.zeros(70), torch.ones(70)), (torch.randn(70, generator=rng), torch.ones(70))
    last = layout == "channels_last"
    codes = torch.zeros((2, 6, 7, 35) if last else (2, 70, 21), dtype=torch.uint8)
    flat = torch.zeros(x.numel() // 2, dtype=torch.uint8)
    scale_minimum = torch.ones(-(-x.numel() // lowmem.ops.GROUP), 2, dtype=torch.bfloat16)
    last_or_dense = x.clone() if last else x.contiguous()
    return {
        "lowbit::binarize": [
            (x, None, None, 0.0, "sign"),
            (x, torch.zeros(70), torch.zeros(70, dtype=torch.bool), 0.0, "step"),
            (x, torch.zeros(2, 70), torch.zeros(2, 70, dtype=torch.bool), 0.0, "step"),
        ],
        "lowbit::binarize_with_mask": [(x, 0.0, "sign"), (x, 0.5, "step")],
        "lowbit::quantized_activation": [(x, "sign"), (x, "step"), (x, "ternary")],
        "lowbit::quantized_activation_with_mask": [(x, "ternary", 0.0, 1.0, False), (x, "sign", -1.0, 1.0, True)],
        "lowbit::masked_gradient": [(x, torch.zeros((x.numel() + 63) // 64, dtype=torch.int64))],
        "lowbit::unpack": [(words, 70, -1.0, 1.0, torch.float32), (words, 70, 0.0, 1.0, torch.bfloat16)],
        "lowbit::binary_conv2d_block_weight": [(weight.words, 70, 1)],
        "lowbit::binary_conv2d": [
            (words, weight.blocked, None, None, None, None, None, *conv, torch.int32),
            (words, weight.words, None, None, None, None, None, *conv, torch.int32),
            (words, weight.blocked, torch.ones(5), torch.ones(5), grad, None, None, *conv, torch.float32),
            (words, weight.blocked, None, None, None, thresholds, None, *conv, torch.int32),
        ],
        "lowbit::binary_conv2d_epilogue": [
            (words, filters, *conv, [2, 0, 4, 0, 7, 1, 8, 2], [*torch.ones(2, 5), grad, torch.zeros(2, 5), None])
            for filters in (weight.blocked, weight.words)
        ],
        "lowbit::pointwise": [
            (x, [], "none", False, 0, [0, 0, 7, 0, 8, 1], 0, [torch.ones(70), torch.zeros(1, 70), None]),
            (x.half(), [3, 3, 2, 2, 1, 1, 1, 1, 0], "maximum", False, 0, [1, 0, 4, 0, 7, 2], 1,
             [torch.ones(70), torch.ones(2, 70, 3, 4)]),
            (x, [2, 2, 2, 2, 0, 0, 1, 1, 1], "average", True, 0, [7, 0], 0, []),
        ],
        "lowbit::binary_conv2d_input_grad": [
            (grad, weight.words, None, None, [2, 70, 6, 7], *GEOMETRY),
            (grad.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2), weight.words, torch.ones(5), words,
             [2, 70, 6, 7], *GEOMETRY),
        ],
        "lowbit::binary_conv2d_weight_grad": [(grad, words, *conv)],
        "lowbit::group_quantize_saved": [(x, 4, None), (x.relu(), 2, torch.tensor(3, device="cpu"))],
        "lowbit::antithetic_sample": [
            (logits, None, 4, "dirichlet", "sample", torch.tensor(1), 0),
            (logits, -logits.abs(), 9, "gaussian", "dimension", torch.tensor(1), 7),
        ],
        "lowbit::antithetic_gradient": [
            (torch.ones(6, 70, dtype=torch.uint8), torch.randn(6, 4, generator=rng), logits, 70, "sample"),
            (torch.ones(4, 6, 2, dtype=torch.int64), torch.randn(6, 4, generator=rng), None, 70, "dimension"),
        ],
        "lowbit::batch_norm_relu_quantize": [
            (x, *statistics, *affine, 4, 8.0, x.clone()),
            (x.bfloat16(), *statistics, *affine, 2, 6.0, x.bfloat16()),
        ],
        "lowbit::batch_norm_quantize": [
            (x, *statistics, *affine, 4, 8.0),
            (x.bfloat16(), *statistics, *affine, 2, 6.0),
        ],
        "lowbit::channel_dequantize": [
            (codes, *affine, [2, 70, 6, 7], last, dtype, 4, 8.0, relu)
            for dtype, relu in ((torch.float32, True), (torch.float16, False))
        ],
        "lowbit::channel_dequantize_into": [(codes, *affine, last, 4, 8.0, True, last_or_dense)],
        "lowbit::batch_norm_relu_backward": [
            (x, codes, *affine, statistics[1], 4, 8.0, relu, training)
            for relu, training in ((True, True), (False, False))
        ],
        "lowbit::group_quantize": [(x, 4, False, None, 0), (x, 2, True, torch.tensor(1, device="cpu"), 16)],
        "lowbit::group_dequantize": [(flat, scale_minimum, [2, 70, 6, 7], last, torch.float16, 4)],
        "lowbit::group_dequantize_into": [(flat, scale_minimum, 4, last_or_dense)],
        "lowbit::binary_matmul": [
            (a, b, scale, 70, *encodings, dtype)
            for scale, encodings, dtype in (
                (None, ("sign", "sign"), torch.int32),
                (torch.ones(1), ("step", "sign"), torch.bfloat16),
                (torch.ones(1), ("sign", "step"), torch.float16),
                (None, ("step", "step"), torch.float32),
            )
        ],
        "lowbit::binary_max_pool2d": [(words, None, 70, [2, 2, 2, 2, 0, 0, 1, 1, 0])],
        "lowbit::binary_avg_pool2d": [(words, 70, [3, 3, 2, 2, 1, 1, 1, 1, 1], True, 0, "sign")],
    }
