"""Manifests as programs write them: each is read, or refused for what it is."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cm3leon.data.sources import SourceError
from cm3leon.data.tables import read_table

ROWS = [{"image": f"{number}.png", "caption": f"caf\u00e9, {number}; a|b"} for number in range(3)]


def read(path: Path) -> list[dict[str, str]]:
    names, rows = read_table(path)
    found = list(rows)
    assert all(fault is None for _, _, fault in found), found
    assert set(names) == {name for _, cells, _ in found for name in cells}
    return [cells for _, cells, _ in found]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be-with-mark"])
@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_separators_encodings_and_line_ends_are_found(tmp_path: Path, encoding: str, separator: str, end: str) -> None:
    text = pd.DataFrame(ROWS).to_csv(index=False, sep=separator, lineterminator=end)
    big_endian = b"\xfe\xff" + text.encode("utf-16-be")
    (tmp_path / "m.csv").write_bytes(big_endian if encoding.startswith("utf-16-be") else text.encode(encoding))
    assert read(tmp_path / "m.csv") == ROWS


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_json_lines_in_any_unicode_encoding(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "m.jsonl").write_bytes("\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode(encoding))
    assert read(tmp_path / "m.jsonl") == ROWS


def test_a_directory_of_parquet_files_is_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    for number, row in enumerate(ROWS):
        pd.DataFrame([row]).to_parquet(tmp_path / f"part-{number}.parquet")
    assert read(tmp_path) == ROWS
    assert [location for location, *_ in read_table(tmp_path)[1]] == [f"part-{number}.parquet row 0" for number in range(3)]


@pytest.mark.parametrize("text", [
    "image,caption,,\na.png,a cat,,\n,,,\n\nb.png,a dog,,\n",  # columns and rows that a spreadsheet adds
    ",image,caption\n0,a.png,a cat\n1,b.png,a dog\n",  # an index of pandas
])  # fmt: skip
def test_columns_without_a_name_and_rows_without_content_are_left_out(tmp_path: Path, text: str) -> None:
    (tmp_path / "m.csv").write_text(text)
    assert read(tmp_path / "m.csv") == [{"image": "a.png", "caption": "a cat"}, {"image": "b.png", "caption": "a dog"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.csv", "image,caption\na,b\n".encode("utf-16-le"), "null bytes at its start, as UTF-16 without a byte order mark"),
        ("m.csv", b"image,caption\n" + b"a,b\n" * 3000 + b"a,caf\xe9\n", r"line 3002, is not UTF-8; read as Latin-1 it has 'a,caf\u00e9'"),
        ("m.csv", b"", "is empty; its first line must name the columns"),
        ("m.csv", b"image,caption,caption\n", "names a column twice: caption; rename"),
        ("m.csv", b'image,caption\na,b\na,"b\n', "row that begins on line 3: .*; correct its quotes"),
        ("m.jsonl", json.dumps(ROWS).encode(), "is one JSON array; in JSON Lines each line is an object"),
        ("m.jsonl", json.dumps(ROWS, indent=1).encode(), "is one JSON array"),
        ("m.jsonl", json.dumps(ROWS[0], indent=1).encode(), "is JSON over several lines"),
        ("m.json", b"[]", r"the format of a manifest is one of \.csv, .* not '\.json'"),
        ("m.parquet", b"PAR1 no parquet file PAR1", "is not a parquet file, or it is damaged"),
    ],
)
def test_what_cannot_be_read_is_told_for_what_it_is(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=message):
        list(read_table(tmp_path / name)[1])


def test_a_directory_without_parquet_files_and_a_missing_file_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="is a directory without parquet files"):
        read_table(tmp_path)
    with pytest.raises(SourceError, match=r"gone\.csv does not exist"):
        read_table(tmp_path / "gone.csv")


def test_a_damaged_page_of_a_parquet_file_is_one_error(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    pd.DataFrame(ROWS * 50).to_parquet(path, compression="gzip")
    data = bytearray(path.read_bytes())
    data[40:120] = bytes(80)
    path.write_bytes(bytes(data))
    with pytest.raises(SourceError, match=r"m\.parquet is (damaged after row \d+|not a parquet file, or it is damaged)"):
        list(read_table(path)[1])


def test_text_that_is_not_utf8_is_the_fault_of_its_row(tmp_path: Path) -> None:
    captions = pa.array([b"a", b"caf\xe9", b"c"], pa.binary())
    bad = pa.Array.from_buffers(pa.string(), 3, captions.buffers())
    pq.write_table(pa.table({"image": ["0", "1", "2"], "caption": bad}), tmp_path / "m.parquet")
    found = list(read_table(tmp_path / "m.parquet")[1])
    assert [fault for _, _, fault in found] == [None, "text that is not UTF-8 in caption", None]
    assert [cells for _, cells, _ in found] == [{"image": "0", "caption": "a"}, {"image": "1"}, {"image": "2", "caption": "c"}]
    (tmp_path / "m.jsonl").write_bytes(b'{"image": "0"}\n{"image": "caf\xe9"}\n{"image": "2"}\n')
    assert [fault is None for _, _, fault in read_table(tmp_path / "m.jsonl")[1]] == [True, False, True]


def test_in_a_tsv_a_caption_may_begin_with_a_quote(tmp_path: Path) -> None:
    (tmp_path / "m.tsv").write_text('image\tcaption\n0.png\t"Hello\n1.png\tb\n2.png\tc"\n3.png\t"Hello" he said\n')
    assert [cells["caption"] for cells in read(tmp_path / "m.tsv")] == ['"Hello', "b", 'c"', '"Hello" he said']
    (tmp_path / "m.tsv").write_text('image\tcaption\n0.png\t"two\nlines"\n1.png\t"a ""b"""\n')
    assert [cells["caption"] for cells in read(tmp_path / "m.tsv")] == ["two\nlines", 'a "b"']


def test_one_odd_cell_does_not_undo_the_quotes_of_a_tsv(tmp_path: Path) -> None:
    rows = [
        {"image": "0.png", "caption": 'say "hi"'},
        {"image": "1.png", "caption": "a tab\tand\na line"},
        {"image": "2.png", "caption": "c"},
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "m.tsv", sep="\t", index=False)
    assert read(tmp_path / "m.tsv") == rows
    (tmp_path / "m.tsv").write_text('image\tcaption\n0.png\t"two\nlines"\n1.png\t"cut')
    with pytest.raises(SourceError, match=r"row that begins on line 4: .*; correct its quotes"):
        read(tmp_path / "m.tsv")


def test_a_date_that_python_has_not_is_no_reason_to_lose_a_row(tmp_path: Path) -> None:
    times = pa.array([0, 2**62], pa.timestamp("us"))
    pq.write_table(pa.table({"image": ["a.png", "b.png"], "seen": times}), tmp_path / "m.parquet")
    found = read(tmp_path / "m.parquet")
    assert [cells["image"] for cells in found] == ["a.png", "b.png"]
    assert "a value that cannot be read" in repr(found[1]["seen"])


def test_a_truncated_file_in_utf16_is_told_for_what_it_is(tmp_path: Path) -> None:
    for name, text in (("m.csv", "image\na.png\n"), ("m.jsonl", '{"image": "a.png"}\n')):
        (tmp_path / name).write_bytes(text.encode("utf-16")[:-1])
        with pytest.raises(SourceError, match="is not UTF-16 to its end"):
            read(tmp_path / name)


def test_a_column_named_twice_in_parquet_is_refused_as_in_csv(tmp_path: Path) -> None:
    columns = [pa.array(["a.png"]), pa.array(["first"]), pa.array(["second"])]
    pq.write_table(pa.Table.from_arrays(columns, names=["image", "caption", "caption"]), tmp_path / "m.parquet")
    with pytest.raises(SourceError, match=r"m\.parquet names a column twice: caption; rename one of them"):
        read_table(tmp_path / "m.parquet")
