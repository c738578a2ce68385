"""The parts of a page, as HTML: text is escaped, pictures are inside it, and no address is ever asked for."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from onefold.errors import printable
from onefold.pictures.grids import png_bytes

__all__ = ["details", "document", "figure", "figures", "grid_table", "heading", "image", "paragraph", "table", "text"]

STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --faint: #666c75; --paper: #fff; --line: #d9dce1; --mark: #0b6b45 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e6ea; --faint: #9aa1ac; --paper: #15171a; --line: #363a41; --mark: #6fd6a6 }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 68rem; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--paper) }
h1, h2, h3 { line-height: 1.2; margin: 2rem 0 .5rem; overflow-wrap: anywhere } h1 { margin-top: .5rem }
h2 { border-top: 1px solid var(--line); padding-top: 1rem }
p, figcaption { max-width: 46rem } figcaption, .faint { color: var(--faint); font-size: .9rem }
figure { margin: 0; min-width: 0 } figure img { max-width: 100%; image-rendering: pixelated; display: block }
svg { width: 100%; height: auto; display: block }
.many { display: grid; gap: 1.25rem; grid-template-columns: repeat(auto-fill, minmax(min(19rem, 100%), 1fr)) }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .92rem; margin: .5rem 0 }
th, td { text-align: left; vertical-align: top; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--line) }
th { font-weight: 600 } td.number { font-variant-numeric: tabular-nums }
.best { color: var(--mark); font-weight: 600 } pre { overflow-x: auto; border: 1px solid var(--line); padding: .6rem }
summary { cursor: pointer; font-weight: 600; margin: .5rem 0 }
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""What the browser may load: nothing."""


def document(title: str, body: Iterable[str]) -> str:
    """A whole page."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f"<title>{text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def text(value: object) -> str:
    """Any text, such as the name of a class or of a file, as it is."""
    return escape(printable(value))


def heading(level: int, title: str) -> str:
    return f"<h{level}>{text(title)}</h{level}>"


def paragraph(line: str, kind: str = "") -> str:
    return f'<p class="{kind}">{text(line)}</p>' if kind else f"<p>{text(line)}</p>"


def details(title: str, body: Iterable[str], *, opened: bool = False) -> str:
    return f"<details{' open' if opened else ''}><summary>{text(title)}</summary>\n" + "\n".join(body) + "\n</details>"


def table(rows: Mapping[str, object]) -> str:
    """Two columns: what, and its value."""
    lines = (f'<tr><th scope="row">{text(name)}</th><td>{text(value)}</td></tr>' for name, value in rows.items())
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def grid_table(columns: Sequence[str], rows: Mapping[str, Sequence[tuple[str, bool]]]) -> str:
    """A column for each of several things; cells are (text, whether it is marked as the best)."""
    head = "".join(f'<th scope="col">{text(column)}</th>' for column in columns)
    lines = [f"<tr><th></th>{head}</tr>"]
    for name, cells in rows.items():
        shown = "".join(
            f'<td class="number best">{text(cell)} ★</td>' if best else f'<td class="number">{text(cell)}</td>'
            for cell, best in cells
        )
        lines.append(f'<tr><th scope="row">{text(name)}</th>{shown}</tr>')
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def figure(content: str, caption: str) -> str:
    return f"<figure>{content}<figcaption>{text(caption)}</figcaption></figure>"


def figures(content: Iterable[str]) -> str:
    """Figures side by side, as many as there is room for."""
    return '<div class="many">' + "\n".join(content) + "</div>"


def image(pixels: UInt8[np.ndarray, "H W C"] | Path, described: str) -> str:
    """A picture inside the page, of an array or of a PNG file."""
    content = pixels.read_bytes() if isinstance(pixels, Path) else png_bytes(pixels)
    return f'<img alt="{text(described)}" src="data:image/png;base64,{base64.b64encode(content).decode("ascii")}">'
