"""Ready-made networks of the papers, built from this library's layers and estimators, and a count of their cost."""

from lowbit_ext.models._describe import Description, LayerCost, describe
from lowbit_ext.models._preact_resnet import PreActResNet, preact_resnet
from lowbit_ext.models.densenet import binary_densenet28, meliusnet22
from lowbit_ext.models.residual import birealnet18, quicknet, reactnet18, reactnet_a, resnet20
from lowbit_ext.models.resnet import ResNet, resnet18
from lowbit_ext.models.sequential import alexnet, vgg7
from lowbit_ext.models.transformer import VisionTransformer, binary_vit
from lowbit_ext.models.vae import BernoulliVAE

__all__ = [
    "BernoulliVAE", "Description", "LayerCost", "PreActResNet", "ResNet", "VisionTransformer", "alexnet",
    "binary_densenet28", "binary_vit", "birealnet18", "describe", "meliusnet22", "preact_resnet", "quicknet",
    "reactnet18", "reactnet_a", "resnet18", "resnet20", "vgg7",
]
