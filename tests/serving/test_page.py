"""The page in a real browser: a person types, adds boxes and uploads, and sees images, scores, answers and errors."""

import json
import re
import shutil

import pytest
from browser_support import Browser
from PIL import Image
from serving_support import serving

from cm3leon.serving.app import PAGE

pytestmark = pytest.mark.browser
CHROMIUM = shutil.which("chromium")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs the program chromium")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(CHROMIUM, tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


@pytest.fixture
def page(browser, server):
    browser.complaints.clear()
    browser.open(server.url)
    yield browser
    assert browser.complaints == []  # nothing was blocked by the policy, no script failed


@pytest.fixture
def image_file(tmp_path):
    Image.new("RGB", (60, 40), "red").save(tmp_path / "red.png")
    return tmp_path / "red.png"


@needs_browser
def test_a_prompt_becomes_images_with_scores_and_retrieved_documents(page, server, tmp_path):
    page.write("#prompt", "a red circle")
    page.click("summary")
    page.write("[name=n]", "3")
    page.write("[name=retrieved_documents]", "2")
    page.click("#go")
    page.until("document.querySelectorAll('figure img.small').length === 3")
    assert page.text("article h2") == "a red circle"
    assert re.fullmatch(r"CLIP score -?\d\.\d{3}, seed \d, 32 × 32", page.text("figcaption"))
    assert "CC0-1.0" in page.text("article table") and "a blue square" in page.text("article table") and "us" in page.text("article table")
    page.keep_downloads(tmp_path)
    page.click("figure a.button")
    seed = re.search(r"seed (\d)", page.text("figcaption"))[1]
    file = tmp_path / f"cm3leon-seed-{seed}.png"
    server.until(file.is_file)
    record = json.loads(Image.open(file).text["cm3leon"])  # type: ignore[attr-defined]
    assert record["prompt"] == "a red circle" and record["seed"] == int(seed) and len(record["retrieved_documents"]) == 2


@needs_browser
def test_boxes_of_a_layout_are_added_with_the_pointer_or_typed(page):
    page.click("#tab-layout")
    page.drag("#board", (0.125, 0.25), (0.5, 0.75))
    page.write(".box input", "circle")
    page.write("#prompt", "a circle and a square")
    page.click("#add-box")
    page.click("#go")
    assert page.text("#error") == "Name the object in each box."
    page.write(".box:nth-child(2) input", "square")
    page.click("#go")
    page.until("document.querySelectorAll('figure').length === 4")
    boxes = page.evaluate(
        "[...document.querySelectorAll('.box')].map((row) => [...row.querySelectorAll('input')].map((field) => field.value))"
    )
    assert [row[0] for row in boxes] == ["circle", "square"] and boxes[1][1:] == ["0", "0", "16", "16"]
    assert all(abs(int(found) - wanted) <= 1 for found, wanted in zip(boxes[0][1:], (4, 8, 16, 24), strict=True))
    page.click("#tab-generate")
    page.click("#tab-layout")
    assert page.count(".box") == 2  # kept while another tab is shown


@needs_browser
def test_a_region_of_an_image_is_inpainted(page, image_file):
    page.click("#tab-infill")
    page.write("#prompt", "a ring")
    page.click("#go")
    assert page.text("#error") == "Choose an image first."
    page.upload("#file", image_file)
    page.until("!document.querySelector('#board-part').hidden")
    page.click("#go")
    page.until("document.querySelector('#error').innerText === 'Add a box around the region to inpaint first.'")
    page.drag("#board", (0.3, 0.3), (0.6, 0.6))
    page.click("#go")
    page.until("document.querySelectorAll('figure').length === 4 && document.querySelector('#error').hidden")
    page.drag("#board", (0.02, 0.3), (0.1, 0.6))  # outside the center crop
    assert page.count(".box") == 1
    page.click("#go")
    page.until("document.querySelector('#error').innerText.includes('outside the square that the model sees')")


@needs_browser
def test_an_image_is_described_asked_about_and_edited(page, image_file, generator):
    page.click("#tab-describe")
    page.upload("#file", image_file)
    page.until("!document.querySelector('#board-part').hidden")
    page.click("#describe")
    page.until("document.querySelector('.answer')")
    shown = page.evaluate("document.querySelector('.answer p').textContent")
    assert shown == generator.caption([Image.open(image_file)])[0].text
    page.write("#question", "What color?")
    page.press("Enter")
    page.until("document.querySelectorAll('.answer').length === 2")
    assert page.text("article h2") == "What color?"
    page.click("#tab-edit")
    page.write("#instruction", "make it blue")
    page.click("#go")
    page.until("document.querySelectorAll('figure').length === 4")


@needs_browser
def test_empty_fields_show_and_mean_the_tasks_own_settings(browser, held, image_file):
    own = {"edit": {"temperature": 0.0, "image_guidance": 1.2, "candidates": 1}, "layout_to_image": {"guidance": 5.0, "candidates": 32}}
    tasks = own | {"write": {"top_p": 0.5}}
    held.decoding = held.generator.decoding.model_copy(update={"temperature": 0.8, "guidance": 3.0, "tasks": tasks})
    held.let_go.set()

    def shown(*names):
        return [browser.evaluate(f"document.querySelector('.settings [name={name}]').placeholder") for name in names]

    with serving(held) as running:
        browser.open(running.url)
        assert shown("n", "temperature", "guidance", "top_p") == ["4", "0.8", "3", "0.9"]
        browser.click("#as-writing")
        assert shown("top_p") == ["0.5"]
        browser.click("#tab-layout")
        assert shown("n", "temperature", "guidance", "top_p", "candidates") == ["4", "0.8", "5", "0.9", "16"]
        browser.click("#tab-edit")
        assert shown("n", "temperature", "guidance", "image_guidance") == ["1", "0", "3", "1.2"]
        browser.upload("#file", image_file)
        browser.until("!document.querySelector('#board-part').hidden")
        browser.write("#instruction", "make it blue")
        browser.click("#go")
        browser.until("document.querySelectorAll('figure').length === 1")
        browser.click("summary")
        browser.write("[name=temperature]", "1")
        assert shown("n") == ["4"]
        browser.click("#go")
        browser.until("document.querySelectorAll('figure').length === 5")
    assert [settings["num_images"] for _, _, settings in held.calls] == [1, 4]


@needs_browser
def test_a_generated_image_is_used_again_and_enlarged(page):
    page.write("#prompt", "a ring")
    page.click("#go")
    page.until("document.querySelectorAll('figure').length === 4")
    page.click("figure button:nth-of-type(2)")
    page.until("document.querySelector('figcaption').textContent === '64 × 64'")
    page.click("article:nth-of-type(2) figure button:nth-of-type(1)")
    page.until("!document.querySelector('#board-part').hidden")
    assert page.evaluate("document.querySelector('[aria-selected=true]').dataset.tab") == "infill"


@needs_browser
def test_a_file_that_cannot_be_used_is_refused_before_it_is_sent(page, tmp_path):
    page.click("#tab-edit")
    for name, content, words in (
        ("big.png", b"0" * (10 * 2**20 + 1), "10.0 MiB; the server takes up to 10"),
        ("x.png", b"x", "not an image"),
    ):
        (tmp_path / name).write_bytes(content)
        page.upload("#file", tmp_path / name)
        page.until(f"document.querySelector('#error').innerText.includes({json.dumps(words)})")
    assert page.count("#board-part[hidden]") == 1


@needs_browser
def test_errors_of_the_server_are_shown(page):
    page.write("#prompt", "circle " * 300)
    page.click("#go")
    page.until("document.querySelector('#error').innerText.includes('shorten the text')")
    page.write("#prompt", " ")
    page.click("#go")
    assert page.text("#error") == "The prompt is empty."
    page.write("#prompt", "x")
    page.click("summary")
    page.write("[name=n]", "17")
    page.click("#go")
    page.until("document.querySelector('#error').innerText.includes('less than or equal to 16')")


@needs_browser
def test_a_pending_request_is_shown_and_can_be_canceled(browser, held):
    with serving(held) as running:
        browser.open(running.url)
        browser.write("#prompt", "first")
        browser.click("#go")
        browser.until("document.querySelector('#seconds').textContent.startsWith('1 s')")
        assert browser.text("#waiting").startswith("Working") and browser.count("#go:disabled") == 1
        browser.click("#cancel")
        browser.until("document.querySelector('#waiting').hidden && !document.querySelector('#go').disabled")
        browser.click("#go")  # is queued after the first, which is being answered
        running.until(lambda: running.worker.queue_length == 1)
        browser.click("#cancel")
        running.until(lambda: running.worker.queue_length == 0)
        held.let_go.set()
    browser.click("#go")
    browser.until("document.querySelector('#error').innerText.includes('does not answer')")


@needs_browser
def test_tasks_that_a_model_cannot_do_are_disabled_with_the_reason(browser, held):
    held.trained_tasks, held.super_resolution = frozenset({"text_to_image", "caption"}), None
    held.let_go.set()
    with serving(held) as running:
        browser.open(running.url)
        off = browser.evaluate("[...document.querySelectorAll('.off')].map((button) => button.dataset.tab)")
        assert off == ["layout", "edit"] and browser.count("#as-writing:disabled") == 1
        browser.click("#tab-edit")
        assert "not tuned for edit; add it to sft.tasks" in browser.text("#unavailable") and browser.evaluate(
            "document.querySelector('#go').disabled"
        )
        browser.click("#tab-describe")
        assert browser.evaluate("['ask', 'describe', 'describe-long'].map((id) => document.getElementById(id).disabled)") == [
            True,
            False,
            True,
        ]
        browser.press("ArrowLeft")
        browser.press("ArrowLeft")
        assert browser.evaluate("document.activeElement.id") == "tab-infill" and browser.evaluate(
            "document.querySelector('#unavailable').hidden"
        )


def test_the_page_needs_nothing_from_elsewhere():
    for file in PAGE.iterdir():
        assert "://" not in file.read_text().replace('xmlns="http://www.w3.org/2000/svg"', ""), file.name
