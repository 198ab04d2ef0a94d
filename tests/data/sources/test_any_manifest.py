"""Whatever a manifest holds, every row of it is accepted, or rejected with reasons that are explained."""

from __future__ import annotations

import io
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from cm3leon.config.ingest_schema import FolderConfig
from cm3leon.config.schema import ValidateConfig
from cm3leon.data.manifest import ImageStore, read_manifest
from cm3leon.data.packing import pack
from cm3leon.data.sources.folder import rows
from cm3leon.data.sources.records import MANIFEST_COLUMNS
from cm3leon.data.validation import RULES, check_rows, profile_images

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from([10**400, "\u200b", "['a', 'b']", "[" * 2000])
)
CELLS = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=6
)
KNOWN = {
    "image": st.sampled_from(["a.png", "b.png", "broken.png", "gone.png", "../a.png", "", None, "a.png/", "https://example.org/a.png"])
    | CELLS,
    "captions": st.sampled_from(["a cat", ["a", "b"], "('a', 'b')", ""]) | CELLS,
    "licence": st.sampled_from(["MIT", "CC0-1.0", ""]) | CELLS,
    "objects": st.just([{"label": "cat", "box": [0, 0, 9, 9]}]) | CELLS,
    "questions": st.just([{"question": "?", "answers": ["a"]}]) | CELLS,
}
ROWS = st.lists(st.fixed_dictionaries({}, optional={name: KNOWN.get(name, CELLS) for name in MANIFEST_COLUMNS}), min_size=1, max_size=6)


def write_pictures(root: Path) -> None:
    for seed, name in enumerate(("a.png", "b.png")):
        data = io.BytesIO()
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(data, "PNG")
        (root / name).write_bytes(data.getvalue())
    (root / "broken.png").write_bytes(data.getvalue()[:100])


@settings(max_examples=60, derandomize=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(written=ROWS)
def test_every_row_is_accepted_or_rejected_for_a_reason(written: list[dict[str, Any]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_pictures(root)
        columns = dict.fromkeys(("image", "captions", "licence"))
        (root / "m.jsonl").write_text("".join(json.dumps({**columns, **row}) + "\n" for row in written), encoding="utf-8")
        counts = pack(rows(FolderConfig(manifest="m.jsonl"), root), root / "raw", 32)
        assert counts["rows"] + counts["merged_rows"] == len(written)
        frame = read_manifest(root / "raw")
        config = ValidateConfig(workers=1)
        findings = check_rows(frame, profile_images(ImageStore(root / "raw"), frame, config), config)
    assert len(findings) == len(frame) == counts["rows"]
    for found in findings:
        assert {reason for reason, _ in found} <= RULES.keys()
    problems: pd.Series = frame["problem"]
    for problem, found in zip(problems, findings, strict=True):
        assert set((problem or "").split(",")) - {""} <= {reason for reason, _ in found}
