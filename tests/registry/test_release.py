"""What a version carries besides the model, and lineage both ways."""

from __future__ import annotations

import json
import re
import weakref
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from registry_support import CONFIG, evaluated, released, train_on

from cm3leon.cli.app import app
from cm3leon.config import paths
from cm3leon.evaluation.record import Record
from cm3leon.generation.generator import Generator
from cm3leon.models.decoder import Decoder
from cm3leon.registry import comparison, model_card, promotion, provenance, registry, release
from cm3leon.utils.errors import UserError
from cm3leon.utils.html import from_markdown


class Balanced(HTMLParser):
    """Fails on a tag that is closed and was not opened, and knows those left open."""

    VOID = ("meta", "img", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check_page(text: str) -> None:
    parser = Balanced()
    parser.feed(text)
    assert not parser.open
    assert all(source.startswith("data:image/png;base64,") for source in parser.sources)  # the page loads nothing


def artifact(version: registry.Version, name: str) -> str:
    client = registry.connect()
    assert version.run_id
    return Path(client.download_artifacts(version.run_id, f"{release.FOLDER}/{name}")).read_text()


def test_a_version_carries_its_release_from_registration_to_approval(stages: Path) -> None:
    version = registry.register(evaluated(0.5), CONFIG)
    card = artifact(version, "model-card.md")
    assert "| CC0-1.0 | 4 | 1 | test | none |" in card
    assert "Not compared yet." in artifact(version, "release.html")

    promotion.gate(CONFIG)
    promotion.promote(reason="looks <b>good</b>")
    page = artifact(version, "release.html")
    check_page(page)
    assert "challenger, champion" in page and "looks &lt;b&gt;good&lt;/b&gt;" in page and "Gate: version 1 passes" in page
    [entity] = registry.connect().search_model_versions("name='cm3leon'")
    assert "promoted version 1" in entity.description and len(entity.description) <= 5000

    second = released(0.6)
    client = registry.connect()
    assert second.run_id
    sheets = Path(client.download_artifacts(second.run_id, "gate.html")).read_text()
    check_page(sheets)
    assert sheets.count("<img") == 2 and "Gate: version 2 passes" in sheets
    assert "promoted version 2 over version 1" in artifact(version, "release.html")  # the former champion's page says who replaced it


def test_every_release_says_which_aliases_its_version_has_now(stages: Path) -> None:
    client = registry.connect()

    def check() -> None:
        for version in registry.status():
            state = f"Version {version}: {', '.join(version.aliases)}." if version.aliases else f"Version {version}."
            assert state in client.get_model_version(registry.MODEL_NAME, str(version)).description
            assert state in artifact(version, "release.html")

    for composition in (0.5, 0.6, 0.7):
        released(composition)
        check()
    promotion.rollback()
    check()
    registry.register(evaluated(0.5), CONFIG)  # known already
    check()


def test_the_bill_of_materials_is_cyclonedx_and_complete(stages: Path) -> None:
    version = registry.register(evaluated(0.5), CONFIG)
    bill = json.loads(artifact(version, "sbom.cdx.json"))
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    by_name = {item["name"].lower(): item for item in bill["components"]}
    assert {"torch", "mlflow", "numpy", "pydantic", "safetensors"} <= by_name.keys()
    assert all(re.fullmatch(r"pkg:pypi/[^@ ]+@\S+", item["purl"]) for item in by_name.values())
    assert by_name["numpy"]["licenses"][0]["license"]["name"].startswith("BSD")


def test_a_score_that_reaches_its_baseline_is_a_limit() -> None:
    record = Record(calibration={"vqa_accuracy_majority": 0.5, "vqa_accuracy_other_images": 0.1, "cider_other_images": 0.2})
    record.add("vqa_accuracy", {str(number): float(number % 2) for number in range(40)}, 100, 0, share=True)
    record.add("cider", {str(number): 3.0 + number % 2 for number in range(40)}, 100, 0)
    assert list(model_card.limits(record)) == ["vqa_accuracy: not shown to be better than the baseline (majority)"]
    record.scores["bleu_4"] = record.scores["composition"] = 0.1
    record.calibration |= {"bleu_4_other_images": 0.0, "composition_real": 1.0}
    table = list(model_card.scores_table(record))
    assert [line.split(" | ")[0] for line in table[2:]] == ["| composition", "| cider", "| vqa_accuracy", "| bleu_4"]  # the main ones first
    table = table[1:]
    assert table[2].startswith("| cider | 3.5 | 3.3") and table[2].endswith(" | other images 0.2 |  |")


def test_licenses_that_bind_the_model_are_flagged() -> None:
    rows = [{"license": name, "documents": 10} for name in ("CC0-1.0", "CC-BY-SA-4.0", "CC-BY-NC-SA-2.0", "LicenseRef-mine")]
    non_commercial, share_alike = list(filter(None, model_card.flags(rows)))
    assert non_commercial.startswith("**10 documents allow no commercial use** (CC-BY-NC-SA-2.0)")
    assert share_alike.startswith("**20 documents ask for the same license of changed works** (CC-BY-SA-4.0, CC-BY-NC-SA-2.0)")
    assert list(model_card.flags(rows[:1])) == []


def test_html_in_markdown_is_shown_and_not_obeyed() -> None:
    assert "&lt;script&gt;" in from_markdown("a <script>alert(1)</script>")


def test_lineage_both_ways(stages: Path, capsys: pytest.CaptureFixture[str]) -> None:
    released(0.5)
    manifest = pd.read_parquet(paths.VALIDATED / "manifest.parquet")
    manifest.loc[manifest["id"] == "b", "licence"] = "CC-BY-SA-4.0"
    train_on(manifest[manifest["id"] != "a"])
    released(0.6)

    def uses(**asked: str) -> dict[str, list[str]]:
        found = provenance.versions_trained_on(**asked)
        return {use.version.number: use.documents["id"].tolist() for use in found if use.documents is not None}

    assert uses(document="a") == {"1": ["a"]}
    assert uses(document="b") == uses(document="row b") == {"1": ["b"], "2": ["b"]}
    assert uses(license_id="CC-BY-SA-4.0") == uses(license_id="cc by-sa 4.0") == {"2": ["b"]}
    assert uses(license_id="CC0-1.0") == {"1": ["a", "b", "c", "d"], "2": ["c", "d"]}
    assert uses(document="nowhere") == {}
    assert provenance.lineage_of("2")["documents"] == {"CC-BY-SA-4.0": 1, "CC0-1.0": 2}
    for wrong in ({}, {"document": "a", "license_id": "CC0-1.0"}):
        with pytest.raises(UserError, match="--document ID or --license SPDX"):
            provenance.versions_trained_on(**wrong)
    with pytest.raises(registry.NotRegisteredError, match="no version 7"):
        provenance.lineage_of("7")

    app(["lineage", "--licence", "CC-BY-SA-4.0"], standalone_mode=False)
    assert capsys.readouterr().out == "version 2 (challenger, champion): 1 documents: b row b\n"


def test_two_models_next_to_each_other(stages: Path) -> None:
    bundle = evaluated(0.5).path
    prompts = ["a red circle on a white background", "<b>a blue square</b>"]
    page, (first, second) = comparison.compare_models([("one", bundle), ("two", bundle)], prompts, seed=3)
    check_page(page)
    assert page.count("<img") == 4 and "&lt;b&gt;a blue square&lt;/b&gt;" in page
    assert first.clip_scores == second.clip_scores and [image.seed for image in first.images] == [image.seed for image in second.images]
    assert first.right[1] is None and comparison.summary("one", first).startswith("one: CLIP score ")


def test_one_of_the_compared_models_is_in_memory_at_a_time(stages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[weakref.ref[Decoder]] = []
    load = Generator.from_bundle

    def counted(bundle: Path) -> Generator:
        assert not any(before() for before in loaded)
        generator = load(bundle)
        loaded.append(weakref.ref(generator.model))
        return generator

    monkeypatch.setattr(Generator, "from_bundle", counted)
    bundle = evaluated(0.5).path
    comparison.compare_models([("one", bundle), ("two", bundle)], ["a red circle"], seed=3)
    assert len(loaded) == 2


def test_prompts_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n\n  two dogs \n")
    assert comparison.read_prompts(file) == ["a cat", "two dogs"]
    file.write_text("\n")
    with pytest.raises(UserError, match="has no prompts"):
        comparison.read_prompts(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8"):
        comparison.read_prompts(file)
