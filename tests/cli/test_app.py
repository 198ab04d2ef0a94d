"""The command: its help is quick, users' errors are one line, and each command passes on what it was given."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
import yaml
from PIL import Image
from tests_support import decoding
from typer.testing import CliRunner

from cm3leon.cli import app, model, options
from cm3leon.config.loading import load_config
from cm3leon.config.schema import DecodingConfig
from cm3leon.generation.checks import PromptTooLongError
from cm3leon.generation.generator import Generator
from cm3leon.generation.results import GeneratedImage
from cm3leon.generation.settings import SETTINGS, bounds_of
from cm3leon.generation.task_names import GENERATOR_TASKS
from cm3leon.stages.common import METRICS, STAGES
from cm3leon.utils.errors import UserError, message_to_user

ROOT = Path(__file__).parents[2]
COMMANDS: dict[str, Any] = typer.main.get_command(app.app).commands  # type: ignore[attr-defined]
HEAVY = ("torch", "mlflow", "prefect", "dvc", "great_expectations", "open_clip", "faiss", "pandas", "numpy")


def test_every_error_that_derives_from_the_users_own_is_one_line():
    from cm3leon.evaluation.leakage import LeakageError
    from cm3leon.registry.bundle import IncompleteRecordError
    from cm3leon.training.checkpoint import CheckpointError

    assert all(message_to_user(kind("x")) for kind in (UserError, LeakageError, IncompleteRecordError, CheckpointError))
    assert not any(message_to_user(kind("x")) for kind in (ValueError, RuntimeError, KeyError))


class Recorder:
    """A real generator of untrained models that records its calls."""

    def __init__(self, generator: Generator) -> None:
        self.generator = generator
        self.asked: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.generator, name)

        def recorded(*arguments: Any, **settings: Any) -> Any:
            self.asked.append((name, arguments, settings))
            return method(*arguments, **settings)

        return recorded


@pytest.fixture(scope="session")
def loaded(tiny_parts: dict[str, Path]) -> Generator:
    return Generator.from_parts(**tiny_parts, decoding=decoding(candidates=2))


@pytest.fixture
def generator(loaded: Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    monkeypatch.chdir(tmp_path)
    recorder = Recorder(loaded)
    monkeypatch.setattr(options, "load_generator", lambda model: recorder)
    return recorder


def call(*arguments: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of the command, in this process."""

    def as_entry_point(*_: Any, **__: Any) -> None:
        with app.plain_errors():
            app.app(arguments, standalone_mode=True)

    import contextlib
    import io

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            as_entry_point()
        except SystemExit as left:
            return int(left.code or 0), out.getvalue(), err.getvalue()
    return 0, out.getvalue(), err.getvalue()


def test_help_imports_nothing_heavy() -> None:
    code = f"""
import sys
from typer.testing import CliRunner
from cm3leon.cli import app
result = CliRunner().invoke(app.app, ["text-to-image", "--help"])
assert result.exit_code == 0, result.output
print([name for name in {HEAVY} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_dvc_stage_is_a_command_and_has_a_module() -> None:
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    assert list(stages) == list(STAGES)
    listed = CliRunner().invoke(app.app, ["--help"]).output
    for name, stage in stages.items():
        assert stage["cmd"].endswith(f" cm3leon {name}")
        assert name in listed
        assert (ROOT / f"cm3leon/stages/{name}.py").is_file()
    assert CliRunner().invoke(app.app, ["super-resolution", "--help"]).exit_code == 0


def test_configure_writes_parameters_that_every_command_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "configs", "configs")
    assert call("configure", "tiny", "--set", "seed=3") == (0, "params.yaml: profile tiny, seed=3\n", "")
    written = Path("params.yaml").read_text()
    assert (load_config().profile, load_config().seed) == ("tiny", 3)
    error = "error: --set sft.stepz=3: sft.stepz: unknown key; did you mean sft.steps?\n"
    assert call("configure", "tiny", "--set", "sft.stepz=3") == (2, "", error)
    assert Path("params.yaml").read_text() == written


def test_a_stage_prints_its_metrics_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text("seed: 5\n")
    fake = types.SimpleNamespace(run=lambda config: print("working") or {"seed": float(config.seed)})
    monkeypatch.setitem(sys.modules, "cm3leon.stages.ingest", fake)
    status, out, _ = call("ingest")
    assert status == 0
    first, last = out.splitlines()
    assert first == "working"
    metrics = json.loads(last.removeprefix(METRICS))
    assert metrics["seed"] == 5
    assert metrics["peak_megabytes"] > 10
    assert metrics["seconds"] >= 0


def test_missing_parameters_are_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cm3leon", "ingest"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
    )
    assert done.returncode == 2
    assert done.stderr == "error: params.yaml does not exist; write it with: cm3leon configure small\n"


def test_what_a_stage_cannot_work_with_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text("{}")

    def refuse(config: object) -> None:
        raise UserError("encoder has no images to train on")

    monkeypatch.setitem(sys.modules, "cm3leon.stages.encoder", types.SimpleNamespace(run=refuse))
    assert call("encoder") == (2, "", "error: encoder has no images to train on\n")


def test_other_errors_keep_their_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text("{}")

    def broken(config: object) -> None:
        raise KeyError("a defect")

    monkeypatch.setitem(sys.modules, "cm3leon.stages.ingest", types.SimpleNamespace(run=broken))
    with pytest.raises(KeyError, match="a defect"):
        call("ingest")


def test_text_to_image(generator: Recorder) -> None:
    status, out, _ = call(
        "text-to-image",
        "a red circle",
        "--seed",
        "3",
        "--guidance",
        "2.5",
        "--retrieved-documents",
        "1",
        "--set",
        "top_k=5",
        "--out",
        "one.png",
    )
    assert status == 0
    name, (prompts, number), settings = generator.asked[0]
    assert (name, prompts, number) == ("text_to_image", ["a red circle"], 1)
    assert settings == {"references": None, "seed": 3, "guidance": 2.5, "retrieved_documents": 1, "top_k": 5}
    picture = Image.open("one.png")
    assert picture.size == (32, 32)
    record = json.loads(picture.info["cm3leon"])
    assert record["prompt"] == "a red circle" and record["settings"]["top_k"] == 5
    assert re.fullmatch(r"one.png: seed [34], CLIP score -?0\.\d{3}", out.splitlines()[0])
    assert out.splitlines()[1] == f"retrieved: {record['retrieved_documents'][0]['id']} (CC0-1.0, us)"


def test_retrieved_documents_are_shown(generator: Recorder) -> None:
    Image.new("RGB", (4, 4), "red").save("a.png")
    _, out, _ = call("text_to_image", "a ring", "--retrieved-documents", "2", "--reference", "a.png", "--show-retrieved-documents")
    shown = [line for line in out.splitlines() if line.startswith("    ")]
    assert len(shown) == out.count("retrieved: ") == 2
    assert all(re.search(r"'.+', score -?\d\.\d{3}, source test", line) for line in shown)


def test_several_images_are_files_of_their_own_the_best_first(generator: Recorder) -> None:
    status, out, _ = call("text-to-image", "shapes", "--num-images", "3", "--out", "some.png")
    assert status == 0
    files = ["some.png", "some-2.png", "some-3.png"]
    assert sorted(path.name for path in Path().iterdir()) == sorted(files)
    records = [json.loads(Image.open(file).info["cm3leon"]) for file in files]
    assert [record["score"] for record in records] == sorted((record["score"] for record in records), reverse=True)
    assert out.splitlines() == [f"{f}: seed {r['seed']}, CLIP score {r['score']:.3f}" for f, r in zip(files, records, strict=True)]
    assert call("text-to-image", "one", "two", "--num-images", "2")[0] == 0
    assert {p.name for p in Path().glob("out*")} == {"out-p1.png", "out-p1-2.png", "out-p2.png", "out-p2-2.png"}


def test_images_are_upscaled(generator: Recorder) -> None:
    assert call("text-to-image", "shapes", "--num-images", "2", "--upscale")[0] == 0
    for name in ("out.png", "out-2.png"):
        picture = Image.open(name)
        assert picture.size == (64, 64)
        assert json.loads(picture.info["cm3leon"])["settings"]["upscale"] is True


IMAGE_COMMANDS = {
    "write": ["hello"],
    "layout_to_image": ["two things", "--object", "red circle=0,0,16,16", "--object", "ring=16,16,32,32"],
    "condition_to_image": ["a ring", "a.png", "--kind", "canny edge"],
    "edit": ["a.png", "make it blue", "--image-guidance", "1.2"],
    "infill": ["a.png", "5,5,30,20", "a ring"],
}


@pytest.mark.parametrize("name", IMAGE_COMMANDS)
def test_every_image_command_is_its_task(name: str, generator: Recorder) -> None:
    Image.new("RGB", (40, 30), "red").save("a.png")
    status, out, err = call(name, *IMAGE_COMMANDS[name], "--num-images", "2", "--set", "temperature=0.9")
    assert (status, err) == (0, "")
    for file, line in zip(("out.png", "out-2.png"), out.splitlines(), strict=True):
        record = json.loads(Image.open(file).info["cm3leon"])
        assert record["task"] == name and record["settings"]["temperature"] == 0.9
        assert line.startswith(f"{file}: seed {record['seed']}" + ("" if name == "edit" else ", CLIP score"))
    if "_" in name:
        assert call(name.replace("_", "-"), *IMAGE_COMMANDS[name])[0] == 0


def test_documents_texts_and_scores(generator: Recorder) -> None:
    Image.new("RGB", (40, 30), "red").save("a.png")
    status, out, _ = call("interleave", "a red circle", "--segments", "1")
    assert (status, out) == (0, "out.png: seed 0\n") and Image.open("out.png").size == (32, 32)
    long = "a red circle above a blue square and " * 8 + "a ring.png"
    assert call("interleave", long, "--segments", "1")[2].startswith("error: ")  # too long for the context, and no name of a file
    assert call("infill_text", "a ___ circle", "--image", "a.png")[1].startswith("a ")
    _, out, _ = call("score", "a.png", "a ring", "a red circle")
    assert re.fullmatch(r"(a ring|a red circle): text given image -\d+\.\d{3}, image given text -\d+\.\d{3}", out.splitlines()[1])
    assert call("upscale", "a.png", "--out", "big.png")[1] == "big.png: 80 x 60\n"


def program(*arguments: bytes, folder: Path) -> tuple[int, bytes, bytes]:
    """Exit status, standard output and standard error of the command in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "cm3leon", *arguments], cwd=folder, capture_output=True, check=False, env=environment)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("arguments", [
    [b"generate", b"caf\xe9"], [b"text-to-image", b"a ring", b"caf\xe9"], [b"interleave", b"caf\xe9"], [b"edit", b"a.png", b"caf\xe9"],
    [b"vqa", b"caf\xe9", b"What?"], [b"configure", b"tiny", b"--set", b"ingest.path=caf\xe9"], [b"promote", b"--reason", b"caf\xe9"],
    [b"caption", b"a.png", b"--model", b"caf\xe9"], [b"caf\xe9"],
])  # fmt: skip
def test_an_argument_that_is_not_utf_8_is_named_in_one_line(arguments: list[bytes], tmp_path: Path) -> None:
    status, out, err = program(*arguments, folder=tmp_path)
    number = next(number for number, argument in enumerate(arguments, 1) if b"\xe9" in argument)
    shown = arguments[number - 1].decode("utf-8", "backslashreplace")
    assert (status, out) == (2, b"")
    assert err.decode() == f"error: argument {number}, '{shown}', is not UTF-8, and no file has this name; write it in UTF-8\n"


def test_a_file_may_have_any_name(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_text("no image")
    status, out, err = program(b"caption", b"caf\xe9.png", folder=tmp_path)
    assert (status, out) == (2, b"")
    assert err.startswith(b"error: caf\\udce9.png: unreadable") and err.count(b"\n") == 1


def test_texts_that_are_no_unicode_are_bad_input(generator: Recorder) -> None:
    for arguments in (["text-to-image", "caf\udce9"], ["interleave", "caf\udce9"], ["write", "\ud800"]):
        status, _, err = call(*arguments)
        assert status == 2 and re.fullmatch(r"error: (prompt|text) 0, '(caf\\xe9|\\ud800)', is not UTF-8 throughout; .*\n", err)


def test_interleave_keeps_what_it_has_generated_where_it_cannot_go_on(generator: Recorder) -> None:
    made: list[Any] = []
    with pytest.raises(PromptTooLongError) as caught:
        made.extend(generator.generator.continued(["a red circle"], 40, seed=1))
    status, out, err = call("interleave", "a red circle", "--segments", "40", "--seed", "1")
    pictures = [part for part in made if isinstance(part, GeneratedImage)]
    files = [f"out{'' if number == 1 else f'-{number}'}.png" for number in range(1, len(pictures) + 1)]
    assert status == 2 and files
    for file, picture in zip(files, pictures, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(file)), np.asarray(picture.image))
        assert f"{file}: seed {picture.seed}\n" in out
    printed = ", what is printed above" if len(made) > len(pictures) else ""
    assert err == f"error: {caught.value}; generated before: {', '.join(files)}{printed}\n"
    assert call("interleave", "a red circle " * 40)[2].endswith("fewer retrieved documents\n"), "nothing was generated before"


def test_images_are_kept_where_they_cannot_be_enlarged(
    tiny_parts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plain = Generator.from_parts(**{name: path for name, path in tiny_parts.items() if name != "super_resolution"}, decoding=decoding())
    monkeypatch.setattr(options, "load_generator", lambda model: plain)
    status, out, err = call("text-to-image", "a ring", "--upscale", "--num-images", "2")
    assert status == 2 and [Image.open(file).size for file in ("out.png", "out-2.png")] == [(32, 32)] * 2
    assert [line.partition(":")[0] for line in out.splitlines()] == ["out.png", "out-2.png"]
    assert re.fullmatch(r"error: .*; not enlarged: out\.png, out-2\.png\n", err)


@pytest.mark.parametrize(("arguments", "message"), [
    (["text-to-image", "x", "--out", "out.jpg"], "error: --out out.jpg: images are written as PNG"),
    (["text-to-image", "x", "--out", "no/out.png"], "error: --out no/out.png: there is no directory no"),
    (["text-to-image", "x", "--out", "folder.png"], "error: --out folder.png: this is a directory; name a file"),
    (["compare", "a", "b", "--prompts", "text.png", "--out", "no/x.html"], "error: --out no/x.html: there is no directory no"),
    (["text-to-image", "x", "--top-p", "2"], "error: top_p: Input should be less than or equal to 1"),
    (["text-to-image", "x", "--set", "seed=3"], "error: --set seed=3: that is an option of its own: --seed 3"),
    (["text-to-image", "x", "--set", "num-images=3"], "error: --set num-images=3: that is an option of its own: --num-images 3"),
    (["text-to-image", "x", "--set", "topk=2"], "error: topk: Extra inputs are not permitted"),
    (["text-to-image", "x", "--set", "topk"], "error: --set topk: write it as name=value"),
    (["text-to-image", "x", "--guidance", "51"], "error: guidance: Input should be less than or equal to 50"),
    (["layout_to_image", "x", "--object", "dog"], "error: --object dog: write it as label=left,top,right,bottom"),
    (["layout_to_image", "x", "--object", "dog=1,2"], "error: --object dog: '1,2': write it as left,top,right,bottom"),
    (["infill", "missing.png", "1,2,3,4", "x"], "missing.png"),
    (["interleave", "a circle", "nope.png"], "No such file or directory: 'nope.png'"),
    (["text-to-image", "\u200b\ufeff"], "error: prompt 0 is empty"),
    (["infill", "missing.png", "1,2,3", "x"], "error: box '1,2,3'"),
    (["caption", "missing.png"], "missing.png"),
    (["caption", "text.png"], "error: text.png: unreadable"),
    (["configure", "huge"], "error: there is no profile 'huge'"),
])  # fmt: skip
def test_users_errors_are_one_line_and_status_2(arguments: list[str], message: str, generator: Recorder) -> None:
    Path("text.png").write_text("not an image")
    Path("folder.png").mkdir()
    status, out, err = call(*arguments)
    assert status == 2
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


def test_captions_and_answers(generator: Recorder) -> None:
    Image.new("RGBA", (4, 6)).save("a.png")
    Image.new("L", (5, 5)).save("b.png")
    [said] = generator.generator.caption([options.open_image(Path("a.png"))])
    assert call("caption", "a.png")[1] == f"{said.text}\n"
    out = call("long-caption", "a.png", "b.png")[1].splitlines()
    assert [line.split(":")[0] for line in out] == ["a.png", "b.png"]
    [told] = generator.generator.vqa([options.open_image(Path("b.png"))], ["What color?"])
    assert call("reasoning", "b.png", "Which?", "--option", "a", "--option", "b")[0] == 0
    assert call("vqa", "b.png", "What color?") == (0, f"{told.text}\n", "")
    assert len(call("vqa", "b.png", "What color?", "How many?")[1].splitlines()) == 2


def test_captions_of_images_before_one_that_cannot_be_read_are_printed(generator: Recorder) -> None:
    names = [f"{number:02d}.png" for number in range(model.TOGETHER + 2)]
    for number, name in enumerate(names):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(name)
    whole = call("caption", *names)[1].splitlines()
    assert [line.partition(":")[0] for line in whole] == names
    for bad in (model.TOGETHER + 1, 2):
        Path(names[bad]).write_text("no image")
        status, out, err = call("caption", *names)
        assert (status, out.splitlines()) == (2, whole[:bad])
        assert err.startswith(f"error: {names[bad]}: unreadable")


CHOICE = ["a.png", "Which?", "--option", "a", "--option", "b"]
FORMER = [
    (["generate", "a ring", "--guidance", "2"], ["text-to-image", "a ring", "--guidance", "2"]),
    (["ask", "a.png", "What?"], ["vqa", "a.png", "What?"]),
    (["answer", "a.png", "What?"], ["vqa", "a.png", "What?"]),
    (["reason", *CHOICE], ["reasoning", *CHOICE]),
    (["caption", "a.png", "--long"], ["long-caption", "a.png"]),
]
"""Commands as in earlier versions, and as of today."""


@pytest.mark.parametrize(("old", "new"), FORMER)
def test_former_names_are_hidden_and_print_a_notice(old: list[str], new: list[str], generator: Recorder) -> None:
    Image.new("RGB", (5, 5)).save("a.png")
    status, out, err = call(*old)
    assert (status, out) == call(*new)[:2]
    assert generator.asked[0] == generator.asked[1]
    assert re.fullmatch(rf"notice: 'cm3leon {old[0]}( --long)?' is now 'cm3leon {new[0]}'\n", err)
    command = COMMANDS[old[0]]
    assert command.hidden or next(option for option in command.params if option.name == "long").hidden


def test_every_task_is_a_command_with_the_decoding_settings_as_the_schema_declares_them() -> None:
    for task in GENERATOR_TASKS:
        command = COMMANDS[task.replace("_", "-")]
        assert not command.hidden
        found = {option.name: option for option in command.params}
        assert set(found) & set(DecodingConfig.model_fields) == set(SETTINGS.get(task, {"temperature"} & set(found)))
        for name in set(found) & set(DecodingConfig.model_fields):
            assert found[name].help.startswith(DecodingConfig.model_fields[name].description)
            assert all(str(bound) in found[name].help for bound in bounds_of(name).values())


def test_no_champion_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    status, _, err = call("text-to-image", "a red circle")
    assert status == 2
    assert "run make run first" in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_no_such_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    status, _, err = call("text-to-image", "a red circle", "--model", "models/bundle")
    assert status == 2
    assert "models/bundle is not a bundle" in err


def test_a_record_that_cannot_be_reproduced_is_said_in_a_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(ROOT / "params.yaml", "params.yaml")
    status, _, err = call("evaluate", "--reproduce", "nothing.json")
    assert status == 2 and "nothing.json is not an evaluation record" in err
    Path("old.json").write_text('{"scores": {}, "intervals": {}}')
    assert "old.json does not say with which settings it was made" in call("evaluate", "--reproduce", "old.json")[2]


def test_what_belongs_to_another_model_is_refused_without_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for option in ("--out", "--params"):
        assert "--out and --params belong to --model" in call("evaluate", option, "other")[2]
    status, _, err = call("evaluate", "--model", "models/bundle", "--params", "other.yaml")
    assert status == 2 and "other.yaml does not exist" in err


def test_changes_are_accepted_only_of_a_run_that_is_named():
    result = CliRunner().invoke(app.app, ["pretrain", "--accept-changes"])
    assert result.exit_code != 0 and "--accept-changes belongs to --resume-from" in str(result.exception)
