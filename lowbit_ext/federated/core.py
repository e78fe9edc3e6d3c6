"""Semi-supervised federated learning without an engine: losses, averages, measures, as functions of tensors and states.

A state is a model's state_dict. Source of all: Zhang, Yang, Yao, Yan, Gonzalez and Mahoney, "Improving Semi-supervised
Federated Learning by Reducing the Gradient Diversity of Models", IEEE BigData 2021.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import random
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit_ext._torch import BatchNorm

State = Mapping[str, Tensor]
User = TypeVar("User", bound=Hashable)

# What batch normalisation measures rather than learns.
_VARIANCE = "running_var"
_STATISTICS = ("running_mean", _VARIANCE, "num_batches_tracked")
STATISTICS_POLICIES = ("average", "local", "recompute")


# --- data -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Partition:
    """Indices of the samples of the server, labelled, and of each user, unlabelled."""

    server: Tensor
    users: tuple[Tensor, ...]

    def counts(self, labels: Tensor) -> Tensor:
        """Samples of each user and class, (users, classes)."""
        classes = int(labels.max()) + 1
        return torch.stack([torch.bincount(labels[user], minlength=classes) for user in self.users])


def _shares(weights: Sequence[float], total: int) -> list[int]:
    """Integers in proportion to the weights that add up to the total: largest remainders."""
    exact = [total * weight / sum(weights) for weight in weights]
    whole = [math.floor(value + 1e-9) for value in exact]
    order = sorted(range(len(exact)), key=lambda i: whole[i] - exact[i])
    for i in order[: total - sum(whole)]:
        whole[i] += 1
    return whole


def partition(
    labels: Tensor, users: int, non_iid: float, *, labelled: int, per_user: int | None = None,
    generator: torch.Generator | None = None,
) -> Partition:
    """Splits a data set between the server and users whose class frequencies differ.

    The server gets the same number of every class. User k gets the part `non_iid` of its samples from class
    k mod classes and the rest evenly from all classes: as many users as classes have that non_iid_level exactly, up to
    whole samples; other numbers have a lower one, so measure it.

    Args:
        labels: int64 (N,), classes 0 to d - 1, each of them there.
        users: number of users K.
        non_iid: target R, 0 (all alike) to 1 (one class a user).
        labelled: samples of the server, a multiple of the number of classes.
        per_user: samples of a user; default: as many as the rarest class allows.
        generator: of the draw.

    Raises:
        TypeError, ValueError: wrong types or ranges, or fewer samples than asked for.
    """
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.dim() != 1 or not labels.numel():
        raise TypeError("partition: labels must be an int64 tensor (N,) with at least one sample")
    if not 0 <= non_iid <= 1:
        raise ValueError(f"partition: non_iid must be between 0 and 1, got {non_iid}")
    if users < 1:
        raise ValueError(f"partition: users must be at least 1, got {users}")
    available = torch.bincount(labels)
    classes = len(available)
    if labelled < 0 or labelled % classes:
        raise ValueError(f"partition: labelled must be a multiple of the {classes} classes, got {labelled}")
    pools = []
    for label in range(classes):
        members = torch.nonzero(labels == label).flatten()
        order = torch.randperm(len(members), generator=generator, device=generator.device if generator else "cpu")
        pools.append(members[order.to(members.device)])
    weights = [[(1 - non_iid) / classes + non_iid * (k % classes == c) for c in range(classes)] for k in range(users)]
    left = [len(pool) - labelled // classes for pool in pools]
    demand = [sum(row[c] for row in weights) for c in range(classes)]
    # Rounding to whole samples may ask for one more a user.
    most = min(math.floor((left[c] - users) / demand[c]) for c in range(classes) if demand[c] > 0)
    per_user = most if per_user is None else per_user
    if min(left) < 0 or per_user > most or per_user < 1:
        raise ValueError(
            f"partition: {len(labels)} samples allow at most {max(most, 0)} a user beside {labelled} of the server, "
            f"got per_user {per_user}"
        )
    server = torch.cat([pool[: labelled // classes] for pool in pools])
    starts = [labelled // classes] * classes
    members_of_users = []
    for row in weights:
        parts = []
        for c, count in enumerate(_shares(row, per_user)):
            parts.append(pools[c][starts[c] : starts[c] + count])
            starts[c] += count
        members_of_users.append(torch.cat(parts))
    return Partition(server, tuple(members_of_users))


def non_iid_level(counts: Tensor) -> float:
    """R: mean total variation distance of the class frequencies of two users (Definition 1).

    Args:
        counts: (users, classes), samples of each, at least two users and one sample a user.

    Returns:
        0 (all alike) to 1 (as many users as classes, one class each).

    Raises:
        ValueError: wrong shape, or a user without samples.
    """
    if counts.dim() != 2 or counts.shape[0] < 2:
        raise ValueError(
            f"non_iid_level: counts must be (users, classes) of at least 2 users, got {tuple(counts.shape)}"
        )
    totals = counts.sum(1, keepdim=True)
    if bool((totals <= 0).any()) or bool((counts < 0).any()):
        raise ValueError("non_iid_level: every user must have samples, and no count may be negative")
    frequencies = counts.double() / totals
    distances = torch.cdist(frequencies, frequencies, p=1) / 2
    users = len(counts)
    return float(distances.sum() / (users * (users - 1)))


# --- loss -------------------------------------------------------------------------------------------------------------


def consistency_loss(logits_weak: Tensor, logits_strong: Tensor, threshold: float = 0.95) -> Tensor:
    """Cross entropy of the strongly augmented images against confident labels of the weakly augmented ones.

    Args:
        logits_weak: (N, classes), of weakly augmented images; no gradient flows into them.
        logits_strong: (N, classes), of strongly augmented ones.
        threshold: tau; labels of a probability below it do not count. The mean is over all N.

    Returns:
        Scalar; 0 for N = 0.

    Raises:
        ValueError: shapes that differ or are not (N, classes).

    Source:
        Section 3.1, user loss; Sohn et al., "FixMatch", NeurIPS 2020.
    """
    if logits_weak.dim() != 2 or logits_weak.shape != logits_strong.shape:
        raise ValueError(
            "consistency_loss: both logits must be (N, classes), "
            f"got {tuple(logits_weak.shape)} and {tuple(logits_strong.shape)}"
        )
    confidence, labels = logits_weak.detach().softmax(1).max(1)
    losses = F.cross_entropy(logits_strong, labels, reduction="none")
    return (losses * (confidence >= threshold)).sum() / max(len(labels), 1)


# --- averages ---------------------------------------------------------------------------------------------------------


def assign_groups(users: Sequence[User], groups: int, rng: random.Random) -> list[list[User]]:
    """Users in random groups whose sizes differ by at most one.

    Raises:
        ValueError: fewer users than groups, or no group.
    """
    if not 1 <= groups <= len(users):
        raise ValueError(f"assign_groups: groups must be 1 to {len(users)}, the number of users, got {groups}")
    order = list(users)
    rng.shuffle(order)
    return [order[i::groups] for i in range(groups)]


def default_groups(users: int) -> int:
    """S such that a group holds about ten users."""
    return max(1, round(users / 10))


def check_like(name: str, state: State, reference: State) -> None:
    """Raises ValueError where a state's tensors are not those of the reference, in name, shape and type."""
    if state.keys() != reference.keys():
        odd = sorted(set(state) ^ set(reference))
        raise ValueError(f"{name} has other tensors than the server's model: {', '.join(odd[:3])}")
    for key, tensor in reference.items():
        if state[key].shape != tensor.shape or state[key].dtype != tensor.dtype:
            raise ValueError(
                f"{name}: {key} must be {tensor.dtype} {tuple(tensor.shape)}, "
                f"got {state[key].dtype} {tuple(state[key].shape)}"
            )


def _is_finite(tensor: Tensor) -> bool:
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(math.isfinite(end) for end in torch.aminmax(tensor))  # a NaN is both; 80 times as fast as torch.isfinite


def check_reply(name: str, state: State, reference: State) -> None:
    """Raises ValueError where a state must not be averaged: other tensors, a NaN, an infinity, a variance below 0."""
    check_like(name, state, reference)
    for key, tensor in state.items():
        if not _is_finite(tensor):
            raise ValueError(f"{name}: {key} has a NaN or an infinity")
        if key.rpartition(".")[2] == _VARIANCE and bool((tensor < 0).any()):
            raise ValueError(f"{name}: {key} has a variance below 0")


def is_statistic(key: str) -> bool:
    """Whether the tensor of that name is a running statistic of batch normalisation."""
    return key.rpartition(".")[2] in _STATISTICS


def change(new: State, old: State) -> dict[str, Tensor]:
    """new - old of floating point tensors."""
    return {key: tensor - old[key] for key, tensor in new.items() if tensor.is_floating_point()}


def change_norm(new: State, old: State, keys: Collection[str]) -> float:
    """Euclidean norm of the change of these tensors together; infinite where it overflows."""
    return math.hypot(*(float(torch.linalg.vector_norm(new[key] - old[key], dtype=torch.float64)) for key in keys))


def group_average(
    server: State, users: Mapping[User, State], groups: Sequence[Sequence[User]], statistics: str = "average"
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Averages each group with the server, unweighted, and then the groups.

    w_i = (w_s + sum of w_k over the group) / (users of the group + 1), w = mean of w_i. One group is FedAvg with the
    server as a participant. Sums are in float64; tensors of integers are the server's.

    Args:
        server: its state.
        users: theirs, by user.
        groups: the users of each group; each user of `users` in one of them.
        statistics: of batch normalisation: "average", or the server's ("local": who keeps their own puts them back;
            "recompute": whoever calls measures them anew).

    Returns:
        w, and the group states w_i in the order of the groups.

    Raises:
        ValueError: groups that are not a partition of the users, states of other tensors, unknown `statistics`.

    Source:
        Section 4, grouping-based model averaging.
    """
    if statistics not in STATISTICS_POLICIES:
        raise ValueError(
            f"group_average: statistics must be one of {', '.join(STATISTICS_POLICIES)}, got {statistics!r}"
        )
    members = [user for group in groups for user in group]
    if len(members) != len(set(members)) or set(members) != set(users) or not all(groups):
        raise ValueError("group_average: groups must hold every user exactly once and no group may be empty")
    for user, state in users.items():
        check_like(f"group_average: user {user}", state, server)
    means: list[dict[str, Tensor]] = [{} for _ in groups]
    total: dict[str, Tensor] = {}
    for key, own in server.items():
        if not own.is_floating_point() or (statistics != "average" and is_statistic(key)):
            total[key] = own.clone()
            for mean in means:
                mean[key] = own.clone()
            continue
        exact = []
        for group in groups:
            summed = own.double()
            for user in group:
                summed = summed + users[user][key].double()
            exact.append(summed / (len(group) + 1))
        for mean, value in zip(means, exact, strict=True):
            mean[key] = value.to(own.dtype)
        total[key] = (sum(exact[1:], exact[0]) / len(exact)).to(own.dtype)
    return total, means


def keep_statistics(state: State, own: State) -> dict[str, Tensor]:
    """`state` with the running statistics of batch normalisation of `own`."""
    return {key: own[key] if is_statistic(key) else tensor for key, tensor in state.items()}


@torch.no_grad()
def recompute_statistics(model: nn.Module, batches: Sequence[Tensor]) -> None:
    """Sets the running statistics of batch normalisation to the mean over the batches, in place."""
    norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    training = model.training
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over batches
    model.train()
    for batch in batches:
        model(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.train(training)


# --- measures ---------------------------------------------------------------------------------------------------------


def norm_parameters(model: nn.Module) -> set[str]:
    """Names of the tensors of normalisation layers in the model's state, which gradient_diversity leaves out."""
    kinds = (BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm)
    return {
        f"{name}.{key}" if name else key
        for name, module in model.named_modules()
        if isinstance(module, kinds)
        for key in module.state_dict()
    }


def gradient_diversity(updates: Sequence[State], norm: str = "paper", skip: Collection[str] = ()) -> float:
    """How far the participants' gradients, or weight changes, point in different directions.

    Args:
        updates: v_i, one state of changes a participant.
        norm: "paper": D = sum |v_i|^2 / |sum v_i|^2 (Equation 8), at least 1/n; "figures": mean (|v_i| / |mean v|)^2 =
            n D, at least 1.
        skip: names to leave out, as norm_parameters gives them.

    Returns:
        Infinity where the changes cancel.

    Raises:
        ValueError: no update, different tensors, unknown norm.
    """
    if norm not in ("paper", "figures"):
        raise ValueError(f"gradient_diversity: norm must be 'paper' or 'figures', got {norm!r}")
    if not updates:
        raise ValueError("gradient_diversity: at least one update is needed")
    for i, update in enumerate(updates[1:], 1):
        check_like(f"gradient_diversity: update {i}", update, updates[0])
    squares = square_of_sum = 0.0
    for key, first in updates[0].items():
        if key in skip or not first.is_floating_point() or is_statistic(key):
            continue
        stacked = torch.stack([update[key].double().flatten() for update in updates])
        squares += float(stacked.square().sum())
        square_of_sum += float(stacked.sum(0).square().sum())
    if square_of_sum == 0:
        return math.inf
    return squares / square_of_sum * (len(updates) if norm == "figures" else 1)


def replace_batchnorm(model: nn.Module, groups: int = 32) -> nn.Module:
    """Copy of a model with group normalisation in place of batch normalisation.

    A layer of C channels gets the largest number of groups up to `groups` that divides C, and keeps scale, shift and
    eps.

    Raises:
        ValueError: fewer than one group.

    Source:
        Section 3.2: batch normalisation enlarges the diversity of the users' gradients. Wu and He, "Group
        Normalization", ECCV 2018.
    """
    if groups < 1:
        raise ValueError(f"replace_batchnorm: groups must be at least 1, got {groups}")
    model = copy.deepcopy(model)

    def replaced(norm: BatchNorm) -> nn.GroupNorm:
        channels = norm.num_features
        count = max(divisor for divisor in range(1, min(groups, channels) + 1) if channels % divisor == 0)
        layer = nn.GroupNorm(count, channels, norm.eps, norm.affine)
        if norm.affine:
            layer.weight, layer.bias = norm.weight, norm.bias
        return layer.train(norm.training)

    if isinstance(model, BatchNorm):
        return replaced(model)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, BatchNorm):
                setattr(module, name, replaced(child))
    return model
