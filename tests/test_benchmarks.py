"""The benchmark scripts load, and the functions of their own are right."""

import ast
import functools
import importlib.util
import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import numpy as np
import pytest
import torch
from results_support import fresh_run

from benchmarks import gpu, repeat
from benchmarks.study import claims, report, runs
from benchmarks.study.claims import CLAIMS
from benchmarks.study.section import Finding, Section, difference, higher, lower, over_trainings, tokens_to_loss, with_range
from cm3leon.config import paths
from cm3leon.config.profiles import configure
from cm3leon.config.schema import Config
from cm3leon.evaluation.record import Record
from cm3leon.evaluation.reference import FreshRun, parameters_digest, read_runs, write_runs
from cm3leon.generation import cache, engine
from cm3leon.stages.common import STAGES
from cm3leon.tracking.runs import pipeline_run
from cm3leon.utils.errors import UserError
from cm3leon.utils.processes import has_ended, identity

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "benchmarks").glob("*.py"))


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_loads_and_states_its_command(path: Path) -> None:
    text = load(path).__doc__ or ""
    assert f"python benchmarks/{path.name}" in text or f"python -m benchmarks.{path.stem}" in text


def test_codes_of_patches_are_compared_both_ways() -> None:
    [path] = [path for path in SCRIPTS if path.stem == "image_tokenizer"]
    script, images = load(path), np.zeros((2, 8, 8, 3), dtype=np.uint8)
    images[:, 4:] = 9  # two different patches, each four times

    def compared(codes: list[int]) -> Any:
        found = script.codes_of_patches(images, np.array([codes, codes]), 4)
        return pytest.approx((script.code_uncertainty(found, 2), script.confused_patches(found, 2)))

    assert compared([1, 1, 2, 2]) == (0, 0)
    assert compared([1, 3, 2, 2]) == (2 * math.log(2), 0)  # the first patch has one of two codes, four times in two images
    assert compared([1, 1, 1, 1]) == (0, 2)
    assert compared([1, 1, 2, 1]) == (2 * math.log(2), 1)  # one of an image's second patches has the code of the first


def test_colors_are_swapped_between_two_different_objects_only() -> None:
    [script] = [path for path in SCRIPTS if path.stem == "decoder"]
    swapped = load(script).swapped_colors
    assert swapped("a small red circle left of a blue square on a red background") == (
        "a small blue circle left of a red square on a red background"
    )
    assert swapped("a red circle above a red square") is None and swapped("a red circle left of a blue circle") is None
    assert swapped("two red circles on white") is None and swapped("a red circle on blue") is None


def test_relations_are_turned_round() -> None:
    [script] = [path for path in SCRIPTS if path.stem == "decoder"]
    opposite = load(script).opposite_relation
    assert opposite("a red circle left of a blue square on white") == "a red circle right of a blue square on white"
    assert opposite("on white: a red circle below a blue square") == "on white: a red circle above a blue square"
    assert opposite("a red circle and a blue square on white") is None


def test_a_claim_holds_if_the_interval_over_trainings_excludes_zero_on_its_side() -> None:
    assert higher("x", [3.0, 4.0, 3.5], [1.0, 2.0, 1.5]).verdict == "holds"
    assert lower("x", [3.0, 4.0, 3.5], [1.0, 2.0, 1.5]).verdict == "does not hold"
    assert higher("x", [1.0, 3.0, 2.0], [2.0, 4.0, 1.0]).verdict == "undecided"
    alone = higher("x", [3.0], [1.0])
    assert alone.verdict == "undecided" and alone.cells == ["x", "+2.000", "one training only", "undecided"]


def test_differences_have_student_intervals() -> None:
    first, second = [0.31, 0.52, 0.43], [0.20, 0.45, 0.30]
    # By hand: the quantile 0.975 of Student's distribution is 4.302653 with two degrees of freedom.
    of_pairs = np.subtract(first, second)
    half = 4.302653 * of_pairs.std(ddof=1) / math.sqrt(3)
    mean = of_pairs.mean()
    assert difference(first, second) == pytest.approx((mean, mean - half, mean + half), abs=1e-6)
    assert difference([0.5, 0.5], [0.2, 0.2]) == pytest.approx((0.3, 0.3, 0.3))  # no variance, no division by it


def test_means_and_ranges_over_trainings() -> None:
    [point, _] = over_trainings((1.0, 2.0), np.array([[0.2, 0.5], [0.4, 0.5]]))
    assert point == pytest.approx((1.0, 0.3, 0.2, 0.4)) and with_range(point) == "0.300 (0.20 to 0.40)"


def test_of_some_candidates_the_one_with_the_highest_clip_score_counts() -> None:
    drawn = {"right": [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]], "clip": [[0.2, 0.3, 0.9], [0.1, 0.5, 0.4]]}
    found = [claims.best_of(drawn, np.arange(count)) for count in (1, 2, 3)]
    assert found == [0.5, 0.5, 1.0]


def test_results_are_kept_for_the_same_key_and_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    study = runs.Study(Config(), 10, 5, 1)
    study.__dict__["inputs"] = "hash"
    asked: list[int] = []

    def compute() -> int:
        asked.append(1)
        return len(asked)

    assert [study.kept("x", "a", compute), study.kept("x", "a", compute), study.kept("x", "b", compute)] == [1, 1, 2]
    other = runs.Study(Config(), 10, 5, 1)
    other.__dict__["inputs"] = "another hash"
    assert other.kept("x", "a", compute) == 3 and study.kept("x", "a", compute) == 1


def test_tokens_to_a_loss_are_interpolated_between_validations() -> None:
    curve = [{"tokens": 100.0, "loss": 3.0}, {"tokens": 200.0, "loss": 2.0}, {"tokens": 300.0, "loss": 1.0}]
    assert tokens_to_loss(curve, "loss", 1.5) == 250 and tokens_to_loss(curve, "loss", 0.5) is None
    assert tokens_to_loss(curve, "loss", 3.5) == 100  # reached at the first validation already


def test_a_stage_that_was_restored_has_no_seconds() -> None:
    [path] = [path for path in SCRIPTS if path.stem == "orchestration"]
    script, line = load(path), "10:00:0{}.000 | INFO    | {} - {}\n"
    texts = {
        0: ("Task run 'ingest'", "Stage 'ingest' is cached - skipping run, checking out outputs"),
        1: ("Task run 'ingest'", f"{script.END} 'dvc.lock'"),
        2: ("Task run 'encoder'", f"{script.START}cm3leon encoder"),
        5: ("Task run 'encoder'", f"{script.END} 'dvc.lock'"),
        6: ("Flow run 'small'", "Finished in state Completed()"),
    }
    log = "".join(line.format(second, *said) for second, said in texts.items())
    assert script.seconds_of(log) == (6, {"encoder": 3})


def test_the_page_has_a_section_and_a_plot_for_each_claim(tmp_path: Path) -> None:
    points = [(1.0, 0.2, 0.1, 0.3), (2.0, 0.4, 0.3, 0.5)]
    finding = Finding("more is better", 0.1, 0.05, 0.15, "holds")
    sections = {
        name: Section(f"({name[0]}) {name}", "so", [finding], "A note.", [["a", "b"], ["1", "2"]], ("x", "y"), {"one": points})
        for name in CLAIMS
    }

    class Study:
        tokens, seeds, captions, runs = 10, 2, ("x",), (Path(),)

    report.write(Study(), sections, tmp_path)
    page = (tmp_path / "study.md").read_text()
    for name in CLAIMS:
        assert f"## ({name[0]}) {name}" in page and (tmp_path / f"study-{name}.png").is_file()
        assert f"| ({name[0]}) | more is better | +0.100 | +0.050 to +0.150 | holds |" in page


class KnownStudy:
    """A study whose decoders have known scores: the larger, and those trained with retrieval, are better."""

    tokens, seeds, prompts, captions, runs = 300, 2, 4, ("a red circle",), (Path("one"), Path("other"))
    config = Config()

    @contextmanager
    def at(self, run: Path) -> Iterator[Self]:
        yield self

    def trained(self, name: str, changes: Sequence[str], seed: int) -> tuple[Path, dict[str, Any]]:
        first = {"retrieval": 2.9, "no-retrieval": 3.0, "size-small": 4.0, "size-large": 1.5}.get(name, 3.0) + seed / 100
        names = ("val_alone_loss", "val_retrieved_loss")
        curve = [{"tokens": 100.0 * step, **dict.fromkeys(names, first - step / 10)} for step in (1, 2, 3)]
        return Path(f"{name}-{seed}"), {"parameters": 1000, "steps": 3, "curve": curve}

    def composition(self, model: Path, count: int = 1, **settings: Any) -> dict[str, Any]:
        mean = 0.5 if settings.get("guidance", 1.5) == 1.5 else 0.2
        return {"mean": mean, "interval": [mean - 0.1, mean + 0.1]}

    def kept(self, name: str, key: Any, compute: Callable[[], Any]) -> Any:
        if name == "tasks":
            return {"vqa_accuracy": {"mean": {"tuned": 0.9, "pretrained": 0.2}[key[0]]}}
        if name == "candidates":  # right from the tenth candidate on, as are all that the mixture takes of CD-K
            right = [[float(number >= 9) for number in range(claims.COUNTS[-1])]] * 4
            return {"right": right, "clip": right}
        return 1.5


@pytest.fixture
def known_study(monkeypatch: pytest.MonkeyPatch) -> KnownStudy:
    monkeypatch.setattr(claims, "content_hash", str)
    return KnownStudy()


@pytest.mark.parametrize(
    ("claim", "expected"),
    [
        ("retrieval", [(-0.1, "holds"), (-0.333, "holds"), (0.0, "undecided"), (0.0, "undecided")]),
        ("guidance", [(0.0, "holds")]),
        ("candidates", [(1.0, "holds"), (1.0, "holds"), (0.0, "undecided"), (0.0, "undecided")]),
        ("masking", [(0.0, "undecided"), (0.0, "undecided"), (0.0, "undecided")]),
        ("tuning", [(0.7, "holds")]),
        ("sizes", [(-2.5, "holds"), (0.0, "undecided")]),
    ],
)
def test_verdicts_follow_from_the_scores(known_study: KnownStudy, claim: str, expected: list[tuple[float, str]]) -> None:
    section = CLAIMS[claim](known_study)
    assert [finding.verdict for finding in section.findings] == [verdict for _, verdict in expected]
    assert [finding.effect for finding in section.findings] == pytest.approx([effect for effect, _ in expected], abs=1e-3)
    assert len({len(row) for row in section.table}) == 1 and len(section.table) > 1
    published = (Path(__file__).parents[1] / "docs" / "study.md").read_text()
    assert f"## {section.title}" in published and section.paper in published
    assert f"| {' | '.join(section.table[0])} |" in published


def test_a_study_works_where_another_run_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    run.mkdir()
    configure("tiny", params=run / "params.yaml")
    monkeypatch.chdir(tmp_path)
    study = runs.Study(Config(), 10, 5, 1)
    with study.at(run) as own:
        assert own.config.profile == "tiny" and Path.cwd() == run
    assert Path.cwd() == tmp_path and study.config.profile == "small"


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_the_benchmark_for_gpus_rehearses_on_a_cpu_and_goes_on_where_it_ended(tmp_path: Path) -> None:
    """Without compiling, which takes minutes; compiled training and decoding have their own tests."""
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--rehearse", "--skip", "compiled", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads((tmp_path / "results.json").read_text())
    assert not [name for name, found in written["results"].items() if "error" in found]
    assert len(written["results"]) >= 14 and "not measured" not in done.stdout
    assert all(f"| {name} | " in (tmp_path / "results.md").read_text() for name in written["results"])
    del written["results"]["images"]
    (tmp_path / "results.json").write_text(json.dumps(written))
    again = subprocess.run([*command, "--minutes", "0"], capture_output=True, text=True, check=False)
    assert "not measured yet, for want of time: images; the same command goes on" in again.stdout and again.returncode == 0


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_the_benchmark_for_gpus_counts_the_passes_of_decoding(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(cache, "_compiled_read", cache._compiled_read.__wrapped__)
    monkeypatch.setattr(engine, "MAX_WINDOW", 1)  # one code a pass
    model = gpu.make_decoder((1, 32, 2), 128, gpu.TINY.vocabulary, torch.device("cpu"), torch.float32)
    model.compiled_decoding = compiled
    with gpu.counted_passes() as passes:
        gpu.generate(model, 1, gpu.sampler())
    assert len(passes) == gpu.TINY.vocabulary.tokens_per_image - 1  # the first code follows from the prompt


def test_no_script_looks_at_the_test_split() -> None:
    """Settings are chosen on val; only the stage ``evaluate`` measures on test."""
    for script in sorted((ROOT / "benchmarks").rglob("*.py")):
        constants = {node.value for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.Constant)}
        assert "test" not in constants, script


def test_seeds_that_are_missing_are_trained_and_kept_as_soon_as_they_end(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    trained: list[int] = []

    def train(seed: int) -> FreshRun:
        if seed == 3:
            raise KeyboardInterrupt
        trained.append(seed)
        return fresh_run(seed)

    with pytest.raises(KeyboardInterrupt):
        repeat.repeat([0, 1, 3], 2, results, "p", train)
    assert [run.seed for run in read_runs(results)] == [0, 1]
    assert "There are 2 of 5 runs." in (tmp_path / "results.md").read_text()
    repeat.repeat([0, 1, 2], 2, results, "p", train)
    assert trained == [0, 1, 2] and [run.seed for run in read_runs(results)] == [0, 1, 2]
    repeat.repeat([0], 1, results, "p", lambda seed: fresh_run(seed, threads=1))
    assert [(run.seed, run.threads) for run in read_runs(results)] == [(0, 2), (1, 2), (2, 2), (0, 1)]


def test_seeds_count_again_under_other_parameters(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    write_runs(results, [fresh_run(0, parameters="old"), fresh_run(1, parameters="old")])
    repeat.repeat([], 2, results, "p", fresh_run)
    assert len(read_runs(results)) == 2 and "There are 2 of 5 runs." in (tmp_path / "results.md").read_text()
    repeat.repeat([1], 2, results, "p", fresh_run)
    assert read_runs(results) == [fresh_run(1)]


class Clones:
    """In place of clones and pipelines: which projects were cloned, and the exit status of the pipelines."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cloned: list[str] = []
        self.monkeypatch = monkeypatch
        monkeypatch.setattr(repeat, "clone", self.clone)
        monkeypatch.setattr(repeat, "check_parameters", self.check)
        self.own = "parameters"
        monkeypatch.setattr(repeat, "collect", lambda project, threads, minutes: fresh_run(0, threads=threads, minutes=minutes))

    def clone(self, to: Path, commit: str, profile: str, *changes: str) -> None:
        assert (commit, profile, changes) == ("HEAD", "small", ("seed=0",))
        to.mkdir()
        self.cloned.append(to.name)

    def check(self, project: Path, parameters: str) -> None:
        assert (project.name, parameters) == (self.cloned[-1], "parameters")
        if parameters != self.own:
            raise UserError("other parameters")

    def train(self, directory: Path, threads: int = 2, status: int = 0, beside: bool = False) -> FreshRun:
        self.monkeypatch.setattr(repeat, "PIPELINE", ["-c", f"import sys; sys.exit({status})"])
        return repeat.train_in_clone(0, threads, directory, "parameters", beside)


def test_an_interrupted_training_goes_on_in_its_clone_and_has_no_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clones = Clones(monkeypatch)
    with pytest.raises(subprocess.CalledProcessError):
        clones.train(tmp_path, status=1)
    assert clones.train(tmp_path).minutes is None and len(clones.cloned) == 1
    other = clones.train(tmp_path, threads=1)
    assert other.minutes is not None and other.threads == 1 and len(set(clones.cloned)) == 2


SLEEPING = """
import sys; from benchmarks import repeat
repeat.PIPELINE = ["-c", "import os, pathlib, time; pathlib.Path('pid').write_text(f'{os.getpid()} '); time.sleep(120)"]
repeat.clone = lambda to, *rest: to.mkdir()
repeat.check_parameters = lambda *rest: None
repeat.main()
"""


def test_a_training_that_is_ended_ends_its_pipeline(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SLEEPING, "--seeds", "99", "--directory", str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT) as process:
        until = time.monotonic() + 60
        while not (found := list(tmp_path.glob("small-*-seed-99-*/pid"))) or not found[0].read_text().endswith(" "):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.05)
        pipeline = identity(int(found[0].read_text()))
        process.terminate()
        assert process.wait(30) == 128 + signal.SIGTERM and has_ended(pipeline)


def test_a_training_beside_other_work_has_no_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Clones(monkeypatch).train(tmp_path, beside=True).minutes is None


def test_a_training_that_has_ended_is_made_again_in_a_new_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clones = Clones(monkeypatch)
    assert clones.train(tmp_path).minutes is not None and clones.train(tmp_path).minutes is not None
    assert len(clones.cloned) == 2


def test_half_of_a_clone_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "small-paramete-seed-0-threads-2").mkdir()
    clones = Clones(monkeypatch)
    assert clones.train(tmp_path).minutes is not None and len(clones.cloned) == 1


def test_a_clone_of_other_parameters_is_not_trained_and_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clones = Clones(monkeypatch)
    clones.own = "those of HEAD"
    with pytest.raises(UserError):
        clones.train(tmp_path)
    clones.own = "parameters"
    assert clones.train(tmp_path).minutes is not None and len(clones.cloned) == 2


def test_the_parameters_of_a_project_are_read_by_its_own_code(tmp_path: Path) -> None:
    for name, text in {"__init__": "", "config/__init__": "", "config/loading": "load_config = str", "evaluation/__init__": ""}.items():
        file = tmp_path / "cm3leon" / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    with pytest.raises(UserError, match="does not tell its parameters: ModuleNotFoundError"):
        repeat.check_parameters(tmp_path, "mine")
    (tmp_path / "cm3leon" / "evaluation" / "reference.py").write_text("parameters_digest = lambda config: 'own'")
    repeat.check_parameters(tmp_path, "own")
    with pytest.raises(UserError, match=r"\(own\) are not those of profile small in this checkout \(mine\)"):
        repeat.check_parameters(tmp_path, "mine")


def pipeline_of(config: Config, *stages: str) -> None:
    """A pipeline's run in which stages ran, a second each."""
    with pipeline_run(config) as run:
        run.log_metrics({f"pipeline/{stage}_seconds": 1.0 for stage in stages})


def test_a_finished_run_is_added_with_times_if_all_its_stages_ran(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []
    monkeypatch.setattr(repeat, "check_parameters", lambda project, parameters: checked.append(parameters))
    config = configure("tiny", ["seed=4"], configs=ROOT / "configs")
    with pytest.raises(UserError, match=r"record\.json; add a checkout"):
        repeat.finished(project, 2, "p")
    Record({"composition": 0.5}, contract={"prompts": "1"}).write(paths.EVALUATION)
    with pytest.raises(UserError, match="no run of the pipeline that has ended"):
        repeat.finished(project, 2, "p")
    pipeline_of(config)  # the one before, which ran the stages, was killed
    assert repeat.finished(project, 2, "p").minutes is None
    pipeline_of(config, *STAGES)
    pipeline_of(config)  # all is up to date: another run of nothing
    found = repeat.finished(project, 3, "p")
    assert (found.seed, found.threads, list(found.seconds)) == (4, 3, list(STAGES)) and found.minutes is not None
    pipeline_of(config, "evaluate")
    again = repeat.finished(project, 3, "p")
    assert (again.minutes, again.seconds) == (None, {}) and again.scores == found.scores and checked == ["p"] * 4
    monkeypatch.setattr(repeat, "changed_files", lambda project: ["params.yaml", "cm3leon/models/decoder.py"])
    with pytest.raises(UserError, match=r"with changes of cm3leon/models/decoder\.py; nothing tells"):
        repeat.finished(project, 3, "p")
    monkeypatch.setattr(repeat, "changed_files", lambda project: ["params.yaml"])
    monkeypatch.setattr(repeat, "commit_of", lambda project: "a later one")
    with pytest.raises(UserError, match=r"at commit unknown: it is at a later, with changes of nothing"):
        repeat.finished(project, 3, "p")
    results = project / "results.json"
    for run in (found, found):
        repeat.keep(run, results)
    assert read_runs(results) == [found] and "There is one run of 5." in (project / "results.md").read_text()


def test_a_run_is_collected_from_its_project(project: Path) -> None:
    configure("tiny", ["seed=4"], configs=ROOT / "configs")
    record = Record({"composition": 0.5}, calibration={"composition_real": 1.0}, contract={"prompts": "1"})
    record.write(paths.EVALUATION)
    with pipeline_run(Config(profile="tiny")) as run:
        run.log_metrics(
            {"pipeline/sft_seconds": 12.34, "pipeline/ingest_seconds": 2.0, "pipeline/sft_peak_megabytes": 900.0, "pipeline/seconds": 15.0}
        )
    found = repeat.collect(project, 2, 0.5)
    assert (found.seed, found.threads, found.profile, found.minutes, found.peak_megabytes) == (4, 2, "tiny", 0.5, 900.0)
    assert list(found.seconds.items()) == [("ingest", 2.0), ("sft", 12.3)]
    assert found.scores == record.scores and found.calibration == record.calibration
    assert found.parameters == parameters_digest(configure("tiny", configs=ROOT / "configs"))
    resumed = repeat.collect(project, 2, None)
    assert (resumed.minutes, resumed.seconds, resumed.peak_megabytes) == (None, {}, None) and resumed.scores == found.scores


def test_a_processor_is_named_with_its_widest_instructions(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: AMD EPYC\nflags\t\t: sse avx2 avx512f\n\nprocessor\t: 1\nmodel name\t: AMD EPYC\n")
    assert repeat.processor(cpuinfo) == "AMD EPYC, AVX-512"
    assert repeat.processor(tmp_path / "none") == "unknown"
