"""A sharded run starts with the weights of a single process, and no process ever holds the whole model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests_support import decoder_spec

from cm3leon.config.schema import ModelConfig
from cm3leon.models.decoder import WEIGHTS, Decoder, stored_weights
from cm3leon.sequence.grammar import Vocabulary
from cm3leon.training.pretraining import build_decoder, new_decoder
from cm3leon.training.trainer import materialize
from cm3leon.utils.files import DamagedFileError


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells how much memory a process has")
def test_two_processes_start_with_the_weights_of_one_and_half_of_the_memory(tmp_path):
    torch.manual_seed(0)
    vocabulary = Vocabulary(text_size=101, image_size=50, sentinels=8, tokens_per_image=16)
    Decoder(decoder_spec(8, 256, 8, 161, image_positions=True, rope=True, previous_token=True), vocabulary).save(tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    job = Path(__file__).with_name("start_job.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back to the system
    done = subprocess.run([*command, str(job), str(tmp_path)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for found in json.loads((tmp_path / "found.json").read_text()):
        assert found["same_initialized"] and found["same_read"]
        assert found["whole"] > 0.9 * found["bytes"]  # a whole model is noticed
        assert max(found["initialized"], found["read"]) < 0.6 * found["bytes"]


def test_a_new_decoder_is_the_same_whether_it_is_built_whole_or_filled(stages):
    config = ModelConfig(layers=2, width=32, heads=2, context=80, image_positions=True, rope=True, previous_token=True, codebook_std=0.05)
    expected = build_decoder(config, 3)
    model, weights = new_decoder(config, 3)
    torch.rand(5)  # what is drawn in between does not count
    materialize(model, weights, torch.device("cpu"))
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in expected.state_dict().items())


def test_a_truncated_or_foreign_file_is_refused(tmp_path):
    vocabulary = Vocabulary(text_size=10, image_size=10, sentinels=1, tokens_per_image=4)
    for name, layers, width in (("right", 2, 32), ("deeper", 3, 32), ("wider", 2, 64)):
        Decoder(decoder_spec(layers, width, 2, 32), vocabulary).save(tmp_path / name)
    for name, message in (("deeper", r"no parameter blocks\.2\."), ("wider", r"of shape \(\d+, 64\)")):
        with pytest.raises(ValueError, match=message):
            materialize(Decoder.load(tmp_path / "right", "meta"), stored_weights(tmp_path / name), torch.device("cpu"))
    file = tmp_path / "right" / WEIGHTS
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(DamagedFileError, match=f"{file} is damaged"):
        materialize(Decoder.load(tmp_path / "right", "meta"), stored_weights(tmp_path / "right"), torch.device("cpu"))
