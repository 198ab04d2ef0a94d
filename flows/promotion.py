"""Register, gate, promote and roll back: they change the registry, so they are tasks of the flow and not stages of the graph.

python -m flows.promotion              # registers, gates and promotes what the stages have left
python -m flows.promotion --rollback   # the previous champion again
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import cast

from cm3leon.services.environment import use_environment

use_environment()

from prefect import flow, get_run_logger, task  # noqa: E402
from prefect.cache_policies import NO_CACHE  # noqa: E402
from prefect.client.schemas.objects import State  # noqa: E402
from prefect.states import Completed  # noqa: E402

from cm3leon.config.schema import GateConfig  # noqa: E402
from cm3leon.registry.gate import Verdict  # noqa: E402


@task(name="register", task_run_name="register", cache_policy=NO_CACHE, persist_result=False)
def register_task() -> str:
    """Bundle what the stages left and register it as challenger; an unchanged bundle makes no new version. Returns the version."""
    from cm3leon.registry import registry

    with tempfile.TemporaryDirectory(prefix="bundle-", dir=_scratch()) as folder:
        version = registry.register(registry.build_bundle(Path(folder) / "bundle"))
    get_run_logger().info("challenger is version %s", version)
    return str(version)


def _scratch() -> Path:
    """On the project's own disk, where a bundle can be as large as the models."""
    path = Path(".cache")
    path.mkdir(exist_ok=True)
    return path


@task(name="gate", task_run_name="gate", cache_policy=NO_CACHE, persist_result=False)
def gate_task(config: GateConfig) -> State:
    """Compare challenger and champion, the table as an artifact; ends Completed when it may be promoted, HeldBack when not."""
    from prefect.artifacts import create_markdown_artifact

    from cm3leon.registry import registry

    verdict = registry.gate(config)
    create_markdown_artifact(verdict.to_markdown(), key="cm3leon-gate", description="Scores of challenger and champion, margins, verdict")
    get_run_logger().info(str(verdict))
    return Completed(name="Completed" if verdict.passed else "HeldBack", message=str(verdict), data=verdict)


@task(name="promote", task_run_name="promote", cache_policy=NO_CACHE, persist_result=False)
def promote_task() -> str:
    """Make the challenger the champion. Returns its version."""
    from cm3leon.registry import registry

    return str(registry.promote())


def register_gate_promote(config: GateConfig) -> str:
    """The three steps; returns the verdict in a sentence. A model that the gate holds back is no failure."""
    version = register_task()
    verdict = cast(Verdict, gate_task(config, return_state=True).result())
    if not verdict.passed:
        return f"version {version} is not promoted, {verdict}"
    promote_task()
    return f"version {version} is the champion, {verdict}"


@flow(name="cm3leon-promotion", persist_result=False)
def promotion() -> State:
    """Register what the stages have left, gate it, and promote it if it passes."""
    from cm3leon.config.schema import load_config

    return Completed(message=register_gate_promote(load_config().gate))


@flow(name="cm3leon-rollback", persist_result=False)
def rollback() -> State:
    """Make the previous champion the champion again."""
    from cm3leon.registry import registry

    return Completed(message=f"version {registry.rollback()} is the champion again")


def main(arguments: list[str] | None = None) -> int:
    """Run the promotion or the rollback flow in this process; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m flows.promotion", description="Register, gate and promote; or roll back.")
    parser.add_argument("--rollback", action="store_true", help="make the previous champion the champion again")
    state = (rollback if parser.parse_args(arguments).rollback else promotion)(return_state=True)
    print(state.message)
    return 0 if state.is_completed() else 1


if __name__ == "__main__":
    sys.exit(main())
