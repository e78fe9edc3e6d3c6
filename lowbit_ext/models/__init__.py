"""Networks of BinaryDuo's experiments, each in three stages: float, binary and coupled; and a count of their cost."""

from lowbit_ext.models.describe import Description, LayerCost, describe
from lowbit_ext.models.resnet import ResNet, resnet18
from lowbit_ext.models.sequential import alexnet, vgg7

__all__ = ["Description", "LayerCost", "ResNet", "alexnet", "describe", "resnet18", "vgg7"]
