"""Exported text-to-image models: read again by v2flow, and by transformers alone in a process of its own."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from core_toys import pictures, small_config
from hub_toys import stand_in_for_the_hub, tree
from peft import LoraConfig, get_peft_model
from safetensors.torch import load, load_file, save_file
from t2i_toys import CAPTIONS, tiny_llm, tiny_tokenizer

from v2flow import V2FlowForTextToImage, V2FlowTokenizer
from v2flow.errors import V2FlowError
from v2flow.inference import export_model
from v2flow.model_card import GEMMA_NOTICE, with_record
from v2flow.t2i.extension import extend_vocabulary
from v2flow.t2i.generation import generate_ids
from v2flow.t2i.hub import DOCUMENT
from v2flow.t2i.model_card import model_card

PLAIN = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, captions = sys.argv[1], json.loads(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(folder)
llm = AutoModelForCausalLM.from_pretrained(folder)
prompt = tokenizer([c + "<boi>" for c in captions], return_tensors="pt", padding=True)
ids = llm.generate(input_ids=prompt.input_ids, attention_mask=prompt.attention_mask)
assert not any(name.split(".")[0] == "v2flow" for name in sys.modules)
print(json.dumps(ids[:, prompt.input_ids.shape[1]:].tolist()))
"""


def build(family: str) -> tuple[V2FlowForTextToImage, torch.Tensor]:
    """A model, and its embedding table as it was before."""
    torch.manual_seed(0)
    tokenizer = V2FlowTokenizer(small_config()).eval()
    words = tiny_tokenizer()
    llm = tiny_llm(family, len(words))
    before = llm.get_input_embeddings().weight.detach().clone()
    tokens = extend_vocabulary(llm, words, tokenizer.codebook_size)
    model = V2FlowForTextToImage(tokenizer, llm, words, tokens, max_caption=40)
    with torch.no_grad():
        for parameter in model.rows.parameters():
            parameter.normal_(std=0.3)
    return model.eval(), before


@pytest.fixture(scope="module")
def learned() -> tuple[V2FlowForTextToImage, torch.Tensor, torch.Tensor]:
    """A Gemma 3 that has learned four captions by heart, their ids, and its embedding table from before."""
    model, before = build("gemma3")
    ids = model.tokenizer.encode(pictures(len(CAPTIONS)))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        loss = model.loss(CAPTIONS, ids, full_share=1.0).total
        loss.backward()
        optimizer.step()
        if loss < 0.02:
            break
    assert loss < 0.1
    return model, ids, before


@pytest.fixture(scope="module")
def folder(learned, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "model"
    learned[0].save_pretrained(folder)
    return folder


def test_transformers_alone_writes_the_same_ids_and_the_end(learned, folder: Path) -> None:
    """Unconstrained greedy decoding in a process that never imports v2flow."""
    model, ids, _ = learned
    assert torch.equal(generate_ids(model, CAPTIONS, temperature=0.0), ids)
    command = [sys.executable, "-c", PLAIN, str(folder), json.dumps(CAPTIONS)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    expected = [[*(row + model.tokens.first).tolist(), model.tokens.eoi] for row in ids]
    assert json.loads(done.stdout.splitlines()[-1]) == expected


def test_round_trip(learned, folder: Path, tmp_path: Path) -> None:
    model, ids, _ = learned
    again = V2FlowForTextToImage.from_pretrained(folder)
    assert not again.training and again.max_caption == 40 and again.tokens == model.tokens
    assert torch.equal(generate_ids(again, CAPTIONS, temperature=0.0), ids)
    assert torch.equal(again.generate(CAPTIONS, temperature=0.0), model.generate(CAPTIONS, temperature=0.0))
    export_model(str(folder), "ema", tmp_path / "again")
    for name in ("model.safetensors", "config.json", "tokenizer.json", "README.md", DOCUMENT):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes(), name


def test_text_rows_are_those_of_the_base_model(learned, folder: Path) -> None:
    model, _, before = learned
    table = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(table[: len(before)], before)
    assert torch.equal(table[model.tokens.rows], model.rows.input)


def test_files_say_what_is_inside(learned, folder: Path) -> None:
    model = learned[0]
    card = (folder / "README.md").read_text()
    assert (
        GEMMA_NOTICE in card and "license: gemma" in card and "V2FlowForTextToImage.from_pretrained" in card
    )
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == model.tokens.eoi and generation["max_new_tokens"] == 9
    assert not generation.get("do_sample")
    for path in folder.rglob("*.json"):
        assert str(folder.parent) not in path.read_text(), path
    V2FlowTokenizer.from_pretrained(folder / "tokenizer")


def test_adapters_are_merged_and_stay_in_the_model(tmp_path: Path) -> None:
    model, before = build("llama")
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, lora_alpha=32)
    model.llm = get_peft_model(model.llm, config)
    ids = generate_ids(model, CAPTIONS, temperature=0.0)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert not any("lora" in name for name in weights)
    assert torch.equal(weights["model.embed_tokens.weight"][: len(before)], before)
    again = V2FlowForTextToImage.from_pretrained(tmp_path)
    likelihoods = [m.log_likelihood(CAPTIONS, ids) for m in (model, again)]
    torch.testing.assert_close(*likelihoods, atol=1e-3, rtol=0)
    with model.llm.disable_adapter():
        assert not torch.allclose(model.log_likelihood(CAPTIONS, ids), likelihoods[0], atol=1e-2)
    card = (tmp_path / "README.md").read_text()
    assert GEMMA_NOTICE not in card and "llama" in card


def test_push_to_hub_uploads_the_whole_folder(
    learned, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The card with its record of the training, the LLM with its tokenizer, and the picture side."""
    exported = tmp_path / "exported"
    shutil.copytree(folder, exported)
    card = exported / "README.md"
    card.write_text(with_record(card.read_text(), "## Figures\n\nGood ones.\n\n"))
    uploaded = stand_in_for_the_hub(monkeypatch, tmp_path / "hub")
    V2FlowForTextToImage.from_pretrained(exported).push_to_hub("me/model")
    assert uploaded == ["me/model"]
    pushed = tmp_path / "hub" / "me" / "model"
    files, expected = tree(pushed), tree(exported)
    ordered = "tokenizer_config.json"  # its keys stand in another order once transformers has read it
    assert json.loads(files.pop(ordered)) == json.loads(expected.pop(ordered))
    assert files == expected
    names = ("README.md", "model.safetensors", "tokenizer.json", DOCUMENT, "tokenizer/model.safetensors")
    assert set(names) <= set(files) and b"Good ones." in files["README.md"]
    again = V2FlowForTextToImage.from_pretrained(pushed)
    assert torch.equal(generate_ids(again, CAPTIONS, temperature=0.0), learned[1])


def test_a_card_of_an_llm_made_anew_names_no_pretrained_model(tmp_path: Path) -> None:
    """Nor does that of its second export."""
    build("gpt2")[0].save_pretrained(tmp_path / "first")
    V2FlowForTextToImage.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    first, second = ((tmp_path / name / "README.md").read_text() for name in ("first", "second"))
    assert first == second and "derive from no pretrained model" in first
    assert "license: other" in first and "An LLM (gpt2)" in first
    model = build("gpt2")[0]
    model.llm.config._name_or_path = "somebody/gpt"
    assert "derive from somebody/gpt, whose terms" in model_card(model)


def refused(folder: Path, *parts: str) -> None:
    with pytest.raises(V2FlowError) as error:
        V2FlowForTextToImage.from_pretrained(folder)
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value), str(error.value)


def test_damaged_and_foreign_folders_are_refused(learned, tmp_path: Path) -> None:
    model = learned[0]
    refused(tmp_path, DOCUMENT, "not found")
    refused(tmp_path / "nowhere" / "at all", "nowhere")
    model.save_pretrained(tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    refused(tmp_path, str(tmp_path), "causal language model")
    tensors = load(weights)
    lost = next(name for name in tensors if "mlp" in name)
    save_file(
        {name: t for name, t in tensors.items() if name != lost},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    refused(tmp_path, str(tmp_path), f"no weights of {lost}")  # not drawn at random
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": "x"}))
    refused(tmp_path, str(tmp_path), "causal language model")
    (tmp_path / DOCUMENT).write_text("{")
    refused(tmp_path, DOCUMENT, "not JSON")
    (tmp_path / DOCUMENT).write_text('{"model_type": "llama"}')
    refused(tmp_path, DOCUMENT, "v2flow-text-to-image")


def test_without_transformers_one_line_says_what_to_install() -> None:
    code = (
        "import sys\nsys.modules['transformers'] = None\n"
        "from v2flow import V2FlowError\n"
        "try:\n    from v2flow import V2FlowForTextToImage\n"
        "except V2FlowError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "transformers" in done.stdout and 'pip install -e ".[t2i]"' in done.stdout
    assert done.stdout.count("\n") == 1
