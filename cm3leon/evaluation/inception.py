"""The Inception network of published FIDs: its features of images, for the distances in ``fidelity.py``.

It is Inception v3 as TensorFlow released it in December 2015, which Heusel et al. 2017 used, with the weights that the project pytorch-fid
converted. torchvision's Inception v3 has the same layers but pools differently in nine blocks, and other weights.
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
"""Name of the weights file that pytorch-fid publishes; it ends with the first digits of the file's SHA-256."""

URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS}"
CACHE = Path(".cache/inception")

SIZE, DIMENSIONS, CLASSES = 299, 2048, 1008
BATCH = 32
AVERAGED = ("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e", "Mixed_7b")
MAXED = "Mixed_7c"


def fetch_weights() -> Path:
    """Path of the published weights, downloaded to :data:`CACHE` (92 MB) if missing, and checked against their hash.

    Raises:
        OSError, RuntimeError: if they cannot be fetched, or are not what was published.
    """
    path = CACHE / WEIGHTS
    if not path.is_file():
        CACHE.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(URL, str(path), hash_prefix=path.stem.rpartition("-")[2])
    return path


def average_pool(x: torch.Tensor) -> torch.Tensor:
    """3 x 3 average pooling of stride 1 that does not count padding, as in TensorFlow."""
    return avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def largest_pool(x: torch.Tensor) -> torch.Tensor:
    """3 x 3 maximum pooling of stride 1, which the 2015 network has in its last block where the paper has average pooling."""
    return max_pool2d(x, 3, stride=1, padding=1)


def _replace_pooling(block: nn.Module, pool: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Replace the pooling of a torchvision block: the input of its pooled branch becomes ``pool`` of the block's input."""
    held: list[torch.Tensor] = []

    def hold(block: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        held[:] = inputs

    def replace(branch: nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
        return pool(held.pop())

    block.register_forward_pre_hook(hold)
    block.get_submodule("branch_pool").register_forward_pre_hook(replace)


def build() -> nn.Module:
    """The network with torch's initial weights, classifier included, in evaluation mode; parameters are named as in :data:`WEIGHTS`."""
    torchvision_compat.make_importable()
    from torchvision.models.inception import Inception3

    network: nn.Module = Inception3(num_classes=CLASSES, aux_logits=False, init_weights=False)
    for name in AVERAGED:
        _replace_pooling(network.get_submodule(name), average_pool)
    _replace_pooling(network.get_submodule(MAXED), largest_pool)
    return network.eval().requires_grad_(False)


def to_input(image: Image.Image) -> torch.Tensor:
    """float32 ``(1, 3, 299, 299)`` in [-1, 1] of an image of any size and mode (see :func:`~cm3leon.data.images.to_rgb`).

    Bilinear and not antialiased, as pytorch-fid resizes: larger images alias. The aspect ratio is not kept.
    """
    pixels = torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1)[None].float() / 255
    return 2 * interpolate(pixels, size=(SIZE, SIZE), mode="bilinear", align_corners=False) - 1


class Inception:
    """Images to the 2048 features of FID and KID; made by :meth:`load`."""

    def __init__(self, network: nn.Module, fingerprint: str) -> None:
        """Use a network of :func:`build` without its classifier."""
        network.fc = nn.Identity()
        self.network, self.fingerprint = network, fingerprint
        self.device = next(network.parameters()).device

    @classmethod
    def load(cls, path: str | Path) -> Inception:
        """Read published weights, :data:`WEIGHTS` or the same tensors in a ``.safetensors`` file. No pickled code is run.

        ``fingerprint`` becomes the first 16 hex digits of the file's SHA-256; the published file's begin with 6726825d.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file cannot be read, or holds other tensors than the network has.
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
        """Move the weights; features are always returned as NumPy arrays."""
        self.network.to(device)
        self.device = torch.device(device)
        return self

    @torch.inference_mode()
    def encode_images(self, images: Sequence[Image.Image], batch_size: int = BATCH) -> np.ndarray:
        """float32 ``(n, 2048)``, the means over all positions of the last block's output, in the order of ``images``.

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
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path}: no readable weights file: {error}") from error
    if not isinstance(weights, Mapping) or not all(isinstance(tensor, torch.Tensor) for tensor in weights.values()):
        raise ValueError(f"{path}: must hold tensors by name, as {WEIGHTS} does")
    return dict(weights)


def _check(path: Path, weights: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Refuse weights of another network; batch counters of the norms may be missing, as inference does not use them."""
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
