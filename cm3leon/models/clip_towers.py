"""The towers of CLIP (Radford et al. 2021, arXiv 2103.00020, section 2.4): a ResNet or a ViT for images, a transformer for texts.

These are the encoders that are trained here. Parameters have the names of open_clip 3.3, and the same seed initializes the same weights,
so that encoders trained with open_clip's classes load. open_clip itself is needed for published weights only: its import takes two seconds,
more than generating a small image does.

Shapes: n texts or images, L positions, W width, d dimensions of the shared space.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

RESNET_EXPANSION = 4
"""A bottleneck's output is this many times as wide as its inside."""
RESNET_STRIDE = 32
"""Pixels of a side for each position of a ResNet's last stage; also its channels there, as a multiple of the first stage's width."""


class CLIP(nn.Module):
    """Both towers and the temperature.

    Args:
        settings: ``embed_dim``; ``vision`` with ``image_size``, ``width``, ``head_width``, ``layers`` (a list of four for a ResNet) and
            ``patch_size`` (of a ViT); ``text`` with ``context_length``, ``vocab_size``, ``width``, ``heads`` and ``layers``.
    """

    attn_mask: torch.Tensor

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        vision, text, dimensions = settings["vision"], settings["text"], settings["embed_dim"]
        tower = ResNet if isinstance(vision["layers"], list) else VisionTransformer
        self.visual = tower(dimensions=dimensions, **vision)
        width, length = text["width"], text["context_length"]
        tokens = nn.Embedding(text["vocab_size"], width)  # before the transformer: the order of initialization is part of a seed's meaning
        self.transformer = Transformer(width, text["layers"], text["heads"])
        self.token_embedding = tokens
        self.positional_embedding = nn.Parameter(torch.empty(length, width))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, dimensions))
        self.register_buffer("attn_mask", torch.full((length, length), -math.inf).triu(1), persistent=False)
        self._initialize_text(width, text["layers"])
        self.logit_scale = nn.Parameter(torch.ones([]) * math.log(1 / 0.07))

    def _initialize_text(self, width: int, layers: int) -> None:
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        output_std = width**-0.5 * (2 * layers) ** -0.5
        stds = {"attn.in_proj_weight": width**-0.5, "attn.out_proj.weight": output_std}
        stds |= {"mlp.c_fc.weight": (2 * width) ** -0.5, "mlp.c_proj.weight": output_std}
        for block in self.transformer.resblocks:
            for name, std in stds.items():
                nn.init.normal_(block.get_parameter(name), std=std)
        nn.init.normal_(self.text_projection, std=width**-0.5)

    def encode_image(self, images_n3HW: torch.Tensor) -> torch.Tensor:
        """Unit vectors ``(n, d)`` of pixels in the range that the tower was trained with."""
        return F.normalize(self.visual(images_n3HW), dim=-1)

    def encode_text(self, ids_nL: torch.Tensor) -> torch.Tensor:
        """Unit vectors ``(n, d)`` of token ids of any length up to the context; pooled at each row's highest id, the end token."""
        length = ids_nL.shape[1]
        x_nLW = self.token_embedding(ids_nL) + self.positional_embedding[:length]
        x_nLW = self.ln_final(self.transformer(x_nLW, self.attn_mask[:length, :length]))
        pooled_nW = x_nLW[torch.arange(len(x_nLW)), ids_nL.argmax(1)]
        return F.normalize(pooled_nW @ self.text_projection, dim=-1)


# --- transformers ----------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        layers = [("c_fc", nn.Linear(width, 4 * width)), ("gelu", nn.GELU()), ("c_proj", nn.Linear(4 * width, width))]
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x_nLW: torch.Tensor, mask_LL: torch.Tensor | None = None) -> torch.Tensor:
        normed_nLW = self.ln_1(x_nLW)
        x_nLW = x_nLW + self.attn(normed_nLW, normed_nLW, normed_nLW, need_weights=False, attn_mask=mask_LL)[0]
        return x_nLW + self.mlp(self.ln_2(x_nLW))


class Transformer(nn.Module):
    """Blocks in turn."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList([Block(width, heads) for _ in range(layers)])

    def forward(self, x_nLW: torch.Tensor, mask_LL: torch.Tensor | None = None) -> torch.Tensor:
        for block in self.resblocks:
            x_nLW = block(x_nLW, mask_LL)
        return x_nLW


class VisionTransformer(nn.Module):
    """ViT (Dosovitskiy et al. 2020) with a layer norm before the blocks; the class token is the image's vector."""

    def __init__(self, *, image_size: int, patch_size: int, width: int, head_width: int, layers: int, dimensions: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch_size, patch_size, bias=False)
        self.class_embedding = nn.Parameter(width**-0.5 * torch.randn(width))
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn((image_size // patch_size) ** 2 + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, width // head_width)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(width**-0.5 * torch.randn(width, dimensions))

    def forward(self, images_n3HW: torch.Tensor) -> torch.Tensor:
        patches_nLW = self.conv1(images_n3HW).flatten(2).transpose(1, 2)
        x_nLW = torch.cat([self.class_embedding.expand(len(patches_nLW), 1, -1), patches_nLW], dim=1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x_nLW)))[:, 0] @ self.proj


# --- ResNet ----------------------------------------------------------------------------------------------------------


class Bottleneck(nn.Module):
    """A residual block whose stride is an average pooling after the second convolution, against aliasing."""

    def __init__(self, channels_in: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        channels_out = channels * RESNET_EXPANSION
        self.conv1 = nn.Conv2d(channels_in, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(channels, channels_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels_out)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or channels_in != channels_out:
            convolution = nn.Conv2d(channels_in, channels_out, 1, bias=False)
            layers = [("-1", nn.AvgPool2d(stride)), ("0", convolution), ("1", nn.BatchNorm2d(channels_out))]
            self.downsample = nn.Sequential(OrderedDict(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inside = F.relu(self.bn1(self.conv1(x)))
        inside = self.avgpool(F.relu(self.bn2(self.conv2(inside))))
        return F.relu(self.bn3(self.conv3(inside)) + self.downsample(x))


class AttentionPool(nn.Module):
    """One attention over the positions of the last stage; the image's vector is the one of their mean."""

    def __init__(self, positions: int, width: int, heads: int, dimensions: int) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(positions + 1, width) / width**0.5)
        self.k_proj, self.q_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.c_proj = nn.Linear(width, dimensions)
        self.heads = heads

    def initialize(self) -> None:
        """Weights for its width, drawn in the order that CLIP has."""
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.c_proj):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)

    def forward(self, x_nWHW: torch.Tensor) -> torch.Tensor:
        x_LnW = x_nWHW.flatten(2).permute(2, 0, 1)
        x_LnW = torch.cat([x_LnW.mean(0, keepdim=True), x_LnW]) + self.positional_embedding[:, None]
        pooled, _ = F.multi_head_attention_forward(
            query=x_LnW,
            key=x_LnW,
            value=x_LnW,
            embed_dim_to_check=x_LnW.shape[-1],
            num_heads=self.heads,
            q_proj_weight=self.q_proj.weight,
            k_proj_weight=self.k_proj.weight,
            v_proj_weight=self.v_proj.weight,
            in_proj_weight=None,
            in_proj_bias=torch.cat([self.q_proj.bias, self.k_proj.bias, self.v_proj.bias]),
            bias_k=None,
            bias_v=None,
            add_zero_attn=False,
            dropout_p=0.0,
            out_proj_weight=self.c_proj.weight,
            out_proj_bias=self.c_proj.bias,
            use_separate_proj_weight=True,
            training=self.training,
            need_weights=False,
        )
        return pooled[0]


class ResNet(nn.Module):
    """ResNet-D (He et al. 2018) with a stem of three convolutions and attention pooling."""

    def __init__(self, *, image_size: int, width: int, head_width: int, layers: list[int], dimensions: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        channels = width
        stages = []
        for number, blocks in enumerate(layers):
            inside, stride = width * 2**number, 2 if number else 1
            first = Bottleneck(channels, inside, stride)
            stages.append(nn.Sequential(first, *(Bottleneck(inside * RESNET_EXPANSION, inside) for _ in range(1, blocks))))
            channels = inside * RESNET_EXPANSION
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.attnpool = AttentionPool((image_size // RESNET_STRIDE) ** 2, channels, channels // head_width, dimensions)
        self.attnpool.initialize()
        for name, parameter in nn.ModuleList(stages).named_parameters():
            if name.endswith("bn3.weight"):  # blocks start as identities
                nn.init.zeros_(parameter)

    def forward(self, images_n3HW: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(images_n3HW)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.avg_pool2d(F.relu(self.bn3(self.conv3(x))), 2)
        return self.attnpool(self.layer4(self.layer3(self.layer2(self.layer1(x)))))
