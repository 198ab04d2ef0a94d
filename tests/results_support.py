"""Made-up fresh runs."""

from typing import Any

from cm3leon.evaluation.reference import FreshRun


def fresh_run(seed: int, **changes: Any) -> FreshRun:
    """A run whose composition is 0.70, 0.71, 0.72 ... by its seed."""
    known: dict[str, Any] = {
        "seed": seed,
        "threads": 2,
        "processor": "AMD EPYC, AVX2",
        "date": f"2026-11-{10 + seed}T10:00:00+00:00",
        "commit": "0123456789abcdef",
        "profile": "small",
        "parameters": "p",
        "evaluation": "e",
        "scores": {
            "composition": 0.7 + seed / 100,
            "composition/prompts": 256.0,
            "composition_seen_prompts": 0.9,
            "vqa_accuracy": 0.8,
            "vqa_accuracy/is": 0.6,
            "cider": 5.0,
            "fd_encoder": 0.05 + seed / 100,
        },
        "calibration": {
            "composition_other_captions": 0.02,
            "composition_reconstructions": 0.84,
            "composition_one_candidate": 0.45 + seed / 100,
            "cider_one_reference": 5.4,
            "cider_beside_one_reference": 4.9,
        },
        "minutes": 30.0 + seed,
        "seconds": {"ingest": 30.0 + seed, "sft": 600.0 + seed},
        "peak_megabytes": 2048.0 + 512 * seed,
    }
    return FreshRun(**{**known, **changes})
