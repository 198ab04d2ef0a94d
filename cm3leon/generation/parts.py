"""The parts of a generator: loading them, tokenizing texts, encoding and decoding images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from PIL import Image

from cm3leon.config.renamed import current_names
from cm3leon.config.schema import DecodingConfig, RetrieveConfig
from cm3leon.data.images import fit_square
from cm3leon.data.tokens import TokenStore
from cm3leon.generation.memory import Memory
from cm3leon.models.decoder import Decoder
from cm3leon.models.pixels import to_channels_first, to_pil
from cm3leon.models.vqgan import ImageTokenizer
from cm3leon.sequence.grammar import Tokens
from cm3leon.sequence.tasks import TASKS, Training
from cm3leon.sequence.text_tokenizer import TextTokenizer
from cm3leon.utils.device import default_device
from cm3leon.utils.files import read_file, read_json

if TYPE_CHECKING:
    from cm3leon.models.clip import Encoder
    from cm3leon.models.super_resolution import SuperResolution

BATCH = 64
"""Images encoded or decoded together."""

Precision = Literal["float32", "bfloat16", "int8"]


@dataclass
class Parts:
    """The loaded parts of a bundle.

    Attributes:
        decoding: the decoding defaults.
        encoder: ranks candidates and finds documents; None: neither.
        memory: the memory bank; None: no retrieval.
        super_resolution: the upscaler; None: no upscaling.
        training: the tasks that the decoder was trained for; None: unknown.
    """

    model: Decoder
    image_tokenizer: ImageTokenizer
    text_tokenizer: TextTokenizer
    decoding: DecodingConfig
    encoder: Encoder | None = None
    memory: Memory | None = None
    super_resolution: SuperResolution | None = None
    training: Training | None = None

    @property
    def image_size(self) -> int:
        """Side of generated images, pixels."""
        return self.image_tokenizer.spec.image_size

    @property
    def trained_tasks(self) -> frozenset[str]:
        """Instruction-tuning tasks that the model was trained for; all of them if that is unknown."""
        return self.training.tasks if self.training else frozenset(TASKS)

    def text_tokens(self, text: str) -> Tokens:
        """Token ids of a text."""
        return self.model.vocabulary.text(self.text_tokenizer.encode(text))

    def encode_images(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Codes (B, tokens_per_image) of images of any size; each is cropped and resized to the tokenizer's square."""
        batches = [np.zeros((0, self.model.vocabulary.tokens_per_image), np.int64)]
        for start in range(0, len(images), BATCH):
            pixels = np.stack([np.asarray(fit_square(image, self.image_size)) for image in images[start : start + BATCH]])
            batches.append(self.image_tokenizer.encode(to_channels_first(torch.from_numpy(pixels), self.model.device)).cpu().numpy())
        return np.concatenate(batches)

    def decode_images(self, codes: np.ndarray) -> list[Image.Image]:
        """Images of codes (B, tokens_per_image)."""
        batches = torch.from_numpy(codes).split(BATCH)
        return [image for batch in batches for image in to_pil(self.image_tokenizer.decode(batch.to(self.model.device)))]


def load_decoder(directory: Path, device: str | torch.device, precision: Precision | None, compiled: bool = False) -> Decoder:
    """A decoder to generate with.

    Args:
        precision: ``int8`` holds the blocks' matrices as 8-bit integers, and the rest in bfloat16 on a GPU, float32 on a CPU; by default
            bfloat16 on a GPU and float32 on a CPU.
        compiled: run each step of decoding compiled. Compilation takes from seconds to minutes, once for each number of rows and length;
            it pays on a GPU for a server or for many images, and hardly on a CPU.
    """
    # On its device only when it is as small as it will be: in float32 it may not fit there.
    model, on_gpu = Decoder.load(directory), torch.device(device).type != "cpu"
    model.compiled_decoding = compiled
    if precision == "bfloat16" or (on_gpu and precision != "float32"):
        model = model.bfloat16()
    if precision == "int8":
        model.quantize()
    if not compiled and not on_gpu:
        model.pack()
    return model.to(device)


def load_parts(
    *,
    model: Path,
    image_tokenizer: Path,
    text_tokenizer: Path,
    decoding: DecodingConfig,
    encoder: Path | None = None,
    memory_bank: Path | None = None,
    tokens: Path | None = None,
    super_resolution: Path | None = None,
    retrieval: RetrieveConfig | None = None,
    device: str | torch.device | None = None,
    precision: Precision | None = None,
    compiled: bool = False,
) -> Parts:
    """Load parts from the directories of the stages.

    Args:
        model: its ``training.json`` names the tasks that it was trained for; without one all tasks and guidance are allowed.
        encoder: without it there is no ranking by CLIP, and no retrieval.
        memory_bank, tokens: retrieval needs both.
        retrieval: rules of retrieval; None: the package's defaults.
        precision, compiled: see :func:`load_decoder`.
    """
    device = device or default_device()
    loaded_encoder, memory, upscaler = None, None, None
    if encoder is not None:
        from cm3leon.models.clip import Encoder

        loaded_encoder = Encoder.load(encoder).to(device)
    if loaded_encoder is not None and memory_bank is not None and tokens is not None:
        from cm3leon.retrieval.index import MemoryBank

        memory = Memory(MemoryBank.load(memory_bank), loaded_encoder, TokenStore(tokens), retrieval or RetrieveConfig())
    if super_resolution is not None:
        from cm3leon.models.super_resolution import SuperResolution

        upscaler = SuperResolution.load(super_resolution).to(device)
    return Parts(
        model=load_decoder(model, device, precision, compiled),
        image_tokenizer=ImageTokenizer.load(image_tokenizer, device),
        text_tokenizer=TextTokenizer.load(text_tokenizer),
        decoding=decoding,
        encoder=loaded_encoder,
        memory=memory,
        super_resolution=upscaler,
        training=Training.read(model),
    )


def load_bundle(path: Path, device: str | None = None, precision: Precision | None = None, compiled: bool = False) -> Parts:
    """Load the parts of a bundle directory; ``precision`` and ``compiled``: see :func:`load_decoder`.

    Raises:
        FileNotFoundError: if it is not one.
    """
    if not (path / "decoding.json").is_file():
        raise FileNotFoundError(f"{path} is not a bundle: it has no decoding.json")

    def settings(file: Path) -> Any:
        return read_file(file, read_json, "cm3leon register (or download the bundle anew)")

    decoding = current_names(settings(path / "decoding.json"), "decoding")
    upscaler, retrieval = path / "super_resolution", path / "retrieval.json"
    return load_parts(
        model=path,
        image_tokenizer=path / "image_tokenizer",
        text_tokenizer=path / "text_tokenizer",
        decoding=DecodingConfig.model_validate(decoding),
        encoder=path / "encoder",
        memory_bank=path / "memory_bank",
        tokens=path / "memory_bank" / "tokens",
        super_resolution=upscaler if upscaler.is_dir() else None,
        retrieval=RetrieveConfig.model_validate(settings(retrieval)) if retrieval.is_file() else None,
        device=device,
        precision=precision,
        compiled=compiled,
    )
