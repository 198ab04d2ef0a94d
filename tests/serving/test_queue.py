"""The queue before real, untrained models: which requests are batched, dropped and counted, and how the server starts and stops."""

import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import chdir

import httpx
import numpy as np
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from serving_support import IMAGES_ROUTE, RED_PNG, Connection, ask_all, encoded, opened, same, serving, starting

from cm3leon.config.schema import Config
from cm3leon.registry.bundle import build_bundle
from cm3leon.serving import batching, requests, schemas
from cm3leon.serving.server import run

# --- the queue ---------------------------------------------------------------------------------------------------------


def test_requests_with_equal_settings_are_batched_and_answered_as_alone(held):
    prompts = ["a red circle", "a blue square", "two green crosses and a blue square on white", "x"]
    with serving(held, max_rows=8) as running:
        [first] = ask_all(running, [{"text": "first"}], "/v1/tasks/write")
        running.until(lambda: held.calls)
        same_settings = ask_all(running, [{"prompt": prompt, "seed": 5, "candidates": 2} for prompt in prompts])
        other_seed = ask_all(running, [{"prompt": prompts[0], "seed": 6, "candidates": 2}])
        too_many = ask_all(running, [{"prompt": prompts[0], "seed": 5, "candidates": 2, "n": 4}])
        running.until(lambda: running.worker.queue_length == 6)
        held.let_go.set()
        answers = [asked.result() for asked in (first, *same_settings, *other_seed, *too_many)]
    assert all(answer.status_code == 200 for answer in answers)
    generated = [(columns[0], settings["seed"], settings["num_images"]) for _, columns, settings in held.calls[1:]]
    assert len(generated) == 3
    assert [(sorted(texts), *rest) for texts, *rest in generated if len(texts) > 1] == [(sorted(prompts), 5, 1)]
    for prompt, answer in zip(prompts, answers[1:5], strict=True):
        [[alone]] = held.generator.text_to_image([prompt], seed=5, candidates=2)
        assert same(opened(answer.json()["data"][0]["b64_json"]), alone.image)


def test_batches_have_no_more_rows_than_allowed(held):
    with serving(held, max_rows=8) as running:
        [first] = ask_all(running, [{"text": "first"}], "/v1/tasks/write")
        running.until(lambda: held.calls)
        asked = ask_all(running, [{"prompt": f"{number}", "candidates": 3} for number in range(5)])
        running.until(lambda: running.worker.queue_length == 5)
        held.let_go.set()
        assert all(answer.result().status_code == 200 for answer in (first, *asked))
    assert [len(columns[0]) for _, columns, _ in held.calls[1:]] == [2, 2, 1]


def test_a_request_that_fails_does_not_fail_its_batch(held):
    with serving(held) as running:
        [first] = ask_all(running, [{"text": "first"}], "/v1/tasks/write")
        running.until(lambda: held.calls)
        asked = ask_all(running, [{"prompt": prompt} for prompt in ("a red circle", "circle " * 300, "a ring")])
        running.until(lambda: running.worker.queue_length == 3)
        held.let_go.set()
        answers = [answer.result() for answer in asked]
        first.result()
    assert [answer.status_code for answer in answers] == [200, 400, 200]
    assert len(held.calls[1][1][0]) == 3
    [[alone]] = held.generator.text_to_image(["a red circle"])
    assert same(opened(answers[0].json()["data"][0]["b64_json"]), alone.image)


@pytest.mark.parametrize(
    ("task", "item"),
    [
        ("infill", {"image": RED_PNG, "box": [0, 0, 16, 16], "prompt": "a ring", "candidates": 1}),
        ("interleave", {"document": [{"text": "a ring"}], "segments": 1}),
        ("upscale", {"image": RED_PNG}),
    ],
)
def test_tasks_that_are_answered_one_by_one_join_nothing(held, task, item):
    bad = {"infill": {"box": [0, 0, 41, 16]}, "interleave": {"document": [{"text": "circle " * 300}]}, "upscale": {}}[task]
    with serving(held) as running:
        asked = ask_all(running, [{"text": "first"}], "/v1/tasks/write")
        running.until(lambda: held.calls)
        asked += ask_all(running, [item, item, item | bad], f"/v1/tasks/{task}")
        running.until(lambda: running.worker.queue_length == 3)
        held.let_go.set()
        assert sorted(answer.result().status_code for answer in asked) == [200, 200, 200, 400 if bad else 200]
    assert [len(columns[0]) for _, columns, _ in held.calls[1:]] == [1, 1, 1]


def test_bodies_that_wait_are_bounded_together(held, monkeypatch):
    monkeypatch.setattr(schemas, "MAX_HELD", 100_000)
    noise = np.random.default_rng(0).integers(256, size=(120, 120, 3), dtype=np.uint8)
    large = {"image": encoded(Image.fromarray(noise))}
    assert 50_000 < len(large["image"]) < 90_000
    with serving(held) as running:
        asked = ask_all(running, [{"text": "first"}], "/v1/tasks/write")
        running.until(lambda: held.calls)
        asked += ask_all(running, [large], "/v1/tasks/caption")
        running.until(lambda: running.worker.queue_length == 1)
        refused = running.client.post("/v1/tasks/caption", json=large)
        assert refused.status_code == 429 and int(refused.headers["Retry-After"]) >= 1
        assert refused.json()["error"]["code"] == "queue_full"
        assert running.healthy()
        asked += ask_all(running, [{"prompt": "a ring"}])  # for which there is room
        running.until(lambda: running.worker.queue_length == 2)
        held.let_go.set()
        assert [answer.result().status_code for answer in asked] == [200] * 3
        assert [running.client.post("/v1/tasks/caption", json=large).status_code for _ in range(3)] == [200] * 3


def test_a_full_queue_says_when_to_try_again(held):
    with serving(held, capacity=2) as running:
        asked = ask_all(running, [{"text": "first"}], "/v1/tasks/write")
        running.until(lambda: held.calls)
        asked += ask_all(running, [{"prompt": "x"}, {"prompt": "y"}])
        running.until(lambda: running.worker.queue_length == 2)
        refused = running.client.post(IMAGES_ROUTE, json={"prompt": "z"})
        assert refused.status_code == 429 and int(refused.headers["Retry-After"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert running.client.get("/health").json() == {"status": "ready", "model": "tiny", "version": None, "queue_length": 2}
        held.let_go.set()
        assert all(answer.result().status_code == 200 for answer in asked)
        assert running.client.post(IMAGES_ROUTE, json={"prompt": "z"}).status_code == 200


def test_a_request_waits_with_images_of_the_models_size_and_all_together_are_bounded(held, monkeypatch):
    monkeypatch.setattr(batching, "MAX_QUEUED_PIXELS", 1_200_000)
    monkeypatch.setattr(requests, "MAX_PIXELS", 1_500_000)
    large = encoded(Image.new("RGB", (1000, 800), "red"))
    inpainting = {"image": large, "box": [0, 0, 500, 400], "prompt": "a red circle", "candidates": 1}
    with serving(held) as running:
        asked = ask_all(running, [{"text": "first"}], "/v1/tasks/write")
        running.until(lambda: held.calls)
        several = running.client.post("/v1/tasks/interleave", json={"document": [{"image": large}, {"text": "x"}, {"image": large}]})
        assert several.status_code == 400 and "more than 1500000 pixels together" in several.json()["error"]["message"]
        asked += ask_all(running, [{"image": large, "instruction": "make it blue", "candidates": 1}], "/v1/tasks/edit")
        running.until(lambda: running.worker.queue_length == 1)
        asked += ask_all(running, [inpainting], "/v1/tasks/infill")  # its box is in pixels of its own image
        running.until(lambda: running.worker.queue_length == 2)
        assert running.client.post("/v1/tasks/infill", json=inpainting).status_code == 429
        asked += ask_all(running, [{"image": large}], "/v1/tasks/caption")
        running.until(lambda: running.worker.queue_length == 3)
        held.let_go.set()
        assert [answer.result().status_code for answer in asked] == [200] * 4
    sizes = {task: columns[0][0].size for task, columns, _ in held.calls[1:]}
    side = held.generator.image_size
    assert sizes == {"edit": (side, side), "infill": (1000, 800), "caption": (side, side)}


def test_a_request_whose_client_disconnects_is_dropped(held):
    with serving(held) as running:
        [first] = ask_all(running, [{"text": "first"}], "/v1/tasks/write")
        running.until(lambda: held.calls)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(running.url + IMAGES_ROUTE, json={"prompt": "left alone"}, timeout=0.3, trust_env=False)
        running.until(lambda: running.worker.queue_length == 0)
        held.let_go.set()
        assert first.result().status_code == 200
        assert running.client.post(IMAGES_ROUTE, json={"prompt": "stayed"}).status_code == 200
        counted = samples(running)
    assert [columns[0] for _, columns, _ in held.calls] == [["first"], ["stayed"]]
    assert counted["cm3leon_requests_total", "text_to_image", "499"] == 1


def test_internal_errors_are_answered_without_details(held):
    held.caption = lambda *columns, **settings: 1 / 0
    with serving(held) as running:
        answer = running.client.post("/v1/tasks/caption", json={"image": RED_PNG})
        assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
        assert "division" not in answer.text and "log" in answer.text
        held.let_go.set()
        assert running.client.post("/v1/tasks/vqa", json={"image": RED_PNG, "question": "?"}).status_code == 200


def samples(running):
    """Sample name, task and status or bound -> value."""
    families = text_string_to_metric_families(running.client.get("/metrics").text)
    return {
        (sample.name, *(sample.labels[name] for name in ("task", "status", "le") if name in sample.labels)): sample.value
        for family in families
        for sample in family.samples
    }


def test_metrics_count_requests_and_batches(held):
    with serving(held) as running:
        [first] = ask_all(running, [{"text": "first"}], "/v1/tasks/write")
        running.until(lambda: held.calls)
        asked = ask_all(running, [{"prompt": "x"}, {"prompt": "y"}])
        running.until(lambda: running.worker.queue_length == 2)
        assert samples(running)["cm3leon_queue_length",] == 2
        held.let_go.set()
        for answer in (first, *asked):
            answer.result()
        running.client.post(IMAGES_ROUTE, json={"n": 0})
        found = samples(running)
    assert found["cm3leon_requests_total", "write", "200"] == 1
    assert found["cm3leon_requests_total", "text_to_image", "200"] == 2 and found["cm3leon_requests_total", "text_to_image", "400"] == 1
    assert found["cm3leon_batch_size_count", "text_to_image"] == 1 and found["cm3leon_batch_size_sum", "text_to_image"] == 2
    assert found["cm3leon_queue_seconds_count", "text_to_image"] == 2 and found["cm3leon_queue_seconds_sum", "text_to_image"] > 0
    assert found["cm3leon_model_seconds_count", "write"] == 1 and found["cm3leon_queue_length",] == 0


# --- beginning and end -------------------------------------------------------------------------------------------------


def test_nothing_is_answered_before_the_model_is_loaded(generator):
    loaded = threading.Event()
    with starting(lambda: loaded.wait(20) and generator) as running:
        health = running.client.get("/health")
        assert health.status_code == 503 and health.json()["status"] == "loading"
        refused = running.client.post(IMAGES_ROUTE, json={"prompt": "x"})
        assert refused.status_code == 503 and "loading" in refused.json()["error"]["message"] and refused.headers["Retry-After"]
        assert running.client.get("/v1/models").json()["data"][0]["cm3leon"] is None
        assert "<title>cm3leon</title>" in running.client.get("/").text
        loaded.set()
        running.until(running.healthy)
        assert running.client.post(IMAGES_ROUTE, json={"prompt": "x"}).status_code == 200


def test_at_a_signal_queued_requests_are_answered_and_new_ones_refused(held):
    with serving(held) as running:
        asked = ask_all(running, [{"text": "first"}], "/v1/tasks/write")
        running.until(lambda: held.calls)
        asked += ask_all(running, [{"prompt": "x"}, {"prompt": "y", "seed": 1}])
        running.until(lambda: running.worker.queue_length == 2)
        running.server.handle_exit(15, None)
        running.until(lambda: running.client.get("/health").status_code == 503)
        refused = running.client.post(IMAGES_ROUTE, json={"prompt": "late"})
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "stopping"
        held.let_go.set()
        assert [answer.result().status_code for answer in asked] == [200, 200, 200]
        running.thread.join(10)
        assert not running.thread.is_alive() and running.worker.join(1)


def test_requests_not_answered_within_the_limit_get_503(held):
    with serving(held, drain_seconds=0.2) as running:
        asked = ask_all(running, [{"text": "first"}], "/v1/tasks/write")
        running.until(lambda: held.calls)
        asked += ask_all(running, [{"prompt": "x"}])
        running.until(lambda: running.worker.queue_length == 1)
        running.server.handle_exit(15, None)
        answers = [answer.result() for answer in asked]
        assert [answer.status_code for answer in answers] == [503, 503] and "send it again" in answers[0].text
        running.thread.join(10)
        assert not running.thread.is_alive()
        held.let_go.set()


def test_a_model_that_cannot_be_loaded_ends_the_server():
    def load():
        raise FileNotFoundError("no bundle here")

    with starting(load) as running:
        running.thread.join(10)
        assert not running.thread.is_alive() and str(running.worker.failure) == "no bundle here"


@pytest.fixture
def bundle(tiny_models, tmp_path):
    with chdir(tiny_models):
        return build_bundle(tmp_path / "bundle", Config()).path


PROGRAM = "import sys; from cm3leon.serving.server import run; run(sys.argv[1], sys.argv[2], int(sys.argv[3]))"


@pytest.mark.slow
def test_a_process_that_gets_sigterm_finishes_and_ends_with_status_0(bundle, tmp_path):
    host = "127.0.0.2"  # not loopback by name: the server warns about it
    with socket.create_server((host, 0)) as free:
        port = free.getsockname()[1]
    with (tmp_path / "log").open("w") as log:
        command = [sys.executable, "-c", PROGRAM, str(bundle), host, str(port)]
        process = subprocess.Popen(command, stderr=log, stdout=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        running = Connection(f"http://{host}:{port}")
        running.until(running.healthy, seconds=60)
        asked = ask_all(running, [{"prompt": "x", "n": 8, "candidates": 4, "seed": seed} for seed in range(16)])
        running.until(lambda: running.client.get("/health").json()["queue_length"] >= 2)
        process.send_signal(signal.SIGTERM)
        assert [answer.result().status_code for answer in asked] == [200] * 16
        assert process.wait(20) == 0
    finally:
        process.kill()
    assert "there is no authentication" in (tmp_path / "log").read_text()


def test_a_missing_model_is_an_error(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="is not a bundle"):
        run(str(tmp_path), port=0)
    assert "authentication" not in capsys.readouterr().err
