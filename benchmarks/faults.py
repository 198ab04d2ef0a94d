"""Faults injected into real runs: python benchmarks/faults.py [--work DIRECTORY] [--only NAME ...]

A copy of the project with a smaller profile ``tiny`` runs once undisturbed. Then each fault is injected into a run of that copy, and the
same command is given again: it must finish with the same outputs, leave no process, and no MLflow run that counts as running.

What was measured is kept in ``DIRECTORY/faults.json`` after each fault; the script goes on with those that are missing. The table in
docs/operations.md says what was found. On two cores it takes about an hour.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import yaml

from cm3leon.services.local import free_port
from cm3leon.utils.processes import stop_tree

ROOT = Path(__file__).parents[1]
SMALLER = {
    "ingest.shapes.count": 120, "image_tokenizer.steps": 10, "encoder.steps": 8, "encoder.layers": 1, "pretrain.checkpoint_every": 5,
    "sft.checkpoint_every": 5, "evaluate.prompts": 4, "evaluate.captions": 4, "evaluate.questions": 6, "evaluate.tasks": 2,
}  # fmt: skip
FLOW = ["flows.pipeline", "--no-promote"]
LIMIT = 600.0
"""Seconds after which a run counts as hanging."""
EARLIEST_END = 45.0
"""Seconds within which a run is killed."""
KILLS = 5
"""Of each of stage, flow and worker."""
OUTPUTS = ("dvc.lock", "data/raw", "data/validated", "data/tokens", "data/neighbours", "models", ".dvc/cache", ".dvc/tmp", ".cache/dvc")


class Project:
    """A copy of the working tree in which runs are disturbed."""

    def __init__(self, root: Path) -> None:
        self.root, self.log = root, root.with_suffix(".log")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "PREFECT_", "DVC_", "PYTHONDONT"))}
        self.environment = {**kept, "PYTHONPATH": str(root), "COLUMNS": "140", "OMP_NUM_THREADS": "1"}
        if not (root / "dvc.yaml").is_file():
            self._make()

    def _make(self) -> None:
        listed = subprocess.run(["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True, text=True)
        for name in filter(None, listed.stdout.split("\0")):
            if (ROOT / name).is_file() and not name.startswith("tests/"):
                (self.root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, self.root / name)
        subprocess.run(["git", "init", "--quiet"], cwd=self.root, check=True)
        self.finish("cm3leon", "configure", "tiny", *settings(SMALLER))

    def start(self, *command: str, **variables: str) -> subprocess.Popen[bytes]:
        """``python -m COMMAND`` in the project; its output is in :attr:`log`."""
        with self.log.open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", *command], cwd=self.root, env=self.environment | variables, stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def finish(self, *command: str, **variables: str) -> int:
        """Run to the end; returns the exit status. A run that takes longer than :data:`LIMIT` is ended."""
        process = self.start(*command, **variables)
        try:
            return process.wait(LIMIT)
        except BaseException:  # also Ctrl-C, which does not reach it
            stop_tree(process.pid)
            raise

    def output(self) -> str:
        """What the last command has written so far."""
        return self.log.read_text(errors="replace")

    def reset(self) -> None:
        """Remove what stages made; the stores of MLflow and Prefect are kept."""
        for name in OUTPUTS:
            path = self.root / name
            path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)

    def hashes(self) -> dict[str, str]:
        """Path -> content hash of all outputs but ``models/runs``, which names MLflow runs."""
        stages = yaml.safe_load((self.root / "dvc.lock").read_text())["stages"].values()
        return {out["path"]: out["md5"] for stage in stages for out in stage["outs"] if not out["path"].startswith("models/runs/")}

    def stage(self) -> str:
        """The stage that the last command has begun last."""
        return (re.findall(r"Running stage '(\w+)'", self.output()) or ["before the first stage"])[-1]

    def processes(self) -> list[psutil.Process]:
        """Processes that work in the project."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.status() != psutil.STATUS_ZOMBIE and process.cwd() == str(self.root):
                    found.append(process)
        return found

    def seconds_until_alone(self, limit: float = 60.0) -> float:
        """Seconds until no process works in the project.

        Raises:
            TimeoutError: if one is left after ``limit`` seconds.
        """
        start = time.monotonic()
        while time.monotonic() - start < limit:
            lines = [line for process in self.processes() if (line := line_of(process))]
            if not lines:
                return time.monotonic() - start
            time.sleep(0.2)
        raise TimeoutError(f"still there after {limit:.0f} s: {lines}")

    def open_runs(self) -> int:
        """MLflow runs that count as running."""
        import sqlite3

        with sqlite3.connect(self.root / "mlflow.db") as connection:
            return int(connection.execute("SELECT count(*) FROM runs WHERE status = 'RUNNING'").fetchone()[0])


def settings(values: dict[str, Any]) -> list[str]:
    """Arguments of ``cm3leon configure``."""
    return [word for name, value in values.items() for word in ("--set", f"{name}={value}")]


def line_of(process: psutil.Process) -> str:
    """The command line of a process; "" if it has ended."""
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def stage_process(process: subprocess.Popen[bytes]) -> psutil.Process | None:
    """The process of the stage that a flow is running."""
    with suppress(psutil.Error):
        for child in psutil.Process(process.pid).children(recursive=True):
            if re.search(r"bin/cm3leon \w+$", line_of(child)) and "sh -c" not in line_of(child):
                return child
    return None


@contextmanager
def server(project: Project, module: str, *arguments: str, port: int, health: str, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """``python -m MODULE ARGUMENTS`` until the block ends, begun once it answers at ``health``."""
    with (project.root.parent / f"{module}.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments], cwd=project.root.parent, env=project.environment | variables, stdout=log, stderr=log
        )  # fmt: skip
    try:
        end = time.monotonic() + 120
        while True:
            with suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}{health}", timeout=2).close()
                break
            assert process.poll() is None and time.monotonic() < end, f"{module} does not start"
            time.sleep(0.3)
        yield process
    finally:
        stop_tree(process.pid, 10)
        process.wait()


def prefect_server(project: Project, port: int) -> Any:
    """A Prefect server on ``port``; its database is kept in the directory of the results."""
    project.environment["PREFECT_HOME"] = str(project.root.parent / "prefect")
    arguments = ["server", "start", "--no-ui", "--host", "127.0.0.1", "--port", str(port)]
    return server(project, "prefect", *arguments, port=port, health="/api/health")


def undisturbed(project: Project) -> dict[str, Any]:
    """A run that nothing disturbs, with whose outputs all others are compared."""
    start = time.monotonic()
    assert project.finish(*FLOW) == 0, project.output()[-3000:]
    return {"seconds": time.monotonic() - start, "hashes": project.hashes()}


def compared(project: Project, expected: dict[str, Any], **variables: str) -> dict[str, Any]:
    """Give the same command again and compare."""
    start = time.monotonic()
    status = project.finish(*FLOW, **variables)
    assert status == 0, project.output()[-3000:]
    assert project.hashes() == expected["hashes"], "the outputs differ from those of the undisturbed run"
    assert project.open_runs() == 0, "an MLflow run still counts as running"
    return {"again_seconds": time.monotonic() - start, "left_processes": len([p for p in project.processes() if line_of(p)])}


def kills(project: Project, expected: dict[str, Any], target: str, seed: int, after: str = "") -> dict[str, Any]:
    """SIGKILL of the flow or of the running stage at random moments, the same command again after each, then a run to the end.

    Args:
        after: stage that begins undisturbed; each kill is then within seconds of the beginning of a stage.
    """
    rng, port = random.Random(seed), free_port(24200)
    moments: list[dict[str, Any]] = []
    api = f"http://127.0.0.1:{port}/api"
    project.reset()
    with prefect_server(project, port):
        for _ in range(KILLS):
            flow = project.start(*FLOW, PREFECT_API_URL=api)
            if after:
                until_stage(project, flow, after if not moments else r"\w+")
            end = time.monotonic() + rng.uniform(0 if after else 4, 12 if after else EARLIEST_END)
            while time.monotonic() < end or (target == "stage" and stage_process(flow) is None):
                assert flow.poll() is None, project.output()[-3000:]
                time.sleep(0.05)
            victim = stage_process(flow) if target == "stage" else psutil.Process(flow.pid)
            assert victim is not None
            victim.kill()
            status = flow.wait(LIMIT)
            moments.append({"stage": project.stage(), "status": status, "seconds_until_alone": round(project.seconds_until_alone(), 1)})
            print(f"  {target} killed: {moments[-1]}", flush=True)
        return {"moments": moments, **compared(project, expected, PREFECT_API_URL=api)}


def killed_stages(project: Project, expected: dict[str, Any]) -> dict[str, Any]:
    """SIGKILL of stages."""
    return kills(project, expected, "stage", 1)


def killed_flows(project: Project, expected: dict[str, Any]) -> dict[str, Any]:
    """SIGKILL of flows."""
    return kills(project, expected, "flow", 2)


def until_stage(project: Project, process: subprocess.Popen[bytes], stage: str) -> None:
    """Wait until a flow has begun a stage, given as a regular expression."""
    while not re.search(f"Running stage '{stage}'", project.output()):
        assert process.poll() is None, project.output()[-3000:]
        time.sleep(0.2)


DEPLOY = """
import sys
from prefect import flow
found = flow.from_source(source=sys.argv[1], entrypoint="flows/pipeline.py:pipeline")
found.deploy(name="faults", work_pool_name="faults", parameters={"promote": False}, print_next_steps=False)
"""
ASK = "from prefect.deployments import run_deployment; print(run_deployment('cm3leon/faults', timeout=0).id)"
STATE = "import sys; from prefect import get_client; print(get_client(sync_client=True).read_flow_run(sys.argv[1]).state.name)"


class Deployment:
    """A deployment of a project's flow on a server, and the workers that run it."""

    def __init__(self, project: Project, api: str) -> None:
        self.project, self.api = project, api
        self.workers: list[subprocess.Popen[bytes]] = []
        self.python("-m", "prefect", "work-pool", "create", "faults", "--type", "process", "--overwrite")
        self.python("-c", DEPLOY, str(project.root))

    def python(self, *arguments: str) -> str:
        """Run Python to its end; returns the last line that it prints."""
        environment = {**self.project.environment, "PREFECT_API_URL": self.api}
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=self.project.root, env=environment, check=True, capture_output=True, text=True)
        return (done.stdout.splitlines() or [""])[-1]

    def begin(self) -> tuple[subprocess.Popen[bytes], psutil.Process, str]:
        """Ask for a run and start a worker; returns the worker, the process of the flow, and the run's id."""
        run = self.python("-c", ASK)
        worker = self.project.start("prefect", "worker", "start", "--pool", "faults", "--name", "faults", PREFECT_API_URL=self.api)
        self.workers.append(worker)
        end = time.monotonic() + 120
        while time.monotonic() < end:
            for process in self.project.processes():
                if "prefect.engine" in line_of(process):
                    return worker, process, run
            time.sleep(0.5)
        raise TimeoutError(f"no flow run has begun: {self.project.output()[-3000:]}")

    def end(self) -> None:
        """End the workers."""
        for worker in self.workers:
            stop_tree(worker.pid)


@contextmanager
def deployment(project: Project, api: str) -> Iterator[Deployment]:
    """A deployment whose workers end with the block."""
    found = Deployment(project, api)
    try:
        yield found
    finally:
        found.end()


def killed_workers(project: Project, expected: dict[str, Any]) -> dict[str, Any]:
    """SIGKILL of the worker at random moments of a run; another worker and another run after each."""
    rng, port = random.Random(3), free_port(24200)
    moments: list[dict[str, Any]] = []
    api = f"http://127.0.0.1:{port}/api"
    project.reset()
    with prefect_server(project, port), deployment(project, api) as deployed:
        for _ in range(KILLS):
            worker, flow, run = deployed.begin()
            until_stage(project, worker, r"\w+")
            time.sleep(rng.uniform(0, 15))
            stage = project.stage()
            worker.kill()
            worker.wait()
            _, alive = psutil.wait_procs([flow], 10)
            state = deployed.python("-c", STATE, run)
            stop_tree(flow.pid)
            moment = {"stage": stage, "flow_alive": bool(alive), "state": state, "seconds_until_alone": project.seconds_until_alone()}
            moments.append(moment)
            print(f"  worker killed: {moments[-1]}", flush=True)
        return {"moments": moments, **compared(project, expected, PREFECT_API_URL=api)}


def worker_without_server(project: Project, expected: dict[str, Any]) -> dict[str, Any]:
    """SIGTERM of a worker whose run is training and whose server is gone."""
    port = free_port(24200)
    api = f"http://127.0.0.1:{port}/api"
    project.reset()
    with prefect_server(project, port) as process, deployment(project, api) as deployed:
        worker, _, _ = deployed.begin()
        until_stage(project, worker, "image_tokenizer")
        stop_tree(process.pid, 0)
        time.sleep(30)
        begun = time.monotonic()
        worker.terminate()
        try:
            status = worker.wait(180)
        except subprocess.TimeoutExpired:
            status = None
        seconds = time.monotonic() - begun
        left, output = [line_of(found) for found in project.processes()], project.output()[-3000:]
    return {"status": status, "seconds": seconds, "left": left, "output": output, **compared(project, expected)}


def interrupted(project: Project, expected: dict[str, Any]) -> dict[str, Any]:
    """SIGTERM of the flow, which is what cancel sends."""
    project.reset()
    port = free_port(24200)
    with prefect_server(project, port):
        flow = project.start(*FLOW, PREFECT_API_URL=f"http://127.0.0.1:{port}/api")
        until_stage(project, flow, "pretrain")
        time.sleep(3)
        start = time.monotonic()
        flow.terminate()
        status = flow.wait(LIMIT)
        seconds = time.monotonic() - start
        alone = project.seconds_until_alone()
        again = compared(project, expected, PREFECT_API_URL=f"http://127.0.0.1:{port}/api")
    return {"status": status, "seconds": seconds, "seconds_until_alone": alone, **again}


def prefect_down(project: Project, expected: dict[str, Any]) -> dict[str, Any]:
    """The Prefect server killed in the middle of a run, and started again a minute later."""
    project.reset()
    port = free_port(24200)
    with prefect_server(project, port) as process:
        flow = project.start(*FLOW, PREFECT_API_URL=f"http://127.0.0.1:{port}/api")
        until_stage(project, flow, "image_tokenizer")
        stop_tree(process.pid, 0)
        time.sleep(60)
        during = {"alive": flow.poll() is None, "stage": project.stage()}
    with prefect_server(project, port):
        status = flow.wait(LIMIT)
        output = project.output()
        again = compared(project, expected, PREFECT_API_URL=f"http://127.0.0.1:{port}/api")
    errors = [line for line in output.splitlines() if "ERROR" in line or line.startswith(("error", "httpx"))]
    return {"during": during, "status": status, "errors": errors[-3:], "tracebacks": output.count("Traceback"), **again}


def mlflow_down(project: Project, expected: dict[str, Any]) -> dict[str, Any]:
    """The MLflow server stopped for a minute in the middle of training."""
    import sqlite3

    steps, port = 3000, free_port(25000)
    database = project.root / "mlflow.db"
    arguments, store = [(project.root / "mlruns").as_uri(), str(port)], f"sqlite:///{database}"
    mlflow = {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}"}

    def mlflow_server() -> Any:
        return server(project, "cm3leon.services.mlflow_server", *arguments, port=port, health="/health", MLFLOW_TRACKING_URI=store)

    def logged() -> list[int]:
        query = (
            "SELECT m.step FROM metrics m JOIN runs r USING (run_uuid) WHERE m.key = 'pretrain/loss' AND r.start_time >= ? ORDER BY m.rowid"
        )
        with sqlite3.connect(database) as connection:
            return [row[0] for row in connection.execute(query, [begun])]

    parameters = (project.root / "params.yaml").read_text()
    project.finish("cm3leon", "configure", "tiny", *settings({**SMALLER, "pretrain.steps": steps, "pretrain.checkpoint_every": 500}))
    begun = int(time.time() * 1000)
    try:
        with mlflow_server():
            stage = project.start("cm3leon", "pretrain", **mlflow)
            while len(logged()) < 20:
                assert stage.poll() is None, project.output()[-3000:]
                time.sleep(0.5)
        before = len(logged())
        time.sleep(60)
        during = {"alive": stage.poll() is None, "metrics": [before, len(logged())]}
        with mlflow_server():
            status = stage.wait(LIMIT)
        steps_logged = logged()
    finally:
        (project.root / "params.yaml").write_text(parameters)
    complete = steps_logged == list(range(10, steps + 1, 10))
    warnings = [line for line in project.output().splitlines() if "WARNING" in line]
    again = compared(project, expected)
    return {"during": during, "status": status, "complete_and_in_order": complete, "warnings": warnings, **again}


def full_disk(project: Project, expected: dict[str, Any]) -> dict[str, Any]:
    """A disk that runs full in the middle of a run, and is freed."""
    disk = project.root.parent / "disk"
    disk.mkdir(exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1g", "tmpfs", str(disk)], check=False).returncode:
        return {"skipped": "needs the right to mount a file system"}
    try:
        other = Project(disk / "project")
        flow = other.start(*FLOW)
        until_stage(other, flow, "tokenize")
        free = os.statvfs(disk)
        with (disk / "fill").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize)
        status = flow.wait(LIMIT)
        (disk / "fill").unlink()
        output = other.output()
        alone = other.seconds_until_alone()
        errors = [line for line in output.splitlines() if "space" in line or "disk" in line]
        result = {"status": status, "seconds_until_alone": alone, "errors": errors[-4:], "tracebacks": output.count("Traceback")}
        result |= compared(other, expected)
        other.seconds_until_alone()
        return result
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def two_runs(project: Project, expected: dict[str, Any]) -> dict[str, Any]:
    """A second run in the directory of one that is working."""
    project.reset()
    first = project.start(*FLOW)
    until_stage(project, first, "validate")
    start = time.monotonic()
    second = subprocess.run(
        [sys.executable, "-m", *FLOW], cwd=project.root, env=project.environment, capture_output=True, text=True, check=False
    )
    seconds, status = time.monotonic() - start, first.wait(LIMIT)
    assert status == 0 and project.hashes() == expected["hashes"]
    return {"status": second.returncode, "error": second.stderr.strip(), "seconds": seconds, **compared(project, expected)}


def damaged_object(project: Project, expected: dict[str, Any]) -> dict[str, Any]:
    """An object of DVC's cache cut in half, and the output that was made of it removed."""
    compared(project, expected)
    output = project.root / "models/encoder"
    [large] = [path for path in output.iterdir() if path.suffix == ".safetensors"]
    md5 = hashlib.md5(large.read_bytes(), usedforsecurity=False).hexdigest()
    halve(project.root / ".dvc/cache/files/md5" / md5[:2] / md5[2:])
    shutil.rmtree(output)
    again = compared(project, expected)
    return {"says": [line for line in project.output().splitlines() if "damaged" in line], **again}


def truncated_files(project: Project, expected: dict[str, Any]) -> dict[str, Any]:
    """Each kind of file cut in half: what the command that reads it says, and what the pipeline does."""
    compared(project, expected)
    errors = {}
    for name, command in TRUNCATED.items():
        path = project.root / name
        content = path.read_bytes()
        halve(path)
        status = project.finish("cm3leon", command)
        errors[name] = [status, project.output().splitlines()[-1], project.output().count("Traceback")]
        path.write_bytes(content)
    for name in TRUNCATED:
        halve(project.root / name)
    return {"errors": errors, **compared(project, expected)}


def halve(path: Path) -> None:
    """Truncate a file to half its size; it keeps its mode."""
    mode = path.stat().st_mode
    path.chmod(0o644)
    os.truncate(path, path.stat().st_size // 2)
    path.chmod(mode)


TRUNCATED = {
    "data/raw/images-00000.tar": "index",
    "data/validated/manifest.parquet": "encoder",
    "data/tokens/train-00000.arrow": "pretrain",
    "data/neighbours/neighbours.parquet": "pretrain",
    "models/image_tokenizer/model.safetensors": "tokenize",
    "models/text_tokenizer/tokenizer.json": "tokenize",
    "models/encoder/model.safetensors": "index",
    "models/index/index.faiss": "retrieve",
    "models/pretrained/model.safetensors": "sft",
}
"""Files, and the stage that reads each."""


def killed_late_stages(project: Project, expected: dict[str, Any]) -> dict[str, Any]:
    """SIGKILL of stages from ``retrieve`` on."""
    return kills(project, expected, "stage", 4, "retrieve")


def killed_late_flows(project: Project, expected: dict[str, Any]) -> dict[str, Any]:
    """SIGKILL of flows from ``retrieve`` on."""
    return kills(project, expected, "flow", 5, "retrieve")


FAULTS: dict[str, Callable[[Project, dict[str, Any]], dict[str, Any]]] = {
    "SIGKILL of a stage": killed_stages,
    "SIGKILL of the flow": killed_flows,
    "SIGKILL of a late stage": killed_late_stages,
    "SIGKILL of the flow, late": killed_late_flows,
    "SIGKILL of the worker": killed_workers,
    "worker without a server": worker_without_server,
    "cancel": interrupted,
    "Prefect server down": prefect_down,
    "MLflow server down": mlflow_down,
    "disk full": full_disk,
    "two runs": two_runs,
    "damaged object in DVC's cache": damaged_object,
    "truncated files": truncated_files,
}


def main() -> None:
    """Inject the faults that were not measured yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path(".cache/faults"), help="directory of the copy and of the results")
    parser.add_argument("--only", nargs="*", default=list(FAULTS), choices=list(FAULTS), metavar="NAME")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    file = options.work.absolute() / "faults.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    project = Project(options.work.absolute() / "project")
    for name, inject in {"undisturbed": lambda project, _: undisturbed(project), **FAULTS}.items():
        if name in results or name not in ("undisturbed", *options.only):
            continue
        print(name, flush=True)
        results[name] = inject(project, results.get("undisturbed", {}))
        file.write_text(json.dumps(results, indent=1) + "\n")
        print(f"  {json.dumps({k: v for k, v in results[name].items() if k not in ('hashes', 'moments')})}", flush=True)


if __name__ == "__main__":
    main()
