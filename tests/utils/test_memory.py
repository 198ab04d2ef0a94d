"""Free memory as Linux and a container's limit tell it."""

from pathlib import Path

import pytest
import torch

from cm3leon.utils.memory import free_host_memory, free_memory

GB = 1 << 30


@pytest.mark.parametrize(
    ("limit", "used", "free"),
    [(None, 0, 8 * GB), ("max", 4 * GB, 8 * GB), (str(6 * GB), 4 * GB, 3 * GB), (str(60 * GB), 4 * GB, 8 * GB), (str(GB), 4 * GB, 0)],
)
def test_the_lower_of_the_machines_memory_and_the_containers(tmp_path: Path, limit: str | None, used: int, free: int) -> None:
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text(f"MemTotal:       {16 << 20} kB\nMemAvailable:   {8 << 20} kB\nHugePages_Total:       0\n")
    if limit:
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text(f"{used}\n")
        (group / "memory.stat").write_text(f"anon {used - GB}\ninactive_file {GB}\n")
    assert free_host_memory(tmp_path) == free


def test_this_machine_has_free_memory_which_processes_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = free_host_memory(tmp_path)  # nothing is known there
    assert 0 < free_memory(torch.device("cpu")) <= everything
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert 0 < free_memory(torch.device("cpu")) <= everything // 8
