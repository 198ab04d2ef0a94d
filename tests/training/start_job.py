"""How a sharded run starts, in a process of ``torchrun``: ``python start_job.py DIRECTORY``.

Builds a decoder on the meta device, shards and fills it, once with initial weights and once from the decoder in the directory. The first
process writes ``found.json`` there: whether the weights are those of that decoder, and the bytes that each way took in memory.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from cm3leon.config.schema import TrainConfig
from cm3leon.models.decoder import Decoder, stored_weights
from cm3leon.training.distributed import full_tensor
from cm3leon.training.trainer import setup
from cm3leon.utils.world import World, world

CONFIG = TrainConfig(steps=1, batch_size=2, warmup_steps=1, validate_every=1, precision="fp32")


def in_memory() -> int:
    """Bytes of this process's memory, without mapped files."""
    return int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0]) * 1024


def start(model: Decoder, weights: Iterable[tuple[str, Tensor]], processes: World) -> int:
    """Set the model up; the most that it had in memory while a whole parameter was there."""
    before, seen = in_memory(), [0]

    def watched() -> Iterator[tuple[str, Tensor]]:
        for name, weight in weights:
            seen.append(in_memory() - before)
            yield name, weight

    setup(model, CONFIG, processes, watched())
    return max(*seen, in_memory() - before)


def same(model: Decoder, reference: Decoder) -> bool:
    expected = {**dict(reference.named_parameters()), **dict(reference.named_buffers())}
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    wholes = {name: full_tensor(tensor) for name, tensor in found.items()}
    return wholes.keys() == expected.keys() and all(torch.equal(wholes[name], expected[name]) for name in expected)


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    with world() as processes:
        new, read = Decoder.load(directory, "meta"), Decoder.load(directory, "meta")
        with torch.device("meta"):
            smaller = Decoder(replace(new.spec, layers=1), new.vocabulary)
        start(smaller, smaller.initial_weights(), processes)  # imports FSDP, which takes memory too
        torch.manual_seed(0)
        found = {"initialized": start(new, new.initial_weights(), processes), "read": start(read, stored_weights(directory), processes)}
        before = in_memory()
        whole = Decoder.load(directory)
        found |= {"whole": in_memory() - before, "bytes": 4 * whole.parameter_count}
        found |= {"same_initialized": same(new, whole), "same_read": same(read, whole)}
        everyone = processes.gather(found)
        if processes.rank == 0:
            (directory / "found.json").write_text(json.dumps(everyone))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
