"""Every value can be read whole, in a terminal of any width and by another program."""

import io

import pytest
from rich.console import Console

from cm3leon.cli.listing import show

RECORDS = [
    {"version": "12", "aliases": "challenger, champion", "created": "2026-11-27 14:02 UTC", "vqa_accuracy": "0.750", "gate": "[passed]"},
    {"version": "3", "aliases": "previous_champion", "created": "2026-11-02 02:00 UTC", "vqa_accuracy": "", "gate": "held back against 2"},
]


def shown(width: int, terminal: bool = True) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None)
    show(RECORDS, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [80, 100, 160])
def test_no_value_is_cut_and_no_line_is_wider_than_the_terminal(width: int) -> None:
    text = shown(width)
    for record in RECORDS:
        assert all(value in text for value in [*record.values(), *record])
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width


def test_a_wide_terminal_has_a_table_and_a_narrow_one_paragraphs_without_empty_values() -> None:
    assert len([line for line in shown(160).splitlines() if "│" in line]) == len(RECORDS)
    assert shown(60).splitlines() == [
        "version 12",
        "  aliases challenger, champion  created 2026-11-27 14:02 UTC",
        "  vqa_accuracy 0.750  gate [passed]",
        "version 3",
        "  aliases previous_champion  created 2026-11-02 02:00 UTC",
        "  gate held back against 2",
    ]


def test_a_pipe_has_a_line_a_record_with_tabs() -> None:
    header, *lines = shown(20, terminal=False).splitlines()
    assert header.split("\t") == list(RECORDS[0])
    assert [line.split("\t") for line in lines] == [list(record.values()) for record in RECORDS]
