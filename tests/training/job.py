"""A small training run as a process of its own, to be killed, interrupted, or started by torchrun: ``python job.py DIRECTORY JSON``.

JSON: ``steps``, and changes to the training parameters. Writes ``losses.json`` and ``model.safetensors`` when it ends.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests_support import OBJECTIVE, decoder_spec

from cm3leon.config.schema import TrainConfig
from cm3leon.data.batches import PackedStream, SortedStream
from cm3leon.data.sequences import PretrainingSamples
from cm3leon.data.tokens import TokenStore
from cm3leon.models.decoder import Decoder
from cm3leon.sequence.grammar import Vocabulary
from cm3leon.training.checkpoint import Checkpoints
from cm3leon.training.distributed import full_tensor, world
from cm3leon.training.trainer import fit, setup

VOCABULARY = Vocabulary(text_size=100, image_size=50, sentinels=8, tokens_per_image=16)


def main(directory: Path, changes: dict) -> None:
    torch.set_num_threads(1)
    plain = {"batch_size": 8, "warmup_steps": 5, "validate_every": 15, "checkpoint_every": 4, "learning_rate": 1e-3}
    config = TrainConfig(**{**plain, "optimizer": "adamw", "precision": "fp32", **changes})
    store = TokenStore(directory / "tokens")
    samples = PretrainingSamples(store, store, {}, VOCABULARY, OBJECTIVE, [1.0], 80, 0)
    stream = (
        PackedStream(samples, len(store), config.batch_size, 0, 160)
        if config.packing
        else SortedStream(samples, len(store), config.batch_size, 0)
    )
    validation = [SortedStream(samples, len(store), 4, 1)(step) for step in range(3)]
    torch.manual_seed(0)
    model = Decoder(decoder_spec(2, 32, 2, 160, init_std=0.02, image_positions=True), VOCABULARY)
    with world() as processes:
        checkpoints = Checkpoints(
            directory / "checkpoints", {"steps": str(config.steps), "data": "one"}, config.keep_checkpoints, processes
        )
        state = setup(model, config, processes)
        metrics = fit(state, stream, config, {"": validation}, "job", checkpoints=checkpoints)
        tensors = {name: full_tensor(parameter).detach().clone() for name, parameter in model.named_parameters()}
        if processes.rank == 0:
            save_file(tensors, directory / "model.safetensors")
            (directory / "losses.json").write_text(json.dumps({"losses": state.losses, **metrics}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
