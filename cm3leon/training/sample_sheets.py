"""Sample sheets by step: images generated for the same prompts and seeds, again and again while a decoder trains."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from cm3leon.config import paths
from cm3leon.config.schema import DecodingConfig
from cm3leon.data.tokens import TokenStore
from cm3leon.generation.engine import generate_images
from cm3leon.generation.prompts import image_prompt
from cm3leon.generation.sampling import Sampler
from cm3leon.models.decoder import Decoder
from cm3leon.models.pixels import to_pil
from cm3leon.models.vqgan import ImageTokenizer
from cm3leon.sequence.text_tokenizer import TextTokenizer
from cm3leon.tracking.runs import Run
from cm3leon.utils.images import save_captioned

PROMPTS = 12


def sample_sheets(run: Run, model: Decoder, held_out: TokenStore, device: torch.device) -> Callable[[int], None]:
    """Prepare sheets of the first captions of ``held_out``.

    Decoding is plain sampling: temperature 1, no guidance, no retrieval; prompt ``n`` has seed ``n``.

    Returns:
        A function of the step that generates the images and logs the sheet to MLflow as the image ``prompts`` of the step.
    """
    image_tokenizer = ImageTokenizer.load(paths.IMAGE_TOKENIZER, device)
    text_tokenizer = TextTokenizer.load(paths.TEXT_TOKENIZER)
    vocabulary = model.vocabulary
    texts = [held_out[row].captions[0] for row in range(min(PROMPTS, len(held_out)))]
    longest = model.spec.context - vocabulary.tokens_per_image - 2  # an opening <eos> and a <break> besides the image
    prompts = [[image_prompt([("text", vocabulary.text(ids[:longest]))], [], vocabulary)] for ids in texts]
    captions = [text_tokenizer.decode(np.asarray(ids).tolist()) for ids in texts]
    sampler = Sampler(DecodingConfig(temperature=1.0, top_p=1.0, guidance=1.0))

    def log_sheet(step: int) -> None:
        model.eval()
        codes = generate_images(model, prompts, [[row] for row in range(len(prompts))], sampler)[:, 0]
        images = to_pil(image_tokenizer.decode(torch.from_numpy(codes).to(device)))
        with tempfile.TemporaryDirectory() as folder:
            sheet = Path(folder) / "prompts.png"
            save_captioned(images, captions, sheet)
            run.log_image(sheet, "prompts", step)
        model.train()

    return log_sheet
