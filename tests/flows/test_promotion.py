"""The promotion flow: three tasks, of which the second holds back and the third promotes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cm3leon.config import loading
from cm3leon.config.schema import Config, GateConfig
from cm3leon.registry import registry


@pytest.mark.parametrize(("floor", "promoted"), [(0.4, True), (0.6, False)])
def test_a_model_becomes_champion_if_the_gate_passes_it(
    floor: float, promoted: bool, project: Path, tiny_models: Path, prefect_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.promotion import promotion_flow

    for name in ("models", "data"):
        shutil.copytree(tiny_models / name, project / name)
    config = Config(profile="tiny", gate=GateConfig(floors={"composition": floor}))
    monkeypatch.setattr(loading, "load_config", lambda: config)
    state = promotion_flow(return_state=True)
    assert state.is_completed()
    assert state.message.startswith("version 1 is the champion, passed" if promoted else "version 1 is not promoted, held back")
    [version] = registry.status()
    assert version.aliases == (["challenger", "champion"] if promoted else ["challenger"])
