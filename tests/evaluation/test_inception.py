"""FID's Inception: published names and shapes, pooling and resizing against loops, and files that are refused.

The weights are random: the published ones are not needed to test what surrounds them.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from cm3leon.evaluation.inception import AVERAGED, Inception, build, to_input
from cm3leon.utils import torchvision_compat

PUBLISHED_BYTES = 95_628_359  # size of the published file


def make_image(width: int = 75, height: int = 75, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, size=(height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """One thread: with busy cores the many small operations would mostly wait for threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """Random weights scaled such that activations keep their magnitude through all layers."""
    generator = torch.Generator().manual_seed(0)
    tensors = build().state_dict()
    for name, tensor in tensors.items():
        if name.endswith("conv.weight"):
            tensor.normal_(std=math.sqrt(2 / tensor[0].numel()), generator=generator)
        elif name.endswith(("bn.weight", "bn.running_var")):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif name.endswith(("bn.bias", "bn.running_mean")):
            tensor.normal_(std=0.1, generator=generator)
    return tensors


@pytest.fixture(scope="module")
def path(weights: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(weights, path)
    return path


@pytest.fixture(scope="module")
def inception(path: Path) -> Inception:
    return Inception.load(path)


def test_names_and_shapes_are_the_published_ones(weights: dict[str, torch.Tensor]) -> None:
    torchvision_compat.make_importable()
    from torchvision.models import Inception3

    with torch.device("meta"):
        reference = Inception3(num_classes=1008, aux_logits=True, init_weights=False).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in reference.items() if not name.startswith("AuxLogits.")}
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == shapes
    assert len(weights) == 94 * 6 + 2 and shapes["fc.weight"] == (1008, 2048)
    overhead = PUBLISHED_BYTES - sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    assert 0 < overhead < 200 * len(weights)


def pooled_by_loop(x: np.ndarray, pool: Callable[..., np.ndarray]) -> np.ndarray:
    """3 x 3 windows clipped at the border, one at a time."""
    height, width = x.shape[-2:]
    result = np.empty_like(x)
    for i in range(height):
        for j in range(width):
            result[..., i, j] = pool(x[..., max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2], axis=(-2, -1))
    return result


@pytest.mark.parametrize("name", [*AVERAGED, "Mixed_7c"])
def test_pooling(inception: Inception, name: str) -> None:
    block = inception.network.get_submodule(name)
    x = torch.randn(1, block.branch_pool.conv.in_channels, 4, 5, generator=torch.Generator().manual_seed(1))
    pooled = torch.from_numpy(pooled_by_loop(x.numpy(), np.max if name == "Mixed_7c" else np.mean))
    output = block(x)
    branch = block.branch_pool.bn(block.branch_pool.conv(pooled)).relu()
    torch.testing.assert_close(output[:, -branch.shape[1] :], branch, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output[:, : block.branch1x1.conv.out_channels], block.branch1x1(x))


def test_reductions_pool_as_torchvision_does(inception: Inception) -> None:
    for name, channels in (("Mixed_6a", 288), ("Mixed_7a", 768)):
        x = torch.randn(1, channels, 5, 7, generator=torch.Generator().manual_seed(1))
        output = inception.network.get_submodule(name)(x)
        assert torch.equal(output[:, -channels:], torch.nn.functional.max_pool2d(x, 3, stride=2))


def resized_by_axis(values: np.ndarray, size: int) -> np.ndarray:
    """Linear interpolation along the first axis between the two nearest pixel centers, whatever the reduction."""
    length = len(values)
    positions = np.clip((np.arange(size) + 0.5) * length / size - 0.5, 0, length - 1)
    below = np.floor(positions).astype(int)
    share = (positions - below)[:, None, None]
    return values[below] * (1 - share) + values[np.minimum(below + 1, length - 1)] * share


@pytest.mark.parametrize("size", [(75, 75), (64, 120), (700, 450)])
def test_resizing_is_bilinear_without_antialiasing(size: tuple[int, int]) -> None:
    image = make_image(*size)
    rows = resized_by_axis(np.asarray(image) / 255, 299)
    expected = 2 * resized_by_axis(rows.transpose(1, 0, 2), 299).transpose(2, 1, 0) - 1
    np.testing.assert_allclose(to_input(image)[0].numpy(), expected, rtol=0, atol=1e-4)


def test_images_of_the_right_size_are_only_scaled() -> None:
    image = make_image(299, 299)
    np.testing.assert_allclose(to_input(image)[0].numpy(), np.asarray(image).transpose(2, 0, 1) / 127.5 - 1, rtol=0, atol=1e-6)
    gray = image.convert("L")
    assert torch.equal(to_input(gray), to_input(gray.convert("RGB")))


def test_features_are_means_of_the_last_block(inception: Inception) -> None:
    seen: list[torch.Tensor] = []
    handle = inception.network.get_submodule("Mixed_7c").register_forward_hook(lambda block, inputs, output: seen.append(output))
    features = inception.encode_images([make_image()])
    handle.remove()
    assert features.shape == (1, 2048) and features.dtype == np.float32 and seen[0].shape == (1, 2048, 8, 8)
    np.testing.assert_allclose(features, seen[0].double().mean(dim=(2, 3)).numpy(), rtol=1e-5, atol=1e-6)
    assert features.min() >= 0 and features.std() > 0.01


def test_features_do_not_depend_on_the_batch(inception: Inception) -> None:
    images = [make_image(seed=1), make_image(90, 60, seed=2)]
    together = inception.encode_images(images)
    assert np.abs(together[0] - together[1]).max() > 0.01
    np.testing.assert_allclose(inception.encode_images(images[::-1], batch_size=1)[::-1], together, rtol=1e-4, atol=1e-5)
    assert inception.encode_images([]).shape == (0, 2048)
    with pytest.raises(ValueError, match="batch_size"):
        inception.encode_images(images, batch_size=0)


def test_fingerprint_is_the_digest_of_the_file(inception: Inception, path: Path) -> None:
    assert inception.fingerprint == hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def test_safetensors_without_counters_load_too(inception: Inception, weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({name: tensor for name, tensor in weights.items() if not name.endswith("num_batches_tracked")}, path)
    loaded = Inception.load(path)
    assert loaded.fingerprint != inception.fingerprint
    expected = inception.network.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.network.state_dict().items())


def test_a_missing_file_is_an_error_that_names_the_published_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"pt_inception-2015-12-05-6726825d\.pth .* pytorch-fid"):
        Inception.load(tmp_path / "weights.pth")


def test_weights_of_another_network_are_refused(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    other = {name: tensor for name, tensor in weights.items() if not name.startswith("fc.")} | {"head": torch.zeros(1)}
    torch.save(other, path)
    with pytest.raises(ValueError, match=r"2 tensors missing \['fc.bias', 'fc.weight'\], 1 unexpected \['head'\]"):
        Inception.load(path)
    torch.save(weights | {"fc.bias": torch.zeros(1000)}, path)
    with pytest.raises(ValueError, match=r"fc.bias must have shape \(1008,\), found \(1000,\)"):
        Inception.load(path)


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_a_file_without_weights_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    for data in (b"", b"<html>not found</html>", b"PK\x03\x04 cut off"):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=f"{name}: no readable weights file"):
            Inception.load(path)


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"fc.weight": torch.nn.Linear(2, 2)}, path)
    with pytest.raises(ValueError, match="no readable weights file"):
        Inception.load(path)
    torch.save([torch.zeros(1)], path)
    with pytest.raises(ValueError, match="must hold tensors by name"):
        Inception.load(path)
