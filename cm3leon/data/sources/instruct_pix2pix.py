"""The source for pairs of InstructPix2Pix: parquet files whose rows hold an image, an instruction, and the edited image.

Columns are those of the published data set: ``original_image``, ``original_prompt``, ``edit_prompt``, ``edited_image``, ``edited_prompt``;
the images as bytes or ``{bytes, path}``. Each row becomes two records, the second an edit of the first.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from cm3leon.config.ingest_schema import InstructPix2PixConfig
from cm3leon.data.manifest import SourceRow
from cm3leon.data.merging import merge_images
from cm3leon.data.sources import SourceError
from cm3leon.data.sources.records import Cells, Files, check_columns, row_of
from cm3leon.data.tables import read_table

ORIGINAL = {"image": "original_image", "captions": "original_prompt"}
EDITED = {"image": "edited_image", "captions": "edited_prompt", "instruction": "edit_prompt"}
"""Our columns of the two records, and the files'."""


def rows(config: InstructPix2PixConfig, path: Path) -> Iterator[SourceRow]:
    """Two records for each row of the parquet files in ``path``, in the order of their names; several edits of one original share it.

    Raises:
        SourceError: if there are no parquet files or rows, a column is missing or mapped that there is not, or a file is damaged.
    """
    found, table_rows = read_table(path)
    names = (*ORIGINAL.values(), *EDITED.values())
    check_columns(config.columns, names, "ingest.instruct_pix2pix")
    needed = {ours: config.columns.get(ours, ours) for ours in names}
    if missing := [theirs for theirs in needed.values() if theirs not in found]:
        raise SourceError(
            f"{path} has no column {' and no column '.join(map(repr, missing))}; its columns are: {', '.join(found)}. "
            "ingest.instruct_pix2pix.columns names others"
        )
    files = Files(path.resolve(), config.max_file_megabytes)
    if next(table_rows, None) is None:
        raise SourceError(f"the parquet files in {path} have no rows")

    def read() -> Iterator[SourceRow]:
        for location, cells, fault in read_table(path)[1]:
            original, edited = (
                {ours: cells.get(needed[theirs]) for ours, theirs in columns.items()} | {"key": f"{location} {kind}"}
                for kind, columns in (("original", ORIGINAL), ("edited", EDITED))
            )
            yield row_of(Cells(original, f"{location} original", fault), files, config)
            yield row_of(Cells({**edited, "edited_from": original["key"]}, f"{location} edited", fault), files, config)

    yield from merge_images(read)
