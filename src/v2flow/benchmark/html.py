"""The report as one HTML page that needs nothing beside itself: plots are inline SVG, pictures data URIs."""

import shlex
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from v2flow.benchmark.document import Best, Block, Bullets, Commands, Section, Table
from v2flow.benchmark.grids import picture_strips
from v2flow.benchmark.plots import CAPTIONS, figures, token_counts
from v2flow.benchmark.t2i_grids import drawn_captions
from v2flow.benchmark.t2i_plots import DRAWING_CAPTIONS
from v2flow.benchmark.tables import introduction, report_sections, report_title

STYLE = """
:root { color-scheme: light dark; --line: color-mix(in srgb, currentColor 22%, transparent); }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 0 auto; padding: 1rem; }
h1 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
p, li, figcaption { max-width: 46rem; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td.words { text-align: left; white-space: normal; min-width: 12rem; overflow-wrap: anywhere; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 2rem; }
figure { margin: 0; } figure svg { width: 100%; max-width: 40rem; height: auto; }
figcaption { font-size: .85rem; opacity: .8; }
.strip { margin: 0 0 .4rem; width: max-content; } .strip span { position: sticky; left: 0; font-size: .8rem; }
.strip img { display: block; height: 4.2rem; image-rendering: pixelated; }
.drawn th, .drawn td { white-space: normal; text-align: left; vertical-align: bottom; border: 0; padding: .15rem; }
.drawn th { font-weight: normal; min-width: 5.6rem; } .drawn img { height: 5.2rem; image-rendering: pixelated; }
details { margin: .3rem 0; } summary { cursor: pointer; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .8rem; margin: .3rem 0 .3rem 1rem; }
""".strip()


def html_report(results: Mapping[str, Any], folder: Path) -> str:
    """The report as a page, with plots and the same pictures through every tokenizer, or captions drawn by every row.

    Args:
        results: content of results.json, see :func:`v2flow.benchmark.tables.markdown_report`.
        folder: the results' folder, which the paths of picture grids are relative to.

    Raises:
        V2FlowError: matplotlib is not installed, or a grid file is no picture.
    """
    title = report_title(results)
    parts = [f"<h1>{escape(title)}</h1>", *(f"<p>{escape(text)}</p>" for text in introduction(results))]
    sections = report_sections(results)
    # Figures and what they say come first, then what shows them to the eye, then the details.
    leading = [section for section in sections[:2] if section.title in ("Results", "What the figures say")]
    parts += [_section(section) for section in leading]
    parts += [_plots(results), _grids(results, folder), *_drawn(results, folder)]
    parts += [_section(section) for section in sections[len(leading) :]]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{STYLE}\n</style>\n</head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body>\n</html>\n"
    )


def _section(section: Section) -> str:
    return "\n".join([f"<h2>{escape(section.title)}</h2>", *(_block(block) for block in section.blocks)])


def _block(block: Block) -> str:
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Bullets):
        return "<ul>\n" + "\n".join(f"<li>{escape(item)}</li>" for item in block.items) + "\n</ul>"
    if isinstance(block, Commands):
        return "\n".join(
            f"<details><summary>{escape(label)}</summary>"
            + "".join(f"<pre>{escape(shlex.join(words))}</pre>" for words in commands)
            + "</details>"
            for label, commands in block.items
        )
    return f"<p>{escape(block)}</p>"


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(heading)}</th>" for heading in table.headings)
    rows = "\n".join("<tr>" + "".join(_cell(cell) for cell in row) + "</tr>" for row in table.rows)
    return (
        f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>'
    )


def _cell(cell: str) -> str:
    text = escape(cell)
    kind = ' class="words"' if len(cell) > 40 else ""
    return f"<td{kind}><strong>{text}</strong></td>" if isinstance(cell, Best) else f"<td{kind}>{text}</td>"


def _plots(results: Mapping[str, Any]) -> str:
    drawn = figures(results)
    if not drawn:
        return ""
    items = "\n".join(
        f'<figure role="group" aria-label="{escape(name)}">\n{drawn[name]}\n<figcaption>{escape(caption)}'
        "</figcaption></figure>"
        for name, caption in (CAPTIONS | DRAWING_CAPTIONS).items()
        if name in drawn
    )
    tokens = token_counts(results)
    note = ""
    if len(tokens) == 1:
        note = f"\n<p>Every row has {tokens[0]} tokens a picture: no plot of quality against tokens.</p>"
    return f'<h2>Plots</h2>\n<div class="plots">\n{items}\n</div>{note}'


def _grids(results: Mapping[str, Any], folder: Path) -> str:
    strips, note = picture_strips(results, folder)
    if not strips:
        return ""
    items = "\n".join(
        f'<div class="strip"><span>{escape(strip.label)}</span>'
        f'<img alt="{escape(strip.label)}" src="{strip.source}"></div>'
        for strip in strips
    )
    heading = f"<h2>The same pictures through every tokenizer</h2>\n<p>{escape(note)}</p>"
    return f'{heading}\n<div class="wide">\n{items}\n</div>'


def _drawn(results: Mapping[str, Any], folder: Path) -> list[str]:
    parts = []
    for drawn in drawn_captions(results, folder):
        head = "<td></td>" + "".join(f"<th>{escape(caption)}</th>" for caption in drawn.captions)
        lines = [
            f"<tr><th>{escape(name)}</th>"
            + "".join(
                f'<td><img alt="{escape(caption)}" src="{uri}"></td>'
                for caption, uri in zip(drawn.captions, uris, strict=True)
            )
            + "</tr>"
            for name, uris in drawn.rows.items()
        ]
        parts.append(
            "<h2>The same captions drawn by every row</h2>\n"
            "<p>The first captions of the evaluation set; one seed of each row, as it comes.</p>\n"
            f'<div class="wide"><table class="drawn">\n<tr>{head}</tr>\n'
            + "\n".join(lines)
            + "\n</table></div>"
        )
    return parts
