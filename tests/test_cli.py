"""The command: its help is quick, users' errors are one line, and each command passes on what it was given."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from cm3leon import cli
from cm3leon.config import UserError
from cm3leon.generation.generator import BadInputError, GeneratedImage

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "mlflow", "prefect", "dvc", "great_expectations", "open_clip", "faiss", "pandas", "numpy")


class FakeGenerator:
    """Remembers what it was asked."""

    asked: dict[str, Any]

    def text_to_image(self, prompts: list[str], num_images: int, **settings: Any) -> list[list[GeneratedImage]]:
        self.asked = {"prompts": prompts, "num_images": num_images, **settings}
        if settings["top_p"] == 2:
            raise BadInputError("top_p: at most 1")
        colours = ["red", "green", "blue", "white"]
        neighbours = [{"id": "ab12", "caption": "a square", "licence": "CC-BY-4.0", "attribution": "Ada", "score": 0.5}]
        return [
            [
                GeneratedImage(Image.new("RGB", (8, 8), colours[n % 4]), prompts[0], n, np.zeros(4), 0.5 - n / 10, neighbours)
                for n in range(num_images)
            ]
        ]

    def upscale(self, images: list[Image.Image]) -> list[Image.Image]:
        return [image.resize((2 * image.width, 2 * image.height)) for image in images]

    def caption(self, images: list[Image.Image], *, long: bool = False) -> list[str]:
        return [f"{'long' if long else 'short'} {image.size}" for image in images]

    def answer(self, images: list[Image.Image], questions: list[str]) -> list[str]:
        return [f"{questions[0]} {images[0].mode}"]


@pytest.fixture
def generator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeGenerator:
    monkeypatch.chdir(tmp_path)
    fake = FakeGenerator()
    monkeypatch.setattr(cli, "load_generator", lambda model: fake)
    return fake


def call(*arguments: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of the command, in this process."""

    def as_entry_point(*_: Any, **__: Any) -> None:
        with cli.plain_errors():
            cli.app(arguments, standalone_mode=True)

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
from cm3leon import cli
result = CliRunner().invoke(cli.app, ["generate", "--help"])
assert result.exit_code == 0, result.output
print([name for name in {HEAVY} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_dvc_stage_is_a_command_and_has_a_module() -> None:
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    assert list(stages) == list(cli.STAGES)
    listed = CliRunner().invoke(cli.app, ["--help"]).output
    for name, stage in stages.items():
        assert stage["cmd"].endswith(f" cm3leon {name}")
        assert name in listed
        assert (ROOT / f"cm3leon/stages/{name}.py").is_file()
    assert CliRunner().invoke(cli.app, ["super-resolution", "--help"]).exit_code == 0


def test_a_stage_prints_its_figures_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text("seed: 5\n")
    fake = types.SimpleNamespace(run=lambda config: print("working") or {"seed": float(config.seed)})
    monkeypatch.setitem(sys.modules, "cm3leon.stages.ingest", fake)  # type: ignore[arg-type]
    status, out, _ = call("ingest")
    assert status == 0
    first, last = out.splitlines()
    assert first == "working"
    figures = json.loads(last.removeprefix(cli.FIGURES))
    assert figures["seed"] == 5
    assert figures["peak_megabytes"] > 10
    assert figures["seconds"] >= 0


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

    monkeypatch.setitem(sys.modules, "cm3leon.stages.encoder", types.SimpleNamespace(run=refuse))  # type: ignore[arg-type]
    assert call("encoder") == (2, "", "error: encoder has no images to train on\n")


def test_other_errors_keep_their_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text("{}")

    def broken(config: object) -> None:
        raise KeyError("a defect")

    monkeypatch.setitem(sys.modules, "cm3leon.stages.ingest", types.SimpleNamespace(run=broken))  # type: ignore[arg-type]
    with pytest.raises(KeyError, match="a defect"):
        call("ingest")


def test_generate_one(generator: FakeGenerator) -> None:
    status, out, _ = call("generate", "a red circle", "--seed", "3", "--guidance", "2.5", "--documents", "1", "--out", "one.png")
    assert status == 0
    assert generator.asked == {
        "prompts": ["a red circle"], "num_images": 1, "seed": 3, "guidance": 2.5, "temperature": None, "top_p": None,
        "candidates": None, "likelihood": None, "documents": 1,
    }  # fmt: skip
    picture = Image.open("one.png")
    assert picture.size == (8, 8)
    assert json.loads(picture.info["cm3leon"])["prompt"] == "a red circle"
    assert "one.png: seed 0, CLIP score 0.500" in out
    assert "Ada" in out
    assert "CC-BY-4.0" in out


def test_generate_several_are_files_of_their_own_the_best_first(generator: FakeGenerator) -> None:
    status, out, _ = call("generate", "shapes", "--num-images", "3", "--out", "some.png")
    assert status == 0
    assert sorted(path.name for path in Path().iterdir()) == ["some-2.png", "some-3.png", "some.png"]
    for number, (name, colour) in enumerate({"some.png": (255, 0, 0), "some-2.png": (0, 128, 0), "some-3.png": (0, 0, 255)}.items()):
        picture = Image.open(name)
        assert picture.size == (8, 8) and picture.getpixel((2, 2)) == colour
        assert json.loads(picture.info["cm3leon"])["seed"] == number
        assert f"{name}: seed {number}, CLIP score {0.5 - number / 10:.3f}" in out
    assert out.count("retrieved: ab12") == 1
    assert call("caption", "some.png")[1] == "short (8, 8)\n"


def test_generate_upscaled(generator: FakeGenerator) -> None:
    assert call("generate", "shapes", "--num-images", "2", "--upscale")[0] == 0
    for name in ("out.png", "out-2.png"):
        picture = Image.open(name)
        assert picture.size == (16, 16)
        assert json.loads(picture.info["cm3leon"])["settings"]["upscale"] is True


@pytest.mark.parametrize(("arguments", "message"), [
    (["generate", "x", "--out", "out.jpg"], "error: --out out.jpg: images are written as PNG"),
    (["generate", "x", "--out", "no/out.png"], "error: --out no/out.png: there is no directory no"),
    (["generate", "x", "--top-p", "2"], "error: top_p: at most 1"),
    (["caption", "missing.png"], "missing.png"),
    (["caption", "text.png"], "error: text.png: unreadable"),
    (["configure", "huge"], "error: there is no profile 'huge'"),
])  # fmt: skip
def test_users_errors_are_one_line_and_status_2(arguments: list[str], message: str, generator: FakeGenerator) -> None:
    Path("text.png").write_text("not an image")
    status, out, err = call(*arguments)
    assert status == 2
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


def test_caption_and_ask(generator: FakeGenerator) -> None:
    Image.new("RGBA", (4, 6)).save("a.png")
    Image.new("L", (5, 5)).save("b.png")
    assert call("caption", "a.png")[1] == "short (4, 6)\n"
    assert call("caption", "a.png", "b.png", "--long")[1] == "a.png: long (4, 6)\nb.png: long (5, 5)\n"
    assert call("ask", "b.png", "What color?")[1] == "What color? RGB\n"


def test_no_champion_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    status, _, err = call("generate", "a red circle")
    assert status == 2
    assert "run make run first" in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_no_such_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    status, _, err = call("generate", "a red circle", "--model", "models/bundle")
    assert status == 2
    assert "models/bundle is not a bundle" in err
