"""Pieces of HTML: pictures with their figures, the grid of tokens, one token's distribution, messages."""

import base64
import io
import math
from collections.abc import Sequence
from html import escape

from PIL import Image
from torch import Tensor

from v2flow.demo.session import Reading, TokenWords, Words
from v2flow.metrics.reconstruction import to_uint8

SHARP = 128
"""Pictures smaller than this are enlarged without smoothing."""


def data_url(picture: Tensor) -> str:
    """A picture `[3, S, S]` in [0, 1] as a PNG inside an address."""
    buffer = io.BytesIO()
    Image.fromarray(to_uint8(picture).permute(1, 2, 0).contiguous().numpy()).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def figure(picture: Tensor, title: str, note: str) -> str:
    """A picture with its title and a line of figures."""
    style = "sharp" if picture.shape[-1] < SHARP else ""
    return (
        f'<figure><img class="{style}" alt="{escape(title)}" src="{data_url(picture)}">'
        f"<figcaption><strong>{escape(title)}</strong><br>{escape(note)}</figcaption></figure>"
    )


def gallery(figures: Sequence[str]) -> str:
    """Figures side by side, below each other where there is no room."""
    return f'<div class="gallery">{"".join(figures)}</div>'


def message(text: str, mistake: bool = False) -> str:
    """One line that a screen reader announces; empty without text."""
    if not text:
        return ""
    return f'<p class="{"mistake" if mistake else "note"}" role="{"alert" if mistake else "status"}">{escape(text)}</p>'


def readable(word: str) -> str:
    """A vocabulary entry that can be seen: line breaks and the like written out."""
    return word if word.isprintable() and word.strip() else repr(word)[1:-1]


def token_grid(reading: Reading, columns: int) -> str:
    """The tokens as buttons over the faded picture, each with its most probable word or, without one, its id."""
    cells = []
    for index, token in enumerate(reading.tokens):
        row, column = divmod(index, columns)
        label = readable(token.probable[0][0]) if token.probable else str(token.id)
        cells.append(
            f'<button type="button" data-index="{index}" tabindex="{0 if index == 0 else -1}" aria-pressed="false" '
            f'aria-label="row {row + 1}, column {column + 1}: {escape(label)}"><bdi>{escape(label)}</bdi></button>'
        )
    return (
        f'<div class="tokens" role="group" aria-label="tokens; arrow keys move, Enter chooses" '
        f'data-columns="{columns}" style="--columns:{columns};--picture:url({data_url(reading.picture)})">'
        f"{''.join(cells)}</div>"
    )


def token_details(token: TokenWords, place: tuple[int, int], vocabulary: int, nearest: Words) -> str:
    """A token's soft distribution and the words nearest to its code.

    Args:
        place: row and column, from 0.
        vocabulary: number of words of the LLM's vocabulary.
    """
    head = f"<h3>Token in row {place[0] + 1}, column {place[1] + 1}: id {token.id}</h3>"
    if not token.probable:
        return head + message("This tokenizer has no distribution over words (readout=none).")
    # exp(entropy) words would have this entropy if they were equally probable.
    head += (
        f"<p>Entropy <strong>{token.entropy:.2f} nats</strong> of at most {math.log(vocabulary):.2f}: as spread as "
        f"{math.exp(token.entropy):,.0f} equally probable words of {vocabulary:,}.</p>"
    )
    return (
        head
        + '<div class="tables">'
        + _table("Most probable words", "probability", token.probable, True)
        + (_table("Nearest to its code", "cosine", nearest, False) if nearest else "")
        + "</div>"
    )


def _table(title: str, unit: str, words: Words, percent: bool) -> str:
    largest = max([1e-9, *(value for _, value in words)])
    rows = "".join(
        f'<tr><th scope="row"><bdi>{escape(readable(word))}</bdi></th>'
        f"<td>{f'{100 * value:#.3g} %' if percent else f'{value:.3f}'}</td>"
        f'<td class="bar"><div style="width:{100 * max(value, 0.0) / largest:.0f}%"></div></td></tr>'
        for word, value in words
    )
    head = f'<th scope="col">word</th><th scope="col">{unit}</th><td></td>'
    return f"<table><caption>{title}</caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
