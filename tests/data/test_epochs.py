"""Documents are seen as often as their weights say, and with weights of 1 once in each epoch, as without weights."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cm3leon.data.epochs import Epochs, Weights, read_weights
from cm3leon.utils.errors import UserError

IDS = [f"{number:016x}" for number in range(200)]


def weighted(values: list[float], seed: int = 0) -> Weights:
    return Weights.of_documents(IDS[: len(values)], dict(zip(IDS, values, strict=False)), seed)


def by_epoch(weights: Weights, count: int) -> list[Counter[int]]:
    """How often each row is in each of the first epochs, by a walk over the positions."""
    epochs, found, position = Epochs(weights, 7), [], 0
    for number in range(count):
        size = int((weights.seen_before(number + 1) - weights.seen_before(number)).sum())
        found.append(Counter(epochs[place].row for place in range(position, position + size)))
        position += size
    return found


def test_with_weights_of_one_an_epoch_is_the_permutation_of_seed_and_number() -> None:
    epochs = Epochs(Weights.equal(10), 3, 1)
    for epoch in (0, 1, 5, 2, 1000, 0):
        found = [epochs[10 * epoch + place] for place in range(10)]
        assert [seen.row for seen in found] == np.random.default_rng((3, 1, epoch)).permutation(10).tolist()
        assert {(seen.earlier, seen.repeat) for seen in found} == {(epoch, 0)}
    ones = weighted([1.0] * 10)
    assert [Epochs(ones, 3, 1)[place] for place in range(50)] == [epochs[place] for place in range(50)]


@pytest.mark.parametrize("weight", [0.1, 0.5, 1.0, 1.3, 2.0, 3.75])
def test_a_document_is_seen_floor_of_its_weight_times_in_an_epoch_or_once_more(weight: float) -> None:
    values = [weight] * 100 + [1.0] * 100
    found = by_epoch(weighted(values), 20)
    assert {epoch[row] for epoch in found for row in range(100)} <= {math.floor(weight), math.ceil(weight)}
    assert all(epoch[row] == 1 for epoch in found for row in range(100, 200))
    for row in range(100):  # over epochs exactly its weight, up to the one that has begun
        assert abs(sum(epoch[row] for epoch in found) - 20 * weight) < 1
    share = sum(found[0][row] for row in range(100)) / 100 - math.floor(weight)
    assert abs(share - weight % 1) < 0.17  # of documents in one epoch: three standard deviations


def test_what_is_seen_depends_on_seed_and_id_alone() -> None:
    values = [0.3] * 50 + [1.6] * 50
    one, other = weighted(values), weighted(values, seed=1)
    assert by_epoch(one, 3) == by_epoch(weighted(values), 3) != by_epoch(other, 3)
    reverse = Weights.of_documents(IDS[99::-1], dict(zip(IDS, values, strict=False)), 0)
    assert [[epoch[row] for row in range(100)] for epoch in by_epoch(one, 3)] == [
        [epoch[99 - row] for row in range(100)] for epoch in by_epoch(reverse, 3)
    ]
    assert by_epoch(one[np.arange(10, 20)], 3) == [
        Counter({row - 10: c for row, c in e.items() if 10 <= row < 20}) for e in by_epoch(one, 3)
    ]


def test_positions_are_the_same_in_any_order_and_each_document_is_counted() -> None:
    weights = weighted([0.01] * 30 + [2.5] * 5)
    count = int(weights.seen_before(40).sum())
    walk = [Epochs(weights, 1)[place] for place in range(count)]
    jumping = Epochs(weights, 1)
    assert [jumping[place] for place in reversed(range(count))] == walk[::-1]
    for row in range(35):
        assert [seen.earlier for seen in sorted(walk) if seen.row == row] == list(range(sum(seen.row == row for seen in walk)))
    assert {seen.repeat for seen in walk} == {0, 1, 2}


def test_tiny_weights_make_epochs_without_documents() -> None:
    found = [Epochs(weighted([1e-6, 1e-6]), 0)[place] for place in range(6)]
    assert sorted(seen.row for seen in found) == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.nan, math.inf])
def test_weights_of_a_manifest_are_above_zero_and_finite(tmp_path: Path, wrong: float) -> None:
    def write(*weights: float | None) -> None:
        pq.write_table(pa.table({"id": IDS[: len(weights)], "weight": pa.array(weights, pa.float32())}), tmp_path / "manifest.parquet")

    write(2.0, None, 0.5)
    assert read_weights(tmp_path) == dict(zip(IDS, [2.0, 1.0, 0.5], strict=False))
    write(2.0, wrong)
    with pytest.raises(UserError, match=f"the weight of {IDS[1]} is"):
        read_weights(tmp_path)
