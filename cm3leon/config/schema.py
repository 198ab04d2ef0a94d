"""Every parameter of a run, typed and checked: one class a stage, the same names as in ``params.yaml``.

``load_config("params.yaml")`` reads and validates; an unknown key or an impossible value is an error that names the key.
Profiles in ``configs/`` are complete parameter files; ``cm3leon configure PROFILE --set pretrain.steps=2000`` writes ``params.yaml`` from
one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cm3leon.utils.errors import UserError


class ConfigError(UserError):
    """A parameter file is unreadable, names an unknown key or holds an impossible value."""


RENAMED = {
    "ingest.folder.licence": "ingest.folder.license",
    "validate.licences": "validate.licenses",
    "pretrain.documents": "pretrain.retrieved_documents",
    "pretrain.neighbours": "pretrain.neighbors",
    "pretrain.validation_documents": "pretrain.validation_samples",
    "pretrain.model.rotation": "pretrain.model.rope",
    "sft.caption_drop": "sft.conditioning_dropout",
    "sft.documents": "sft.retrieved_documents",
    "sft.neighbours": "sft.neighbors",
    "sft.validation_documents": "sft.validation_samples",
    "decoding.documents": "decoding.retrieved_documents",
    "decoding.tasks.*.documents": "decoding.tasks.*.retrieved_documents",
}
"""Keys of earlier versions and their names today; ``*`` is any key. A parameter file with an old key is refused with the new name; JSON
files that an earlier version wrote are read through :func:`current_names`."""


def current_name(key: str) -> str | None:
    """Today's name of a dotted key that was renamed; None for any other key."""
    for old, new in RENAMED.items():
        parts = key.split(".")
        if len(parts) == old.count(".") + 1 and all(pattern in ("*", part) for part, pattern in zip(parts, old.split("."), strict=True)):
            return ".".join(part if pattern == "*" else pattern for part, pattern in zip(parts, new.split("."), strict=True))
    return None


def current_names(stored: Mapping[str, Any], section: str) -> dict[str, Any]:
    """The tree of a stored file with the names of today.

    Args:
        stored: parameters as an earlier version wrote them, into a model's directory, say.
        section: dotted name of the section that they belong to; empty for a tree of sections.
    """
    found: dict[str, Any] = {}
    for key, value in stored.items():
        path = f"{section}.{key}" if section else key
        name = (current_name(path) or path).rpartition(".")[2]
        found[name] = current_names(value, path) if isinstance(value, Mapping) else value
    return found


def _renamed_keys(tree: Mapping[Any, Any], section: str = "") -> Iterator[str]:
    """One sentence for each old key of a parameter tree."""
    for key, value in tree.items():
        path = f"{section}.{key}" if section else str(key)
        if new := current_name(path):
            yield f"{path} is now called {new}"
        elif isinstance(value, Mapping):
            yield from _renamed_keys(value, path)


class Section(BaseModel):
    """Base of all parameter classes: unknown keys are errors, instances are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ShapesConfig(Section):
    """The procedural source: scenes with exact ground truth (``data/sources/shapes.py``)."""

    count: int = Field(12_000, ge=1, description="scenes to draw, edited versions not counted")
    size: int = Field(64, ge=32, description="side of the square images, pixels")
    seed: int = 0
    max_objects: int = Field(3, ge=1, le=3)
    grid: int = Field(8, ge=0, description="object centres lie on a grid of this many steps a side; 0: anywhere")
    letters: float = Field(0.04, ge=0, le=1, description="share of scenes that show a drawn letter")
    edits: float = Field(0.05, ge=0, le=1, description="share of scenes that also appear edited, with the instruction")
    conditions: float = Field(0.05, ge=0, le=1, description="share of scenes with condition images of all kinds")


class FolderConfig(Section):
    """A directory of images with a CSV or parquet manifest (``data/sources/folder.py``)."""

    manifest: str = Field("manifest.csv", description="manifest file, relative to ingest.path")
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="our manifest column -> column of the file; names not given map to themselves",
    )
    license: str | None = Field(None, description="license of rows that state none (SPDX id)")
    attribution: str | None = Field(None, description="attribution of rows that state none")
    source: str = Field("folder", description="source name of rows that state none")


class IngestConfig(Section):
    """``ingest``: any source into image shards and one manifest."""

    source: Literal["shapes", "folder"] = "shapes"
    path: str = Field("data/source", description="the collection's root; a dependency of the stage")
    shard_megabytes: float = Field(32.0, gt=0)
    extract: list[Literal["canny edge", "hed", "children's scribbles", "M-LSD lines"]] = Field(
        default_factory=list, description="condition images to compute of the source's images, where a row has none of that kind"
    )
    extract_share: float = Field(0.1, ge=0, le=1, description="share of the images of which they are computed")
    shapes: ShapesConfig = ShapesConfig()
    folder: FolderConfig = FolderConfig()


class ValidateConfig(Section):
    """``validate``: profile pass, expectations, quarantine, splits."""

    licenses: list[str] = Field(
        default_factory=lambda: ["CC0-1.0", "CC-BY-4.0", "CC-BY-3.0", "CC-BY-2.0", "Apache-2.0", "MIT"],
        description="allow-list of SPDX ids",
    )
    min_side: int = Field(32, ge=1, description="smaller images are rejected as too_small, pixels")
    max_pixels: int = Field(50_000_000, ge=1, description="larger images are rejected as decompression_bomb, unread")
    max_caption_characters: int = Field(1000, ge=1)
    max_rejected_rate: float = Field(0.2, ge=0, le=1, description="a larger share of rejected rows fails the stage")
    near_duplicate_distance: float = Field(
        0.01, ge=0, description="root mean square difference of 8x8 RGB thumbnails (0-1) below which two images share a split"
    )
    val_fraction: float = Field(0.03, gt=0, lt=0.5)
    test_fraction: float = Field(0.05, gt=0, lt=0.5)
    workers: int = Field(2, ge=1)


class ImageTokenizerConfig(Section):
    """``image_tokenizer``: the VQ-GAN. Downsampling f = patch * 2 ** (len(multipliers) - 1)."""

    image_size: int = Field(64, ge=8, description="images are fitted to this square before tokenising, pixels")
    patch: int = Field(4, ge=1, description="pixel-unshuffle factor before the first convolution (1: none)")
    channels: int = Field(48, ge=8)
    multipliers: list[int] = Field(default_factory=lambda: [1, 3])
    blocks: int = Field(1, ge=1, description="residual blocks a level of the encoder")
    decoder_blocks: int = Field(2, ge=1, description="residual blocks a level of the decoder")
    encoder_kernel: Literal[1, 3] = Field(3, description="of the encoder's residual blocks; 1: a code depends on its own patch alone")
    embedding_dim: int = Field(64, ge=2)
    codebook_size: int = Field(2048, ge=2, le=65_535)
    commitment: float = Field(0.25, ge=0)
    codebook_decay: float = Field(0.98, gt=0, lt=1, description="of the codebook's exponential moving averages")
    continuous_share: float = Field(0.25, ge=0, lt=1, description="share of the training before latents are quantised")
    restart_below: float = Field(0.05, ge=0, description="codes used less often than this share of the mean are restarted")
    restart_until: float = Field(0.7, ge=0, le=1, description="share of the training after which no code is restarted")
    condition_share: float = Field(0.1, ge=0, lt=1, description="share of condition images, of all kinds, among those it learns from")
    steps: int = Field(2200, ge=1)
    batch_size: int = Field(16, ge=1)
    optimizer: Literal["adamw", "muon"] = Field("adamw", description="muon: for the convolutions, with AdamW for biases and scales")
    learning_rate: float = Field(4e-3, gt=0)
    warmup_steps: int = Field(50, ge=0)
    perceptual_weight: float = Field(0.0, ge=0, description="of a VGG-16 feature loss; needs perceptual_weights")
    perceptual_weights: str | None = Field(None, description="path of torchvision's VGG-16 features, safetensors or weights-only .pth")
    adversarial_weight: float = Field(0.0, ge=0, description="of the hinge patch-GAN loss")
    adversarial_start: int = Field(0, ge=0, description="first step with the adversarial loss")
    pretrained: str | None = Field(None, description="directory of an image tokenizer to import instead of training")

    @property
    def downsampling(self) -> int:
        return self.patch * 2 ** (len(self.multipliers) - 1)

    @property
    def tokens_per_image(self) -> int:
        return (self.image_size // self.downsampling) ** 2

    @model_validator(mode="after")
    def _check(self) -> ImageTokenizerConfig:
        if self.image_size % self.downsampling:
            raise ValueError(f"image_size {self.image_size} is not a multiple of the downsampling factor {self.downsampling}")
        if self.perceptual_weight and not self.perceptual_weights:
            raise ValueError("perceptual_weight > 0 needs perceptual_weights, the path of VGG-16 weights")
        return self


class TextTokenizerConfig(Section):
    """``text_tokenizer``: byte-level BPE."""

    vocabulary_size: int = Field(512, ge=257)


class TokenizeConfig(Section):
    """``tokenize``: images to codes, captions to ids."""

    batch_size: int = Field(64, ge=1)
    shard_documents: int = Field(50_000, ge=1)


class EncoderConfig(Section):
    """``encoder``: the frozen CLIP bi-encoder: pretrained weights, or a small model trained here."""

    pretrained_model: str | None = Field(None, description="an open_clip architecture, e.g. ViT-B-32")
    pretrained_weights: str | None = Field(None, description="an open_clip tag, e.g. laion2b_s34b_b79k, or a checkpoint's path")
    image_size: int = Field(64, ge=8)
    image_tower: Literal["resnet", "vit"] = Field("resnet", description="resnet learns from far fewer images")
    patch_size: int = Field(8, ge=1, description="of the vit")
    width: int = Field(16, ge=8, description="of the image tower; a resnet's last stage is 32 times as wide")
    layers: int = Field(1, ge=1, description="blocks of a vit, or of each of a resnet's four stages")
    text_width: int = Field(64, ge=16)
    text_layers: int = Field(2, ge=1)
    embedding_dim: int = Field(64, ge=8)
    vocabulary_size: int = Field(512, ge=257)
    context_length: int = Field(48, ge=4)
    hard_negatives: int = Field(1, ge=0, description="near misses of its caption that each image is trained to tell apart from it")
    steps: int = Field(240, ge=1)
    batch_size: int = Field(128, ge=2)
    learning_rate: float = Field(2e-3, gt=0)
    warmup_steps: int = Field(30, ge=0)

    @model_validator(mode="after")
    def _check(self) -> EncoderConfig:
        step = 32 if self.image_tower == "resnet" else self.patch_size
        if not self.pretrained_model and self.image_size % step:
            raise ValueError(f"image_size {self.image_size} is not a multiple of {step}, as a {self.image_tower} needs")
        return self


class IndexConfig(Section):
    """``index``: the FAISS memory bank over the train split."""

    kind: Literal["flat", "ivf", "hnsw"] = "flat"
    batch_size: int = Field(128, ge=1)


class RetrieveConfig(Section):
    """``retrieve``: the neighbour table for training."""

    candidates_per_modality: int = Field(2, ge=1)
    max_score: float = Field(0.9, description="a candidate with a higher score to the query or to one already taken is skipped")
    query_drop: float = Field(0.2, ge=0, lt=1, description="share of the query's words dropped before encoding")
    search_depth: int = Field(256, ge=1, description="candidates looked at for each modality")


class ModelConfig(Section):
    """The decoder (``model.py``), RECIPE: pre-norm, no biases, no affine LayerNorm, learned positions, tied embeddings."""

    layers: int = Field(4, ge=1)
    width: int = Field(256, ge=8)
    heads: int = Field(4, ge=1)
    context: int = Field(256, ge=8, description="longest sequence, tokens")
    init_std: float = Field(0.02, gt=0)
    position_std: float = Field(0.0002, gt=0)
    qk_norm: bool = False
    image_positions: bool = Field(True, description="image tokens also know their place in the image; not in the paper")
    rope: bool = Field(False, description="attention turns by positions, and by places in images; not in the paper")
    previous_token: bool = Field(False, description="tokens also know the one before; not in the paper")
    codebook_std: float = Field(
        0.05, ge=0, description="image tokens start as the codebook's vectors, at this deviation; 0: at random, as the paper's"
    )
    sentinels: int = Field(16, ge=1, description="mask tokens in the vocabulary (paper: 512)")
    reserved: int = Field(0, ge=0, description="ids of the vocabulary kept for later tokens")

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.rope and self.width // self.heads % 8:
            raise ValueError(f"rope needs heads of a multiple of 8, found {self.width // self.heads} (width / heads)")
        return self


class ObjectiveConfig(Section):
    """CM3 masking (``objective.py``)."""

    mean_masks: float = Field(1.0, ge=0, description="lambda of the Poisson number of masked spans")
    segment_rate: float = Field(0.15, ge=0, le=1, description="share of samples that mask one whole segment instead of spans")
    caption_share: float = Field(0.67, ge=0, le=1, description="of whole-segment masks: share that falls on the query's text")
    across_breaks: bool = Field(False, description="masked spans may cross from a text into an image, as CM3's did; CM3leon's may not")


NeighborChoice = Literal["paper", "text", "image", "random", "none"]


class TrainConfig(Section):
    """What the trainer needs, for pretraining and instruction tuning alike."""

    steps: int = Field(1500, ge=1)
    batch_size: int = Field(32, ge=1, description="rows a step, over all processes")
    micro_batch_size: int | None = Field(None, ge=1, description="rows that a process computes at once; null: all of its share")
    packing: bool = Field(False, description="fill rows of the context's length with several samples, which do not see one another")
    optimizer: Literal["adamw", "muon"] = Field("adamw", description="muon: AdamW for the embeddings, Muon for all between them")
    learning_rate: float = Field(2e-3, gt=0)
    final_learning_rate: float = Field(0.05, ge=0, le=1, description="floor of the decay, share of the peak")
    warmup_steps: int = Field(100, ge=0)
    weight_decay: float = Field(0.05, ge=0)
    betas: tuple[float, float] = Field((0.9, 0.95), description="of AdamW")
    clip: float = Field(1.0, gt=0)
    z_loss: float = Field(0.0, ge=0, description="weight of log(Z)^2 of the output in the loss (Chameleon: 1e-5)")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "fp32", description="of the matrix products; auto: bf16 where there are instructions for it; parameters and optimiser stay fp32"
    )
    compile: bool = Field(False, description="compile the blocks; needs a C++ compiler on a CPU")
    activation_checkpointing: bool = Field(False, description="compute blocks again in the backward pass instead of keeping them")
    validate_every: int = Field(250, ge=1)
    validation_samples: int = Field(256, ge=1)
    checkpoint_every: int = Field(250, ge=1, description="steps from one checkpoint to the next")
    keep_checkpoints: int = Field(2, ge=1, description="newest checkpoints kept, beside the best")
    retrieved_documents: list[float] = Field(
        default_factory=lambda: [0.6, 0.4],
        description="share of sequences with 0, 1, 2 ... retrieved documents",
    )
    neighbors: NeighborChoice = Field("paper", description="retrieved documents: by the paper's rules, or for ablation")

    @model_validator(mode="after")
    def _check_documents(self) -> TrainConfig:
        if not self.retrieved_documents or min(self.retrieved_documents) < 0 or abs(sum(self.retrieved_documents) - 1) > 1e-6:
            raise ValueError(f"retrieved_documents must be shares, none negative, that sum to 1, found {self.retrieved_documents}")
        return self


class PretrainConfig(TrainConfig):
    """``pretrain``: CM3 pretraining."""

    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()


TASK_NAMES = (
    "text_to_image", "write", "layout_to_image", "condition_to_image", "edit", "caption", "long_caption", "vqa", "reasoning"
)  # fmt: skip
"""The keys of ``tasks.TASKS``, which is not imported here: parameters are read without loading a tokenizer."""


class SFTConfig(TrainConfig):
    """``sft``: multitask instruction tuning."""

    answer_weight: float = Field(4.0, gt=0, description="weight in the loss of answer tokens, which are few beside an image's")
    input_weight: float = Field(1.0, ge=0, description="weight in the loss of what stands before the answer or the image to draw")
    questions_per_sample: int = Field(1, ge=1, description="most questions that one sample asks about its image")
    tasks: dict[str, float] = Field(
        default_factory=lambda: {"text_to_image": 3.0, "caption": 1.0, "long_caption": 0.5, "vqa": 3.0},
        description="task -> weight in the mix; a task is in it where the collection has its columns",
    )
    upsampling: float = Field(3.0, ge=1, description="a task is drawn at most this many times as often as its share of the samples")
    downsampling: float = Field(0.3, ge=0, le=1, description="and at least this many times as often")
    conditioning_dropout: float = Field(
        0.1, ge=0, le=1, description="share of the samples of drawing tasks in which what was asked is masked, for guidance"
    )

    @model_validator(mode="after")
    def _check(self) -> SFTConfig:
        unknown = sorted(set(self.tasks) - set(TASK_NAMES))
        if unknown:
            raise ValueError(f"tasks names {', '.join(unknown)}; tasks are {', '.join(TASK_NAMES)}")
        if any(not 0 <= weight < float("inf") for weight in self.tasks.values()) or not any(self.tasks.values()):
            raise ValueError(f"the weights of tasks must be 0 or more and at least one above 0, found {self.tasks}")
        return self


class SuperResolutionConfig(Section):
    """``super_resolution``: the separate upscaler."""

    scale: int = Field(2, ge=2, le=4)
    channels: int = Field(32, ge=4)
    blocks: int = Field(2, ge=1)
    patch_size: int = Field(32, ge=8, description="side of the low-resolution training crops, pixels")
    steps: int = Field(400, ge=1)
    batch_size: int = Field(16, ge=1)
    learning_rate: float = Field(6e-3, gt=0)


class DecodingConfig(Section):
    """Decoding defaults of a profile; they travel with the bundle."""

    temperature: float = Field(0.8, ge=0, le=10, description="of sampling; 0: greedy")
    top_p: float = Field(0.9, gt=0, le=1, description="only the smallest set of most likely tokens with this probability mass; 1: all")
    top_k: int | None = Field(None, ge=1, description="only this many most likely tokens; null: all")
    guidance: float = Field(2.0, ge=0, le=50, description="classifier-free guidance scale; 1: none")
    guidance_schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="of the guidance scale over an image: constant, or rising to it from 1"
    )
    image_guidance: float = Field(1.5, ge=0, le=50, description="in editing, guidance scale towards the image that is edited")
    contrastive: float = Field(0.0, ge=0, le=1, description="share of the candidates that is sampled by contrastive decoding (CD-K)")
    contrastive_k: int = Field(4, ge=1, description="CD-K: plausible is what is not much less likely than the k-th most likely token")
    contrastive_alpha: float = Field(0.5, ge=0, le=1, description="CD-K: how much less likely it may be")
    candidates: int = Field(4, ge=1, description="images generated for each one returned; the best-ranked are returned")
    likelihood: float = Field(
        0.0, ge=0, description="weight, in ranking, of the prompt's log-likelihood as the image's caption (nats), added to the CLIP score"
    )
    retrieved_documents: int = Field(0, ge=0, le=16, description="documents retrieved to precede the prompt")
    max_text_tokens: int = Field(64, ge=1, description="longest text generated, tokens")
    tasks: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="task -> its own values of the settings above, where they differ"
    )

    @model_validator(mode="after")
    def _check_tasks(self) -> DecodingConfig:
        for task, own in self.tasks.items():
            if task not in TASK_NAMES:
                raise ValueError(f"tasks names {task}; tasks are {', '.join(TASK_NAMES)}")
            if "tasks" in own:
                raise ValueError(f"tasks.{task}: a task's settings have no tasks of their own")
            try:
                self.model_validate({**self.model_dump(exclude={"tasks"}), **own})
            except ValidationError as error:
                first = error.errors()[0]
                key = ".".join(map(str, first["loc"]))
                found = "unknown key" if first["type"] == "extra_forbidden" else f"{first['msg']} (found {first['input']!r})"
                raise ValueError(f"tasks.{task}.{key}: {found}") from None
        return self


class EvaluateConfig(Section):
    """``evaluate``: the evaluation contract."""

    prompts: int = Field(256, ge=1, description="held-out prompts drawn")
    captions: int = Field(256, ge=1, description="held-out images captioned")
    questions: int = Field(400, ge=1, description="held-out questions asked")
    tasks: int = Field(128, ge=1, description="held-out samples of each other task")
    inception: str | None = Field(
        None, description="the FID Inception's weights: a path, or download; null: distances of the encoder's features alone"
    )
    sheet: int = Field(24, ge=1, description="prompts on the sample sheet")
    seed: int = 0
    bootstrap: int = Field(1000, ge=1)


class GateConfig(Section):
    """``gate``: floors and margins; names are those of the evaluation record's scores."""

    floors: dict[str, float] = Field(default_factory=dict, description="score -> least value")
    ceilings: dict[str, float] = Field(default_factory=dict, description="score -> greatest value (where lower is better)")
    margins: dict[str, float] = Field(default_factory=dict, description="score -> how much worse than the champion is tolerated")
    on_contract_change: Literal["floors", "refuse"] = Field(
        "floors", description="challenger and champion were evaluated differently: decide by floors and ceilings alone, or hold back"
    )


TEXT_ROOM = 32
"""Least tokens of the context beside one image's: for its text and the marks of masked spans."""


class Config(Section):
    """All of ``params.yaml``."""

    profile: str = "small"
    seed: int = 0
    ingest: IngestConfig = IngestConfig()
    validate_: ValidateConfig = Field(default_factory=ValidateConfig, alias="validate")
    image_tokenizer: ImageTokenizerConfig = ImageTokenizerConfig()
    text_tokenizer: TextTokenizerConfig = TextTokenizerConfig()
    tokenize: TokenizeConfig = TokenizeConfig()
    encoder: EncoderConfig = EncoderConfig()
    index: IndexConfig = IndexConfig()
    retrieve: RetrieveConfig = RetrieveConfig()
    pretrain: PretrainConfig = PretrainConfig()
    sft: SFTConfig = SFTConfig()
    super_resolution: SuperResolutionConfig = SuperResolutionConfig()
    decoding: DecodingConfig = DecodingConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    gate: GateConfig = GateConfig()

    @model_validator(mode="after")
    def _check(self) -> Config:
        images, context = self.image_tokenizer, self.pretrain.model.context
        if images.pretrained is None and context < images.tokens_per_image + TEXT_ROOM:
            raise ValueError(
                f"pretrain.model.context {context} is too short for an image of {images.tokens_per_image} tokens and {TEXT_ROOM} of text: "
                f"raise pretrain.model.context, lower image_tokenizer.image_size ({images.image_size}), "
                f"or raise image_tokenizer.patch ({images.patch}) or the number of image_tokenizer.multipliers ({len(images.multipliers)})"
            )
        return self


def parse_config(data: Any, origin: str) -> Config:
    """Validate a parameter tree; ``origin`` names it in errors.

    Raises:
        ConfigError: with one line for each wrong key: where, what was found, what is allowed.
    """
    if not isinstance(data, dict):
        raise ConfigError(f"{origin}: expected a mapping of sections, found {type(data).__name__}")
    if renamed := list(_renamed_keys(data)):
        raise ConfigError(f"{origin} has keys of an earlier version: " + "; ".join(renamed))
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        lines = []
        for item in error.errors():
            key = ".".join(str(part) for part in item["loc"])
            if item["type"] == "extra_forbidden":
                lines.append(f"  {key}: unknown key")
            elif item["type"] == "value_error":  # of a check over several keys, which says what it found
                lines.append(f"  {key or '(file)'}: {item['msg'].removeprefix('Value error, ')}")
            else:
                lines.append(f"  {key or '(file)'}: {item['msg']} (found {item['input']!r})")
        raise ConfigError(f"{origin} is not a valid parameter file:\n" + "\n".join(lines)) from None


def load_config(path: str | Path = "params.yaml") -> Config:
    """Read and validate a parameter file.

    Raises:
        ConfigError: if the file is missing, is not YAML, or holds an unknown key or impossible value.
    """
    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; write it with: cm3leon configure small") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    return parse_config(data, str(path))
