"""The reference of every parameter of a run: one class for each stage, one field for each key of ``params.yaml``, typed and checked.

Those of ``ingest`` are in ``ingest_schema.py``. The defaults are those of profile ``small``: ``Config()`` equals what
``cm3leon configure small`` writes. The comments of ``params.yaml`` and the table of ``docs/configuration.md`` are generated from the
docstrings and descriptions here.

Lengths are in tokens, sizes of images in pixels. "Paper" is CM3leon, arXiv 2309.02591.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from cm3leon.config.ingest_schema import IngestConfig
from cm3leon.config.section import Section, Seed, first_error

Precision = Annotated[
    Literal["auto", "fp32", "bf16"],
    Field(description="dtype of matrix products; auto: bf16 on GPUs that have it; parameters and optimizer state stay fp32"),
]


class ValidateConfig(Section):
    """Profiles, checks and quarantines records, and splits the accepted ones."""

    licenses: list[str] = Field(
        ["CC0-1.0", "CC-BY-4.0", "CC-BY-3.0", "CC-BY-2.0", "Apache-2.0", "MIT"],
        description="licenses that are accepted: SPDX identifiers, or commercial or research for all that allow it",
    )
    min_side: int = Field(32, ge=1, description="images with a shorter side are rejected as too_small, pixels")
    max_pixels: int = Field(50_000_000, ge=1, description="images with more pixels are rejected unread as decompression_bomb")
    max_seconds: float = Field(20.0, gt=0, description="a record whose images take longer to read is rejected as too_expensive")
    max_megabytes: float = Field(1000.0, gt=0, description="so is one that takes more memory, MB (on Linux)")
    max_caption_characters: int = Field(1000, ge=1, description="records with a longer caption are rejected")
    max_rejected_rate: float = Field(0.2, ge=0, le=1, description="the stage fails if a larger share of the records is rejected")
    near_duplicate_distance: float = Field(
        0.01, ge=0, description="images whose 8x8 RGB thumbnails differ by less (root mean square, values 0-1) share a split"
    )
    near_duplicate_bits: int | None = Field(
        None, ge=1, le=12, description="so do images whose difference hashes, of 112 bits, differ in no more; null: not compared"
    )
    near_duplicate_similarity: float | None = Field(
        None, gt=0, lt=1, description="so do images whose embeddings by the pretrained encoder have a higher cosine; null: not compared"
    )
    val_fraction: float = Field(0.03, gt=0, lt=0.5, description="share of the validation split, if no record states to be in it")
    test_fraction: float = Field(0.05, gt=0, lt=0.5, description="share of the test split, if no record states to be in it")
    workers: int = Field(2, ge=1, description="processes that read images")


class ImageTokenizerConfig(Section):
    """Trains the VQ-GAN (arXiv 2012.09841, 2203.13131), whose downsampling factor is f = patch * 2 ** (len(multipliers) - 1)."""

    image_size: int = Field(64, ge=8, description="side of the square that images are fitted to, pixels")
    patch: int = Field(4, ge=1, description="factor of the pixel unshuffle before the first convolution; 1: none")
    channels: int = Field(48, ge=8, description="base width of the convolutions")
    multipliers: list[int] = Field(default_factory=lambda: [1, 3], description="width of each level as a multiple of channels")
    blocks: int = Field(1, ge=1, description="residual blocks per level of the encoder")
    decoder_blocks: int = Field(2, ge=1, description="residual blocks per level of the decoder")
    encoder_kernel: Literal[1, 3] = Field(1, description="kernel of the encoder's blocks; 1: a code depends on its own patch alone")
    embedding_dim: int = Field(64, ge=2, description="dimensions of a code's vector")
    codebook_size: int = Field(3072, ge=2, le=65_535, description="number of codes (paper: 8192)")
    commitment: float = Field(0.25, ge=0, description="weight of the commitment loss")
    codebook_decay: float = Field(0.98, gt=0, lt=1, description="decay of the codebook's exponential moving averages")
    continuous_share: float = Field(0.25, ge=0, lt=1, description="share of the training before latents are quantized")
    restart_below: float = Field(0.01, ge=0, description="codes used less often than this share of the mean are restarted")
    restart_until: float = Field(0.85, ge=0, le=1, description="share of the training after which no code is restarted")
    condition_share: float = Field(0.1, ge=0, lt=1, description="share of condition images among the training images")
    steps: int = Field(900, ge=1, description="optimizer steps")
    batch_size: int = Field(16, ge=1, description="images per step, over all processes")
    micro_batch_size: int | None = Field(None, ge=1, description="images that a process computes at once; null: all")
    precision: Precision = "fp32"
    optimizer: Literal["adamw", "muon"] = Field("muon", description="muon: Muon for the convolutions, AdamW for biases and scales")
    learning_rate: float = Field(4e-3, gt=0, description="peak learning rate")
    warmup_steps: int = Field(50, ge=0, description="steps of linear warm-up")
    perceptual_weight: float = Field(0.0, ge=0, description="weight of the VGG-16 perceptual loss; needs perceptual_weights")
    perceptual_weights: str | None = Field(
        None, description="torchvision's VGG-16 features in data/weights: safetensors, or a weights-only .pth"
    )
    adversarial_weight: float = Field(0.0, ge=0, description="weight of the hinge patch-GAN loss")
    adversarial_start: int = Field(0, ge=0, description="first step with the adversarial loss")
    pretrained: str | None = Field(None, description="directory of an image tokenizer to import instead of training one, in data/weights")

    @property
    def downsampling(self) -> int:
        """The factor f: an image of S pixels per side has S / f codes per side."""
        return int(self.patch * 2 ** (len(self.multipliers) - 1))

    @property
    def tokens_per_image(self) -> int:
        """Codes of one image."""
        return (self.image_size // self.downsampling) ** 2

    @model_validator(mode="after")
    def _check(self) -> ImageTokenizerConfig:
        if self.image_size % self.downsampling:
            raise ValueError(f"image_size {self.image_size} is not a multiple of the downsampling factor {self.downsampling}")
        if self.perceptual_weight and not self.perceptual_weights:
            raise ValueError("perceptual_weight > 0 needs perceptual_weights, the path of VGG-16 weights")
        return self


class TextTokenizerConfig(Section):
    """Trains the byte-level BPE."""

    vocabulary_size: int = Field(896, ge=257, description="text tokens in the vocabulary (paper: 56320)")


class TokenizeConfig(Section):
    """Turns images into codes and texts into token ids."""

    batch_size: int = Field(64, ge=1, description="images encoded at once")
    shard_documents: int = Field(50_000, ge=1, description="documents per Arrow shard")


HEAD_WIDTH = 32
"""Width of an attention head of the encoder's transformers."""


class EncoderConfig(Section):
    """The frozen CLIP bi-encoder for retrieval and ranking: pretrained weights, or a small model trained here."""

    pretrained_model: str | None = Field(None, description="open_clip architecture, such as ViT-B-32; null: train one of the sizes below")
    pretrained_weights: str | None = Field(None, description="open_clip tag, such as laion2b_s34b_b79k, or a checkpoint in data/weights")
    image_size: int = Field(64, ge=8, description="side of the image tower's input, pixels")
    image_tower: Literal["resnet", "vit"] = Field("resnet", description="image tower to train; resnet needs far fewer images")
    patch_size: int = Field(8, ge=1, description="patch side of a vit, pixels")
    width: int = Field(
        16, ge=8, description="width of the image tower, of a vit a multiple of 32; the last stage of a resnet is 32 times as wide"
    )
    layers: int = Field(1, ge=1, description="blocks of a vit, or of each of the four stages of a resnet")
    text_width: int = Field(64, ge=32, description="width of the text tower, a multiple of 32")
    text_layers: int = Field(2, ge=1, description="blocks of the text tower")
    embedding_dim: int = Field(64, ge=8, description="dimensions of the joint embedding")
    vocabulary_size: int = Field(512, ge=257, description="text tokens of the tower's own tokenizer")
    context_length: int = Field(48, ge=4, description="longest caption read, tokens")
    hard_negatives: int = Field(1, ge=0, description="near misses of its caption that each image is trained to reject")
    steps: int = Field(300, ge=1, description="optimizer steps")
    batch_size: int = Field(128, ge=2, description="image-caption pairs per step, over all processes")
    micro_batch_size: int | None = Field(None, ge=1, description="pairs that a process computes at once; null: all")
    precision: Precision = "fp32"
    learning_rate: float = Field(2e-3, gt=0, description="peak learning rate")
    warmup_steps: int = Field(30, ge=0, description="steps of linear warm-up")

    @model_validator(mode="after")
    def _check(self) -> EncoderConfig:
        if self.pretrained_model and not self.pretrained_weights:
            raise ValueError("pretrained_model needs pretrained_weights, an open_clip tag or the path of a checkpoint")
        step = 32 if self.image_tower == "resnet" else self.patch_size
        if not self.pretrained_model and self.image_size % step:
            raise ValueError(f"image_size {self.image_size} is not a multiple of {step}, as a {self.image_tower} needs")
        widths = {"text_width": self.text_width} | ({"width": self.width} if self.image_tower == "vit" else {})
        if not self.pretrained_model and (wrong := [f"{name} {value}" for name, value in widths.items() if value % HEAD_WIDTH]):
            raise ValueError(f"{' and '.join(wrong)}: a transformer's width is a multiple of {HEAD_WIDTH}, the width of its heads")
        if self.image_tower == "resnet" and self.micro_batch_size:
            raise ValueError("micro_batch_size must be null with image_tower resnet, which normalizes by the whole batch; use vit")
        return self


class IndexConfig(Section):
    """Builds the FAISS memory bank over the train split."""

    kind: Literal["auto", "flat", "ivf", "hnsw"] = Field(
        "auto",
        description="FAISS index: flat is exact, ivf and hnsw approximate; auto is exact for small collections, ivf where that is faster",
    )
    batch_size: int = Field(128, ge=1, description="documents encoded at once")


class RetrieveConfig(Section):
    """Finds the neighbors of every document for training; the same rules hold in generation (RA-CM3, arXiv 2211.12561; paper)."""

    candidates_per_modality: int = Field(2, ge=1, description="neighbors found by text, and as many found by image (paper: 2)")
    max_score: float = Field(
        0.9, description="a candidate with a higher cosine to the query or to a chosen neighbor is skipped (paper: 0.9)"
    )
    query_drop: float = Field(0.2, ge=0, lt=1, description="share of the query's words that are dropped before encoding (paper: 0.2)")
    search_depth: int = Field(256, ge=1, description="nearest candidates considered per modality")


class ModelConfig(Section):
    """The decoder: pre-norm, no biases, no affine LayerNorm, learned positions, tied embeddings (paper)."""

    layers: int = Field(6, ge=1, description="decoder blocks")
    width: int = Field(96, ge=8, description="width of the residual stream; the feed-forward is four times as wide")
    heads: int = Field(3, ge=1, description="attention heads")
    context: int = Field(256, ge=8, description="longest sequence, tokens (paper: 4096)")
    init_std: float = Field(0.02, gt=0, description="standard deviation of the initial weights (paper: 0.006)")
    position_std: float = Field(0.0002, gt=0, description="standard deviation of the initial position embeddings (paper)")
    qk_norm: bool = Field(True, description="normalize queries and keys (arXiv 2010.04245); not in the paper")
    image_positions: bool = Field(True, description="add an embedding of its raster index to each image token; not in the paper")
    rope: bool = Field(True, description="rotary embedding of positions, and of rows and columns in images; not in the paper")
    previous_token: bool = Field(True, description="add a projection of the previous token's embedding to each token; not in the paper")
    codebook_std: float = Field(
        0.2, ge=0, description="image tokens start as the codebook's vectors at this standard deviation; 0: at random, as in the paper"
    )
    sentinels: int = Field(16, ge=1, description="mask tokens in the vocabulary (paper: 512)")
    reserved: int = Field(0, ge=0, description="token ids reserved for later use")

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.rope and self.width // self.heads % 8:
            raise ValueError(f"rope needs heads of a multiple of 8, found {self.width // self.heads} (width / heads)")
        return self


class ObjectiveConfig(Section):
    """CM3 (arXiv 2201.07520): masked spans move to the end of the sequence."""

    mean_masks: float = Field(0.15, ge=0, description="mean of the Poisson number of masked spans (CM3: 1)")
    segment_rate: float = Field(0.16, ge=0, le=1, description="share of the samples that mask one whole segment instead of spans")
    caption_share: float = Field(0.75, ge=0, le=1, description="share of these whole-segment masks that fall on the query's text")
    across_breaks: bool = Field(False, description="spans may cross from text into image, as in CM3; not in CM3leon")
    text_weight: float = Field(
        0.3, gt=0, description="loss weight of text that is not masked, which can only be guessed without its image (paper: 1)"
    )


NeighborChoice = Literal["paper", "text", "image", "random", "none"]

Steps = Annotated[int, Field(ge=1, description="optimizer steps")]
LearningRate = Annotated[float, Field(gt=0, description="peak learning rate")]
FinalLearningRate = Annotated[
    float, Field(ge=0, le=1, description="learning rate at the end of the decay, as a share of the peak; 1: none")
]
WarmupSteps = Annotated[int, Field(ge=0, description="steps of linear warm-up")]
ValidateEvery = Annotated[int, Field(ge=1, description="steps between validations")]


class TrainConfig(Section):
    """Parameters of the trainer, for pretraining and instruction tuning alike."""

    steps: Steps
    batch_size: int = Field(16, ge=1, description="samples per step, under packing rows of context tokens, over all processes")
    micro_batch_size: int | None = Field(None, ge=1, description="samples or rows that a process computes at once; null: all")
    packing: bool = Field(False, description="a step has batch_size * context tokens of whole samples; false: batch_size samples")
    optimizer: Literal["adamw", "muon"] = Field("muon", description="muon: Muon for the blocks' matrices, AdamW for the embeddings")
    learning_rate: LearningRate = 8e-3
    final_learning_rate: FinalLearningRate = 0.05
    warmup_steps: WarmupSteps
    weight_decay: float = Field(0.05, ge=0, description="decoupled weight decay")
    betas: tuple[float, float] = Field((0.9, 0.95), description="decay rates of AdamW's first and second moment")
    clip: float = Field(1.0, gt=0, description="norm to which the gradient is clipped")
    z_loss: float = Field(0.0, ge=0, description="weight of the z-loss, log(Z)^2 of the output (Chameleon, arXiv 2405.09818: 1e-5)")
    precision: Precision = "fp32"
    compile: bool = Field(False, description="compile the blocks with torch.compile; on a CPU this needs a C++ compiler")
    activation_checkpointing: bool = Field(False, description="recompute the blocks in the backward pass to save memory")
    validate_every: ValidateEvery
    validation_samples: int = Field(256, ge=1, description="samples per validation")
    checkpoint_every: int = Field(500, ge=1, description="steps between checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="newest checkpoints that are kept, in addition to the best")
    retrieved_documents: list[float] = Field([0.9, 0.1], description="share of the sequences with 0, 1, 2 ... retrieved documents")
    neighbors: NeighborChoice = Field("paper", description="paper: found by text and by image; the others are for ablation")

    @model_validator(mode="after")
    def _check_retrieved_documents(self) -> TrainConfig:
        shares = self.retrieved_documents
        if not shares or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
            raise ValueError(f"retrieved_documents must be shares, none negative, that sum to 1, found {shares}")
        return self


class PretrainConfig(TrainConfig):
    """CM3 pretraining of the decoder."""

    steps: Steps = 3000
    learning_rate: LearningRate = 6e-3
    final_learning_rate: FinalLearningRate = 1.0
    warmup_steps: WarmupSteps = 100
    validate_every: ValidateEvery = 1000
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()


TASK_NAMES = (
    "text_to_image", "write", "layout_to_image", "condition_to_image", "edit", "caption", "long_caption", "vqa", "reasoning"
)  # fmt: skip
"""The tasks of instruction tuning (paper, Table 5), in the order of ``sequence.tasks.TASKS``, which implements exactly these."""
TWO_IMAGE_TASKS = ("condition_to_image", "edit")
"""Those that make an image from another one."""


class SFTConfig(TrainConfig):
    """Multitask instruction tuning on the mix of tasks of the paper's Table 5."""

    steps: Steps = 4000
    warmup_steps: WarmupSteps = 50
    validate_every: ValidateEvery = 2000
    answer_weight: float = Field(6.0, gt=0, description="loss weight of answer tokens, which are few compared with those of an image")
    input_weight: float = Field(0.3, ge=0, description="loss weight of the instruction, which precedes the answer or the image")
    questions_per_sample: int = Field(6, ge=1, description="most questions that one sample asks about its image")
    edit_weight: float = Field(
        3.0, gt=0, description="loss weight of the image tokens that an edit changes, which are few compared with those that it keeps"
    )
    tasks: dict[str, float] = Field(
        {
            "text_to_image": 2.1,
            "write": 0.15,
            "layout_to_image": 2.4,
            "condition_to_image": 0.7,
            "edit": 1.4,
            "caption": 0.4,
            "long_caption": 0.3,
            "vqa": 2.8,
            "reasoning": 0.4,
        },
        description="task -> weight in the mix; a task takes part where the collection has its columns",
    )
    upsampling: float = Field(4.0, ge=1, description="upper bound of a task's share of the mix over its share of the samples (paper: 3)")
    downsampling: float = Field(0.3, ge=0, le=1, description="lower bound of that ratio (paper: 0.3)")
    mean_masks: float = Field(
        0.0, ge=0, description="CM3 in the other image-generating samples: mean number of masked spans, Poisson (paper: 1); 0: none"
    )
    infill_share: float = Field(
        0.25, ge=0, le=1, description="share of the samples of text_to_image whose image has a region masked, for inpainting (paper: 0)"
    )
    conditioning_dropout: float = Field(
        0.1, ge=0, le=1, description="share of the image-generating samples whose conditioning is masked, for classifier-free guidance"
    )

    @model_validator(mode="after")
    def _check(self) -> SFTConfig:
        unknown = sorted(set(self.tasks) - set(TASK_NAMES))
        if unknown:
            raise ValueError(f"tasks names {', '.join(unknown)}; tasks are {', '.join(TASK_NAMES)}")
        if any(weight < 0 for weight in self.tasks.values()) or not any(self.tasks.values()):
            raise ValueError(f"the weights of tasks must be 0 or more and at least one above 0, found {self.tasks}")
        return self


class SuperResolutionConfig(Section):
    """The separate upscaler of generated images; the paper publishes no details."""

    scale: int = Field(2, ge=2, le=4, description="factor by which sides grow")
    channels: int = Field(32, ge=4, description="width of the convolutions")
    blocks: int = Field(2, ge=1, description="residual blocks")
    patch_size: int = Field(32, ge=8, description="side of the low-resolution training crops, pixels")
    steps: int = Field(400, ge=1, description="optimizer steps")
    batch_size: int = Field(16, ge=1, description="crops per step, over all processes")
    micro_batch_size: int | None = Field(None, ge=1, description="crops that a process computes at once; null: all")
    precision: Precision = "fp32"
    learning_rate: LearningRate = 6e-3


class DecodingConfig(Section):
    """Decoding defaults of a profile, stored in the bundle."""

    temperature: float = Field(0.7, ge=0, le=10, description="sampling temperature; 0: greedy (paper: 0.7-1.0)")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus sampling (arXiv 1904.09751); 1: all tokens (paper: 0.8-0.9)")
    top_k: int | None = Field(None, ge=1, description="sample from this many most likely tokens; null: from all")
    guidance: float = Field(1.5, ge=0, le=50, description="classifier-free guidance scale; 1: none (paper: 3-5)")
    guidance_schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="over the tokens of an image: the scale throughout, or rising to it from 1"
    )
    image_guidance: float = Field(1.5, ge=0, le=50, description="in editing, guidance scale towards the source image (paper: 1.5)")
    contrastive: float = Field(0.0, ge=0, le=1, description="share of the candidates sampled by contrastive decoding, CD-K (paper: 0.5)")
    contrastive_k: int = Field(4, ge=1, description="CD-K: rank of the token that sets the threshold of plausibility")
    contrastive_alpha: float = Field(0.5, ge=0, le=1, description="CD-K: threshold as a share of that token's probability")
    candidates: int = Field(8, ge=1, description="images generated for each one returned; the best-ranked is kept (paper: 8)")
    likelihood: float = Field(
        0.03,
        ge=0,
        description="ranking: weight, beside the CLIP score, of the log-likelihood of the image and of the prompt as its caption, nats",
    )
    retrieved_documents: int = Field(0, ge=0, le=16, description="retrieved documents before the prompt (paper: 0-2)")
    max_text_tokens: int = Field(80, ge=1, description="longest generated text, tokens")
    tasks: dict[str, dict[str, Any]] = Field(
        {
            "edit": {"temperature": 0.0, "candidates": 1, "guidance": 1.0, "image_guidance": 1.0},
            "layout_to_image": {"candidates": 4},
            "condition_to_image": {"candidates": 4},
        },
        description="task -> its own values of the settings above, where they differ",
    )

    @model_validator(mode="after")
    def _check_tasks(self) -> DecodingConfig:
        for task, own in self.tasks.items():
            if task not in TASK_NAMES:
                raise ValueError(f"tasks names {task}; tasks are {', '.join(TASK_NAMES)}")
            if "tasks" in own:
                raise ValueError(f"tasks.{task}: the settings of a task have no tasks of their own")
            try:
                self.model_validate({**self.model_dump(exclude={"tasks"}), "tasks": {}, **own})
            except ValidationError as error:
                raise ValueError(f"tasks.{task}.{first_error(error)}") from None
        return self


DOWNLOAD = "download"
"""Value of ``evaluate.inception`` that names no file."""


class EvaluateConfig(Section):
    """The evaluation contract: what is measured on the test split."""

    prompts: int = Field(256, ge=1, description="held-out captions to generate images for")
    captions: int = Field(256, ge=1, description="held-out images to caption")
    questions: int = Field(2000, ge=1, description="held-out questions to answer")
    tasks: int = Field(100, ge=1, description="held-out samples of each other task")
    inception: str | None = Field(
        None,
        description="weights of the FID Inception network in data/weights, or download; null: distances of the encoder's features alone",
    )
    max_training_similarity: float | None = Field(
        None, gt=0, le=1, description="test images with a higher cosine of embeddings to one of training are left out; null: none"
    )
    sheet: int = Field(24, ge=1, description="samples on each contact sheet")
    seed: Seed = Field(0, description="the same seed chooses the same samples and generates the same images")
    bootstrap: int = Field(1000, ge=1, description="resamples for the confidence intervals")


class GateConfig(Section):
    """The gate of promotion; keys are names of scores in the evaluation record."""

    floors: dict[str, float] = Field({"composition": 0.55, "vqa_accuracy": 0.7}, description="score -> least value, where higher is better")
    ceilings: dict[str, float] = Field(default_factory=dict, description="score -> greatest value, where lower is better")
    margins: dict[str, float] = Field(
        {
            "composition": 0.05,
            "vqa_accuracy": 0.05,
            "cider": 0.3,
            "clip_score": 0.03,
            "layout/iou": 0.1,
            "edit/done_and_kept": 0.1,
            "condition/agreement": 0.05,
            "reasoning/accuracy": 0.1,
            "long_caption/cider": 0.3,
            "infill/composition": 0.1,
            "super_resolution_psnr_y": 0.5,
            "fd_inception": 1.0,
        },
        description="score -> how much worse than the champion is tolerated; skipped where the champion has no such score",
    )
    max_risk: float = Field(
        0.5, ge=0, lt=1, description="hold back where the probability of being worse than tolerated is larger (paired bootstrap)"
    )


class DriftConfig(Section):
    """The drift check: how far new training data may be from the champion's. A run past a limit stops before training."""

    sample: int = Field(2000, ge=8, description="records whose embeddings are compared, of each side")
    max_auc: float = Field(0.6, ge=0.5, le=1, description="AUC of a classifier of new and old documents; 0.5: alike, 1: any passes")
    max_caption_shift: float = Field(0.2, ge=0, le=1, description="Kolmogorov-Smirnov distance of the lengths of captions")
    max_size_shift: float = Field(0.2, ge=0, le=1, description="Kolmogorov-Smirnov distance of widths or heights of images")
    max_license_shift: float = Field(0.2, ge=0, le=1, description="share of the documents that have another license than before")
    max_duplicate_shift: float = Field(0.1, ge=0, le=1, description="change of the share of exact copies and near-duplicates")
    max_lost: float = Field(1.0, ge=0, le=1, description="share of the champion's training documents that are gone; 1: any passes")


class LaunchConfig(Section):
    """How stages start their processes. No result depends on it, but for rounding."""

    processes: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto", description="processes of a stage on this machine; auto: one for each GPU, one without"
    )
    image_workers: int | None = Field(
        None,
        ge=0,
        description="processes that decode images for each process of a stage; 0: threads; null: by the cores beside a GPU, else 0",
    )
    torchrun: str = Field("", description="on several machines, how torchrun connects them; $NAME is a variable of the environment")


TEXT_ROOM = 32
"""Least tokens that the context must have in addition to those of one image: for its text and the marks of masked spans."""


class Config(Section):
    """All parameters of a run."""

    profile: str = Field("small", description="name of the profile, a tag of every MLflow run")
    seed: Seed = Field(0, description="seed of all stages; ingest.shapes and evaluate have their own")
    launch: LaunchConfig = LaunchConfig()
    ingest: IngestConfig = IngestConfig()
    validate_: ValidateConfig = Field(default_factory=ValidateConfig, alias="validate")
    drift: DriftConfig = DriftConfig()
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
        if self.validate_.near_duplicate_similarity is not None and not self.encoder.pretrained_model:
            raise ValueError(
                "validate.near_duplicate_similarity needs encoder.pretrained_model, because an encoder that is trained here reads the "
                "splits: name one, or set validate.near_duplicate_similarity=null"
            )
        images, context = self.image_tokenizer, self.pretrain.model.context
        if images.pretrained is None and context < images.tokens_per_image + TEXT_ROOM:
            raise ValueError(
                f"pretrain.model.context {context} is too short for an image of {images.tokens_per_image} tokens and {TEXT_ROOM} of text: "
                f"raise pretrain.model.context, lower image_tokenizer.image_size ({images.image_size}), "
                f"or raise image_tokenizer.patch ({images.patch}) or the number of image_tokenizer.multipliers ({len(images.multipliers)})"
            )
        paired = [name for name in TWO_IMAGE_TASKS if self.sft.tasks.get(name, 0) > 0]
        if images.pretrained is None and paired and context < (needed := 2 * images.tokens_per_image + TEXT_ROOM):
            raise ValueError(
                f"pretrain.model.context {context} is too short for {' and '.join(paired)}, which take two images of "
                f"{images.tokens_per_image} tokens each and {TEXT_ROOM} of text: raise it to {needed}, "
                f"or set {' and '.join(f'sft.tasks.{name}=0' for name in paired)}"
            )
        # sequence/cm3.py: a region has up to three quarters of the rows, each with a mask of three tokens; two <eos> and a <break>.
        rows = min(max(1, 3 * math.isqrt(images.tokens_per_image) // 4), self.pretrain.model.sentinels)
        masked = images.tokens_per_image + 3 + 3 * rows
        if images.pretrained is None and self.sft.infill_share > 0 and context < masked:
            raise ValueError(
                f"pretrain.model.context {context} is too short for inpainting, where each row of a region has a mask: "
                f"raise it to {masked}, or set sft.infill_share=0"
            )
        return self
