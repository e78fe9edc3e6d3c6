"""Every spelling of (N, C, *spatial) -> (N, features) that the tests of graph rewriting share."""

import torch
from torch import nn


def _sizes(x):
    n, c, h, w = x.shape
    return x.view(n, c * h * w)


def _sizes_of_method(x):
    n, c, h, w = x.size()
    return x.reshape(n, c * h * w)


def flattens(features):
    """{spelling: function of an image of this number of features, or module}."""
    return {
        "nn.Flatten()": nn.Flatten(),
        "nn.Flatten(1, 3)": nn.Flatten(1, 3),
        "torch.flatten(x, 1)": lambda x: torch.flatten(x, 1),
        "torch.flatten(x, start_dim=1)": lambda x: torch.flatten(x, start_dim=1),
        "torch.flatten(input=x, start_dim=1, end_dim=-1)": lambda x: torch.flatten(input=x, start_dim=1, end_dim=-1),
        "x.flatten(1)": lambda x: x.flatten(1),
        "x.flatten(1, 3)": lambda x: x.flatten(1, 3),
        "x.flatten(start_dim=1)": lambda x: x.flatten(start_dim=1),
        "x.view(-1, n)": lambda x: x.view(-1, features),
        "x.view((-1, n))": lambda x: x.view((-1, features)),
        "x.view([-1, n])": lambda x: x.view([-1, features]),
        "x.view(size=(-1, n))": lambda x: x.view(size=(-1, features)),
        "x.view(x.size(0), -1)": lambda x: x.view(x.size(0), -1),
        "x.view(x.size(dim=0), -1)": lambda x: x.view(x.size(dim=0), -1),
        "x.view(x.size()[0], -1)": lambda x: x.view(x.size()[0], -1),
        "x.view(x.shape[0], -1)": lambda x: x.view(x.shape[0], -1),
        "x.view(x.shape[0], n)": lambda x: x.view(x.shape[0], features),
        "x.view((x.shape[0], -1))": lambda x: x.view((x.shape[0], -1)),
        "n, c, h, w = x.shape": _sizes,
        "n, c, h, w = x.size()": _sizes_of_method,
        "x.reshape(-1, n)": lambda x: x.reshape(-1, features),
        "x.reshape(x.shape[0], -1)": lambda x: x.reshape(x.shape[0], -1),
        "x.reshape(shape=(-1, n))": lambda x: x.reshape(shape=(-1, features)),
        "torch.reshape(x, (-1, n))": lambda x: torch.reshape(x, (-1, features)),
        "torch.reshape(input=x, shape=(x.size(0), -1))": lambda x: torch.reshape(input=x, shape=(x.size(0), -1)),
        "x.contiguous().view(-1, n)": lambda x: x.contiguous().view(-1, features),
        "x.clone().flatten(1)": lambda x: x.clone().flatten(1),
    }


SPELLINGS = tuple(flattens(1))


class Flattened(nn.Module):
    """What comes before, the flattening, and what comes behind it."""

    def __init__(self, before, spelling, features, behind):
        super().__init__()
        self.before, self.flatten, self.behind = before, flattens(features)[spelling], behind

    def forward(self, x):
        return self.behind(self.flatten(self.before(x)))
