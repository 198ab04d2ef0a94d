"""A small training run, to be killed or interrupted, in one process or in several."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tests_support import OBJECTIVE, decoder_spec

from cm3leon.config.schema import DecodingConfig, TrainConfig
from cm3leon.data.batches import SampleStream, TokenStream
from cm3leon.data.sequences import PretrainingSamples
from cm3leon.data.tokens import TokenStore
from cm3leon.generation.engine import generate_images
from cm3leon.generation.sampling import Sampler
from cm3leon.models.decoder import Decoder
from cm3leon.sequence.grammar import BREAK, EOS, Prompt, Vocabulary
from cm3leon.training.checkpoint import Checkpoints
from cm3leon.training.distributed import full_tensor
from cm3leon.training.trainer import fit, setup
from cm3leon.utils.world import world

VOCABULARY = Vocabulary(text_size=100, image_size=50, sentinels=8, tokens_per_image=16)


def train(directory: Path, changes: dict[str, Any]) -> None:
    """Train on a directory's tokens. After each validation all processes draw an image, as sample sheets do.

    Writes ``losses.json``, with the last image's codes, and ``model.safetensors`` when it ends.

    Args:
        changes: to the training parameters.
    """
    torch.set_num_threads(1)
    plain = {"batch_size": 8, "warmup_steps": 5, "validate_every": 15, "checkpoint_every": 4, "learning_rate": 1e-3}
    config = TrainConfig(**{**plain, "optimizer": "adamw", "precision": "fp32", **changes})
    store = TokenStore(directory / "tokens")
    samples = PretrainingSamples(store, store, {}, VOCABULARY, OBJECTIVE, [1.0], 80, 0)
    stream = (
        TokenStream(samples, len(store), config.batch_size, 0, 160)
        if config.packing
        else SampleStream(samples, len(store), config.batch_size, 0)
    )
    validation = [SampleStream(samples, len(store), 4, 1)(step) for step in range(3)]
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Decoder(decoder_spec(2, 32, 2, 160, init_std=0.02, image_positions=True), VOCABULARY)
    with world() as processes:
        checkpoints = Checkpoints(
            directory / "checkpoints", {"steps": str(config.steps), "data": "one"}, config.keep_checkpoints, processes
        )
        state = setup(model, config, processes, model.initial_weights())
        drawn: list[int] = []

        def draw(step: int) -> None:
            prompt = Prompt(np.array([EOS, VOCABULARY.text_start, BREAK]), np.zeros(3, np.int64))
            drawn[:] = generate_images(model, [[prompt]], [[1]], Sampler(DecodingConfig()))[0, 0].tolist()

        metrics = fit(state, stream, config, {"": validation}, "job", after_validation=draw, checkpoints=checkpoints)
        assert len({str(codes) for codes in processes.gather(drawn)}) == 1, "the processes draw the same image"
        tensors = {name: full_tensor(parameter).detach().clone() for name, parameter in model.named_parameters()}
        if processes.rank == 0:
            save_file(tensors, directory / "model.safetensors")
            (directory / "losses.json").write_text(json.dumps({"losses": state.losses, "drawn": drawn, **metrics}))
