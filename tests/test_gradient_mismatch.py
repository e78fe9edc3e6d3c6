"""Gradient-mismatch meter: exactness of the discrete gradient, invariances, and the ordering that BinaryDuo reports."""

import copy
import math

import pytest
import torch
from torch import nn

from conftest import sum_bound
from lowbit_ext.binary import BinaryLinear
from lowbit_ext.duo import StepActivation, TernaryActivation, gradient_mismatch


class TwoBitActivation(nn.Module):
    """0, 1/3, 2/3 or 1, straight-through where 0 < x < 1."""

    def forward(self, x):
        clipped = x.clamp(0, 1)
        return clipped + (torch.round(3 * clipped) / 3 - clipped).detach()


class ClipActivation(nn.Module):
    def forward(self, x):
        return x.clamp(0, 1)


ACTIVATIONS = {
    "float": ClipActivation,
    "2-bit": TwoBitActivation,
    "ternary": TernaryActivation,
    "binary": StepActivation,
}


def perceptron(activation, seed):
    """16-16-16-1, pre-activations round 1/2."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 16), activation(), nn.Linear(16, 16), activation(), nn.Linear(16, 1))
    with torch.no_grad():
        for index, deviation in ((0, 0.25), (2, 0.5), (4, 0.25)):
            model[index].weight.normal_(0, deviation)
        model[0].bias.fill_(0.5)
        model[2].bias.copy_(0.5 - model[2].weight.sum(1) / 2)
        model[4].bias.zero_()
    return model


def teacher_and_student(name, seed, samples):
    """Student and (input, target), the target from a float network of other weights, equal in mean."""
    x = torch.randn(samples, 16, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        target = perceptron(ClipActivation, 100 + seed)(x).double()
        student = perceptron(ACTIVATIONS[name], seed)
        student[4].bias += (target - student(x)).mean()
    return student, (x, target)


def test_more_levels_have_less_mismatch():
    """First and second layer, eps 0.1, 16 000 samples, mean over three students: float > 2-bit >= ternary > binary."""
    means = {}
    for name in ACTIVATIONS:
        cosines = []
        for seed in range(3):
            student, batch = teacher_and_student(name, seed, 16_000)
            layers = ["0.weight", "2.weight"]
            result = gradient_mismatch(student, nn.functional.mse_loss, batch, eps=0.1, layers=layers)
            assert result.samples == 16_000
            cosines.append(list(result.cosines.values()))
        means[name] = torch.tensor(cosines).mean(0)
    for layer in range(2):
        float_, two_bit, ternary, binary = (float(means[name][layer]) for name in ACTIVATIONS)
        assert float_ > two_bit >= ternary > binary
        assert float_ > 0.999
        assert ternary >= 0.95
        assert 0.85 <= binary <= 0.96


def test_discrete_gradient_of_a_step_is_the_probability_in_the_window():
    """L(w) = mean 1[w x >= 1/2] over a grid of x: the smoothed slope is a count, known exactly."""
    x = (torch.arange(1, 1001).double() / 1000).unsqueeze(1)
    model = nn.Sequential(nn.Linear(1, 1, bias=False), StepActivation()).double()
    with torch.no_grad():
        model[0].weight.fill_(0.7)
    result = gradient_mismatch(model, lambda out, _: out.mean(), (x, None), eps=0.1)
    above, below = (float((x * w >= 0.5).double().mean()) for w in (0.7 + 0.1, 0.7 - 0.1))
    assert float(result.layers[0].discrete) == pytest.approx((above - below) / 0.2, rel=1e-12)
    inside = (x * 0.7 > 0) & (x * 0.7 < 1)
    assert float(result.layers[0].straight_through) == pytest.approx(float((x * inside).mean()), rel=1e-12)


def test_equals_an_independent_loop_and_chunks_change_nothing():
    student, (x, target) = teacher_and_student("ternary", 0, 300)
    # Activations are 0, 1/2 and 1: what rounds is the last layer, a sum of 17. The loss moves by twice the deviation
    # times that, at both ends of the window.
    last = float(sum(parameter.detach().abs().sum() for parameter in student[4].parameters()))
    loss = float(nn.functional.mse_loss(student(x).detach().double(), target))
    bound = 2 * 2 * math.sqrt(loss) * 2 * sum_bound(17, last) / 0.1
    whole = gradient_mismatch(student, nn.functional.mse_loss, (x, target), eps=0.05)
    weight = student[2].weight
    for index in (0, 17, 255):
        losses = []
        for sign in (1, -1):
            model = copy.deepcopy(student)
            with torch.no_grad():
                model[2].weight.view(-1)[index] += sign * 0.05
                losses.append(float(nn.functional.mse_loss(model(x).double(), target)))
        slope = (losses[0] - losses[1]) / 0.1
        assert float(whole.layers[1].discrete[index]) == pytest.approx(slope, rel=1e-5, abs=bound)
    assert weight.numel() == whole.layers[1].weights == whole.layers[1].of_weights
    for chunk_size in (3, 1000):
        other = gradient_mismatch(student, nn.functional.mse_loss, (x, target), eps=0.05, chunk_size=chunk_size)
        for a, b in zip(whole.layers, other.layers, strict=True):
            torch.testing.assert_close(a.discrete, b.discrete, rtol=0, atol=bound)
            assert torch.equal(a.straight_through, b.straight_through)
    assert whole.layers[0].cosine == pytest.approx(
        float(torch.cosine_similarity(whole.layers[0].discrete, whole.layers[0].straight_through, 0))
    )


def test_sampled_weights_and_layers():
    student, batch = teacher_and_student("binary", 1, 200)
    draws = [
        gradient_mismatch(student, nn.functional.mse_loss, batch, eps=0.1, layers=["2.weight"], max_weights=10,
                          generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    assert [layer.name for layer in draws[0].layers] == ["2.weight"]
    assert torch.equal(draws[0].layers[0].indices, draws[1].layers[0].indices)
    assert not torch.equal(draws[0].layers[0].indices, draws[2].layers[0].indices)
    full = gradient_mismatch(student, nn.functional.mse_loss, batch, eps=0.1, layers=["2.weight"]).layers[0]
    part = draws[0].layers[0]
    assert (part.weights, part.of_weights) == (10, 256)
    assert torch.equal(part.discrete, full.discrete[part.indices])


def test_the_model_and_the_random_state_stay_as_they_are():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), StepActivation(), nn.Dropout(0.2), nn.Flatten(),
        BinaryLinear(4 * 36, 3, encoding="step", surrogate="identity"),
    )
    before = copy.deepcopy(model.state_dict())
    x, y = torch.randn(20, 1, 8, 8), torch.randint(3, (20,))
    state = torch.get_rng_state()
    done = []
    results = [
        gradient_mismatch(model, nn.functional.cross_entropy, (x, y), eps=0.1, max_weights=12,
                          generator=torch.Generator().manual_seed(0), progress=done.append)
        for _ in range(2)
    ]
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in model.parameters())
    assert results[0].cosines == results[1].cosines
    assert sum(done) == 2 * 24
    assert not any(math.isnan(cosine) for cosine in results[0].cosines.values())


X, Y = torch.zeros(4, 16), torch.zeros(4, 1, dtype=torch.float64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 0.0}, "eps must be positive, got 0.0"),
        ({"eps": math.nan}, "eps must be positive, got nan"),
        ({"eps": 0.1, "max_weights": 0}, "max_weights must be at least 1, got 0"),
        ({"eps": 0.1, "chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        ({"eps": 0.1, "layers": ["9.weight"]}, "layers names '9.weight'; the model has 0.weight, 0.bias"),
        ({"eps": 0.1, "loss": lambda a, b: a - b}, "loss must return a scalar tensor"),
        ({"eps": 0.1, "loss": lambda a, b: (a * math.nan).sum()}, "the loss is nan"),
    ],
)
def test_wrong_calls(options, message):
    loss = options.pop("loss", nn.functional.mse_loss)
    with pytest.raises(ValueError, match=f"gradient_mismatch: {message}"):
        gradient_mismatch(perceptron(StepActivation, 0), loss, (X, Y), **options)
    with pytest.raises(ValueError, match="gradient_mismatch: the model has no weight"):
        gradient_mismatch(nn.Sequential(nn.BatchNorm1d(16)), loss, (X, Y), eps=0.1)
