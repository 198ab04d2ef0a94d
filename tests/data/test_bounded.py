"""Items that take too much time or memory are given up, and the others are done."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
import warnings

import pytest

from cm3leon.data.bounded import Done, bounded_map
from cm3leon.utils.errors import UserError


def square(number: int) -> int:
    return number * number


def work(what: str) -> str:
    if what == "slow":
        time.sleep(60)
    elif what == "large":
        return str(len(bytearray(400_000_000)))
    elif what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "warns":
        warnings.warn("an odd file", stacklevel=1)
        os.write(2, b"TIFFReadDirectory: unknown tag 1.\n" * 2)
    elif what == "wrong":
        raise UserError("image shard is truncated")
    elif what == "bug":
        raise KeyError("a name")
    return what


@pytest.mark.parametrize("workers", [1, 3])
def test_results_are_in_order(workers: int) -> None:
    found = list(bounded_map(square, range(50), workers, 60, 1000))
    assert found == [Done(number * number) for number in range(50)]
    assert list(bounded_map(square, [], workers, 60, 1000)) == []
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [1, 2])
def test_expensive_items_are_given_up_and_the_others_are_done(workers: int) -> None:
    start = time.monotonic()
    items = ["a", "slow", "b", "killed", "c", *(["large"] if sys.platform == "linux" else []), "d"]
    found = dict(zip(items, bounded_map(work, items, workers, 1.0, 200), strict=True))
    assert [done.result for done in found.values() if done.excess is None] == ["a", "b", "c", "d"]
    assert found["slow"].excess == "more than 1 seconds"
    assert found["killed"].excess == "the process that read it ended with status -9"
    if "large" in found:
        assert found["large"].excess == "more than 200 MB of memory"
    assert time.monotonic() - start < 30
    assert not multiprocessing.active_children()


def test_warnings_of_python_and_of_libraries_are_the_items_and_not_the_programs(capfd: pytest.CaptureFixture[str]) -> None:
    quiet, told, after = bounded_map(work, ["a", "warns", "b"], 1, 60, 1000)
    assert told == Done("warns", warnings=("an odd file", "TIFFReadDirectory: unknown tag 1."))
    assert quiet.warnings == after.warnings == ()
    assert capfd.readouterr().err == ""


def test_a_users_error_ends_the_work() -> None:
    with pytest.raises(UserError, match="image shard is truncated"):
        list(bounded_map(work, ["a", "wrong", "b"], 2, 60, 1000))
    assert not multiprocessing.active_children()


def test_any_other_error_is_a_failure_with_its_traceback_and_not_the_items_fault() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*in work.*KeyError: 'a name'"):
        list(bounded_map(work, ["a", "bug", "b"], 2, 60, 1000))


def test_processes_end_with_the_iterator() -> None:
    done = bounded_map(square, range(1000), 2, 60, 1000)
    next(done)
    assert len(multiprocessing.active_children()) == 2
    done.close()  # type: ignore[attr-defined]
    assert not multiprocessing.active_children()
