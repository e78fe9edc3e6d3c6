"""A vision transformer whose linear layers are binary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lowbit_ext.binary import BinaryActivation, BinaryLinear
from lowbit_ext.models.layers import before_sign, check_multiple, check_network


def _linear(stage: str, in_features: int, out_features: int, surrogate: str) -> nn.Linear:
    """Linear layer of the input's signs, or in the float stage of the input."""
    if stage == "float":
        return nn.Linear(in_features, out_features)
    return BinaryLinear(in_features, out_features, surrogate=surrogate, weight_scale="channel")


class Attention(nn.Module):
    """Multi-head self-attention, in the binary stage on the signs of queries and keys. (N, T, C) -> the same."""

    def __init__(self, stage: str, width: int, heads: int, surrogate: str) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.projection = _linear(stage, width, 3 * width, surrogate), _linear(stage, width, width, surrogate)
        self.query, self.key = (before_sign(stage, BinaryActivation("sign", surrogate)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Each token's mixture of the values."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = self.query(qkv[0]), self.key(qkv[1]), qkv[2]
        scores = torch.matmul(query, key.transpose(-2, -1)) * query.shape[-1] ** -0.5
        return self.projection(torch.matmul(scores.softmax(-1), value).transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """Attention and two linear layers, each behind a layer norm and with a shortcut. (N, T, C) -> the same."""

    def __init__(self, stage: str, width: int, heads: int, surrogate: str) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(stage, width, heads, surrogate)
        self.linear1 = _linear(stage, width, 4 * width, surrogate)
        self.act = before_sign(stage, twin=nn.GELU())
        self.linear2 = _linear(stage, 4 * width, width, surrogate)

    def forward(self, x: Tensor) -> Tensor:
        """The stream behind the block."""
        x = x + self.attention(self.norm1(x))
        return x + self.linear2(self.act(self.linear1(self.norm2(x))))


class VisionTransformer(nn.Module):
    """Vision transformer: see binary_vit."""

    def __init__(
        self, stage: str, *, in_channels: int, num_classes: int, image_size: int, patch_size: int, width: int,
        depth: int, heads: int, surrogate: str,
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(in_channels, width, patch_size, patch_size)
        self.position = nn.Parameter(torch.empty((image_size // patch_size) ** 2, width))
        self.blocks = nn.Sequential(*(TransformerBlock(stage, width, heads, surrogate) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, num_classes)
        nn.init.trunc_normal_(self.position, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, in_channels, image_size, image_size)."""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(tokens)).mean(1))


def binary_vit(
    stage: str = "binary",
    *,
    in_channels: int = 3,
    num_classes: int = 1000,
    image_size: int = 224,
    patch_size: int = 16,
    width: int = 384,
    depth: int = 12,
    heads: int = 6,
    surrogate: str = "clip",
) -> VisionTransformer:
    """Vision transformer with binary linear layers and attention on the signs of queries and keys.

    Each block is x + attention(norm(x)) and x + linear(linear(norm(x))); the four linear layers take the signs of their
    input, so that the hidden layer has no activation but the sign. Weights have the scale mean |w| of their output.
    Patches, positions, softmax, values and the classifier on the mean token are float. The default is the size of
    DeiT-S.

    Args:
        stage: "binary", or "float": the twin with float weights, float attention and GELU in the hidden layers.
        in_channels, num_classes, surrogate: as birealnet18.
        image_size: height and width of the images, a multiple of patch_size.
        patch_size: height and width of a token's pixels.
        width: of the stream, a multiple of heads; hidden layers have four times as much.
        depth: number of blocks.
        heads: of the attention.

    Returns:
        (N, in_channels, image_size, image_size) -> (N, num_classes).

    Raises:
        TypeError, ValueError: unknown stage or surrogate, sizes that do not divide or are not positive.

    Source:
        Touvron et al., "Training data-efficient image transformers", ICML 2021; binary linear layers as Qin et al.,
        "BiBERT", ICLR 2022, and Le and Li, "BinaryViT", CVPR workshops 2023, without their distillation.
    """
    sizes: dict[str, Any] = {
        "in_channels": in_channels, "num_classes": num_classes, "image_size": image_size, "patch_size": patch_size,
        "width": width, "depth": depth, "heads": heads,
    }
    check_network("binary_vit", stage, surrogate, **sizes)
    check_multiple("binary_vit", "image_size", image_size, patch_size)
    check_multiple("binary_vit", "width", width, heads)
    return VisionTransformer(stage, surrogate=surrogate, **sizes)
