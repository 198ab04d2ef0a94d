"""Great Expectations' Data Docs as self-contained pages.

Great Expectations writes pages which load scripts, styles and images from the network and without them show empty tables. Here the tables
are written as HTML, and one style sheet of our own replaces the remote ones, so that a page loads nothing. Titles say what was checked
and when; of a table in memory Great Expectations does not know the name.
"""

from __future__ import annotations

import ast
import re
import shutil
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

_STYLE = """
* { box-sizing: border-box }
body { margin: 0; font: 15px/1.5 system-ui, sans-serif; color: #212529; background: #fff }
a { color: #0b5ed7; text-decoration: none }
a:hover { text-decoration: underline }
h4, h5, h6, p { margin: 0 0 .3rem }
h4, h5 { font-size: 1.15rem }
h6, .h6 { font-size: 1rem; font-weight: 600 }
body > nav { padding: .8rem 2rem; border-bottom: 1px solid #dee2e6 }
nav nav { display: flex; gap: 1.5rem; align-items: center }
.navbar-brand { font-size: 1.2rem; font-weight: 600 }
.breadcrumb { display: flex; gap: .5rem; list-style: none; margin: 0; padding: 0 }
.breadcrumb-item + .breadcrumb-item::before { content: "/ "; color: #6c757d }
body > .container-fluid { padding: 1.5rem 2rem }
body > .container-fluid > .row { display: grid; grid-template-columns: 15rem minmax(0, 1fr); gap: 2rem }
.sticky { position: sticky; top: 1rem }
.card { border: 1px solid #dee2e6; border-radius: 6px; margin: 0 0 1rem }
.card-header { padding: .4rem .8rem; background: #f1f3f5 }
.card-body { padding: .6rem .8rem }
.card .nav { list-style: none; margin: 0; padding: 0; max-height: 65vh; overflow: auto }
.nav-tabs { display: none }
.tab-pane { margin: 0 0 2rem }
.ge-section { margin: 0 0 2rem; scroll-margin-top: 1rem }
.alert { padding: .6rem 1rem; margin: 0 0 .5rem; background: #e9ecef; border-radius: 6px }
.badge { padding: .05em .45em; border-radius: 4px; font: .9em ui-monospace, monospace; background: #e2e6ea; overflow-wrap: anywhere }
table { border-collapse: collapse; width: 100% }
.table-sm { width: auto; min-width: 24rem }
th, td { padding: .35rem .8rem; border-bottom: 1px solid #dee2e6; text-align: left; vertical-align: top }
th { background: #f8f9fa }
i.fas { font-style: normal; font-weight: 700 }
i.text-success { color: #19713f }
i.text-success::before { content: "\\2713" }
i.text-danger { color: #b02a37 }
i.text-danger::before { content: "\\2717" }
i.text-warning { color: #946200 }
i.text-warning::before { content: "!" }
.cooltip .top { display: none }
.collapse { display: none }
.collapse:target { display: block }
body:has(#option2:checked) tr:has(i.text-success),
body:has(#option2:checked) .ge-section:has(td i.text-success):not(:has(i.text-danger, i.text-warning)) { display: none }
"""
_SCRIPT = re.compile(r"<script\b.*?</script>", re.DOTALL)
_HEAD_LINK = re.compile(r"<link\b[^>]*>")
_STYLES = re.compile(r"(?:\s*<style>.*?</style>)+", re.DOTALL)
_FOOTER = re.compile(r"<footer\b.*?</footer>", re.DOTALL)
_LOGO = re.compile(r"<img\b[^>]*/>", re.DOTALL)
_FILLED_TABLE = re.compile(
    r"<div id=\"(?P<id>[\w-]+)-toolbar\".*?</div>\s*<table\b[^>]*>\s*</table>"
    r".*?columns: (?P<columns>\[.*?\]),\n\s*data: (?P<data>\[.*?\]),\n",
    re.DOTALL,
)
_TITLE = re.compile(r"<title>.*?</title>", re.DOTALL)


def make_self_contained(docs: Path, checked: datetime) -> None:
    """Rewrite every page under ``docs`` in place, and remove the files that no page uses any more.

    Args:
        checked: when.
    """
    for page in docs.rglob("*.html"):
        what = "Data Docs" if page.name == "index.html" else page.stem.rpartition("-")[2].replace("_", " ")
        if "expectations" in page.relative_to(docs).parts:
            what = f"expectations of {what}"
        html = _titled(page.read_text(encoding="utf-8"), what, f"{checked:%Y-%m-%d %H:%M} UTC")
        page.write_text(_without_remote_files(html), encoding="utf-8")
    shutil.rmtree(docs / "static", ignore_errors=True)


def add_counts(docs: Path, title: str, counts: dict[str, int], more: str) -> None:
    """Insert a table of ``counts``, and a link to ``more`` about them, before the other tables of the index page."""
    body = "".join(f"<tr><td>{escape(name)}</td><td>{count:,}</td></tr>" for name, count in counts.items())
    table = f'<table class="table-sm"><thead><tr><th>{escape(title)}</th><th></th></tr></thead><tbody>{body}</tbody></table>\n'
    link = f'<p><a href="{escape(more)}">examples of each, with pictures</a></p><br>\n'
    page = docs / "index.html"
    before, tag, after = page.read_text(encoding="utf-8").partition("<table")
    page.write_text(before + table + link + tag + after, encoding="utf-8")


def _titled(html: str, what: str, when: str) -> str:
    """The page with one title, and the name and time of what was checked."""
    html = _TITLE.sub("", html).replace("<head>", f"<head>\n    <title>{what} · {when}</title>", 1)
    return html.replace("Data asset: None", f"Data asset: {what}<br>Checked: {when}")


def _without_remote_files(html: str) -> str:
    """The page with its tables as HTML and our style sheet, without scripts, links and images."""
    html = _FILLED_TABLE.sub(lambda match: _table(ast.literal_eval(match["columns"]), ast.literal_eval(match["data"])) + "<script>", html)
    for outside in (_SCRIPT, _HEAD_LINK, _FOOTER):
        html = outside.sub("", html)
    html = _LOGO.sub("Data Docs", html)
    return _STYLES.sub(lambda _: f"\n    <style>{_STYLE}</style>", html, count=1)


def _table(columns: list[dict[str, str]], rows: list[dict[str, Any]]) -> str:
    """The rows of an index table, each with a link to its page."""
    shown = [column for column in columns if column["field"] not in ("run_name", "batch_identifier")]
    head = "".join(f"<th>{column['title']}</th>" for column in shown)
    body = []
    for row in rows:
        cells = "".join(f"<td>{row[column['field']]}</td>" for column in shown)
        body.append(f'<tr>{cells}<td><a href="{row["_table_row_link_path"]}">open its page</a></td></tr>')
    return f"<table><thead><tr>{head}<th></th></tr></thead><tbody>{''.join(body)}</tbody></table>"
