"""The Great Expectations gate over the accepted records and the counts of the run, and its Data Docs."""

from __future__ import annotations

import logging
import shutil
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from cm3leon.config.schema import ValidateConfig
from cm3leon.data import data_docs
from cm3leon.data.licenses import allowed
from cm3leon.data.manifest import SPLITS
from cm3leon.utils import telemetry

SITE = "manifest of the training data"
RUN = "validate"
"""Names on the pages of Data Docs."""


def flat_frame(accepted: pd.DataFrame, components: Any) -> pd.DataFrame:
    """The columns on which expectations are set, with one value in each cell.

    ``splits_of_its_part`` is the number of splits in which the record's component of linked records occurs.
    """
    captions = accepted["captions"]
    return pd.DataFrame(
        {
            "id": accepted["id"],
            "image": accepted["image"],
            "pixels": accepted["pixels"],
            "licence": accepted["licence"],
            "source": accepted["source"],
            "problem": accepted["problem"],
            "split": accepted["split"],
            "shortest_side": accepted[["width", "height"]].min(axis=1),
            "pixel_count": accepted["width"].astype("int64") * accepted["height"],
            "captions": captions.map(len),
            "shortest_caption": captions.map(lambda texts: min(map(len, texts), default=0)),
            "longest_caption": captions.map(lambda texts: max(map(len, texts), default=0)),
            "splits_of_its_part": accepted.groupby(components)["split"].transform("nunique"),
        }
    )


def _expectations(config: ValidateConfig) -> dict[str, list[Any]]:
    """Expectations by suite: ``accepted_rows``, and ``counts`` of all rows (a table of one row)."""
    from great_expectations import expectations as gxe

    rows: list[Any] = [gxe.ExpectTableRowCountToBeBetween(min_value=1)]
    rows += [gxe.ExpectColumnValuesToNotBeNull(column=name) for name in ("id", "image", "licence", "source", "split")]
    rows += [gxe.ExpectColumnValuesToBeUnique(column=name) for name in ("id", "pixels")]
    rows += [
        gxe.ExpectColumnValuesToBeNull(column="problem"),
        gxe.ExpectColumnValuesToBeInSet(column="licence", value_set=sorted(allowed(config.licenses))),
        gxe.ExpectColumnValuesToBeInSet(column="split", value_set=list(SPLITS)),
        gxe.ExpectColumnDistinctValuesToContainSet(column="split", value_set=list(SPLITS)),
        gxe.ExpectColumnValuesToBeBetween(column="shortest_side", min_value=config.min_side),
        gxe.ExpectColumnValuesToBeBetween(column="pixel_count", max_value=config.max_pixels),
        gxe.ExpectColumnValuesToBeBetween(column="captions", min_value=1),
        gxe.ExpectColumnValuesToBeBetween(column="shortest_caption", min_value=1),
        gxe.ExpectColumnValuesToBeBetween(column="longest_caption", max_value=config.max_caption_characters),
        gxe.ExpectColumnValuesToBeBetween(column="splits_of_its_part", min_value=1, max_value=1),
    ]
    counts = [
        gxe.ExpectColumnValuesToBeBetween(column="unaccounted", min_value=0, max_value=0),
        gxe.ExpectColumnValuesToBeBetween(column="accepted", min_value=1),
        gxe.ExpectColumnValuesToBeBetween(column="rejected_rate", min_value=0, max_value=config.max_rejected_rate),
    ]
    return {"accepted_rows": rows, "counts": counts}


def check(frames: dict[str, pd.DataFrame], config: ValidateConfig, docs: Path) -> list[str]:
    """Validate ``frames`` and write Data Docs to ``docs``.

    Args:
        frames: by suite, ``accepted_rows`` and ``counts``; a suite without a frame is left out.

    Returns:
        One line for each expectation that failed.
    """
    telemetry.turn_off()
    logging.getLogger("great_expectations").setLevel(logging.ERROR)
    import great_expectations as gx
    from great_expectations.core.run_identifier import RunIdentifier

    shutil.rmtree(docs, ignore_errors=True)
    failed = []
    with tempfile.TemporaryDirectory(prefix="cm3leon-expectations-") as scratch:
        context = gx.get_context(mode="file", project_root_dir=scratch)
        context.enable_analytics(False)
        context.variables.progress_bars = {"globally": False}
        # A site of our own, which is moved to its place: Great Expectations takes a $ in a configured path for a variable.
        context.delete_data_docs_site("local_site")
        store = {"class_name": "TupleFilesystemStoreBackend", "base_directory": "site"}
        context.add_data_docs_site(
            SITE, {"class_name": "SiteBuilder", "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"}, "store_backend": store}
        )
        now = datetime.now(UTC)
        source = context.data_sources.add_pandas("manifest")
        run_id = RunIdentifier(run_name=RUN, run_time=now)
        for name, expectations in _expectations(config).items():
            if name not in frames:
                continue
            batch = source.add_dataframe_asset(name).add_batch_definition_whole_dataframe("all")
            suite = context.suites.add(gx.ExpectationSuite(name=name, expectations=expectations))
            definition = context.validation_definitions.add(gx.ValidationDefinition(name=name, data=batch, suite=suite))
            result = definition.run(batch_parameters={"dataframe": frames[name]}, result_format="SUMMARY", run_id=run_id)
            failed += [_line(name, item) for item in result.results if not item.success]
        context.build_data_docs(site_names=[SITE])
        shutil.copytree(Path(context.root_directory) / "site", docs)
    data_docs.make_self_contained(docs, now)
    return failed


def _line(suite: str, item: Any) -> str:
    config = item.expectation_config
    kwargs = {key: value for key, value in config.kwargs.items() if key not in ("batch_id", "column")}
    column = config.kwargs.get("column", "table")
    unexpected = item.result.get("unexpected_count", "some")
    return f"{suite}.{column}: {config.type} {kwargs} ({unexpected} unexpected)"
