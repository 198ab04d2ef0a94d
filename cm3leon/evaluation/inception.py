"""The Inception network with which published FIDs are computed: features of images for the distances in ``fidelity.py``.

It is the Inception v3 that TensorFlow released in December 2015 and Heusel et al. 2017 used, with the weights as the project pytorch-fid
converted them. torchvision's Inception v3 has the same layers, but other weights and another pooling in nine blocks.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import avg_pool2d, interpolate, max_pool2d

from cm3leon.data.images import to_rgb
from cm3leon.utils import torchvision_compat

WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"
"""The weights file that pytorch-fid publishes; its name ends with the first digits of its SHA-256."""

URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS}"
CACHE = Path(".cache/inception")

SIZE, DIMENSIONS, CLASSES = 299, 2048, 1008
"""Side of the input, pixels; width of the features; classes of the classifier, which is not used."""
BATCH = 32
AVERAGED = ("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e", "Mixed_7b")
MAXED = "Mixed_7c"
"""Blocks whose pooling is not torchvision's: a mean without padding, and a maximum."""


def fetch_weights() -> Path:
    """Path of the published weights in :data:`CACHE`; downloaded (92 MB) if they are not there, and checked against their hash.

    Raises:
        OSError, RuntimeError: if they cannot be downloaded, or have another hash.
    """
    path = CACHE / WEIGHTS
    if not path.is_file():
        CACHE.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(URL, str(path), hash_prefix=path.stem.rpartition("-")[2])
    return path


def average_pool(x: torch.Tensor) -> torch.Tensor:
    """3 x 3 mean of stride 1 that does not count padding, as in TensorFlow: (B, C, H, W) to the same shape."""
    return avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def largest_pool(x: torch.Tensor) -> torch.Tensor:
    """3 x 3 maximum of stride 1, which the 2015 network has in its last block, where the paper has a mean: (B, C, H, W) likewise."""
    return max_pool2d(x, 3, stride=1, padding=1)


def _replace_pooling(block: nn.Module, pool: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Give a torchvision block another pooling.

    torchvision pools in the block's ``forward``, which cannot be replaced by itself. So one hook keeps the block's input, and another
    replaces the input of the pooled branch with ``pool`` of it.
    """
    held: list[torch.Tensor] = []

    def hold(block: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        held[:] = inputs

    def replace(branch: nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
        return pool(held.pop())

    block.register_forward_pre_hook(hold)
    block.get_submodule("branch_pool").register_forward_pre_hook(replace)


def build() -> nn.Module:
    """The network with random weights, with its classifier, in evaluation mode; parameters have the names of :data:`WEIGHTS`."""
    torchvision_compat.make_importable()
    from torchvision.models.inception import Inception3

    network: nn.Module = Inception3(num_classes=CLASSES, aux_logits=False, init_weights=False)
    for name in AVERAGED:
        _replace_pooling(network.get_submodule(name), average_pool)
    _replace_pooling(network.get_submodule(MAXED), largest_pool)
    return network.eval().requires_grad_(False)


def to_input(image: Image.Image) -> torch.Tensor:
    """Resize an image of any size and mode (:func:`~cm3leon.data.images.to_rgb`) to float32 ``(1, 3, 299, 299)`` in [-1, 1].

    As in pytorch-fid it is bilinear without antialiasing, so larger images alias, and the aspect ratio is not kept.
    """
    pixels = torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1)[None].float() / 255
    return 2 * interpolate(pixels, size=(SIZE, SIZE), mode="bilinear", align_corners=False) - 1


class Inception:
    """Computes the 2,048 features of images on which FID and KID are defined. Use :meth:`load`."""

    def __init__(self, network: nn.Module, fingerprint: str) -> None:
        """Wrap a network of :func:`build` without its classifier."""
        network.fc = nn.Identity()
        self.network, self.fingerprint = network, fingerprint
        self.device = next(network.parameters()).device

    @classmethod
    def load(cls, path: str | Path) -> Inception:
        """Load the published weights, from :data:`WEIGHTS` or from a ``.safetensors`` file of the same tensors. No pickled code is run.

        ``fingerprint`` is the first 16 hex digits of the file's SHA-256; that of the published file begins with 6726825d.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file cannot be read, or its tensors are not those of the network.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: no Inception weights here; {WEIGHTS} is in the release fid_weights of the project pytorch-fid"
            )
        weights, network = _read(path), build()
        _check(path, weights, network.state_dict())
        network.load_state_dict(weights)
        with path.open("rb") as file:
            return cls(network, hashlib.file_digest(file, "sha256").hexdigest()[:16])

    def to(self, device: str | torch.device) -> Inception:
        """Move the weights to a device; features are returned as NumPy arrays in any case."""
        self.network.to(device)
        self.device = torch.device(device)
        return self

    @torch.inference_mode()
    def encode_images(self, images: Sequence[Image.Image], batch_size: int = BATCH) -> np.ndarray:
        """Features of images, float32 ``(n, 2048)``: the last block's output averaged over all positions.

        Computed in full float32 precision: TensorFloat-32, torch's default for convolutions on a GPU, is off.

        Raises:
            ValueError: for a ``batch_size`` under 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, found {batch_size}")
        features = np.empty((len(images), DIMENSIONS), dtype=np.float32)
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            for start in range(0, len(images), batch_size):
                batch = torch.cat([to_input(image) for image in images[start : start + batch_size]])
                features[start : start + len(batch)] = self.network(batch.to(self.device)).cpu().numpy()
        return features


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # A .pth file is a pickle; weights_only refuses anything but tensors and plain containers.
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path}: no readable weights file: {error}") from error
    if not isinstance(weights, Mapping) or not all(isinstance(tensor, torch.Tensor) for tensor in weights.values()):
        raise ValueError(f"{path}: must hold tensors by name, as {WEIGHTS} does")
    return dict(weights)


def _check(path: Path, weights: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Raise ValueError for weights of another network; counters of training batches may be missing, as inference does not use them."""
    missing = sorted(name for name in expected.keys() - weights.keys() if not name.endswith("num_batches_tracked"))
    unexpected = sorted(weights.keys() - expected.keys())
    if missing or unexpected:
        raise ValueError(
            f"{path}: not the weights of FID's Inception ({WEIGHTS}): "
            f"{len(missing)} tensors missing {missing[:3]}, {len(unexpected)} unexpected {unexpected[:3]}"
        )
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(f"{path}: {name} must have shape {tuple(expected[name].shape)}, found {tuple(tensor.shape)}")
