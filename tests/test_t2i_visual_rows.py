"""The visual tokens' rows as a module: equal to the plain extended model and to peft's trainable tokens."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, TrainableTokensConfig, get_peft_model
from t2i_toys import FAMILIES, WIDTH, tiny_llm, tiny_tokenizer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from v2flow.errors import V2FlowError
from v2flow.t2i.extension import VisualTokens, extend_vocabulary, is_tied
from v2flow.t2i.visual_rows import VisualRows, check_family, hidden_states, merge

K = 12
EXACT = {"rtol": 0.0, "atol": 1e-5}


def extended(family: str, padding: int = 0) -> tuple[Any, VisualTokens]:
    """A model whose visual rows and biases are unlike each other; with padding there are text rows on both sides."""
    tokenizer = tiny_tokenizer()
    model = tiny_llm(family, len(tokenizer) + padding)
    tokens = extend_vocabulary(model, tokenizer, K)
    head = model.get_output_embeddings()
    with torch.no_grad():
        for parameter in {model.get_input_embeddings().weight, head.weight, head.bias} - {None}:
            parameter[tokens.rows] += 0.3 * torch.randn(parameter[tokens.rows].shape)
    return model, tokens


def sequences(tokens: VisualTokens, batch: int = 3) -> Tensor:
    """Captions of 5 text ids, <boi>, 8 visual tokens, <eoi> and 2 more text ids, `[batch, 17]`."""
    text = torch.randint(3, tokens.boi, (batch, 7))
    visual = torch.randint(tokens.first, tokens.eoi, (batch, 8))
    boi, eoi = torch.full((batch, 1), tokens.boi), torch.full((batch, 1), tokens.eoi)
    return torch.cat([text[:, :5], boi, visual, eoi, text[:, 5:]], 1)


def disturb(rows: VisualRows) -> VisualRows:
    with torch.no_grad():
        for parameter in rows.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return rows


# --- equal to the plain model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [0, 40], ids=["at-the-end", "in-the-middle"])
@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_and_logits_are_those_of_the_merged_model(family: str, padding: int) -> None:
    model, tokens = extended(family, padding)
    rows = disturb(VisualRows(model, tokens))
    ids = sequences(tokens)
    with torch.no_grad():
        embeddings = rows.embed(model, ids)
        hidden = hidden_states(model, embeddings)
        logits = rows.visual_logits(model, hidden)
        text = rows.text_log_sum_exp(model, hidden, chunk=7)
        every_word = rows.sampled_log_sum_exp(model, hidden, 10**6)
        full = rows.full_vocabulary(model, hidden[:, :-1], ids[:, 1:], chunk=100)
        before = model(input_ids=ids).logits
        merge(model, rows)
        plain = model(input_ids=ids).logits
        assert not torch.allclose(before, plain, atol=1e-3)  # the rows do matter
        torch.testing.assert_close(embeddings, model.get_input_embeddings()(ids), **EXACT)

    torch.testing.assert_close(logits, plain[..., tokens.rows], **EXACT)
    others = torch.ones(plain.shape[-1], dtype=torch.bool)
    others[tokens.rows] = False
    assert others[: tokens.boi].all() and int(others[tokens.eoi + 1 :].sum()) == max(padding - K - 2, 0)
    torch.testing.assert_close(text, plain[..., others].logsumexp(-1), **EXACT)
    torch.testing.assert_close(every_word, text, **EXACT)
    expected = plain.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(full.log_probabilities, expected, **EXACT)
    torch.testing.assert_close(full.text_mass, plain.softmax(-1)[:, :-1, others].sum(-1), **EXACT)


def test_sampled_words_stand_for_all_on_average() -> None:
    """The sum of exponentials is estimated without bias, from the same words for all positions, by hidden alone."""
    model, tokens = extended("gemma3", 40)
    rows = disturb(VisualRows(model, tokens))
    hidden = torch.randn(5, WIDTH, requires_grad=True)
    exact = rows.text_log_sum_exp(model, hidden).detach()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        draws = torch.stack([rows.sampled_log_sum_exp(model, hidden, 50, generator) for _ in range(400)])
    ratios = (draws - exact).exp()
    error = ratios.std(0) / 400**0.5
    assert bool((error > 0).all()) and bool(((ratios.mean(0) - 1).abs() < 4 * error).all())
    rows.sampled_log_sum_exp(model, hidden, 50, generator).sum().backward()
    assert hidden.grad is not None and bool(hidden.grad.abs().sum(-1).gt(0).all())
    assert all(p.grad is None for p in (*model.parameters(), *rows.parameters()))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_plain_cross_entropy(family: str) -> None:
    """For the rows and for the body alike, text and visual positions in the loss."""
    model, tokens = extended(family, padding=40)
    ids = sequences(tokens)
    plain = model(input_ids=ids).logits[:, :-1]
    expected_loss = F.cross_entropy(plain.flatten(0, 1), ids[:, 1:].flatten())
    expected_loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    expected_rows = [table.weight.grad[tokens.rows].clone()]
    if not is_tied(model):
        expected_rows.append(head.weight.grad[tokens.rows].clone())
    if head.bias is not None:
        expected_rows.append(head.bias.grad[tokens.rows].clone())
    model.zero_grad()

    rows = VisualRows(model, tokens)
    hidden = hidden_states(model, rows.embed(model, ids))[:, :-1]
    loss = -rows.full_vocabulary(model, hidden, ids[:, 1:], chunk=50).log_probabilities.mean()
    torch.testing.assert_close(loss, expected_loss, **EXACT)
    loss.backward()
    found = [p.grad for p in (rows.input, rows.output, rows.bias) if p is not None]
    for mine, theirs in zip(found, expected_rows, strict=True):
        torch.testing.assert_close(mine, theirs, **EXACT)
    frozen = {id(p) for p in (*table.parameters(), *head.parameters())}
    for name, parameter in model.named_parameters():
        if id(parameter) in frozen:
            assert parameter.grad is None, name
        else:
            torch.testing.assert_close(parameter.grad, expected[name], **EXACT)


def test_the_cheap_loss_is_the_softmax_over_the_visual_columns() -> None:
    model, tokens = extended("llama-tied")
    rows = VisualRows(model, tokens)
    ids = sequences(tokens)
    with torch.no_grad():
        logits = rows.visual_logits(model, hidden_states(model, rows.embed(model, ids)))
        plain = model(input_ids=ids).logits[..., tokens.rows]
    index = ids[:, 6:15] - tokens.boi  # eight visual tokens and <eoi>
    assert index.min() >= 1 and (index[:, -1] == K + 1).all()
    torch.testing.assert_close(
        F.cross_entropy(logits[:, 5:14].flatten(0, 1), index.flatten()),
        F.cross_entropy(plain[:, 5:14].flatten(0, 1), index.flatten()),
    )


# --- equal to peft ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gemma3", "llama-tied", "llama", "qwen2"])
def test_a_step_of_sgd_moves_the_rows_as_peft_does(family: str) -> None:
    ours, tokens = extended(family)
    theirs, _ = extended(family)
    theirs.load_state_dict(ours.state_dict())
    ids, indices = sequences(tokens), list(range(tokens.boi, tokens.eoi + 1))
    modules = ["embed_tokens"] if is_tied(theirs) else ["embed_tokens", "lm_head"]
    peft: Any = get_peft_model(theirs, TrainableTokensConfig(token_indices=indices, target_modules=modules))
    logits = peft(input_ids=ids).logits[:, :-1]
    peft_loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    step(peft_loss, [p for p in peft.parameters() if p.requires_grad])
    merged = peft.merge_and_unload()

    rows = VisualRows(ours, tokens)
    before = rows.input.detach().clone()
    hidden = hidden_states(ours, rows.embed(ours, ids))[:, :-1]
    loss = -rows.full_vocabulary(ours, hidden, ids[:, 1:]).log_probabilities.mean()
    torch.testing.assert_close(loss, peft_loss, **EXACT)
    step(loss, list(rows.parameters()))
    merge(ours, rows)
    assert (rows.input - before).abs().max() > 1e-2
    torch.testing.assert_close(
        ours.get_input_embeddings().weight, merged.get_input_embeddings().weight, **EXACT
    )
    torch.testing.assert_close(
        ours.get_output_embeddings().weight, merged.get_output_embeddings().weight, **EXACT
    )


def test_with_lora_beside_it_the_step_is_that_of_trainable_token_indices() -> None:
    ours, tokens = extended("gemma3")
    theirs, _ = extended("gemma3")
    theirs.load_state_dict(ours.state_dict())
    ids, indices = sequences(tokens), list(range(tokens.boi, tokens.eoi + 1))
    lora = {"r": 2, "target_modules": ["q_proj", "v_proj"], "lora_alpha": 4}
    torch.manual_seed(5)
    peft: Any = get_peft_model(theirs, LoraConfig(**lora, trainable_token_indices={"embed_tokens": indices}))
    torch.manual_seed(5)
    wrapped: Any = get_peft_model(ours, LoraConfig(**lora))
    rows = VisualRows(wrapped, tokens)
    with torch.no_grad():
        for (name, mine), (other, yours) in zip(adapters(wrapped), adapters(peft), strict=True):
            assert name == other
            mine.copy_(torch.randn(mine.shape))
            yours.copy_(mine)
    logits = peft(input_ids=ids).logits[:, :-1]
    step(
        F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()),
        [p for p in peft.parameters() if p.requires_grad],
    )
    hidden = hidden_states(wrapped, rows.embed(wrapped, ids))[:, :-1]
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    assert len(trained) == len(adapters(wrapped)) > 0
    loss = -rows.full_vocabulary(wrapped, hidden, ids[:, 1:]).log_probabilities.mean()
    step(loss, trained + list(rows.parameters()))
    for (_, mine), (_, yours) in zip(adapters(wrapped), adapters(peft), strict=True):
        torch.testing.assert_close(mine, yours, **EXACT)
    whole, merged = wrapped.merge_and_unload(), peft.merge_and_unload()
    merge(whole, rows)
    torch.testing.assert_close(whole(input_ids=ids).logits, merged(input_ids=ids).logits, rtol=0, atol=1e-4)


def adapters(model: Any) -> list[tuple[str, Tensor]]:
    return [(name, p) for name, p in model.named_parameters() if "lora_" in name]


def step(loss: Tensor, parameters: list[torch.nn.Parameter]) -> None:
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    loss.backward()
    optimizer.step()


# --- what training touches and keeps ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_training_and_merging_leave_the_text_rows_bit_for_bit(family: str) -> None:
    model, tokens = extended(family, padding=40)
    rows = VisualRows(model, tokens)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    watched = [p for p in (table.weight, head.weight, head.bias) if p is not None]
    before = [p.detach().clone() for p in watched]
    assert not any(p.requires_grad for p in watched)
    parameters = [p for p in (*model.parameters(), *rows.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        ids = sequences(tokens)
        hidden = hidden_states(model, rows.embed(model, ids))[:, :-1]
        loss = -rows.full_vocabulary(model, hidden, ids[:, 1:]).log_probabilities.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for parameter, kept in zip(watched, before, strict=True):
        assert torch.equal(parameter, kept)
    states = [s["exp_avg"] for s in optimizer.state.values()]
    assert not any(s.shape[0] == len(table.weight) for s in states)
    assert any(s.shape == (K + 2, WIDTH) for s in states)

    merge(model, rows)
    for parameter, kept in zip(watched, before, strict=True):
        text = torch.ones(len(parameter), dtype=torch.bool)
        text[tokens.rows] = False
        assert torch.equal(parameter[text], kept[text])
    assert torch.equal(table.weight[tokens.rows], rows.input)
    assert torch.equal(head.weight[tokens.rows], rows.input if rows.output is None else rows.output)
    assert is_tied(model) == (rows.output is None)


def test_a_checkpoint_of_the_rows_holds_nothing_of_the_llm() -> None:
    model, tokens = extended("phi")
    rows = VisualRows(model, tokens)
    shapes = {name: tuple(value.shape) for name, value in rows.state_dict().items()}
    assert shapes == {"input": (K + 2, WIDTH), "output": (K + 2, WIDTH), "bias": (K + 2,)}
    model, tokens = extended("gemma3")
    assert list(VisualRows(model, tokens).state_dict()) == ["input"]


class LargestTensor(TorchDispatchMode):
    """Watches how many elements the largest result of an operation has."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not getattr(func, "is_view", False):
            LargestTensor.elements = max(LargestTensor.elements, result.numel())
        return result


@pytest.mark.parametrize("chunk", [16, 400], ids=["chunked", "whole"])
def test_no_tensor_of_all_columns_is_made_forward_or_backward(chunk: int) -> None:
    model, tokens = extended("gemma3")
    rows = VisualRows(model, tokens)
    hidden, targets = torch.randn(50, WIDTH, requires_grad=True), torch.randint(0, tokens.boi, (50,))
    LargestTensor.elements = 0
    with LargestTensor():
        rows.full_vocabulary(model, hidden, targets, chunk).log_probabilities.sum().backward()
    columns = 50 * len(model.get_input_embeddings().weight)
    assert (LargestTensor.elements < columns / 4) == (chunk == 16)


# --- starts and refusals ----------------------------------------------------------------------------------------


def test_rows_start_where_they_are_told_in_fp32_whatever_the_model_is() -> None:
    model, tokens = extended("llama")
    start, head = torch.randn(K + 2, WIDTH), torch.randn(K + 2, WIDTH)
    rows = VisualRows(model.to(torch.bfloat16), tokens, start, head)
    assert torch.equal(rows.input, start) and rows.output is not None and torch.equal(rows.output, head)
    assert {p.dtype for p in rows.parameters()} == {torch.float32}
    ids = sequences(tokens)
    embeddings = rows.embed(model, ids)
    assert embeddings.dtype == torch.bfloat16
    hidden = hidden_states(model, embeddings)
    assert rows.visual_logits(model, hidden).dtype == torch.float32
    merge(model, rows)
    assert torch.equal(model.get_input_embeddings().weight[tokens.rows], start.bfloat16())


def test_rows_of_another_shape_or_a_second_set_for_a_tied_head_are_refused() -> None:
    model, tokens = extended("gemma3")
    with pytest.raises(V2FlowError, match=r"expected shape \[14, 32\], found \[12, 32\]"):
        VisualRows(model, tokens, torch.zeros(K, WIDTH))
    with pytest.raises(V2FlowError, match="expected none"):
        VisualRows(model, tokens, None, torch.zeros(K + 2, WIDTH))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_supported_families_are_known_to_be(family: str) -> None:
    model, tokens = extended(family, padding=40)
    check_family(model.train(), tokens)
    assert model.training


def test_a_head_that_does_more_is_refused_by_its_type() -> None:
    from transformers import AutoModelForCausalLM, CohereConfig

    tokenizer = tiny_tokenizer()
    config = CohereConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, logit_scale=0.5, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    tokens = extend_vocabulary(model, tokenizer, K)
    with pytest.raises(V2FlowError, match="LLM of type cohere: expected logits of a linear head"):
        check_family(model, tokens)
