"""The HTTP interface around real, untrained models: what it answers, and what it refuses."""

import asyncio
import base64
import json
import re
import socket
import struct
import sys
import zlib

import pytest
from PIL import Image
from serving_support import IMAGES_ROUTE, RED, RED_PNG, encoded, opened, same, serving

from cm3leon.generation.task_names import GENERATOR_TASKS
from cm3leon.serving import schemas
from cm3leon.serving.guard import Guard
from cm3leon.serving.metrics import Metrics

# --- answers -----------------------------------------------------------------------------------------------------------


def test_images_are_those_of_the_generator_with_their_retrieved_documents(server, generator):
    asked = {
        "prompt": "a red circle",
        "n": 3,
        "seed": 7,
        "retrieved_documents": 1,
        "guidance": 3.0,
        "temperature": 0.9,
        "top_p": 0.8,
        "candidates": 2,
    }
    answer = server.client.post(IMAGES_ROUTE, json={"model": "tiny", "size": "32x32", "response_format": "b64_json", **asked})
    assert answer.status_code == 200
    settings = {name: asked[name] for name in ("seed", "retrieved_documents", "guidance", "temperature", "top_p", "candidates")}
    [expected] = generator.text_to_image(["a red circle"], 3, **settings)
    body = answer.json()
    assert isinstance(body["created"], int) and len(body["data"]) == 3
    for found, image in zip(body["data"], expected, strict=True):
        assert same(opened(found["b64_json"]), image.image)
        assert found["seed"] == image.seed and found["score"] == pytest.approx(image.score)
        assert found["retrieved_documents"] == image.retrieved_documents and found["retrieved_documents"][0]["licence"] == "CC0-1.0"
        assert json.loads(opened(found["b64_json"]).text["cm3leon"])["prompt"] == "a red circle"


def test_null_is_absent_and_base64_may_have_lines(server):
    """As clients send that are generated from OpenAI's specification, and as the program ``base64`` writes."""
    plain = server.client.post(IMAGES_ROUTE, json={"prompt": "x"}).json()["data"]
    nulls = dict.fromkeys(("n", "response_format", "seed", "size", "top_p", "model"))
    assert server.client.post(IMAGES_ROUTE, json={"prompt": "x", **nulls}).json()["data"] == plain
    answer = server.client.post(IMAGES_ROUTE, json={"prompt": None})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "prompt"
    lines = "\r\n".join(RED_PNG[start : start + 76] for start in range(0, len(RED_PNG), 76))
    for image in (lines, f"data:image/png;base64,{lines}\n"):
        assert server.client.post("/v1/tasks/upscale", json={"image": image}).status_code == 200


def test_the_larger_size_is_the_upscalers(server, generator):
    small, large = (
        [opened(server.client.post(IMAGES_ROUTE, json={"prompt": "x", "size": size}).json()["data"][0]["b64_json"])]
        for size in ("auto", "64x64")
    )
    assert small[0].size == (32, 32) and large[0].size == (64, 64)
    assert same(generator.upscale(small)[0], large[0])
    assert json.loads(large[0].text["cm3leon"])["settings"]["upscale"] is True


def test_by_default_no_more_candidates_are_generated_than_allowed(server, held):
    held.decoding = held.generator.decoding.model_copy(update={"candidates": 32})
    held.let_go.set()
    with serving(held) as running:
        answer = running.client.post(IMAGES_ROUTE, json={"prompt": "x", "n": 4})
        assert answer.status_code == 200, answer.text
        assert len(answer.json()["data"]) == 4
    assert held.calls[0][2]["candidates"] * 4 == schemas.MAX_GENERATED


BOX = [6, 1, 20, 20]
IMAGE_TASKS = {
    "edit": ({"image": RED_PNG, "instruction": "x", "image_guidance": 2.0}, lambda g: g.edit([RED], ["x"], image_guidance=2.0)),
    "infill": ({"image": RED_PNG, "box": BOX, "prompt": "a ring"}, lambda g: g.infill([RED], [BOX], ["a ring"])),
    "layout_to_image": (
        {"prompt": "x", "objects": [{"label": "ring", "box": [0, 0, 16, 9]}]},
        lambda g: g.layout_to_image(["x"], [[("ring", (0, 0, 16, 9))]]),
    ),
    "condition_to_image": (
        {"prompt": "x", "image": RED_PNG, "kind": "canny edge"},
        lambda g: g.condition_to_image(["x"], [RED], ["canny edge"]),
    ),
    "write": ({"text": "A", "seed": 3}, lambda g: g.write(["A"], seed=3)),
}


@pytest.mark.parametrize("task", IMAGE_TASKS)
def test_every_image_task_is_the_generators(server, generator, task):
    body, direct = IMAGE_TASKS[task]
    answer = server.client.post(f"/v1/tasks/{task}", json=body)
    assert answer.status_code == 200, answer.text
    [[expected]] = direct(generator)
    [found] = answer.json()["data"]
    assert same(opened(found["b64_json"]), expected.image) and found["seed"] == expected.seed


def test_every_text_task_is_the_generators(server, generator):
    def text(task, **body):
        return server.client.post(f"/v1/tasks/{task}", json=body).json()["text"]

    data_url = "data:image/png;base64," + RED_PNG
    assert text("caption", image=data_url) == generator.caption([RED])[0].text
    assert text("long_caption", image=RED_PNG, temperature=1.0, seed=4) == generator.long_caption([RED], temperature=1.0, seed=4)[0].text
    assert text("vqa", image=RED_PNG, question="What?") == generator.vqa([RED], ["What?"])[0].text
    asked = {"question": "Which?", "options": ["a", "b"], "explain": False}
    assert text("reasoning", image=RED_PNG, **asked) == generator.reasoning([RED], ["Which?"], [["a", "b"]], explain=False)[0].text
    assert text("infill_text", text="a ___ circle") == generator.infill_text(["a ___ circle"])[0].text
    assert text("infill_text", text="a ___ circle", image=RED_PNG) == generator.infill_text(["a ___ circle"], [RED])[0].text


def test_documents_scores_and_enlarged_images_are_the_generators(server, generator):
    body = {"document": [{"text": "a red circle"}, {"image": RED_PNG}], "segments": 2, "seed": 2}
    found = server.client.post("/v1/tasks/interleave", json=body).json()["document"]
    [expected] = generator.interleave([["a red circle", RED]], 2, seed=2)
    assert [part.get("text") for part in found] == [getattr(part, "text", part if isinstance(part, str) else None) for part in expected]
    assert [part.get("seed") for part in found] == [getattr(part, "seed", None) for part in expected]
    assert all(
        same(opened(part["image"]), getattr(image, "image", image)) for part, image in zip(found, expected, strict=True) if "image" in part
    )
    [score] = generator.score([RED], ["a ring"])
    found = server.client.post("/v1/tasks/score", json={"image": RED_PNG, "text": "a ring"}).json()
    assert found == {"text": pytest.approx(score.text, rel=1e-4), "image": pytest.approx(score.image, rel=1e-4)}
    [large] = server.client.post("/v1/tasks/upscale", json={"image": RED_PNG}).json()["data"]
    assert same(opened(large["b64_json"]), generator.upscale([RED])[0])


def test_every_task_has_a_route_of_its_name(server, generator):
    paths = server.client.get("/openapi.json").json()["paths"]
    assert {path for path in paths if path.startswith("/v1/tasks/")} == {f"/v1/tasks/{task}" for task in GENERATOR_TASKS}
    answers = [server.client.post(path, json={"prompt": "x", "seed": 3}) for path in (IMAGES_ROUTE, "/v1/tasks/text_to_image")]
    assert same(*(opened(answer.json()["data"][0]["b64_json"]) for answer in answers))
    assert all("Deprecation" not in answer.headers for answer in answers)


@pytest.mark.parametrize(
    ("old", "new", "body"),
    [
        ("answer", "vqa", {"question": "What?"}),
        ("reason", "reasoning", {"question": "Which?", "options": ["a", "b"]}),
        ("caption", "long_caption", {"long": True}),
    ],
)
def test_requests_of_earlier_versions_are_answered_as_deprecated(server, old, new, body):
    former = server.client.post(f"/v1/tasks/{old}", json={"image": RED_PNG, **body})
    assert re.fullmatch(r"@\d+", former.headers["Deprecation"])
    assert former.headers["Link"] == f'</v1/tasks/{new}>; rel="successor-version"'
    body.pop("long", None)
    answer = server.client.post(f"/v1/tasks/{new}", json={"image": RED_PNG, **body})
    assert former.json() == answer.json() and "Deprecation" not in answer.headers
    assert "long" not in server.client.get("/openapi.json").json()["components"]["schemas"]["Caption"]["properties"]


def test_a_tasks_own_number_of_candidates_is_its_default(server, held):
    held.decoding = held.generator.decoding.model_copy(update={"tasks": {"edit": {"candidates": 3}}})
    held.let_go.set()
    with serving(held) as running:
        assert running.client.post("/v1/tasks/edit", json={"image": RED_PNG, "instruction": "x"}).status_code == 200
    assert held.calls[0][2]["candidates"] == 3


def test_models_describe_what_they_can_do(server, held):
    [model] = server.client.get("/v1/models").json()["data"]
    assert model["id"] == "tiny" and model["object"] == "model" and model["cm3leon"]["sizes"] == ["32x32", "64x64"]
    assert set(model["cm3leon"]["tasks"].values()) == {None}
    held.trained_tasks, held.super_resolution = frozenset({"text_to_image", "caption"}), None
    with serving(held) as running:
        described = running.client.get("/v1/models").json()["data"][0]["cm3leon"]
    assert {name for name, reason in described["tasks"].items() if reason is None} == {
        "text_to_image", "caption", "infill", "infill_text", "interleave", "score"
    }  # fmt: skip
    assert "not tuned for edit; add it to sft.tasks" in described["tasks"]["edit"] and described["sizes"] == ["32x32"]


# --- refusals ----------------------------------------------------------------------------------------------------------


def header_of(width, height):
    """A PNG whose header has a size, and whose data are empty."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")).decode()


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "words"),
    [
        (IMAGES_ROUTE, {}, 400, "prompt", "required"),
        (IMAGES_ROUTE, {"prompt": "  "}, 400, "prompt", "must not be empty"),
        (IMAGES_ROUTE, {"prompt": "x" * 4001}, 400, "prompt", "at most 4000 characters"),
        (IMAGES_ROUTE, {"prompt": "circle " * 300}, 400, None, "do not fit in the context of 160; shorten the text"),
        (IMAGES_ROUTE, {"prompt": "x", "n": 17}, 400, "n", r"less than or equal to 16 \(found 17\)"),
        (IMAGES_ROUTE, {"prompt": "x", "n": 16, "candidates": 5}, 400, "candidates", "more than the 64 generated for one request; lower n"),
        (IMAGES_ROUTE, {"prompt": "x", "temperature": -1}, 400, "temperature", "greater than or equal to 0"),
        (IMAGES_ROUTE, {"prompt": "x", "top_p": 0}, 400, "top_p", "greater than 0"),
        (IMAGES_ROUTE, {"prompt": "x", "seed": 2**53}, 400, "seed", "less than"),
        (IMAGES_ROUTE, {"prompt": "x", "size": "33x33"}, 400, "size", "generates 32x32 or 64x64"),
        (IMAGES_ROUTE, {"prompt": "x", "response_format": "url"}, 400, "response_format", "no addresses to give; ask for b64_json"),
        (IMAGES_ROUTE, {"prompt": "x", "quality": "hd"}, 400, "quality", "unknown field; remove it"),
        (IMAGES_ROUTE, {"prompt": "x", "model": "gpt"}, 404, "model", "this server has 'tiny'"),
        ("/v1/tasks/caption", {"image": "?"}, 400, "image", "not base64.*send the bytes"),
        ("/v1/tasks/caption", {"image": "aGVsbG8="}, 400, "image", "no PNG, JPEG"),
        ("/v1/tasks/caption", {"image": RED_PNG[:60]}, 400, "image", "unreadable"),
        ("/v1/tasks/caption", {"image": header_of(6000, 6000)}, 400, "image", "6000x6000 pixels, 25000000 allowed"),
        ("/v1/tasks/caption", {"image": "A" * 14_000_000}, 400, "image", "10485760 allowed"),
        ("/v1/tasks/vqa", {"image": RED_PNG}, 400, "question", "required"),
        ("/v1/tasks/infill", {"image": RED_PNG, "box": [0, 0, 10], "prompt": "x"}, 400, "box", "at least 4 items"),
        ("/v1/tasks/infill", {"image": RED_PNG, "box": [0, 0, 41, 10], "prompt": "x"}, 400, None, "inside the image of 40 x 30"),
        ("/v1/tasks/infill", {"image": RED_PNG, "box": BOX, "prompt": "x", "guidance": 2}, 400, "guidance", "unknown field"),
        ("/v1/tasks/layout_to_image", {"prompt": "x", "objects": []}, 400, "objects", "at least 1 item"),
        ("/v1/tasks/layout_to_image", {"prompt": "x", "objects": [{"label": " ", "box": BOX}]}, 400, "objects.0.label", "empty"),
        ("/v1/tasks/condition_to_image", {"prompt": "x", "image": RED_PNG, "kind": "y"}, 400, None, "unknown condition 'y'; known are"),
        ("/v1/tasks/infill_text", {"text": "no blank"}, 400, None, r"1 to 4 blanks \(___\)"),
        ("/v1/tasks/interleave", {"document": [{"text": "a", "image": RED_PNG}]}, 400, "document.0", "give .* or"),
        ("/v1/tasks/interleave", {"document": [{"image": "?"}]}, 400, "document.0.image", "not base64"),
        ("/v1/tasks/upscale", {"image": encoded(Image.new("RGB", (1025, 1)))}, 400, "image", "at most 1024 a side"),
        ("/v1/tasks/paint", {}, 404, None, "Not Found"),
    ],
)  # fmt: skip
def test_errors_say_what_is_wrong_where_and_what_to_do(server, path, body, status, param, words):
    answer = server.client.post(path, json=body)
    error = answer.json()["error"]
    assert answer.status_code == status and set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param and error["type"] == "invalid_request_error" and error["code"]
    assert len(error["message"]) < 300
    assert re.search(words, error["message"]), error["message"]


@pytest.mark.parametrize(
    ("content", "kind", "words"),
    [
        (b'{"prompt": "x"', "application/json", "not valid JSON: .* at character 14"),
        (
            b'{"prompt": "x"}',
            "text/plain",
            "Content-Type: application/json",
        ),  # sent by a page of another site without preflight
        (b'["x"]', "application/json", "JSON object"),
        (b'{"prompt": "x", "temperature": NaN}', "application/json", "finite number"),
        (b'{"prompt": "\\ud800"}', "application/json", "prompt: "),
        (b"[" * 100_000, "application/json", "parsing the body"),
        (b"\xff", "application/json", "parsing the body"),
        (b"", "application/json", "JSON object"),
    ],
)
def test_bodies_that_are_not_requests_are_refused(server, content, kind, words):
    answer = server.client.post(IMAGES_ROUTE, content=content, headers={"Content-Type": kind})
    assert answer.status_code == 400
    assert re.search(words, answer.json()["error"]["message"]), answer.text


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_that_is_too_large_is_refused_before_it_has_ended(server, announced):
    size = f"Content-Length: {10 * schemas.MAX_BODY}" if announced else "Transfer-Encoding: chunked"
    with socket.create_connection(server.url.removeprefix("http://").split(":"), timeout=20) as connection:
        connection.sendall(f"POST {IMAGES_ROUTE} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{size}\r\n\r\n".encode())
        if not announced:
            connection.sendall(f"{schemas.MAX_BODY + 1:x}\r\n".encode() + b" " * (schemas.MAX_BODY + 1))
        answer = b""
        while b"send smaller images" not in answer:
            answer += (received := connection.recv(10_000))
            assert received, answer
    assert answer.startswith(b"HTTP/1.1 413 ")


def test_only_the_application_keeps_a_body_while_it_waits():
    counts = []

    async def application(scope, receive, send):
        found, alone = (await receive())["body"], bytes(1000)
        counts.extend([sys.getrefcount(found), sys.getrefcount(alone)])

    async def receive():
        return {"type": "http.request", "body": b"x" * 1000}

    async def send(message):
        raise AssertionError(message)

    guard = Guard(application, Metrics(), {}, max_body=1000, max_held=1000)
    for _ in range(2):  # what the first held is free again
        asyncio.run(guard({"type": "http", "path": "/", "headers": []}, receive, send))
    assert counts == [counts[1]] * 4


def test_other_host_names_are_refused(server):
    for host, status in {"localhost:1": 200, "[::1]": 200, "127.0.0.1": 200, "evil.example": 421, "127.0.0.1.evil.example:80": 421}.items():
        assert server.client.get("/health", headers={"Host": host}).status_code == status


def test_every_answer_forbids_what_the_page_does_not_need(server):
    for answer in (
        server.client.get("/"),
        server.client.get("/page/page.js"),
        server.client.get("/x"),
        server.client.post(IMAGES_ROUTE, json={}),
    ):
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert server.client.get("/page/../app.py").status_code == server.client.get("/page/%2e%2e/app.py").status_code == 404
