"""Random programs of epilogue steps, and comparison with the reference."""

import torch

from lowbit_ext.binary import ops
from reference import epilogue

READING = ("multiply", "add", "multiply_add", "multiply_image", "prelu", "clamp")


def random_steps(rng, shape, axis, count, writing=True):
    """(kind, option, operands) of `count` steps on results of `shape`; the last one writes, if any does."""
    batch, channels = shape[0], shape[axis]

    def floats(*size):
        values = torch.randn(size, generator=rng)
        values[torch.rand(size, generator=rng) < 0.01] = float("nan")
        return values

    def pick(choices):
        return choices[torch.randint(len(choices), (), generator=rng)]

    steps = []
    for index in range(count):
        kinds = ("store", "bits") if writing and index == count - 1 else READING
        if writing and index < count - 1:
            kinds = (*READING, "add_tensor", "store", "bits")
        kind = pick(kinds)
        option, operands = 0, (floats(channels),)
        if kind in ("multiply_add", "clamp"):
            operands = floats(channels), floats(channels)
        elif kind == "multiply_image":
            operands = (floats(batch, channels),)
        elif kind == "add_tensor":
            operands = (floats(*shape).to(pick(epilogue.DTYPES)),)
            if len(shape) == 4 and pick((True, False)):
                operands = (operands[0].to(memory_format=torch.channels_last),)
        elif kind == "store":
            option, operands = pick((0, 1, 2)), ()
        elif kind == "bits":
            option = pick((1, 2))
            flip = torch.rand(option, channels, generator=rng) < 0.5
            operands = torch.randn(option, channels, generator=rng), pick((flip, None))
        steps.append((kind, option, operands))
    return steps


def encoded(steps):
    """Steps and operands as the operators take them."""
    numbers = [number for kind, option, _ in steps for number in (ops.STEP_KINDS[kind], option)]
    return numbers, [operand for *_, operands in steps for operand in operands]


def assert_same(got, expected):
    assert len(got) == len(expected)
    for ours, reference in zip(got, expected, strict=True):
        assert ours.dtype == reference.dtype
        torch.testing.assert_close(ours, reference, rtol=0, atol=0, equal_nan=ours.is_floating_point())
