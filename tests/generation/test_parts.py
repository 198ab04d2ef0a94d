"""Loading the parts of a generator."""

from pathlib import Path

import pytest
import torch
from tests_support import decoder_spec
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cm3leon.generation.parts import Precision, load_decoder
from cm3leon.models.decoder import Decoder, PackedLinear
from cm3leon.sequence.grammar import Vocabulary


class BytesOnMeta(TorchDispatchMode):
    """Bytes an element of every tensor that operations return on the device ``meta``, while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        self.sizes |= {leaf.element_size() for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor) and leaf.is_meta}
        return found


@pytest.mark.parametrize(("precision", "sizes"), [(None, {2}), ("bfloat16", {2}), ("int8", {1, 2}), ("float32", {4})])
def test_a_decoder_is_on_its_device_only_in_its_own_precision(tmp_path: Path, precision: Precision | None, sizes: set[int]) -> None:
    """In float32 one of 7B takes 27 GB. The device ``meta`` stands for a GPU."""
    Decoder(decoder_spec(2, 32, 2, 80, rope=True), Vocabulary(100, 50, 8, 16)).save(tmp_path)
    with BytesOnMeta() as seen:
        model = load_decoder(tmp_path, "meta", precision)
    assert seen.sizes == sizes and model.device.type == "meta" and not model.training


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")
@pytest.mark.parametrize("precision", [None, "float32", "bfloat16", "int8"])
@pytest.mark.parametrize(("slow_mkl", "compiled"), [(True, False), (True, True), (False, False)])
def test_matrices_are_packed_where_prefers_onednn(
    tmp_path: Path, precision: Precision | None, slow_mkl: bool, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 alone, and not for compiled decoding, which lays them out itself."""
    monkeypatch.setattr("cm3leon.models.kernels.prefers_onednn", lambda: slow_mkl)
    Decoder(decoder_spec(1, 128, 2, 80), Vocabulary(100, 50, 8, 16)).save(tmp_path)
    packed = any(isinstance(module, PackedLinear) for module in load_decoder(tmp_path, "cpu", precision, compiled).modules())
    assert packed == (slow_mkl and not compiled and precision in (None, "float32"))
