"""Semi-supervised federated learning: labels on the server, unlabelled images on the users.

`simulate` runs server and users in one process. The Flower application (`GroupedAveraging`, `client_app`, `server_app`)
needs the extra `federated` and is loaded when it is first asked for.

Source: Zhang, Yang, Yao, Yan, Gonzalez and Mahoney, "Improving Semi-supervised Federated Learning by Reducing the
Gradient Diversity of Models", IEEE BigData 2021.
"""

from typing import TYPE_CHECKING, Any

from lowbit_ext.federated._simulate import Settings, Simulation, run_round, simulate
from lowbit_ext.federated.augment import strong, weak
from lowbit_ext.federated.core import (
    Partition,
    assign_groups,
    consistency_loss,
    default_groups,
    gradient_diversity,
    group_average,
    non_iid_level,
    norm_parameters,
    partition,
    recompute_statistics,
    replace_batchnorm,
)
from lowbit_ext.federated.rounds import Coordinator, Participant, RoundReport
from lowbit_ext.federated.wire import CompressedUpdate, compress, decompress

if TYPE_CHECKING:
    from lowbit_ext.federated.flower import GroupedAveraging, client_app, server_app

__all__ = [
    "CompressedUpdate",
    "Coordinator",
    "GroupedAveraging",
    "Participant",
    "Partition",
    "RoundReport",
    "Settings",
    "Simulation",
    "assign_groups",
    "client_app",
    "compress",
    "consistency_loss",
    "decompress",
    "default_groups",
    "gradient_diversity",
    "group_average",
    "non_iid_level",
    "norm_parameters",
    "partition",
    "recompute_statistics",
    "replace_batchnorm",
    "run_round",
    "server_app",
    "simulate",
    "strong",
    "weak",
]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name not in ("GroupedAveraging", "client_app", "server_app"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from lowbit_ext.federated import flower
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in ("flwr", "ray"):
            raise
        raise ImportError(f'lowbit_ext.federated.{name} needs Flower: pip install "lowbit-ext[federated]"') from error
    return getattr(flower, name)
