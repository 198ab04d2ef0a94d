"""A decoder with its tokenizers as a directory of ``transformers``, which reads it without this package.

    export_transformers(decoder, image_tokenizer, text_tokenizer, DecodingConfig(), Path("out"))
    # AutoModelForCausalLM.from_pretrained("out", trust_remote_code=True), AutoTokenizer.from_pretrained("out")

Every option of the decoder has its counterpart in the modeling files, which are copied next to the weights. ``transformers`` is not needed
here, and nothing is pickled.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import Tensor

from cm3leon.models.decoder import Decoder
from cm3leon.models.vqgan import ImageTokenizer
from cm3leon.sequence.grammar import BREAK, EOS, EOSS, PAD, SPECIALS, Vocabulary
from cm3leon.sequence.text_tokenizer import FILE as TOKENIZER
from cm3leon.sequence.text_tokenizer import TextTokenizer
from cm3leon.utils.errors import UserError

if TYPE_CHECKING:
    from cm3leon.config.schema import DecodingConfig

CONFIG, GENERATION_CONFIG, TOKENIZER_CONFIG = "config.json", "generation_config.json", "tokenizer_config.json"
WEIGHTS = "model.safetensors"
MODULES = ("configuration_cm3leon.py", "image_tokenizer_cm3leon.py", "modeling_cm3leon.py")
"""The files of this package that are copied into the directory; they import one another, torch and transformers."""

RENAMED = {"codebook.entries": "codebook.weight", "codebook.used": "used"}
"""Tensors of the image tokenizer that have another name in the export."""


class ExportError(UserError):
    """Parts of a model that do not belong together."""


def export_transformers(
    model: Decoder, image_tokenizer: ImageTokenizer, text_tokenizer: TextTokenizer, decoding: DecodingConfig, directory: Path
) -> None:
    """Write configurations, modeling files, weights and the text tokenizer, in the decoder's own precision.

    Args:
        decoding: whose temperature, top-k and top-p become the defaults of ``generate``.

    Raises:
        ExportError: if the tokenizers are not those of the decoder.
    """
    _check_parts(model.vocabulary, image_tokenizer, text_tokenizer)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    special = {"pad_token_id": PAD, "bos_token_id": EOS, "eos_token_id": [EOS, EOSS]}
    _write(directory / CONFIG, {**_config(model, image_tokenizer), **special})
    _write(directory / GENERATION_CONFIG, {**special, "max_new_tokens": model.vocabulary.tokens_per_image, **_sampling(decoding)})
    text_tokenizer.save(directory)
    _write(directory / TOKENIZER, _with_special_tokens(json.loads((directory / TOKENIZER).read_text()), model.vocabulary))
    _write(directory / TOKENIZER_CONFIG, _tokenizer_config(model.spec.context))
    for name in MODULES:
        shutil.copyfile(Path(__file__).with_name(name), directory / name)
    save_file(_weights(model, image_tokenizer), directory / WEIGHTS, metadata={"format": "pt"})


def _check_parts(vocabulary: Vocabulary, image_tokenizer: ImageTokenizer, text_tokenizer: TextTokenizer) -> None:
    spec = image_tokenizer.spec
    for what, found, needed in (
        ("text tokens", text_tokenizer.size, vocabulary.text_size),
        ("image codes", spec.codebook_size, vocabulary.image_size),
        ("tokens an image", spec.tokens_per_image, vocabulary.tokens_per_image),
    ):
        if found != needed:
            raise ExportError(
                f"the tokenizer has {found} {what} and the decoder {needed}; export a model with the tokenizers that it was trained with"
            )


def _config(model: Decoder, image_tokenizer: ImageTokenizer) -> dict[str, Any]:
    spec, vocabulary = model.spec, model.vocabulary
    return {
        "architectures": ["Cm3leonForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_cm3leon.Cm3leonConfig",
            "AutoModelForCausalLM": "modeling_cm3leon.Cm3leonForCausalLM",
        },
        "model_type": "cm3leon",
        "dtype": str(model.tokens.weight.dtype).removeprefix("torch."),
        "vocab_size": vocabulary.size,
        "hidden_size": spec.width,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "max_position_embeddings": spec.context,
        "initializer_range": spec.init_std,
        "tie_word_embeddings": True,
        "qk_norm": spec.qk_norm,
        "image_positions": spec.image_positions,
        "rope": spec.rope,
        "previous_token": spec.previous_token,
        "sentinels": vocabulary.sentinels,
        "reserved": vocabulary.reserved,
        "image_tokenizer": asdict(image_tokenizer.spec),
    }


def _sampling(decoding: DecodingConfig) -> dict[str, Any]:
    """Settings of ``generate``; a top-k of 0 is none, where without one ``transformers`` samples from 50 tokens."""
    if decoding.temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": decoding.temperature, "top_k": decoding.top_k or 0, "top_p": decoding.top_p}


def _weights(model: Decoder, image_tokenizer: ImageTokenizer) -> dict[str, Tensor]:
    """The tensors of both under the export's names; the output matrix is tied and not among them."""
    pictures = {f"image_tokenizer.{RENAMED.get(name, name)}": weight for name, weight in image_tokenizer.state_dict().items()}
    return {name: weight.detach().cpu().contiguous() for name, weight in (model.state_dict() | pictures).items()}


def _with_special_tokens(tokenizer: dict[str, Any], vocabulary: Vocabulary) -> dict[str, Any]:
    """``tokenizer.json`` with the ids of the whole vocabulary: special tokens, masks and image codes are added tokens."""
    names = [
        *SPECIALS,
        *(f"<mask:{number}>" for number in range(vocabulary.sentinels)),
        *(f"<reserved:{number}>" for number in range(vocabulary.reserved)),
        *(f"<image:{code}>" for code in range(vocabulary.image_size)),
    ]
    # No text token has such a name: byte-level BPE merges nothing across letters and punctuation.
    special = {name: id_ for id_, name in enumerate(names)}
    texts = {text: vocabulary.text_start + id_ for text, id_ in tokenizer["model"]["vocab"].items()}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": id_, "content": name, **plain} for name, id_ in special.items()]
    return {**tokenizer, "added_tokens": added, "model": {**tokenizer["model"], "vocab": special | texts}}


def _tokenizer_config(context: int) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": SPECIALS[PAD],
        "bos_token": SPECIALS[EOS],
        "eos_token": SPECIALS[EOS],
        "sep_token": SPECIALS[BREAK],
        "padding_side": "left",
        "model_max_length": context,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
