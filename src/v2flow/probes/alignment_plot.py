"""A picture of both vocabularies in one plane, as in the paper's second figure."""

import io
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from v2flow.errors import V2FlowError
from v2flow.metrics.files import write_atomically
from v2flow.probes.alignment import cannot_compare, collect_tokens, sample
from v2flow.probes.findings import Batches
from v2flow.tokenizer import V2FlowTokenizer

ROWS = 2048
"""Points of the LLM's vocabulary at most."""
RED = "#c23b22"


def plot_alignment(model: V2FlowTokenizer, loader: Batches, path: str | Path, seed: int = 0) -> None:
    """Writes a PNG: the directions of the LLM's rows and of the codes in the rows' first two principal components.

    Codes are the larger the more tokens of the pictures have them; those that none has are rings.

    Raises:
        V2FlowError: matplotlib is not installed, no picture, or tokens that cannot be compared with the table.
    """
    reason = cannot_compare(model)
    if reason is not None:
        raise V2FlowError(f"alignment plot: {reason}")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise V2FlowError(
            "alignment plot: matplotlib is not installed; pip install 'v2flow[benchmark]'"
        ) from error
    draws = torch.Generator().manual_seed(seed)
    counts = collect_tokens(model, loader, draws).counts
    rows, codes, shares = project(model.resampler.table, model.visual_vocabulary.codes)
    rows = sample(rows, draws, ROWS)
    figure = Figure(figsize=(5.6, 4.8), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    axes.scatter(rows[:, 0], rows[:, 1], s=4, color="0.65", lw=0, label=f"LLM vocabulary ({len(rows)} rows)")
    used = counts > 0
    size = 6 + 30 * counts[used] / counts.max()
    axes.scatter(
        codes[used, 0], codes[used, 1], s=size.numpy(), color=RED, alpha=0.6, linewidths=0,
        label=f"visual vocabulary ({int(used.sum())} of {len(codes)} codes used)",
    )  # fmt: skip
    axes.scatter(codes[~used, 0], codes[~used, 1], s=6, facecolors="none", edgecolors=RED, linewidths=0.4)
    axes.set_xlabel(f"principal component 1 of the LLM's rows ({shares[0]:.1%})")
    axes.set_ylabel(f"principal component 2 of the LLM's rows ({shares[1]:.1%})")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.1), ncols=2, fontsize=8, frameon=False)
    drawn, written = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png")
    # A palette makes the file a third of the size.
    Image.open(drawn).convert("RGB").quantize(64).save(written, format="PNG", optimize=True)
    write_atomically(Path(path), lambda file: file.write(written.getvalue()))


def project(table: Tensor, codes: Tensor) -> tuple[Tensor, Tensor, list[float]]:
    """Directions of rows `[V, D]` and codes `[K, D]` in the plane of the rows' largest variance.

    Returns:
        `[V, 2]`, `[K, 2]`, and the two components' shares of the rows' variance.
    """
    rows, codes = (F.normalize(x.detach().double().cpu(), dim=-1) for x in (table, codes))
    values, vectors = torch.linalg.eigh(rows.T.cov())
    plane = vectors.flip(1)[:, :2]
    shares = (values.flip(0)[:2] / values.sum()).tolist()
    return (rows - rows.mean(0)) @ plane, (codes - rows.mean(0)) @ plane, shares
