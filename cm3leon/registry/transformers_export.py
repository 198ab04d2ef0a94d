"""A model as a directory for ``transformers``: what :mod:`cm3leon.models.transformers_export.export` writes, and its ``README.md``.

The README says how to prompt. Of a bundle it also has the model card, and the list of the training documents lies next to it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from string import Template

from cm3leon.config.renamed import current_names
from cm3leon.config.schema import DecodingConfig
from cm3leon.evaluation.record import Record
from cm3leon.models import transformers_export
from cm3leon.models.decoder import Decoder
from cm3leon.models.transformers_export.export import export_transformers
from cm3leon.models.vqgan import ImageTokenizer
from cm3leon.registry.bundle import LINEAGE, TRAINING_DATA
from cm3leon.registry.model_card import card_sections
from cm3leon.registry.release import facts
from cm3leon.sequence.tasks import BLANK, BREAK, IMAGE, TASKS, Training
from cm3leon.sequence.text_tokenizer import TextTokenizer
from cm3leon.utils.files import read_file, read_json

README = "README.md"
TEMPLATES = Path(transformers_export.__file__).parent


def export_model(model: Decoder, source: Path, directory: Path) -> None:
    """Export a decoder with the tokenizers of its bundle; of a stage's directory (``models/finetuned``), with those next to it.

    Raises:
        FileNotFoundError: if a tokenizer is missing.
        ExportError: if the tokenizers are not those of the decoder.
    """
    image_tokenizer = ImageTokenizer.load(_part(source, "image_tokenizer"))
    text_tokenizer = TextTokenizer.load(_part(source, "text_tokenizer"))
    decoding = _decoding(source)
    export_transformers(model, image_tokenizer, text_tokenizer, decoding, directory)
    (directory / README).write_text(_readme(model, image_tokenizer, decoding, source))
    if (source / TRAINING_DATA).is_file():
        shutil.copyfile(source / TRAINING_DATA, directory / TRAINING_DATA)


def _part(source: Path, name: str) -> Path:
    for directory in (source / name, source.parent / name):
        if directory.is_dir():
            return directory
    raise FileNotFoundError(
        f"{source} has no {name}/, and there is none next to it; the export needs it: give --model a bundle, a registered model "
        "(models:/cm3leon@champion) or models/finetuned"
    )


def _decoding(source: Path) -> DecodingConfig:
    """The decoding defaults of a bundle; of any other directory the package's."""
    path = source / "decoding.json"
    if not path.is_file():
        return DecodingConfig()
    return DecodingConfig.model_validate(current_names(read_file(path, read_json, "cm3leon register"), "decoding"))


# --- the README ------------------------------------------------------------------------------------------------------


def prompt_pattern(task: str, masked: tuple[int, ...] = ()) -> str:
    """The prompt of a task as the exported tokenizer reads it; fields of images in braces stand for image tokens.

    Args:
        masked: segments that are masked, as in guidance's other stream.
    """
    template = TASKS[task].templates[0]
    segments = template.split(BREAK)
    for number, segment in enumerate(masked):
        segments[segment] = f"<mask:{number}>"
    if TASKS[task].generates_image:
        return f"<eos>{'<break>'.join(segments).removesuffix(IMAGE)}"
    return f"<eos>{BLANK.sub('<mask:0>', '<break>'.join(segments))}<mask:0>"


def _readme(model: Decoder, image_tokenizer: ImageTokenizer, decoding: DecodingConfig, source: Path) -> str:
    training, vocabulary = Training.read(source), model.vocabulary
    room_for_text = model.spec.context - vocabulary.tokens_per_image - len(("<eos>", "<mask:0>", "<break>", "<mask:0>"))
    return Template((TEMPLATES / README).read_text()).substitute(
        parameters=f"{model.parameter_count:,}",
        size=image_tokenizer.spec.image_size,
        tokens_per_image=vocabulary.tokens_per_image,
        context=model.spec.context,
        guidance=decoding.guidance if training is None or training.masked_prompts else 1.0,
        text_tokens=min(decoding.max_text_tokens, room_for_text),
        prompts="\n".join(_row(task) for task in TASKS if training is None or task in training.tasks),
        card="\n".join(_card(source)),
    )


def _row(task: str) -> str:
    """A line of the table of prompts."""
    streams = TASKS[task].cfg_dropout
    patterns = [prompt_pattern(task), *(prompt_pattern(task, streams[0]) for _ in streams[:1])]
    cells = [f"`{pattern}`".replace("\n", "\\n") for pattern in patterns]
    return f"| {task} | {cells[0]} | {cells[1] if streams else ''} |"


def _card(source: Path) -> list[str]:
    """The sections of a bundle's model card; for any other directory a sentence."""
    if not (source / TRAINING_DATA).is_file():
        return ["## Training data", "", "Not stated: this was exported from a directory that is no bundle and lists no training data."]
    listed = f"The scores are of the whole model, with what is not here. Each document is in `{TRAINING_DATA}` of this directory too."
    return [listed, "", *card_sections(facts(source), Record.read(source / "evaluation"), json.loads((source / LINEAGE).read_text()))]
