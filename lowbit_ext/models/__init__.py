"""Ready-made networks of the papers, built from this library's layers and estimators, and a count of their cost."""

from lowbit_ext.models._describe import Description, LayerCost, describe
from lowbit_ext.models._preact_resnet import PreActResNet, preact_resnet
from lowbit_ext.models.resnet import ResNet, resnet18
from lowbit_ext.models.sequential import alexnet, vgg7
from lowbit_ext.models.vae import BernoulliVAE

__all__ = [
    "BernoulliVAE", "Description", "LayerCost", "PreActResNet", "ResNet", "alexnet", "describe", "preact_resnet",
    "resnet18", "vgg7",
]
