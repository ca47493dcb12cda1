"""Where the rows of the visual tokens start: μ + r·direction, of the length and around the mean of the LLM's own rows.

μ is the table's mean row and r the root mean square of the centred rows' norms. Directions, one unit vector a token:

- ``vocabulary``: the codes c_k of the visual vocabulary, for an LLM whose table the tokenizer was trained on;
- ``words``: each token's words in this LLM's embeddings (word_directions.py), for any LLM;
- ``projection``: codes through a random orthonormal map of their width to the LLM's: their similarities (about, when
  the LLM is narrower) without any meaning; the control for ``words``;
- ``random``: independent of the codes; the control for all.

`<boi>` and `<eoi>` are given random directions. A head that is not tied starts by the same directions around its own
mean, with ``words`` by the words' rows in the head.
"""

from dataclasses import dataclass, field
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from v2flow.errors import V2FlowError
from v2flow.t2i.config import RowsMethod
from v2flow.t2i.extension import VisualTokens, is_tied
from v2flow.t2i.word_directions import TokenWords, word_directions


@dataclass
class InitialRows:
    """Rows of `<boi>`, the visual tokens and `<eoi>`.

    Attributes:
        input: for the embedding table, `[K + 2, D]` fp32.
        output: for the head, `[K + 2, D]`; None if it is tied.
        report: figures about them, by name; with ``words``: the share of the vocabulary's words that the LLM has,
            the mean and least mass of a token on them, and the share of tokens that no picture used.
    """

    input: Tensor
    output: Tensor | None
    report: dict[str, float] = field(default_factory=dict)


def initial_rows(
    method: RowsMethod,
    codes: Tensor,
    model: Any,
    llm_tokenizer: Any,
    tokens: VisualTokens,
    words: TokenWords | None = None,
    seed: int = 0,
) -> InitialRows:
    """Rows to start training from.

    Args:
        method: see the module's text.
        codes: unit codes `[K, D]` of the visual vocabulary.
        model: the LLM with its vocabulary extended.
        llm_tokenizer: its tokenizer.
        tokens: where the visual tokens are.
        words: what `token_words` says of the V2Flow tokenizer; for ``words`` only.
        seed: of every random direction.

    Raises:
        V2FlowError: an unknown method, another number of codes than visual tokens, codes of another width than the
            LLM's with ``vocabulary``, or `words` missing.
    """
    if len(codes) != tokens.num_visual:
        raise V2FlowError(
            f"codes: expected {tokens.num_visual}, a row for every visual token, found {len(codes)}; is it another "
            "tokenizer?"
        )
    if method not in get_args(RowsMethod):
        raise V2FlowError(f"option rows: expected one of {', '.join(get_args(RowsMethod))}, found {method!r}")
    tables = [model.get_input_embeddings().weight.detach()[: tokens.boi]]
    if not is_tied(model):
        tables.append(model.get_output_embeddings().weight.detach()[: tokens.boi])
    report: dict[str, float] = {}
    if method == "words":
        if words is None:
            raise V2FlowError("option rows: words need the tokens' word distributions; see token_words")
        said = [word_directions(words, llm_tokenizer, table) for table in tables]
        directions = [each.directions for each in said]
        report = {
            "words_matched": said[0].matched / len(words.words),
            "mass_matched": float(said[0].mass.mean()),
            "least_mass_matched": float(said[0].mass.min()),
            "tokens_unused": words.unused / len(words.counts),
        }
    else:
        shared = _directions(method, codes, tables[0].shape[1], seed)
        directions = [shared] * len(tables)
    rows = [place(each, table, seed) for each, table in zip(directions, tables, strict=True)]
    return InitialRows(rows[0], rows[1] if len(rows) > 1 else None, report)


def mean_and_radius(table: Tensor) -> tuple[Tensor, float]:
    """Mean row μ `[D]` of a table `[V, D]` and r, the root mean square of the centred rows' norms."""
    mean = table.float().mean(0)
    # Without a second copy of the table; in double, for the difference of two nearly equal numbers.
    squares = torch.linalg.vector_norm(table.float(), dim=1).double().square().mean()
    return mean, float((squares - mean.double().square().sum()).clamp_min(0).sqrt())


def place(directions: Tensor, table: Tensor, seed: int) -> Tensor:
    """Rows `[K + 2, D]` at distance r from the mean row of `table` `[V, D]`, in `directions` `[K, D]` of any length;
    the first and the last, for `<boi>` and `<eoi>`, in random ones."""
    mean, radius = mean_and_radius(table)
    ends = random_directions(2, table.shape[1], seed + 1).to(table.device)
    ordered = torch.cat([ends[:1], directions.to(table.device).float(), ends[1:]])
    return mean + radius * F.normalize(ordered, dim=-1)


def random_directions(count: int, width: int, seed: int) -> Tensor:
    """Unit vectors `[count, width]`, uniform on the sphere."""
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


def projected_directions(codes: Tensor, width: int, seed: int) -> Tensor:
    """Codes `[K, D]` through a random map `[D, width]` with orthonormal rows, or columns if `width` < D."""
    larger, smaller = max(codes.shape[1], width), min(codes.shape[1], width)
    matrix = torch.randn(larger, smaller, generator=torch.Generator().manual_seed(seed))
    orthonormal = torch.linalg.qr(matrix).Q.to(codes.device)
    return codes @ (orthonormal.T if codes.shape[1] < width else orthonormal)


def _directions(method: str, codes: Tensor, width: int, seed: int) -> Tensor:
    if method == "random":
        return random_directions(len(codes), width, seed)
    if method == "projection":
        return projected_directions(codes, width, seed)
    if codes.shape[1] != width:
        raise V2FlowError(
            f"option rows: vocabulary needs an LLM of the codes' width {codes.shape[1]}, found one of width {width}; "
            "use rows=words or rows=projection"
        )
    return codes
