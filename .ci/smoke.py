"""Smoke test of the installed package: levels and threads, and one convolution at every level against torch.

Usage: smoke.py [--best LEVEL]
"""

import argparse

import torch
from torch.nn.functional import conv2d

import lowbit_ext
from lowbit_ext import _native, binary


def check_levels(best: str | None) -> None:
    """Detection finds `best`; a level above it, asked for by LOWBIT_ISA, is a clear error."""
    levels = lowbit_ext.available_isas()
    if best is not None and levels[-1] != best:
        raise AssertionError(f"expected best level {best}, found {levels[-1]}")
    if levels[-1] == _native.ISA_LEVELS[-1]:
        return
    above = _native.ISA_LEVELS[len(levels)]
    try:
        _native.select_isa(above)
    except RuntimeError as error:
        print(f"{above} refused: {error}")
    else:
        raise AssertionError(f"{above} was accepted on a machine that cannot run it")


def check_threads() -> None:
    """The kernels use torch's threads."""
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        if _native.cpu.threads() != threads:
            raise AssertionError(f"torch has {threads} threads, the kernels {_native.cpu.threads()}")
    torch.set_num_threads(before)


def check_convolution() -> None:
    """Values and gradients of one layer at the active level."""
    torch.manual_seed(0)
    x = torch.randn(2, 70, 6, 5, requires_grad=True)
    weight = torch.randn(33, 70, 3, 3, requires_grad=True)
    grad = torch.randn(2, 33, 6, 5)
    x_signs = torch.where(x >= 0, 1.0, -1.0).detach().requires_grad_()
    weight_signs = torch.where(weight >= 0, 1.0, -1.0).detach().requires_grad_()

    output = binary.conv2d(x, weight, padding=1)
    expected = conv2d(x_signs, weight_signs, padding=1)
    torch.testing.assert_close(output, expected, rtol=0, atol=0)

    # The same terms, up to 297 of them, summed in another order.
    output.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(weight.grad, weight_signs.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x.grad, x_signs.grad * (x.abs() <= 1), rtol=1e-4, atol=1e-4)

    packed = binary.conv2d(binary.binarize(x), binary.pack_weight(weight), padding=1, threshold=3)
    torch.testing.assert_close(packed.unpack(), torch.where(expected >= 3, 1.0, -1.0), rtol=0, atol=0)


def main() -> None:
    parser = argparse.ArgumentParser(description="Smoke test of the installed package.")
    parser.add_argument("--best", choices=_native.ISA_LEVELS, help="level that detection must find")
    check_levels(parser.parse_args().best)
    check_threads()
    for level in lowbit_ext.available_isas():
        _native.select_isa(level)
        check_convolution()
        print(f"{level}: convolution, gradients and packed output agree with torch")


if __name__ == "__main__":
    main()
