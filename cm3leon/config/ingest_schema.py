"""The parameters of ``ingest``: a class for each source, as in ``schema.py``, which has those of the other stages."""

from __future__ import annotations

import os
import string
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, field_validator, model_validator

from cm3leon.config import paths
from cm3leon.config.section import Section, Seed, first_error


def _template(template: str) -> str:
    """Checks a template of image paths, such as ``images/{image_id:012d}.jpg``."""
    try:
        fields = [field for _, *field in string.Formatter().parse(template) if field[0] is not None]
        plain = all(name == "image_id" and "{" not in (spec or "") and not conversion for name, spec, conversion in fields)
        if fields and plain and template.format(image_id=1):
            return template
    except (ValueError, LookupError):
        pass
    raise ValueError(
        f"{template!r} names no image: write {{image_id}}, or {{image_id:012d}} for its number in 12 digits, and no other field"
    )


ImageTemplate = Annotated[
    str,
    AfterValidator(_template),
    Field(description="image files relative to ingest.path; {image_id:012d} is the image's number in 12 digits"),
]


class ShapesConfig(Section):
    """The procedural source: scenes of colored shapes with exact ground truth for every task."""

    count: int = Field(12_500, ge=1, description="scenes to paint; edited versions come on top")
    size: int = Field(64, ge=32, description="side of the square images, pixels")
    seed: Seed = Field(0, description="the same seed paints the same scenes")
    max_objects: int = Field(3, ge=1, le=3, description="most objects in a scene")
    grid: int = Field(8, ge=0, description="centers of objects lie on a grid of this many steps per side; 0: anywhere")
    letters: float = Field(0.0, ge=0, le=1, description="share of the scenes that show a letter")
    edits: float = Field(0.4, ge=0, le=1, description="share of the scenes that also come edited, with the instruction")
    conditions: float = Field(0.12, ge=0, le=1, description="share of the scenes that come with condition images of all kinds")
    reading_order: float = Field(
        0.75, ge=0, le=1, description="share of the captions of train that name objects from the top left on; the others in random order"
    )
    val_fraction: float = Field(0.03, ge=0, lt=0.5, description="share of what captions say that only the validation split shows")
    test_fraction: float = Field(0.05, ge=0, lt=0.5, description="share of what captions say that only the test split shows")
    new_combinations: float = Field(
        0.01,
        ge=0,
        lt=0.5,
        description="share of the scenes, of the test split, with colors or relations of shapes that no other scene shows",
    )


class CollectionConfig(Section):
    """What every format of a collection has."""

    license: str | None = Field(None, description="license of records that state none")
    attribution: str | None = Field(None, description="attribution of records that state none")
    source: str = Field("", description="source name of records that state none")
    max_file_megabytes: float = Field(200.0, gt=0, description="a larger image file is not read: its record is rejected as file_too_large")


class ColumnsConfig(CollectionConfig):
    """What every format has whose records have columns of any names."""

    columns: dict[str, str] = Field(
        default_factory=dict, description="manifest column -> column of the file; a name that is not given maps to itself"
    )


class FolderConfig(ColumnsConfig):
    """A directory of images with a CSV, TSV, JSON Lines or parquet manifest."""

    manifest: str = Field("manifest.csv", description="manifest file, relative to ingest.path")
    merge: Literal["image", "none"] = Field("image", description="image: rows of one image path become one record; none: each row is one")
    source: str = Field("folder", description="source name of records that state none")


class WebdatasetConfig(ColumnsConfig):
    """Tar shards in which files of one name are a record, as img2dataset writes them: KEY.jpg, KEY.txt, KEY.json."""

    source: str = Field("webdataset", description="source name of records that state none")


class SidecarConfig(ColumnsConfig):
    """A directory of images with a text file of captions beside each: NAME.png, NAME.txt."""

    source: str = Field("sidecar", description="source name of records that state none")


class CocoConfig(CollectionConfig):
    """Annotations in COCO's format: captions, boxes, and panoptic segmentation."""

    images: str = Field("images", description="directory of the images, relative to ingest.path")
    annotations: list[str] = Field(
        ["annotations/captions.json"],
        description="annotation files, captions, instances and panoptic in any order, relative to ingest.path",
    )
    panoptic: str = Field("panoptic", description="directory of the PNG files of panoptic annotations, relative to ingest.path")
    source: str = Field("coco", description="source name of records that state none")


class LocalizedNarrativesConfig(CollectionConfig):
    """Localized Narratives: JSON Lines with a spoken description of an image each."""

    annotations: list[str] = Field(["localized_narratives.jsonl"], description="annotation files, relative to ingest.path")
    images: ImageTemplate = "images/{image_id}.jpg"
    source: str = Field("localized_narratives", description="source name of records that state none")


class ImageParagraphsConfig(CollectionConfig):
    """Stanford Image Paragraphs: a JSON list with a paragraph about an image each."""

    annotations: str = Field("paragraphs_v1.json", description="annotation file, relative to ingest.path")
    images: ImageTemplate = "images/{image_id}.jpg"
    source: str = Field("image_paragraphs", description="source name of records that state none")


class VqaConfig(CollectionConfig):
    """Questions and answers of VQA v2, OK-VQA and VizWiz."""

    questions: str = Field("questions.json", description="file of the questions, relative to ingest.path")
    annotations: str | None = Field("annotations.json", description="file of their answers; null: they are in the file of the questions")
    images: ImageTemplate = "images/COCO_train2014_{image_id:012d}.jpg"
    source: str = Field("vqa", description="source name of records that state none")


class ScienceQAConfig(CollectionConfig):
    """ScienceQA: multiple-choice questions with lectures and solutions."""

    problems: str = Field("problems.json", description="file of the problems, relative to ingest.path")
    captions: str | None = Field(None, description="file of captions of their images, such as captions.json; null: none")
    images: str = Field("images", description="directory with SPLIT/ID/image.png, relative to ingest.path")
    source: str = Field("scienceqa", description="source name of records that state none")


class OpenImagesConfig(CollectionConfig):
    """Open Images: boxes."""

    boxes: str = Field("boxes.csv", description="CSV file of the boxes, all of an image together, relative to ingest.path")
    classes: str = Field("class-descriptions.csv", description="CSV file of the classes' names, relative to ingest.path")
    image_list: str | None = Field(None, description="CSV file with the images' licenses and authors; null: none")
    images: ImageTemplate = "images/{image_id}.jpg"
    source: str = Field("open_images", description="source name of records that state none")


class InstructPix2PixConfig(ColumnsConfig):
    """Parquet files of pairs: an image, an instruction, and the edited image."""

    source: str = Field("instruct_pix2pix", description="source name of records that state none")


SourceName = Literal[
    "shapes", "folder", "webdataset", "sidecar", "coco", "localized_narratives", "image_paragraphs", "vqa", "scienceqa", "open_images",
    "instruct_pix2pix",
]  # fmt: skip
"""The sources that read one collection; the section ``ingest.NAME`` has the parameters of each."""


class MixturePart(Section):
    """One collection of a mixture."""

    source: SourceName
    path: str = Field("", description="its directory, relative to ingest.path")
    weight: float = Field(1.0, gt=0, description="how often its records are seen in training, relative to those of weight 1")
    options: dict[str, Any] = Field(default_factory=dict, description="parameters of its source that differ from the defaults")

    @field_validator("path")
    @classmethod
    def _is_below(cls, path: str) -> str:
        if Path(path).is_absolute() or ".." in Path(path).parts:
            raise ValueError(f"{path!r} is not below ingest.path, the only place that DVC tracks: move the collection into it")
        return path


class IngestConfig(Section):
    """Reads any source into image shards and one manifest."""

    source: SourceName | Literal["mixture"] = Field(
        "shapes", description="shapes: painted here; mixture: several collections; the others: your own, in the format of that name"
    )
    path: str = Field("data/source", description="root directory of the collection; DVC tracks it as an input")
    shard_megabytes: float = Field(32.0, gt=0, description="size at which a tar shard of images is closed, MB")
    extract: list[Literal["canny edge", "hed", "children's scribbles", "M-LSD lines"]] = Field(
        default_factory=list, description="kinds of condition images to compute where a row has none of that kind"
    )
    extract_share: float = Field(0.1, ge=0, le=1, description="share of the images for which they are computed")
    mixture: list[MixturePart] = Field(
        default_factory=list,
        description="for source mixture: {source: NAME, path: below ingest.path, weight: 1.0, options: {of ingest.NAME}} of each part",
    )
    shapes: ShapesConfig = ShapesConfig()
    folder: FolderConfig = FolderConfig()
    webdataset: WebdatasetConfig = WebdatasetConfig()
    sidecar: SidecarConfig = SidecarConfig()
    coco: CocoConfig = CocoConfig()
    localized_narratives: LocalizedNarrativesConfig = LocalizedNarrativesConfig()
    image_paragraphs: ImageParagraphsConfig = ImageParagraphsConfig()
    vqa: VqaConfig = VqaConfig()
    scienceqa: ScienceQAConfig = ScienceQAConfig()
    open_images: OpenImagesConfig = OpenImagesConfig()
    instruct_pix2pix: InstructPix2PixConfig = InstructPix2PixConfig()

    @classmethod
    def options_of(cls, part: MixturePart) -> Section:
        """The options of a part as the section of its source; pydantic's ValidationError if they are none."""
        section = cls.model_fields[part.source].annotation
        assert isinstance(section, type) and issubclass(section, Section)
        return section.model_validate(part.options)

    @model_validator(mode="after")
    def _check_mixture(self) -> IngestConfig:
        if self.source == "mixture" and not self.mixture:
            raise ValueError("source is mixture, and mixture lists no collection")
        for number, part in enumerate(self.mixture):
            try:
                self.options_of(part)
            except ValidationError as error:
                raise ValueError(f"mixture.{number}.options.{first_error(error)}") from None
        return self

    @field_validator("path")
    @classmethod
    def _is_a_place_of_its_own(cls, path: str) -> str:
        """DVC would take what the stages write for a change of the collection."""
        place = Path(os.path.normpath(Path.cwd() / path))
        held = [out for out in paths.OUTPUTS if (Path.cwd() / out).is_relative_to(place) or place.is_relative_to(Path.cwd() / out)]
        if held:
            raise ValueError(
                f"{path!r} holds or is what stages write ({held[0]}): give the collection a directory of its own, as data/source"
            )
        return path
