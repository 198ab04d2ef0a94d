"""The webdataset source: tar shards in which files that share a name are one record, as img2dataset writes them.

    00000.tar: 000000000.jpg, 000000000.txt, 000000000.json, 000000001.jpg ...

The image is the member with the suffix of an image format, captions are the lines of the ``.txt``, and other columns the fields of the
``.json`` that are called as ours are (``license`` and ``caption`` too), or mapped in ``ingest.webdataset.columns``. Nothing is extracted.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Self

from cm3leon.config.ingest_schema import WebdatasetConfig
from cm3leon.data.cells import RowProblem, parse_json
from cm3leon.data.directories import files_below
from cm3leon.data.images import SUFFIXES
from cm3leon.data.manifest import SourceRow
from cm3leon.data.sources import SourceError
from cm3leon.data.sources.records import Cells, Columns, Files, add_problems, row_of, too_large

TEXT_BYTES = 16 << 20
"""Most bytes of a text or JSON member."""
SIDECAR = "._"
"""Beginning of the names of files in which macOS keeps what other file systems have no place for; they are no records."""


class _Header(tarfile.TarInfo):
    """A member's header; one that is damaged or missing is an error, where ``tarfile`` takes it for the end of the archive."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(archive)
        except tarfile.HeaderError as error:
            if isinstance(error, tarfile.EOFHeaderError):  # type: ignore[attr-defined]  # a block of zeros, as it should be
                raise
            raise tarfile.ReadError(f"no member and no end of the archive: {error}") from None


def rows(config: WebdatasetConfig, path: Path) -> Iterator[SourceRow]:
    """Every record of the shards ``path / **.tar``, in the order of their names.

    Members that are no files (links, devices) or whose names leave the archive make their record ``malformed_row``.

    Raises:
        SourceError: if there are no shards or records, a shard is damaged, or a column is mapped that there is not.
        UserError: if a directory cannot be read, or is a link that leads out of ``path``.
    """
    columns = Columns(config.columns, "ingest.webdataset")
    shards = [file for file in files_below(path) if file.suffix == ".tar"]
    if not shards:
        raise SourceError(f"{path} holds no tar shards; ingest.path names their directory")
    files = Files(path.resolve(), config.max_file_megabytes)
    empty = True
    for shard in shards:
        for key, members, wrong in _groups(shard, config.max_file_megabytes):
            empty = False
            values, fault = _values(members, columns)
            if values["image"] is None and wrong is None:
                wrong = RowProblem("missing", f"no image among its files: {', '.join(members)}")
            row = row_of(Cells(values, f"{shard.relative_to(path)} {key}", fault), files, config, read=values["image"] is not None)
            add_problems(row, [wrong] if wrong else [])
            yield row
    if empty:
        raise SourceError(f"{path}: the tar shards hold no records")
    columns.tell_unseen()


def _groups(shard: Path, megabytes: float) -> Iterator[tuple[str, dict[str, bytes], RowProblem | None]]:
    """Key, content by suffix, and what is wrong, of each run of members that share a name up to its first dot."""
    key: str = ""
    fault: RowProblem | None = None
    members: dict[str, bytes] = {}
    try:
        with tarfile.open(shard, "r|*", tarinfo=_Header) as archive:
            for member in archive:
                name = PurePosixPath(member.name)
                if member.isdir() or name.name.startswith(SIDECAR):
                    continue
                own, suffix = str(name.parent / name.name.partition(".")[0]), "." + name.name.partition(".")[2].lower()
                if own != key or suffix in members:
                    if members or fault:
                        yield key, members, fault
                    key, members, fault = own, {}, None
                if not member.isfile() or name.is_absolute() or ".." in name.parts:
                    fault = RowProblem("malformed_row", f"{member.name} is a link, a device, or outside of the archive")
                elif suffix in (".txt", ".json") and member.size > TEXT_BYTES:
                    fault = RowProblem("malformed_row", f"{member.name} has {member.size / 1e6:,.1f} MB of text")
                elif member.size > megabytes * 1e6:
                    fault = too_large(member.name, member.size, megabytes)
                else:
                    content = archive.extractfile(member)
                    assert content is not None  # of a regular file it is not
                    members[suffix] = content.read()
            _check_end(archive)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise SourceError(f"{shard} is damaged after {key or 'its beginning'} ({error}); write or download it again") from None
    if members or fault:
        yield key, members, fault


def _check_end(archive: tarfile.TarFile) -> None:
    """Raises :class:`tarfile.ReadError` if anything but zeros follows the end of an archive, such as another archive."""
    assert archive.fileobj is not None
    while block := archive.fileobj.read(tarfile.RECORDSIZE):
        if block.strip(b"\0"):
            raise tarfile.ReadError("more follows the end of the archive; archives that were joined by cat have to stay files of their own")


def _values(members: dict[str, bytes], columns: Columns) -> tuple[dict[str, Any], str | None]:
    """The cells of a record by our columns, and what is wrong with its files."""
    fields: Any = {}
    try:
        if ".json" in members:
            fields = parse_json(members[".json"])
        lines = members.get(".txt", b"").decode().splitlines()
    except ValueError as error:
        return {"image": _image(members)}, f".json or .txt: {error}"
    if not isinstance(fields, dict):
        return {"image": _image(members)}, ".json holds no object"
    values = columns.mapped(fields)
    if any(line.strip() for line in lines):
        values["captions"] = [line for line in lines if line.strip()]
    return {**values, "image": _image(members)}, None


def _image(members: dict[str, bytes]) -> dict[str, Any] | None:
    suffix = next((suffix for suffix in members if suffix in SUFFIXES), None)
    return None if suffix is None else {"bytes": members[suffix], "path": f"image{suffix}"}
