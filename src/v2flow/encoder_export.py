"""The encoder of a tokenizer as one program of `torch.export`, which plain torch loads and runs without v2flow.

Pictures in, ids out, and the ids are those of `V2FlowTokenizer.encode`. That computes in single precision and again in
double where two codes are nearly as near; a graph has no such branch, so the program computes everything behind the
codec in double precision. Decisions then rest on sums whose rounding is some eight orders of magnitude below the margin
at which `encode` stops trusting single precision, whatever the batch, the threads or the order of the sums.
"""

import copy
import math
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from v2flow.encoding import nearest_codes
from v2flow.errors import V2FlowError
from v2flow.metrics.files import write_atomically
from v2flow.tokenizer import V2FlowTokenizer, inference
from v2flow.vocabulary_logits import Logits, spans

FILE = "encoder.pt2"
"""Name of the program in the folder of a tokenizer."""
COLUMNS = 1 << 14
"""Vocabulary entries that the program looks at together: a picture of N tokens takes 3·8·N·COLUMNS bytes at most."""
CHECKED = 3
"""Pictures that a program is compared with `encode` on before it is kept."""


class EncoderProgram(nn.Module):
    """What is exported: pictures `[B, 3, S, S]` fp32 in [0, 1] to ids `[B, N]` int64, behind the codec all in double.

    It copies the resampler's networks and shares codec, embedding table and codes with `tokenizer`.
    """

    table: Tensor
    codes: Tensor
    keys: Tensor
    bias: Tensor | None

    def __init__(self, tokenizer: V2FlowTokenizer) -> None:
        super().__init__()
        resampler = tokenizer.resampler
        self.config = resampler.config
        self.codec = tokenizer.codec
        # A codec hides its frozen autoencoder from state dicts; a program has to carry it.
        self.autoencoder: nn.Module | None = getattr(tokenizer.codec, "autoencoder", None)
        self.encoder = copy.deepcopy(resampler.encoder).double()
        self.query = (
            nn.Identity() if self.config.readout == "linear" else copy.deepcopy(resampler.query).double()
        )
        self.register_buffer("codes", tokenizer.visual_vocabulary.codes)
        self.register_buffer("bias", None)
        if self.config.readout == "none":
            return
        self.register_buffer("table", resampler.table)
        if self.config.readout == "keys":
            keys = F.normalize(resampler.table.double() @ resampler.key.detach().double(), dim=-1)
        else:
            keys = resampler.logits.weight.detach()
            self.register_buffer("bias", resampler.logits.bias.detach())
        self.register_buffer("keys", keys)

    def forward(self, images: Tensor) -> Tensor:
        """Pictures `[B, 3, S, S]` in [0, 1] to ids `[B, N]`."""
        queries = self.query(self.encoder(self.codec.encode(images).double()))
        embeddings = queries if self.config.readout == "none" else self._embeddings(queries)
        return nearest_codes(embeddings, self.codes)[0]

    def _embeddings(self, queries: Tensor) -> Tensor:
        """Embeddings `[B, N, D]` of the resampler, without noise, from its queries `[B, N, d]`."""
        if self.config.readout == "keys":
            queries = self.config.scale * F.normalize(queries, dim=-1)
        logits = Logits(queries, self.keys, self.bias, temperature=self.config.temperature[1])
        if self.config.hard:
            return self.table[most_probable(logits)].double()
        return expected_rows(logits, self.table)


def expected_rows(logits: Logits, values: Tensor, columns: int = 0) -> Tensor:
    """`softmax(logits)·values` `[…, D]` in double, of values `[V, D]`, by a running softmax; no branch looks at data.

    Args:
        columns: entries at a time, `COLUMNS` when left out.
    """
    top = torch.full_like(logits.queries[..., :1].double(), -math.inf)
    total = out = torch.zeros_like(top)
    for part in spans(len(values), columns or COLUMNS):
        scores = _part(logits, part)
        risen = torch.maximum(top, scores.amax(-1, keepdim=True))
        shares, shrunk = (scores - risen).exp(), (top - risen).exp()
        out = shrunk * out + shares @ values[part].double()
        total = shrunk * total + shares.sum(-1, keepdim=True)
        top = risen
    return out / total


def most_probable(logits: Logits, columns: int = 0) -> Tensor:
    """Entries `[…]` with the largest logits in double, the first of equals; `columns` as of `expected_rows`."""
    top = torch.full_like(logits.queries[..., 0].double(), -math.inf)
    words = torch.zeros_like(top, dtype=torch.long)
    for part in spans(len(logits.keys), columns or COLUMNS):
        highest, places = _part(logits, part).max(-1)
        words = torch.where(highest > top, places + part.start, words)
        top = torch.maximum(top, highest)
    return words


def _part(logits: Logits, part: slice) -> Tensor:
    """The logits `[…, v]` of these entries in double."""
    bias = None if logits.bias is None else logits.bias[part]
    return replace(logits, keys=logits.keys[part], bias=bias).to(torch.float64).whole()


def export_encoder(tokenizer: V2FlowTokenizer) -> ExportedProgram:
    """The program of `tokenizer.encode`: pictures `[B, 3, S, S]` fp32 to ids `[B, N]` int64, for any B from 1 on.

    The size S is that of the tokenizer; the program lies where the tokenizer does.

    Raises:
        V2FlowError: it gives other ids than `encode`.
    """
    size, device = tokenizer.config.image_size, tokenizer.visual_vocabulary.codes.device
    generator = torch.Generator().manual_seed(0)
    pictures = torch.rand(CHECKED, 3, size, size, generator=generator).to(device)
    with inference(tokenizer), torch.no_grad():
        program = torch.export.export(
            EncoderProgram(tokenizer).eval().requires_grad_(False), (pictures,),
            dynamic_shapes=({0: Dim("batch", min=1)},), strict=False,
        )  # fmt: skip
        wrong = int((program.module()(pictures) != tokenizer.encode(pictures)).sum())
    if wrong:
        raise V2FlowError(
            f"option --encoder: expected the ids of encode from the exported program, found {wrong} others among "
            f"{CHECKED * tokenizer.num_tokens}; please report it with the tokenizer's config.json"
        )
    return program


def save_encoder(tokenizer: V2FlowTokenizer, folder: Path) -> Path:
    """Writes the program of `export_encoder` as ``encoder.pt2`` into a folder, atomically, and returns its path.

    Raises:
        V2FlowError: it gives other ids than `encode`.
    """
    program = export_encoder(tokenizer)
    write_atomically(folder / FILE, lambda file: torch.export.save(program, file))
    return folder / FILE
