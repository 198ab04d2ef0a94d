"""The adversarial and perceptual losses of the image tokenizer.

Shapes: B batch, C channels, H W pixels, h w positions of a feature map.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """PatchGAN of three strided convolutions (Isola et al. 2017, arXiv 1611.07004): images (B, 3, H, W) to logits (B, 1, H / 8, W / 8).

    Each logit says whether its patch of the image is real (positive) or a reconstruction (negative).
    """

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        previous = 3
        for width in (channels, 2 * channels, 4 * channels):
            layers += [nn.Conv2d(previous, width, 4, stride=2, padding=1), nn.GroupNorm(4, width), nn.LeakyReLU(0.2)]
            previous = width
        self.layers = nn.Sequential(*layers, nn.Conv2d(previous, 1, 3, padding=1))

    def forward(self, images_B3HW: Tensor) -> Tensor:
        return self.layers(images_B3HW)


def hinge_loss(discriminator: nn.Module, images: Tensor, reconstructions: Tensor) -> Tensor:
    """The discriminator's loss: ``(mean(max(0, 1 - D(x))) + mean(max(0, 1 + D(x_hat)))) / 2`` (arXiv 1705.02894)."""
    real, fake = discriminator(images), discriminator(reconstructions)
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())


def last_layer_gradients(reconstruction_loss: Tensor, generator_loss: Tensor, last_layer: Tensor) -> Tensor:
    """The gradients of both losses at the decoder's last layer L, stacked: (2, ...). The losses' graph is kept."""
    losses = (reconstruction_loss, generator_loss)
    return torch.stack([torch.autograd.grad(loss, last_layer, retain_graph=True)[0] for loss in losses])


def adaptive_weight(reconstruction_gradient: Tensor, generator_gradient: Tensor) -> Tensor:
    """Weight that gives both losses gradients of the same norm at the decoder's last layer L (arXiv 2012.09841, equation 7).

    ``|d reconstruction_loss / d L| / (|d generator_loss / d L| + 1e-4)``, at most 10^4.
    """
    return (reconstruction_gradient.norm() / (generator_gradient.norm() + 1e-4)).clamp(0, 1e4)


class PerceptualLoss(nn.Module):
    """Squared difference of channel-normalized VGG-16 features at five depths: LPIPS (arXiv 1801.03924) without its learned weights."""

    DEPTHS = (3, 8, 15, 22, 29)
    """Indices of the last ReLU of each of VGG's five blocks."""

    def __init__(self, weights: Path | None) -> None:
        """``weights``: of torchvision's VGG-16, safetensors or a weights-only .pth; None: random ones, which teach nothing."""
        super().__init__()
        from cm3leon.utils.torchvision_compat import make_importable

        make_importable()
        from torchvision.models import vgg16

        network = vgg16(weights=None).features
        if weights is not None:
            state = load_file(weights) if weights.suffix == ".safetensors" else torch.load(weights, weights_only=True, map_location="cpu")
            network.load_state_dict({k.removeprefix("features."): v for k, v in state.items() if not k.startswith("classifier")})
        self.network = network.eval().requires_grad_(False)
        # Mean and standard deviation of ImageNet's pixels, by which VGG's input is normalized.
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))

    def features(self, images_B3HW: Tensor) -> list[Tensor]:
        """Features (B, C, h, w) at each depth, of length 1 over the channels, of images in [-1, 1]."""
        x = (images_B3HW * 0.5 + 0.5 - self.get_buffer("mean")) / self.get_buffer("std")
        kept = []
        for depth, layer in enumerate(self.network):
            x = layer(x)
            if depth in self.DEPTHS:
                kept.append(F.normalize(x, dim=1))
        return kept

    def forward(self, images_B3HW: Tensor, reconstructions_B3HW: Tensor) -> Tensor:
        pairs = zip(self.features(images_B3HW), self.features(reconstructions_B3HW), strict=True)
        return torch.stack([(a - b).square().sum(1).mean() for a, b in pairs]).sum()
