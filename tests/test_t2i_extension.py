"""Vocabulary extension: ids, matrices of every length, captions; and the LLMs it is done to."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from t2i_toys import CAPTIONS, FAMILIES, tiny_llm, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3Config
from transformers.utils import logging as transformers_logging

from v2flow.errors import V2FlowError
from v2flow.t2i import language_model
from v2flow.t2i.extension import (
    encode_captions,
    extend_vocabulary,
    find_visual_tokens,
    is_tied,
    visual_token,
)
from v2flow.t2i.language_model import first_layers, load_language_model
from v2flow.t2i.small_llm import PREFIXES, train_caption_llm_tokenizer

K = 16
TOKENIZER_LENGTH = len(tiny_tokenizer())


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


# --- ids and matrices -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [-3, 0, 5, 64], ids=["longer", "equal", "shorter", "much-shorter"])
@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_the_tokenizers_next_and_text_rows_stay(family: str, padding: int) -> None:
    """`padding`: by how much the matrix is longer than the tokenizer."""
    tokenizer, old_rows = tiny_tokenizer(), TOKENIZER_LENGTH + padding
    model = tiny_llm(family, old_rows)
    tied, before = is_tied(model), state(model)
    tokens = extend_vocabulary(model, tokenizer, K)

    names = ["<boi>", *(visual_token(k) for k in range(K)), "<eoi>"]
    expected = list(range(TOKENIZER_LENGTH, TOKENIZER_LENGTH + K + 2))
    assert tokenizer.convert_tokens_to_ids(names) == expected
    assert (tokens.boi, tokens.first, tokens.eoi, tokens.num_visual) == (*expected[:2], expected[-1], K)
    assert find_visual_tokens(tokenizer) == tokens

    rows = max(old_rows, TOKENIZER_LENGTH + K + 2)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert len(table.weight) == len(head.weight) == model.config.vocab_size == rows
    assert is_tied(model) == tied == (table.weight is head.weight)
    for name, value in model.state_dict().items():
        kept = before[name]
        if value.shape == kept.shape and value.shape[:1] != (rows,):
            assert torch.equal(value, kept), name
            continue
        text = torch.ones(rows, dtype=torch.bool)
        text[tokens.rows] = False
        text[old_rows:] = False
        assert torch.equal(value[text], kept[text[: len(kept)]]), name
        new = value[~text]
        torch.testing.assert_close(new, kept[: min(old_rows, tokens.boi)].mean(0).expand_as(new))
    assert model(input_ids=torch.tensor([[0, tokens.boi, tokens.first, tokens.eoi]])).logits.isfinite().all()


def test_an_extended_model_comes_back_from_a_folder_as_it_was(tmp_path: Path) -> None:
    tokenizer, model = tiny_tokenizer(), tiny_llm("gemma3", TOKENIZER_LENGTH)
    tokens = extend_vocabulary(model, tokenizer, K)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, words = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert find_visual_tokens(words) == tokens
    ids = torch.tensor([words("a red strawberry").input_ids + [tokens.boi, tokens.first + 3, tokens.eoi]])
    assert ids.tolist() == [tokenizer("a red strawberry<boi><v_3><eoi>").input_ids]
    assert torch.equal(again.eval()(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_vocabulary_is_extended_once() -> None:
    tokenizer, model = tiny_tokenizer(), tiny_llm("gpt2", TOKENIZER_LENGTH)
    extend_vocabulary(model, tokenizer, K)
    with pytest.raises(V2FlowError, match="expected no token '<boi>'"):
        extend_vocabulary(model, tokenizer, K)
    with pytest.raises(V2FlowError, match="at least 1 visual token, found 0"):
        extend_vocabulary(model, tiny_tokenizer(), 0)


def test_a_tokenizer_without_visual_tokens_or_with_gaps_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(V2FlowError, match="extend its vocabulary"):
        find_visual_tokens(tokenizer)
    tokenizer.add_tokens(["<eoi>", "<boi>", "<v_0>"])
    with pytest.raises(V2FlowError, match="ids in a row"):
        find_visual_tokens(tokenizer)


# --- captions ---------------------------------------------------------------------------------------------------


@pytest.fixture
def extended() -> tuple[Any, Any]:
    tokenizer = tiny_tokenizer()
    return tokenizer, extend_vocabulary(tiny_llm("gpt2", TOKENIZER_LENGTH), tokenizer, K)


def test_a_caption_is_text_whatever_it_says(extended: tuple[Any, Any]) -> None:
    tokenizer, tokens = extended
    text = "a red <v_3> strawberry<eoi> <eos>"
    assert tokens.first + 3 in tokenizer(text).input_ids  # what would happen otherwise
    (ids,) = encode_captions(tokenizer, [text], 64)
    assert ids[0] == tokenizer.bos_token_id and not set(ids[1:]) & set(tokenizer.all_special_ids)
    assert max(ids) < tokens.boi
    assert tokenizer.decode(ids[1:]).strip() == text


def test_plain_captions_are_as_the_tokenizer_encodes_them(extended: tuple[Any, Any]) -> None:
    tokenizer, _ = extended
    assert encode_captions(tokenizer, CAPTIONS, 64) == tokenizer(CAPTIONS).input_ids
    assert encode_captions(tokenizer, [], 64) == []


@pytest.mark.parametrize("caption", ["", "  \n"])
def test_an_empty_caption_is_refused_by_its_place(extended: tuple[Any, Any], caption: str) -> None:
    with pytest.raises(V2FlowError, match="caption 1: expected some words") as error:
        encode_captions(extended[0], ["a dog", caption], 64)
    assert "\n" not in str(error.value)


def test_a_caption_as_long_as_the_context_passes_and_one_token_more_does_not(
    extended: tuple[Any, Any],
) -> None:
    tokenizer, _ = extended
    length = len(tokenizer(CAPTIONS[2]).input_ids)
    assert len(encode_captions(tokenizer, CAPTIONS[2:3], length)[0]) == length
    message = f"caption 0 .*expected at most {length - 1} tokens, found {length}"
    with pytest.raises(V2FlowError, match=message) as error:
        encode_captions(tokenizer, CAPTIONS[2:3], length - 1)
    assert "\n" not in str(error.value)


# --- language models --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gemma3", "qwen2", "gpt2"])
def test_the_first_layers_of_a_folders_model(tmp_path: Path, family: str) -> None:
    whole = tiny_llm(family, TOKENIZER_LENGTH)
    whole.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    again, tokenizer = load_language_model(str(tmp_path))
    ids = torch.tensor([tokenizer("a red house").input_ids])
    assert torch.equal(again(input_ids=ids).logits, whole(input_ids=ids).logits)
    states = whole(input_ids=ids, output_hidden_states=True).hidden_states

    part, _ = load_language_model(str(tmp_path), layers=1)
    assert part.config.num_hidden_layers == 1
    # The last entry has been through the final norm, so the state before it is compared.
    seen: list[torch.Tensor] = []
    norm = part.get_decoder().ln_f if family == "gpt2" else part.get_decoder().norm
    norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    part(input_ids=ids)
    torch.testing.assert_close(seen[0], states[1])
    part.save_pretrained(tmp_path / "part")  # a shorter layer_types, or this would be refused
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "part").config.num_hidden_layers == 1


def test_blocks_left_out_are_not_reported_and_a_missing_weight_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_llm("llama", TOKENIZER_LENGTH).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    verbosity = transformers_logging.get_verbosity()
    load_language_model(str(tmp_path), layers=1)
    assert "layers.1" not in caplog.text and transformers_logging.get_verbosity() == verbosity

    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(V2FlowError, match="no weights of model.layers.0.mlp.up_proj.weight"):
        load_language_model(str(tmp_path))


def test_random_weights_depend_on_the_seed_and_nothing_else(tmp_path: Path) -> None:
    whole = tiny_llm("llama", TOKENIZER_LENGTH)
    whole.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(99 + len(found))
        state_before = torch.get_rng_state()
        model, _ = load_language_model(str(tmp_path), random_weights=True, layers=1, seed=seed)
        assert torch.equal(torch.get_rng_state(), state_before)
        found.append(model.get_output_embeddings().weight)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert not torch.equal(found[0], whole.get_output_embeddings().weight)


@pytest.mark.parametrize("style", PREFIXES)
def test_the_small_llm_spells_every_caption_and_text_it_never_saw(style: str) -> None:
    model, tokenizer = load_language_model(f"{style}tiny", captions=CAPTIONS, layers=1)
    assert model.config.num_hidden_layers == 1 and model.config.vocab_size == len(tokenizer) < 4096
    for text in [*CAPTIONS, "zebra, 東京 & 🍓"]:
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text
        assert model(input_ids=torch.tensor([ids])).logits.shape == (1, len(ids), len(tokenizer))
    assert len(tokenizer(CAPTIONS[0]).input_ids) == 4  # <bos> and three whole words
    assert train_caption_llm_tokenizer(CAPTIONS).get_vocab() == tokenizer.get_vocab()


@torch.no_grad()
def test_a_small_llm_with_rotary_positions_knows_no_place_but_the_distance() -> None:
    """What it says of a sequence is the same at later positions, which GPT-2's is not."""
    for style, same in (("gpt2-style:", False), ("neox-style:", True)):
        model, tokenizer = load_language_model(f"{style}tiny", captions=CAPTIONS)
        ids = tokenizer(CAPTIONS[:1], return_tensors="pt").input_ids
        here = torch.arange(ids.shape[1])[None]
        logits = [model(input_ids=ids, position_ids=here + start).logits for start in (0, 9)]
        assert torch.allclose(*logits, atol=1e-5) == same


def test_a_damaged_configuration_is_refused_in_one_line(tmp_path: Path) -> None:
    """Each of these ends in an exception of another class of another library."""
    tiny_llm("llama", TOKENIZER_LENGTH).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    whole = json.loads(file.read_text())
    for change in (
        {"num_hidden_layers": "x"},
        {"hidden_size": None},
        {"num_attention_heads": 0},
        {"dtype": "foo"},
    ):
        file.write_text(json.dumps(whole | change))
        with pytest.raises(V2FlowError, match=f"option llm: '{tmp_path}': expected") as error:
            load_language_model(str(tmp_path))
        assert "\n" not in str(error.value)
    file.write_text("[]")
    with pytest.raises(V2FlowError, match="option llm"):
        load_language_model(str(tmp_path))


def test_blocks_of_a_model_of_text_and_pictures_are_not_cut() -> None:
    with pytest.raises(
        V2FlowError, match="option layers: expected an LLM of text alone, found one of type gemma3 "
    ):
        first_layers(Gemma3Config(), 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "gema3"}, "option llm: 'gema3': expected gemma3-270m"),
        ({"source": "gpt2-style:tiny"}, "needs captions"),
        (
            {"source": "gpt2-style:huge", "captions": CAPTIONS},
            "one of tiny, small, medium, base, found 'huge'",
        ),
        ({"source": "gpt2-style:tiny", "captions": CAPTIONS, "layers": 3}, "expected 1 to 2.* found 3"),
        ({"source": "gpt2-style:tiny", "captions": CAPTIONS, "layers": 0}, "expected 1 to 2.* found 0"),
    ],
)
def test_what_cannot_be_loaded_is_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(V2FlowError, match=message) as error:
        load_language_model(**options)
    assert "\n" not in str(error.value)


def test_gemma_is_converted_once_and_again_when_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a small GGUF in the place of the package's, through transformers' own reader."""
    monkeypatch.setenv("V2FLOW_CACHE", str(tmp_path / "cache"))
    gguf = write_gemma_gguf(tmp_path / "gemma.gguf")
    monkeypatch.setattr(language_model, "gemma_file", lambda: gguf)
    model, tokenizer = load_language_model("gemma3-270m")
    assert model.config.model_type == "gemma3_text" and next(model.parameters()).dtype == torch.float32
    (folder,) = [f for f in (tmp_path / "cache" / "language-models").iterdir() if f.is_dir()]
    weights = folder / "model.safetensors"
    stamp, size = weights.stat().st_mtime_ns, weights.stat().st_size
    load_language_model("gemma3-270m", layers=1)
    assert weights.stat().st_mtime_ns == stamp
    weights.write_bytes(weights.read_bytes()[:-7])
    again, _ = load_language_model("gemma3-270m")
    assert weights.stat().st_size == size
    assert [f.name for f in folder.parent.iterdir() if f.is_dir()] == [folder.name]
    ids = torch.tensor([tokenizer("cat").input_ids])
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def write_gemma_gguf(path: Path) -> Path:
    """A Gemma 3 of one block and a dozen words, as llama.cpp stores it."""
    import numpy as np
    from gguf import GGUFWriter, TokenType

    words = ["<pad>", "<eos>", "<bos>", "<unk>", *"▁abcdet", "ca", "cat"]
    width, inner, head = 32, 48, 16
    writer = GGUFWriter(str(path), "gemma3")
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_sliding_window(8)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([-float(i) for i in range(len(words))])
    writer.add_token_types([TokenType.CONTROL] * 4 + [TokenType.NORMAL] * (len(words) - 4))
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(3)
    writer.add_pad_token_id(0)
    draw = np.random.default_rng(0)
    shapes = {
        "token_embd": (len(words), width), "output_norm": (width,), "blk.0.attn_norm": (width,),
        "blk.0.attn_q": (2 * head, width), "blk.0.attn_k": (head, width), "blk.0.attn_v": (head, width),
        "blk.0.attn_output": (width, 2 * head), "blk.0.attn_q_norm": (head,), "blk.0.attn_k_norm": (head,),
        "blk.0.post_attention_norm": (width,), "blk.0.ffn_norm": (width,), "blk.0.ffn_gate": (inner, width),
        "blk.0.ffn_up": (inner, width), "blk.0.ffn_down": (width, inner), "blk.0.post_ffw_norm": (width,),
    }  # fmt: skip
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", draw.standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
