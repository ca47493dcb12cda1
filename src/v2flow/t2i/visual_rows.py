"""The visual tokens' rows as a module of their own, beside an LLM whose text rows are frozen.

A pretrained LLM's table has 10⁵ rows and the visual vocabulary 10³: only the latter learn, so only they need gradients
and optimiser state, and at image positions the head is the K + 2 visual columns. On some positions the loss takes
the whole vocabulary: the text columns enter as a log-sum-exp over chunks, which backward computes again. Elsewhere a
few words can stand for all.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from v2flow.errors import V2FlowError
from v2flow.t2i.extension import VisualTokens, is_tied

CHUNK = 16384  # text columns at a time


@dataclass
class FullVocabulary:
    """Positions under the softmax over the whole vocabulary.

    Attributes:
        log_probabilities: of the targets, `[…]`.
        text_mass: probability of all text tokens together, `[…]` in [0, 1]; without gradient.
    """

    log_probabilities: Tensor
    text_mass: Tensor


class VisualRows(nn.Module):
    """Rows of `<boi>`, the K visual tokens and `<eoi>`, in this order, and of their columns in the head.

    Making one freezes the embedding table and the head of `model`. Where the model ties the two, so do the rows.
    The parameters are fp32 whatever the model's type is.

    Args:
        model: a causal LLM with an extended vocabulary.
        tokens: where its visual tokens are.
        input_rows: rows `[K + 2, D]` to start from; by default those of the model.
        output_rows: the same for the head of a model that does not tie it.

    Attributes:
        input: embedding rows, `[K + 2, D]`.
        output: rows of the head, `[K + 2, D]`; None for a tied head.
        bias: biases of the head's columns, `[K + 2]`; None for a head without.
    """

    def __init__(
        self,
        model: Any,
        tokens: VisualTokens,
        input_rows: Tensor | None = None,
        output_rows: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.tokens = tokens
        table, head = model.get_input_embeddings(), model.get_output_embeddings()
        if output_rows is not None and is_tied(model):
            raise V2FlowError("output_rows: expected none for a model whose head is its embedding table")
        self.input = _start(table.weight, tokens, input_rows)
        self.output = None if is_tied(model) else _start(head.weight, tokens, output_rows)
        self.bias = None if head.bias is None else _start(head.bias, tokens, None)
        for parameter in (*table.parameters(), *head.parameters()):
            parameter.requires_grad_(False)

    def embed(self, model: Any, ids: Tensor) -> Tensor:
        """Input embeddings `[…, D]` of LLM ids `[…]`, text and visual in any mixture, as the model's own layer gives
        them."""
        table = model.get_input_embeddings()
        visual = self.tokens.contains(ids)
        with torch.no_grad():
            text = table(ids.masked_fill(visual, 0))
        index = (ids - self.tokens.boi).clamp(0, len(self.input) - 1)
        rows = F.embedding(index, self.input).to(text.dtype)
        scale = getattr(table, "embed_scale", None)  # Gemma multiplies by √D inside its embedding layer
        if scale is not None:
            rows = rows * scale.to(text.dtype)
        return torch.where(visual[..., None], rows, text)

    def visual_logits(self, model: Any, hidden: Tensor) -> Tensor:
        """Logits `[…, K + 2]` of `<boi>`, the visual tokens and `<eoi>` from last hidden states `[…, D]`."""
        weight = self.input if self.output is None else self.output
        bias = None if self.bias is None else self.bias.to(hidden.dtype)
        return _finish(model, F.linear(hidden, weight.to(hidden.dtype), bias))

    def text_log_sum_exp(self, model: Any, hidden: Tensor, chunk: int = CHUNK) -> Tensor:
        """Log-sum-exp `[…]` of all logits but the visual ones; gradients reach `hidden` alone.

        Args:
            chunk: columns computed at a time, `[…, chunk]` being the largest tensor there is.
        """
        head = model.get_output_embeddings()
        weight, bias = head.weight.detach(), None if head.bias is None else head.bias.detach()
        bounds = [
            (start, min(start + chunk, stop))
            for begin, stop in ((0, self.tokens.boi), (self.tokens.eoi + 1, len(weight)))
            for start in range(begin, stop, chunk)
        ]
        parts = [
            _log_sum_exp(model, hidden, weight[start:stop], None if bias is None else bias[start:stop])
            for start, stop in bounds
        ]
        return torch.stack(parts).logsumexp(0)

    def sampled_log_sum_exp(
        self, model: Any, hidden: Tensor, words: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Estimate `[…]` of :meth:`text_log_sum_exp` from text tokens drawn without replacement; gradients reach
        `hidden` alone.

        Its exponential is right on average; where few words hold most of the mass it is too low at most draws.

        Args:
            words: to draw; as many as there are make it exact.
            generator: draws them.
        """
        head = model.get_output_embeddings()
        number = len(head.weight) - len(self.input)
        drawn = torch.randperm(number, generator=generator, device=head.weight.device)[:words]
        drawn = drawn + (drawn >= self.tokens.boi) * len(self.input)  # leaves the visual rows out
        weight = head.weight.detach()[drawn].to(hidden.dtype)
        bias = None if head.bias is None else head.bias.detach()[drawn].to(hidden.dtype)
        return _log_sum_exp(model, hidden, weight, bias) + math.log(number / len(drawn))

    def full_vocabulary(
        self, model: Any, hidden: Tensor, targets: Tensor, chunk: int = CHUNK
    ) -> FullVocabulary:
        """Log-probabilities over the whole vocabulary of LLM ids `targets` `[…]`, text or visual, from last hidden
        states `[…, D]`."""
        head = model.get_output_embeddings()
        logits = self.visual_logits(model, hidden)
        visual_sum = logits.logsumexp(-1)
        text_sum = self.text_log_sum_exp(model, hidden, chunk)
        visual = self.tokens.contains(targets)
        index = (targets - self.tokens.boi).clamp(0, len(self.input) - 1)
        chosen = logits.gather(-1, index[..., None]).squeeze(-1)
        words = targets.masked_fill(visual, 0)
        text = (hidden * head.weight.detach()[words].to(hidden.dtype)).sum(-1)
        if head.bias is not None:
            text = text + head.bias.detach()[words].to(hidden.dtype)
        chosen = torch.where(visual, chosen, _finish(model, text))
        return FullVocabulary(
            chosen - torch.logaddexp(visual_sum, text_sum), torch.sigmoid(text_sum - visual_sum).detach()
        )


def hidden_states(model: Any, embeddings: Tensor, **options: Any) -> Tensor:
    """Last hidden states `[B, L, D]`, as the head reads them, of input embeddings `[B, L, D]`.

    Args:
        options: further arguments of the LLM's body, such as `attention_mask`.
    """
    states: Tensor = model.get_decoder()(inputs_embeds=embeddings, **options).last_hidden_state
    return states


@torch.no_grad()
def merge(model: Any, rows: VisualRows) -> None:
    """Write the rows into the model, which then speaks visual tokens by itself; its text rows are not touched."""
    head = model.get_output_embeddings()
    model.get_input_embeddings().weight[rows.tokens.rows] = rows.input.to(head.weight)
    if rows.output is not None:
        head.weight[rows.tokens.rows] = rows.output.to(head.weight)
    if rows.bias is not None:
        head.bias[rows.tokens.rows] = rows.bias.to(head.bias)


@torch.no_grad()
def check_family(model: Any, tokens: VisualTokens) -> None:
    """Refuse an LLM whose embedding layer or head does more than `VisualRows` knows of.

    Runs the LLM twice on three text tokens and compares.

    Raises:
        V2FlowError: the logits differ.
    """
    rows = VisualRows(model, tokens)
    table = model.get_input_embeddings()
    training = model.training
    model.eval()
    try:
        ids = torch.arange(3, device=table.weight.device)[None]
        plain = model(input_ids=ids).logits.float()
        hidden = hidden_states(model, rows.embed(model, ids))
        ours = torch.cat(
            [rows.visual_logits(model, hidden), rows.text_log_sum_exp(model, hidden)[..., None]], -1
        )
    finally:
        model.train(training)
    others = torch.ones(plain.shape[-1], dtype=torch.bool, device=plain.device)
    others[tokens.rows] = False
    expected = torch.cat([plain[..., tokens.rows], plain[..., others].logsumexp(-1, keepdim=True)], -1)
    visual = torch.arange(tokens.boi, tokens.eoi + 1, device=ids.device)
    tolerance = max(1e-4, 20 * torch.finfo(table.weight.dtype).eps)
    if not (
        torch.allclose(ours.float(), expected, rtol=tolerance, atol=tolerance)
        and torch.allclose(rows.embed(model, visual), table(visual), rtol=tolerance, atol=tolerance)
    ):
        raise V2FlowError(
            f"LLM of type {model.config.model_type}: expected logits of a linear head with at most a bias and a soft "
            "cap, found others; use a Gemma, LLaMA, Qwen, Phi or GPT-2 model"
        )


def _start(weight: Tensor, tokens: VisualTokens, rows: Tensor | None) -> nn.Parameter:
    found = weight[tokens.rows].detach()
    if rows is not None and rows.shape != found.shape:
        raise V2FlowError(
            f"rows of the visual tokens: expected shape {list(found.shape)}, found {list(rows.shape)}"
        )
    return nn.Parameter((found if rows is None else rows.to(found.device)).float().clone())


def _log_sum_exp(model: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Over the head's columns `weight` `[n, D]`, whose logits backward computes again."""

    def columns(hidden: Tensor) -> Tensor:
        return _finish(model, F.linear(hidden, weight, bias)).logsumexp(-1)

    found: Tensor = checkpoint(columns, hidden, use_reentrant=False, preserve_rng_state=False)
    return found


def _finish(model: Any, logits: Tensor) -> Tensor:
    """What the model does to its head's output, in fp32 at least: Gemma 2 caps it softly."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)
