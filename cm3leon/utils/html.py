"""HTML pages of one file, which load nothing."""

from __future__ import annotations

import base64
import html

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; color: #1c2430 }
table { border-collapse: collapse; margin: 1rem 0; font-size: 14px }
td, th { border: 1px solid #d5dbe3; padding: .25rem .6rem; text-align: left; vertical-align: top }
th { background: #f2f5f9 }
img { max-width: 100%; image-rendering: pixelated }
code { background: #f2f5f9; padding: 0 .2rem }
h2 { margin-top: 2.2rem; border-bottom: 1px solid #d5dbe3 }
.state { font-size: 17px; padding: .6rem 1rem; background: #eef4ff; border-left: 4px solid #3b6fd4 }
"""


def page(title: str, body: str, style: str = "") -> str:
    """A whole HTML page that loads nothing; ``style`` is added to :data:`STYLE`."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}{style}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def from_markdown(text: str) -> str:
    """HTML of markdown with tables; HTML in it is shown, not obeyed."""
    from markdown_it import MarkdownIt

    rendered: str = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    return rendered


def image_tag(data: bytes, alternative: str, kind: str = "png") -> str:
    """An image that is part of the page, from its file of a ``kind`` that browsers show."""
    return f'<img alt="{html.escape(alternative)}" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'
