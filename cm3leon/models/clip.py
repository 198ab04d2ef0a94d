"""The CLIP bi-encoder (Radford et al. 2021, arXiv 2103.00020) that retrieval, reranking and the CLIP score share.

It maps images and texts to unit vectors of one space. It is either pretrained open_clip weights (paper: ViT-B/32, frozen) or a small
open_clip model trained here (``training/clip.py``). Both are saved the same way, ``config.json`` + ``model.safetensors``
(+ ``tokenizer.json`` for a trained one), and load without network and without pickle.

Shapes: n texts or images, L token positions, W width of the text tower, d dimensions of the shared space.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cm3leon.config.schema import HEAD_WIDTH, EncoderConfig
from cm3leon.data.loading import Square, default_workers, image_batches
from cm3leon.data.manifest import ImageStore
from cm3leon.models.pixels import to_unit
from cm3leon.sequence.text_tokenizer import TextTokenizer
from cm3leon.utils import torchvision_compat
from cm3leon.utils.errors import ConfigError
from cm3leon.utils.files import read_file, read_json
from cm3leon.utils.imports import hidden
from cm3leon.utils.progress import progress

if TYPE_CHECKING:
    from PIL import Image

CONFIG, WEIGHTS = "config.json", "model.safetensors"
MADE_BY = "cm3leon encoder"
PAD = 0
BATCH = 128


class ClipTokenizer:
    """Byte-level BPE ids in the form of open_clip's text tower: ``<start> ids <end> <pad>...``, ``context_length`` in all.

    The tower pools at the highest id of a row, so ``<end>`` is the highest: pad is 0, text counts from 1, then come start and end.
    """

    def __init__(self, tokenizer: TextTokenizer, context_length: int) -> None:
        self.bpe, self.context_length = tokenizer, context_length
        self.start, self.end = tokenizer.size + 1, tokenizer.size + 2
        self.size = tokenizer.size + 3

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """int64 ``(n, context_length)``; longer texts are truncated before the end token."""
        rows = torch.full((len(texts), self.context_length), PAD)
        for row, ids in zip(rows, self.bpe.encode_many(list(texts)), strict=True):
            kept = [self.start, *(i + 1 for i in ids[: self.context_length - 2]), self.end]
            row[: len(kept)] = torch.tensor(kept)
        return rows


def build_clip(settings: dict[str, Any]) -> nn.Module:
    """A small open_clip model from the ``model`` section of a trained encoder's settings, initialized by torch's global generator."""
    torchvision_compat.make_importable()
    with hidden("transformers", "timm"):  # for towers that are not used here; their imports take a second
        from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    return CLIP(settings["embed_dim"], CLIPVisionCfg(**settings["vision"]), CLIPTextCfg(**settings["text"]))


def trained_settings(config: EncoderConfig, vocabulary: int) -> dict[str, Any]:
    """The settings of an encoder to be trained, as stored in ``config.json``."""
    vision: dict[str, Any] = {"image_size": config.image_size, "width": config.width, "head_width": HEAD_WIDTH}
    if config.image_tower == "resnet":
        vision["layers"] = [config.layers] * 4
    else:
        vision |= {"layers": config.layers, "patch_size": config.patch_size}
    text = {"context_length": config.context_length, "vocab_size": vocabulary, "width": config.text_width, "layers": config.text_layers}
    text["heads"] = config.text_width // HEAD_WIDTH
    model = {"embed_dim": config.embedding_dim, "vision": vision, "text": text}
    return {"kind": "trained", "image_size": config.image_size, "model": model}


def embed_pixels(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Unit vectors ``(n, d)`` of uint8 pixels ``(n, 3, size, size)``; for models trained here, which take pixels in [-1, 1]."""
    return model.encode_image(to_unit(pixels), normalize=True)  # type: ignore[operator]


def without_padding(ids_nL: torch.Tensor) -> torch.Tensor:
    """The positions up to the last that is not padding in every row: attention is causal, so the others have no effect."""
    return ids_nL[:, : int((ids_nL != PAD).sum(1).max())]


def embed_ids(model: nn.Module, ids_nL: torch.Tensor) -> torch.Tensor:
    """Unit vectors ``(n, d)`` of token ids, which may be :func:`without_padding`: the tower pools at the end token."""
    longest = ids_nL.shape[1]
    x_nLW = model.token_embedding(ids_nL) + model.positional_embedding[:longest]  # type: ignore[operator, index]
    x_nLW = model.ln_final(model.transformer(x_nLW, attn_mask=model.attn_mask[:longest, :longest]))  # type: ignore[operator, index]
    pooled_nW = x_nLW[torch.arange(len(x_nLW)), ids_nL.argmax(1)]
    return nn.functional.normalize(pooled_nW @ model.text_projection, dim=-1)


class Encoder:
    """Images and texts to unit vectors of one space. Made by :meth:`load`, :meth:`pretrained` or ``training.clip.train``."""

    def __init__(self, model: nn.Module, settings: dict[str, Any], tokenizer: Any, preprocess: Any = None) -> None:
        self.model = model.eval().requires_grad_(False)
        self.settings, self.tokenizer = settings, tokenizer
        self._preprocess = preprocess  # open_clip's image transform; None for models trained here
        self.device = next(model.parameters()).device

    @classmethod
    def pretrained(cls, architecture: str, weights: str) -> Encoder:
        """Published open_clip weights.

        Args:
            architecture: a name of open_clip, e.g. ``ViT-B-32``.
            weights: one of its tags for that architecture, e.g. ``laion2b_s34b_b79k`` (downloaded), or the path of a checkpoint.

        Raises:
            ConfigError: if open_clip has no such architecture, or ``weights`` is neither a tag nor a file, or was trained with another
                activation function.
        """
        torchvision_compat.make_importable()
        import open_clip

        if architecture not in open_clip.list_models():
            raise ConfigError(f"encoder.pretrained_model {architecture!r}: open_clip has no such architecture; see open_clip.list_models()")
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        if weights not in tags and not Path(weights).is_file():
            known = ", ".join(tags) or "none"
            raise ConfigError(f"encoder.pretrained_weights {weights!r}: neither a file nor a tag of {architecture}; tags: {known}")
        if weights in tags:
            _check_activation(architecture, weights)
        model, _, preprocess = open_clip.create_model_and_transforms(architecture, pretrained=weights)
        settings = {"kind": "pretrained", "architecture": architecture, "preprocess": _plain(open_clip.get_model_preprocess_cfg(model))}
        return cls(model, settings, open_clip.get_tokenizer(architecture), preprocess)

    @classmethod
    def load(cls, directory: str | Path) -> Encoder:
        """Read an encoder written by :meth:`save`.

        Raises:
            FileNotFoundError: if the directory holds none.
            DamagedFileError: if a file of it is truncated.
        """
        directory = Path(directory)
        for name in (CONFIG, WEIGHTS):
            if not (directory / name).is_file():
                raise FileNotFoundError(f"{directory / name}: no encoder here; run: {MADE_BY}")
        settings = read_file(directory / CONFIG, read_json, MADE_BY)
        if settings["kind"] == "trained":
            model: nn.Module = build_clip(settings["model"])
            tokenizer: Any = ClipTokenizer(TextTokenizer.load(directory), settings["model"]["text"]["context_length"])
            preprocess = None
        else:
            torchvision_compat.make_importable()
            import open_clip

            model = open_clip.create_model(settings["architecture"], pretrained=None, load_weights=False, pretrained_text=False)
            tokenizer = open_clip.get_tokenizer(settings["architecture"])
            preprocess = _transform(settings["preprocess"])
        model.load_state_dict(read_file(directory / WEIGHTS, load_file, MADE_BY))
        return cls(model, settings, tokenizer, preprocess)

    def save(self, directory: str | Path) -> None:
        """Write ``config.json``, ``model.safetensors`` and, for a trained encoder, ``tokenizer.json``."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / CONFIG).write_text(json.dumps(self.settings, indent=2, sort_keys=True) + "\n")
        save_file({name: tensor.contiguous().clone() for name, tensor in self.model.state_dict().items()}, directory / WEIGHTS)
        if isinstance(self.tokenizer, ClipTokenizer):
            self.tokenizer.bpe.save(directory)

    @property
    def dimensions(self) -> int:
        """Length of the vectors."""
        return self.encode_texts([""]).shape[1]

    @property
    def fingerprint(self) -> str:
        """16 hex digits, a hash of settings and weights: an index built with one encoder must not be searched with another."""
        digest = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def to(self, device: str | torch.device) -> Encoder:
        """Move the weights to a device; returns self. Vectors are NumPy arrays on any device."""
        self.model.to(device)
        self.device = torch.device(device)
        return self

    @torch.inference_mode()
    def encode_images(self, images: Sequence[Image.Image]) -> np.ndarray:
        """float32 ``(n, d)``, L2-normalized."""
        parts = (images[start : start + BATCH] for start in range(0, len(images), BATCH))
        batches = [self._embed(torch.stack([self.prepare(image) for image in part])) for part in parts]
        return np.concatenate(batches) if batches else np.zeros((0, self.dimensions), dtype=np.float32)

    def prepare(self, image: Image.Image) -> torch.Tensor:
        """What the model reads of an image: uint8 ``(size, size, 3)``, or what the pretrained model's own transformation gives."""
        if self._preprocess is None:
            return Square(self.settings["image_size"])(image)
        return self._preprocess(image.convert("RGB"))

    def _embed(self, prepared: torch.Tensor) -> np.ndarray:
        """Unit vectors of prepared images."""
        pixels = prepared.to(self.device, non_blocking=True)
        if self._preprocess is None:
            vectors = embed_pixels(self.model, pixels.permute(0, 3, 1, 2).contiguous())
        else:
            vectors = self.model.encode_image(pixels, normalize=True)  # type: ignore[operator]
        return vectors.float().cpu().numpy()

    @torch.inference_mode()
    def encode_refs(self, store: ImageStore, refs: Sequence[str], batch_size: int = BATCH) -> np.ndarray:
        """:meth:`encode_images` of stored images, of which few batches at a time are in memory; they are decoded ahead."""
        batches = []
        with progress("embedding images", len(refs), "images") as meter:
            for prepared in image_batches(store, refs, self.prepare, batch_size, default_workers(self.device)):
                batches.append(self._embed(prepared))
                meter.advance(len(prepared))
        return np.concatenate(batches) if batches else self.encode_images([])

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """float32 ``(n, d)``, L2-normalized. Texts longer than the tower's context are truncated."""
        batches = []
        for start in range(0, len(texts), BATCH):
            ids_nL = self.tokenizer(list(texts[start : start + BATCH]))
            if self._preprocess is None:
                vectors = embed_ids(self.model, without_padding(ids_nL).to(self.device))
            else:
                vectors = self.model.encode_text(ids_nL.to(self.device), normalize=True)  # type: ignore[operator]
            batches.append(vectors.float().cpu().numpy())
        return np.concatenate(batches) if batches else np.zeros((0, self.dimensions), dtype=np.float32)


def _check_activation(architecture: str, tag: str) -> None:
    """Raise ConfigError if the weights of the tag were trained with QuickGELU and the architecture has GELU.

    They would load, and every vector would be off. For these weights, such as OpenAI's, open_clip has the architectures ``…-quickgelu``.
    """
    import open_clip

    trained, built = open_clip.pretrained.get_pretrained_cfg(architecture, tag), open_clip.get_model_config(architecture)
    if trained.get("quick_gelu") and not built.get("quick_gelu"):
        raise ConfigError(
            f"encoder.pretrained_weights {tag!r} was trained with QuickGELU, which {architecture} does not have; "
            f"set encoder.pretrained_model={architecture}-quickgelu"
        )


def _plain(value: Any) -> Any:
    """Settings as JSON stores them, where tuples become lists: saved and loaded encoders then have the same fingerprint."""
    return json.loads(json.dumps(value))


def _transform(settings: dict[str, Any]) -> Any:
    """open_clip's evaluation transform from stored settings."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    known = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
    return image_transform_v2(PreprocessCfg(**known), is_train=False)
