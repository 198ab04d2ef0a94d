"""The served model: requests are checked, and a logged model works from its own copy of the code, anywhere."""

import base64
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cm3leon.config.schema import Config, DecodingConfig
from cm3leon.registry.bundle import build_bundle
from cm3leon.registry.signature import REQUEST_COLUMNS, RequestSettings, request_settings, signature


@pytest.fixture(scope="module")
def bundle(tiny_models, tmp_path_factory):
    before = Path.cwd()
    os.chdir(tiny_models)
    try:
        return build_bundle(tmp_path_factory.mktemp("out") / "bundle", Config()).path
    finally:
        os.chdir(before)


@pytest.fixture(scope="module")
def predict(bundle):
    from cm3leon.serving.mlflow_model import BundleModel

    model, context = BundleModel(), SimpleNamespace(artifacts={"bundle": str(bundle)})
    return lambda rows, params=None: model.predict(context, rows, params)


def encoded_image(color="red"):
    stream = io.BytesIO()
    Image.new("RGB", (40, 30), color).save(stream, format="PNG")
    return base64.b64encode(stream.getvalue()).decode()


def opened(value):
    return Image.open(io.BytesIO(base64.b64decode(value)))


def test_answers_come_in_the_order_of_the_rows_and_say_which_they_answer(predict):
    rows = [
        {"task": "vqa", "image": encoded_image(), "question": "what color?"},
        {"prompt": "a red circle"},
        {"task": "caption", "image": "data:image/png;base64," + encoded_image("blue")},
        {"task": "text_to_image", "prompt": "a ring"},
    ]
    answers = predict(pd.DataFrame(rows), {"num_images": 2, "candidates": 1, "seed": 5})
    assert answers["row"].tolist() == [0, 1, 1, 2, 3, 3]
    assert answers["task"].tolist() == ["vqa", "text_to_image", "text_to_image", "caption", "text_to_image", "text_to_image"]
    images = answers[answers["row"] == 1]
    assert set(images["seed"]) == {5, 6}
    assert opened(images["image_png"].iloc[0]).size == (32, 32)
    assert json.loads(opened(images["image_png"].iloc[0]).text["cm3leon"])["prompt"] == "a red circle"
    assert isinstance(answers["text"].iloc[0], str)
    assert isinstance(answers["text"].iloc[3], str)


def test_the_default_number_of_candidates_leaves_room_for_several_images():
    """MLflow sends the signature's defaults along; 4 images with 32 candidates each would be more than are generated for a request."""
    from cm3leon.serving.mlflow_model import call_of

    generator = SimpleNamespace(decoding=DecodingConfig(candidates=32), image_size=32, super_resolution=None)
    row = {"prompt": "a ring"}
    assert dict(call_of(0, row, RequestSettings(num_images=4, candidates=32), generator).settings)["candidates"] == 16
    assert dict(call_of(0, row, RequestSettings(num_images=4, candidates=8), generator).settings)["candidates"] == 8
    with pytest.raises(ValueError, match="row 0: 4 images with 33 candidates each are more"):
        call_of(0, row, RequestSettings(num_images=4, candidates=33), generator)


def test_every_task_is_answered(predict):
    image, box = encoded_image(), "[4, 4, 24, 20]"
    asked = {
        "write": {"text": "hi"},
        "layout_to_image": {"prompt": "a ring", "objects": '[{"label": "ring", "box": [0, 0, 16, 16]}]'},
        "condition_to_image": {"prompt": "a ring", "image": image, "kind": "canny edge"},
        "edit": {"image": image, "instruction": "make it blue"},
        "infill": {"image": image, "box": box, "prompt": "a ring"},
        "infill_text": {"text": "a ___ circle", "image": image},
        "long_caption": {"image": image},
        "reasoning": {"image": image, "question": "Which?", "options": '["a", "b"]', "context": "Look."},
        "interleave": {"document": '[{"text": "a ring"}]'},
        "score": {"image": image, "text": "a ring"},
        "upscale": {"image": image},
    }
    answers = predict([{"task": task, **fields} for task, fields in asked.items()], {"candidates": 1, "segments": 1})
    assert answers["row"].drop_duplicates().tolist() == list(range(len(asked)))
    by_task = {task: part.iloc[-1] for task, part in answers.groupby("task")}
    for task in ("write", "layout_to_image", "condition_to_image", "edit", "infill", "interleave"):
        assert opened(by_task[task]["image_png"]).size == (32, 32), task
    assert opened(by_task["upscale"]["image_png"]).size == (80, 60)
    assert by_task["infill_text"]["text"].startswith("a ")
    assert by_task["score"]["text_log_likelihood"] < 0 and by_task["score"]["image_log_likelihood"] < 0


def test_columns_of_json_take_lists_too_and_what_is_missing_is_absent(predict):
    given = {
        "box": {"task": "infill", "image": encoded_image(), "prompt": "a ring", "box": [4, 4, 24, 20]},
        "objects": {"task": "layout_to_image", "prompt": "a ring", "objects": [{"label": "ring", "box": [0, 0, 16, 16]}]},
        "options": {"task": "reasoning", "image": encoded_image(), "question": "Which?", "options": ["a", "b"]},
    }
    rows = list(given.values())
    texts = [row | {name: json.dumps(row[name])} for name, row in given.items()]
    found, expected = predict(rows, {"candidates": 1}), predict(texts, {"candidates": 1})
    assert found.equals(expected) and len(found) == 3
    arrays = [row | {name: np.array(row[name], dtype=object if name == "objects" else None)} for name, row in given.items()]
    assert predict(arrays, {"candidates": 1}).equals(expected)  # as pandas reads lists of a parquet file
    for missing in (None, float("nan"), pd.NA, np.float32("nan")):
        assert predict([{"context": missing, "kind": missing, **row} for row in rows], {"candidates": 1}).equals(expected)


def test_the_same_request_gives_the_same_answer_and_documents_are_named(predict):
    request = [{"prompt": "a blue square"}], {"retrieved_documents": 1, "candidates": 1, "seed": 3}
    first, second = predict(*request), predict(*request)
    assert first.equals(second)
    assert set(json.loads(first["retrieved_documents"].iloc[0])[0]) >= {"id", "licence", "attribution"}


def test_task_names_of_earlier_versions_are_answered_with_a_warning(predict):
    row = {"image": encoded_image(), "question": "what color?"}
    with pytest.warns(UserWarning, match="row 0: the task answer is now called vqa"):
        former = predict([{"task": "answer", **row}])
    assert former.equals(predict([{"task": "vqa", **row}])) and former["task"].tolist() == ["vqa"]


def test_defaults_of_the_signature_leave_a_task_its_own_settings():
    """MLflow sends all defaults along; a task's own settings in the bundle hold unless a request changes them."""
    from cm3leon.serving.mlflow_model import call_of

    decoding = DecodingConfig(temperature=0.7, tasks={"edit": {"temperature": 0.0}})
    generator = SimpleNamespace(decoding=decoding, image_size=32, super_resolution=None)
    sent = {param.name: param.default for param in signature(decoding).params.params}
    row = {"task": "edit", "image": encoded_image(), "instruction": "x"}
    assert "temperature" not in dict(call_of(0, row, request_settings(sent), generator).settings)
    assert dict(call_of(0, row, request_settings(sent | {"temperature": 0.5}), generator).settings)["temperature"] == 0.5


@pytest.mark.parametrize(
    ("params", "complaint"),
    [
        ({"temprature": 1.0}, "unknown parameter 'temprature'; known are num_images"),
        ({"temperature": -1.0}, "temperature: .*-1.0"),
        ({"top_p": 0.0}, "top_p"),
        ({"guidance": 51.0}, "guidance: .*50"),
        ({"long": True}, "long_caption"),
        ({"num_images": 0}, "num_images"),
        ({"num_images": 1000}, "num_images"),
        ({"candidates": "many"}, "candidates"),
        ({"seed": -1, "guidance": -2}, "seed.*guidance"),
    ],
)
def test_wrong_parameters_are_named(predict, params, complaint):
    with pytest.raises(ValueError, match=complaint):
        predict([{"prompt": "a red circle"}], params)


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"prompt": " "}, "row 1: task text_to_image: prompt: Field required"),
        ({"task": "paint", "prompt": "x"}, "row 1: unknown task 'paint'"),
        ({"task": "vqa", "image": encoded_image()}, "row 1: task vqa: question: Field required"),
        ({"task": "caption", "image": "no image"}, "row 1: image: not base64"),
        ({"task": "caption", "image": base64.b64encode(b"no image").decode()}, "row 1: image: unreadable"),
        ({"task": "caption", "image": encoded_image(), "prompt": "x"}, "row 1: task caption: prompt: unknown field"),
        (
            {"task": "infill", "image": encoded_image(), "box": "1, 2", "prompt": "x"},
            "row 1: box and objects and document and options must be JSON",
        ),
        ({"task": "infill", "image": encoded_image(), "box": "[1, 2]", "prompt": "x"}, "row 1: task infill: box"),
        ({"promt": "x"}, "row 1: unknown column 'promt'"),
        ({"task": "infill_text", "text": "a ___", "image": b"PNG"}, "row 1: image: must be text.* base64, found bytes"),
        ({"prompt": 3}, "row 1: prompt: must be text.*, found int"),
        ({"task": "infill", "image": encoded_image(), "box": 3, "prompt": "x"}, "row 1: box: must be JSON or a list, found int"),
        ({"prompt": "circle " * 300}, "row 1: a prompt of .* do not fit"),
        ({"task": "infill", "image": encoded_image(), "box": "[0, 0, 99, 9]", "prompt": "x"}, "row 1: the box.* must be"),
    ],
)
def test_wrong_rows_are_named(predict, row, complaint):
    with pytest.raises(ValueError, match=complaint):
        predict([{"prompt": "a red circle"}, row], {"candidates": 1})


def test_a_path_is_opened_only_where_the_operator_allows_it(predict, tmp_path, monkeypatch):
    allowed, secret = tmp_path / "images", tmp_path / "secret.png"
    allowed.mkdir()
    for file in (allowed / "image.png", secret):
        Image.new("RGBA", (20, 20)).save(file)
    (allowed / "link.png").symlink_to(secret)

    def ask(file):
        return predict([{"task": "caption", "image": str(file)}])["task"].tolist()

    monkeypatch.delenv("CM3LEON_IMAGES", raising=False)
    with pytest.raises(ValueError, match="row 0: paths are opened nowhere; name directories in CM3LEON_IMAGES"):
        ask(allowed / "image.png")
    monkeypatch.setenv("CM3LEON_IMAGES", str(allowed))
    assert ask(allowed / "image.png") == ["caption"]
    for outside in (secret, allowed / ".." / "secret.png", allowed / "link.png", tmp_path / "images-2.png"):
        with pytest.raises(ValueError, match="paths are opened below"):
            ask(outside)
    with pytest.raises(ValueError, match=r"missing\.png cannot be read: No such file"):
        ask(allowed / "missing.png")


def test_the_signature_states_all_columns_and_the_bundles_defaults():
    stated = signature(DecodingConfig(guidance=4.0))
    assert [c.name for c in stated.inputs.inputs] == list(REQUEST_COLUMNS)
    defaults = {p.name: p.default for p in stated.params.params}
    assert set(defaults) == set(RequestSettings.model_fields)
    assert defaults["guidance"] == 4.0
    assert request_settings(defaults).guidance == 4.0


PROGRAM = """
import sys, warnings
import mlflow.pyfunc
assert "cm3leon" not in sys.modules
model = mlflow.pyfunc.load_model(sys.argv[1])
answers = model.predict([{"prompt": "a red circle"}], params={"candidates": 1, "seed": 1, "guidance": 2})
import cm3leon
print(cm3leon.__file__)
print(answers["image_png"][0])
"""


@pytest.mark.slow
def test_a_saved_model_works_in_another_process_and_directory(bundle, tmp_path, monkeypatch):
    import mlflow.pyfunc  # not the loader that stands for it until it is used

    from cm3leon.registry import packaging

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/unused.db")
    monkeypatch.setattr(mlflow.pyfunc, "log_model", lambda name, **options: mlflow.pyfunc.save_model(str(tmp_path / name), **options))
    packaging.log_model(bundle, "model")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    arguments = [sys.executable, "-P", "-c", PROGRAM, str(tmp_path / "model")]
    done = subprocess.run(arguments, cwd=tmp_path, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    code, image = done.stdout.split()[-2:]
    assert code == str(tmp_path / "model" / "code" / "cm3leon" / "__init__.py")
    assert opened(image).size == (32, 32)
