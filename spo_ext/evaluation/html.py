"""Parts of a report: one HTML file that needs no other file and runs no script."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from spo_ext.shown import visible

STYLE = """
:root { --ink: #0f172a; --soft: #64748b; --line: #e2e8f0; --good: #047857; --bad: #b91c1c; }
* { box-sizing: border-box; }
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; color: var(--ink);
  background: #f8fafc; margin: 0; }
main { max-width: 1080px; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; margin: 0 0 .25rem; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; }
p.lead { color: var(--soft); margin: 0 0 1.75rem; max-width: 46rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(210px, 1fr)); gap: 1rem; }
.card, figure, .scroll, article { background: #fff; border: 1px solid var(--line);
  border-radius: 12px; }
.card { padding: 1rem 1.2rem; } .card span { color: var(--soft); font-size: .85rem; }
.card strong { display: block; font-size: 1.7rem; font-variant-numeric: tabular-nums; }
.card small { color: var(--soft); }
figure { margin: 1.5rem 0 0; padding: .75rem; } figure img { width: 100%; display: block; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr));
  gap: 1rem; } .figures figure { margin: 0; max-width: 640px; }
.figures.alone { margin-top: 1rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .5rem .9rem; border-bottom: 1px solid var(--line);
  vertical-align: top; } tr:last-child td { border-bottom: 0; }
th { font-size: .8rem; color: var(--soft); font-weight: 600; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
.bar { background: #2563eb; height: .6rem; border-radius: 4px; min-width: 2px; }
article { padding: 1rem 1.2rem; margin-bottom: 1rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); gap: 1rem; }
pre { background: #0f172a; color: #e2e8f0; padding: .75rem 1rem; border-radius: 8px;
  margin: .4rem 0 0; overflow-x: auto; font-size: .85rem; }
pre.wrap, pre.prompt { white-space: pre-wrap; overflow-wrap: anywhere; }
pre.prompt { background: none; color: inherit; padding: 0; margin: 0 0 .75rem; }
code { font-size: .9rem; } .good { color: var(--good); } .bad { color: var(--bad); }
.columns { columns: 3 260px; } .columns div { display: flex; justify-content: space-between;
  gap: 1rem; border-bottom: 1px solid var(--line); padding: .2rem 0; break-inside: avoid; }
.columns code { overflow-wrap: anywhere; text-align: right; }
footer { color: var(--soft); margin-top: 2.5rem; font-size: .9rem; }
"""
# The browser refuses whatever a text of a model might smuggle past escape.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def text(words: object) -> str:
    """Any text as HTML that shows it and no more: neither tags nor what turns a line around."""
    return escape(visible(str(words)))


def page(title: str, body: Iterable[str]) -> str:
    """A whole document; body is HTML, title text."""
    joined = "\n".join(body)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><main>\n{joined}\n</main></body></html>\n"
    )


def figure(png: bytes, alt: str) -> str:
    """The image lies in the page itself."""
    image = base64.b64encode(png).decode("ascii")
    return f'<figure><img alt="{text(alt)}" src="data:image/png;base64,{image}"></figure>'


def card(label: str, value: str, note: str) -> str:
    """A number to be seen from afar, all three as text."""
    return (
        f'<div class="card"><span>{text(label)}</span><strong>{text(value)}</strong>'
        f"<small>{text(note)}</small></div>"
    )


def cards(items: Iterable[str]) -> str:
    return f'<div class="cards">{"".join(items)}</div>'


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are text; all but the first of a row are numbers, to the right."""

    def line(cells: Sequence[str], tag: str) -> str:
        first, *others = (text(cell) for cell in cells)
        numbers = "".join(f'<{tag} class="number">{cell}</{tag}>' for cell in others)
        return f"<tr><{tag}>{first}</{tag}>{numbers}</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f'<div class="scroll"><table>{line(header, "th")}{body}</table></div>'


def settings(values: Mapping[str, object]) -> str:
    """Names and values in columns."""
    items = "".join(
        f"<div><span>{text(name)}</span><code>{text(value)}</code></div>"
        for name, value in values.items()
    )
    return f'<div class="card columns">{items}</div>'
