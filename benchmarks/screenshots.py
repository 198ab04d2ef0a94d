"""Pictures of the pages that a user looks at: python -m benchmarks.screenshots [--project DIRECTORY] [--out DIRECTORY]

A clone of HEAD runs profile ``tiny`` twice, the second time with another learning rate. Then ``cm3leon ui`` and ``cm3leon serve`` run in
it, and a headless Chromium takes a picture of each page. What pages complain of, and errors in the servers' logs, are printed. A project
that has its two runs already is used as it is. About a quarter of an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from PIL import Image

from benchmarks.reproduce import clone, environment_of
from cm3leon.registry.ledger import EXPERIMENT as LEDGER
from cm3leon.registry.registry import CHALLENGER, MODEL_NAME
from cm3leon.services.environment import SERVER_FILE
from cm3leon.services.local import LOGS, free_port
from cm3leon.tracking.store import EXPERIMENT
from cm3leon.tracking.view import KEY, TRAINING, run_page
from cm3leon.utils.processes import stop_tree
from tests.browser_support import Browser

CHANGE = "pretrain.learning_rate=0.01"
"""Of the second run."""
CHAMPION_REPORT = "from flows.champion import evaluate_champion; evaluate_champion()"
WIDTH, COLORS = 1200, 256
"""Of a picture: pixels, and the most colors of its palette."""
START_SECONDS = 120.0
"""How long a server may take to answer."""
ERROR = re.compile(r"\bERROR\b|\bCRITICAL\b|Traceback")
NOISE = re.compile(r"WebGL|GL Driver")
"""What a browser without a graphics card complains of."""
WITHOUT_ASSISTANT = "try { localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true') } catch {}"
"""As after a user has closed MLflow's assistant, which opens by itself at the first visit."""


class Page(NamedTuple):
    """A page to take a picture of.

    Attributes:
        name: of the picture.
        url: its address.
        ready: text that it shows once it has its data.
        size: width and height of the window, pixels.
        act: what a user does there before the picture.
        whole: of the page, not only of what the window shows.
    """

    name: str
    url: str
    ready: str
    size: tuple[int, int] = (1440, 900)
    act: Callable[[Browser], None] = lambda browser: None
    whole: bool = False


class Project:
    """A clone in which the pipeline has run twice."""

    def __init__(self, root: Path) -> None:
        self.root = root
        if root.exists():
            self.environment = environment_of(root)
            return
        self.environment = clone(root, "HEAD", "tiny")
        self.run("flows.pipeline")
        self.run("cm3leon", "configure", "tiny", "--set", CHANGE)
        self.run("flows.pipeline")

    def run(self, *arguments: str) -> None:
        """``python -m ARGUMENTS``; ``-c`` and a script instead of a module."""
        command = [sys.executable, *([] if arguments[0] == "-c" else ["-m"]), *arguments]
        subprocess.run(command, cwd=self.root, env=self.environment, check=True)

    @contextmanager
    def server(self, *arguments: str, is_up: Callable[[], bool]) -> Iterator[None]:
        """``cm3leon ARGUMENTS`` until the block ends; its output is ``.cache/screenshots/COMMAND.log``."""
        log = self.root / ".cache" / "screenshots" / f"{arguments[0]}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "cm3leon", *arguments], cwd=self.root, env=self.environment, stdout=output, stderr=output
            )
        try:
            end = time.monotonic() + START_SECONDS
            while not is_up():
                if process.poll() is not None or time.monotonic() > end:
                    raise SystemExit(f"{' '.join(arguments)} did not start: {log.read_text()}")
                time.sleep(0.2)
            yield
        finally:
            stop_tree(process.pid, 10)
            process.wait()
            report(f"cm3leon {arguments[0]}", errors_of(log))


def report(what: str, complaints: list[str]) -> None:
    """Print what a page or a server complains of."""
    for line in dict.fromkeys(complaints):
        print(f"  {what}: {line[:400]}", flush=True)


def errors_of(log: Path) -> list[str]:
    """The lines of a server's log that tell of errors."""
    return [line for line in log.read_text(errors="replace").splitlines() if ERROR.search(line)]


def answers(url: str) -> bool:
    """Whether a server answers with success."""
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except OSError:
        return False


def mlflow_pages(address: str, files: Path) -> Iterator[Page]:
    """Pages of MLflow, and files that runs keep there."""
    from mlflow import MlflowClient

    client, newest = MlflowClient(tracking_uri=address, registry_uri=address), ["attributes.start_time DESC"]
    ids = {found.name: found.experiment_id for found in client.search_experiments()}
    experiment, ledger = ids[EXPERIMENT], ids[LEDGER]
    runs = client.search_runs([experiment], "tags.stage = 'pipeline' and attributes.status = 'FINISHED'", order_by=newest, max_results=2)
    [pretraining] = client.search_runs([experiment], "tags.stage = 'pretrain'", order_by=newest, max_results=1)
    version = client.get_model_version_by_alias(MODEL_NAME, CHALLENGER)
    view = f"{address}/#/experiments/{experiment}/runs?{TRAINING}&viewStateShareKey={KEY}"
    chosen, experiments = (quote(json.dumps(found)) for found in ([run.info.run_id for run in runs], [experiment]))
    run, training = (f"{address}/{run_page(experiment, found.info.run_id)}" for found in (runs[0], pretraining))
    yield Page("mlflow-runs", view, "Run Name", (1440, 620))
    yield Page("mlflow-compare", f"{view}&compareRunsMode=CHART", "What differs", (1440, 1700))
    yield Page(
        "mlflow-compare-runs", f"{address}/#/compare-runs?runs={chosen}&experiments={experiments}&{TRAINING}", "Comparing", (1440, 1800)
    )
    yield Page("mlflow-run", run, "Description", (1440, 1000))
    yield Page("mlflow-run-charts", run.replace("?", "/model-metrics?"), "Add chart", (1440, 1400))
    yield Page("mlflow-stage-charts", training.replace("?", "/model-metrics?"), "Add chart", (1440, 1400))
    yield Page("mlflow-version", f"{address}/#/models/{MODEL_NAME}/versions/{version.version}?{TRAINING}", "Schema", (1440, 1400))
    yield Page("mlflow-model", f"{address}/#/models/{MODEL_NAME}?{TRAINING}", "Registered at", (1440, 700))
    yield Page("mlflow-ledger", f"{address}/#/experiments/{ledger}/runs?{TRAINING}", "Run Name", (1440, 620))
    for file, picture in (("gate.html", "gate"), ("release/release.html", "release")):
        yield Page(picture, Path(client.download_artifacts(str(version.run_id), file, str(files))).as_uri(), "", (1200, 900), whole=True)


def prefect_pages(address: str) -> Iterator[Page]:
    """Pages of Prefect: the newest run of the pipeline, and the newest artifact of each key."""

    def find(what: str, **query: Any) -> list[dict[str, Any]]:
        request = urllib.request.Request(f"{address}/api/{what}/filter", json.dumps(query).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            return list(json.load(answer))

    [run] = find("flow_runs", flows={"name": {"any_": ["cm3leon"]}}, sort="START_TIME_DESC", limit=1)
    yield Page("prefect-runs", f"{address}/runs", run["name"])
    yield Page("prefect-run", f"{address}/runs/flow-run/{run['id']}", run["name"], (1440, 900))
    yield Page("prefect-artifacts", f"{address}/artifacts", "report", (1440, 500))
    for artifact in find("artifacts/latest"):
        yield Page(f"prefect-{artifact['key']}", f"{address}/artifacts/artifact/{artifact['latest_id']}", artifact["key"], (1440, 1100))


def files_of(project: Project, scratch: Path) -> Iterator[Page]:
    """Pages that commands write."""
    prompts, comparison = scratch / "prompts.txt", scratch / "comparison.html"
    prompts.write_text("a red circle left of a blue square\na large yellow ring on a black background\n")
    project.run("cm3leon", "drift")
    project.run("cm3leon", "compare", "models:/cm3leon/1", "models:/cm3leon/2", "--prompts", str(prompts), "--out", str(comparison))
    yield Page("drift", (project.root / ".cache" / "drift.html").as_uri(), "Drift", (1200, 900), whole=True)
    yield Page("comparison", comparison.as_uri(), "", (1200, 900), whole=True)


def first_row(browser: Browser) -> None:
    """Open the page of the first checks in the index of the Data Docs."""
    browser.evaluate("document.querySelector('a[href^=validations]').click()")
    browser.until("document.URL.includes('validations') && document.readyState === 'complete'")


def generate(browser: Browser) -> None:
    """What a user of the serving page does first."""
    browser.until("document.querySelector('#model').textContent.includes('generates')", START_SECONDS)
    browser.write("#prompt", "a green ring and a purple square on a white background")
    browser.click("summary")
    browser.write("[name=retrieved_documents]", "1")
    browser.click("#go")
    browser.until("document.querySelectorAll('figure img.small').length === 4", START_SECONDS)
    browser.evaluate("window.scrollTo(0, 0)")


def take(browser: Browser, page: Page, folder: Path) -> None:
    """Take the picture of one page."""
    browser.complaints.clear()
    browser.failed_requests.clear()
    browser.resize(*page.size)
    try:
        browser.visit(page.url, f"document.body.innerText.includes({json.dumps(page.ready)})", 60)
    except AssertionError as error:  # the picture shows what came instead
        report(page.name, [str(error)])
    browser.until_quiet()
    page.act(browser)
    browser.until_quiet()
    file = folder / f"{page.name}.png"
    browser.screenshot(file)
    shrink(file, None if page.whole else page.size[1])
    print(f"{file}  {file.stat().st_size / 1000:.0f} kB", flush=True)
    report(page.name, [line for line in browser.complaints + browser.failed_requests if not NOISE.search(line)])


def shrink(file: Path, height: int | None) -> None:
    """Cut a picture below ``height``, and make it at most :data:`WIDTH` wide, with a palette."""
    with Image.open(file) as picture:
        smaller = picture.convert("RGB").crop((0, 0, picture.width, min(height or picture.height, picture.height)))
    if smaller.width > WIDTH:
        smaller = smaller.resize((WIDTH, round(smaller.height * WIDTH / smaller.width)), Image.Resampling.LANCZOS)
    smaller.quantize(COLORS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(file, optimize=True)


def main() -> None:
    """Run the project where there is none, and take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--project", type=Path, default=Path(".cache/screenshots/project"), help="used as it is if it exists")
    parser.add_argument("--out", type=Path, default=Path(".cache/screenshots/pictures"), help="folder of the pictures")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="only pictures whose names begin so, without new reports")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    program = shutil.which("chromium") or sys.exit("error: the program chromium is not installed")
    project = Project(options.project.absolute())
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, ExitStack() as stack:
        scratch = Path(folder)
        (scratch / "browser").mkdir()
        browser = Browser(program, scratch / "browser")
        stack.callback(browser.close)
        browser.send("Page.addScriptToEvaluateOnNewDocument", source=WITHOUT_ASSISTANT)
        for page in all_pages(project, scratch, reports=not options.only):
            if not options.only or page.name.startswith(tuple(options.only)):
                take(browser, page, options.out)


def all_pages(project: Project, scratch: Path, reports: bool) -> Iterator[Page]:
    """All pages, each while its server runs; ``reports``: also those that commands write first."""
    announced, port = project.root / SERVER_FILE, free_port(0)
    announced.unlink(missing_ok=True)  # of a run that was killed
    with project.server("ui", *(f"--{name}-port={free_port(0)}" for name in ("mlflow", "prefect", "docs")), is_up=announced.is_file):
        servers = json.loads(announced.read_text())["servers"]
        if reports:
            project.run("-c", CHAMPION_REPORT)
        yield from mlflow_pages(servers["MLflow"], scratch)
        yield from prefect_pages(servers["Prefect"])
        yield Page("data-docs", f"{servers['Data Docs']}/index.html", "Data Docs", (1200, 620))
        yield Page("data-docs-rows", f"{servers['Data Docs']}/index.html", "Data Docs", (1200, 900), first_row)
        yield Page("data-report", f"{servers['Data Docs']}/data_report.html", "Data report", (1200, 900), whole=True)
        for log in sorted((project.root / LOGS).glob("*.log")):
            report(log.name, errors_of(log))
    if reports:
        yield from files_of(project, scratch)
    with project.server("serve", f"--port={port}", is_up=lambda: answers(f"http://127.0.0.1:{port}/")):
        yield Page("serving", f"http://127.0.0.1:{port}/", "cm3leon", (1200, 750), generate)


if __name__ == "__main__":
    main()
