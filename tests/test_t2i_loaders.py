"""Exported LLMs as vLLM and llama.cpp's converter look at them: what they assert of a folder, without running them."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import pytest
import torch
from core_toys import pictures, small_config
from gguf.vocab import LlamaHfVocab, SpecialVocab
from safetensors import safe_open
from t2i_toys import CAPTIONS, tiny_llm, tiny_tokenizer
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoTokenizer, GemmaTokenizer, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from v2flow import V2FlowForTextToImage, V2FlowTokenizer
from v2flow.cli import main
from v2flow.t2i.compatibility import old_config
from v2flow.t2i.extension import extend_vocabulary, is_tied, visual_token

ARCHITECTURES = {
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3": gguf.MODEL_ARCH.GEMMA3,
    "llama": gguf.MODEL_ARCH.LLAMA,
    "llama-tied": gguf.MODEL_ARCH.LLAMA,
    "phi": gguf.MODEL_ARCH.PHI2,
    "gpt2": gguf.MODEL_ARCH.GPT2,
    "gpt-neox": gguf.MODEL_ARCH.GPTNEOX,
}
"""Families, and llama.cpp's names. Not Qwen2: transformers gives it Qwen's own tokenizer, whatever a folder holds."""
FREQUENCY = 5000.0  # of rotary positions; no family's default


class Exported(NamedTuple):
    """A model and its folder."""

    family: str
    model: V2FlowForTextToImage
    folder: Path

    def json(self, name: str) -> Any:
        return json.loads((self.folder / f"{name}.json").read_text())


def gemma_tokenizer() -> Any:
    """Of Gemma's class and kind: bytes for what it cannot spell, ▁ for spaces, five special tokens."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += [*"▁abcdeghilmnoprstw", "re", "▁a", "red"]
    merges = [("r", "e"), ("▁", "a"), ("re", "d")]
    return GemmaTokenizer({word: i for i, word in enumerate(words)}, merges, add_bos_token=True)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    torch.manual_seed(0)
    family, folder = request.param, tmp_path_factory.mktemp("exported") / request.param
    words = gemma_tokenizer() if family == "gemma3" else tiny_tokenizer()
    llm = tiny_llm(family, len(words))
    for parameters in nested(getattr(llm.config, "rope_parameters", None)):
        parameters["rope_theta"] = FREQUENCY
    tokenizer = V2FlowTokenizer(small_config()).eval()
    tokens = extend_vocabulary(llm, words, tokenizer.codebook_size)
    model = V2FlowForTextToImage(tokenizer, llm, words, tokens, max_caption=40)
    model.save_pretrained(folder)
    return Exported(family, model, folder)


def nested(rope: Any) -> list[dict[str, Any]]:
    """The parameters of each kind of layer."""
    rope = rope or {}
    return [part for part in rope.values() if isinstance(part, dict)] or ([rope] if rope else [])


def tensors(folder: Path) -> dict[str, tuple[list[int], str]]:
    """Shape and type of every tensor, as a loader finds them: by the index where there is one, else in one file."""
    index, files = folder / "model.safetensors.index.json", sorted(folder.glob("*.safetensors"))
    found: dict[str, tuple[list[int], str]] = {}
    owner = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                assert name not in found, name
                part = file.get_slice(name)
                found[name], owner[name] = (part.get_shape(), part.get_dtype()), path.name
    if index.exists():
        assert json.loads(index.read_text())["weight_map"] == owner
    else:
        assert [path.name for path in files] == ["model.safetensors"]
    return found


def test_the_architecture_is_the_base_models_and_needs_no_code(exported: Exported) -> None:
    config = exported.json("config")
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config["model_type"]]
    assert config["architectures"] == [type(exported.model.llm).__name__] == [known]
    assert not list(exported.folder.rglob("*.py")) and not list(exported.folder.rglob("*.bin"))
    for name in ("config", "tokenizer_config", "generation_config"):
        assert not exported.json(name).keys() & {"auto_map", "quantization_config", "custom_pipelines"}, name


def test_rows_ids_and_types_agree(exported: Exported) -> None:
    """vLLM: rows of table and head are vocab_size. llama.cpp: the tokenizer's largest id is below it."""
    config, found = exported.json("config"), tensors(exported.folder)
    names = ("embed_tokens.weight", "wte.weight", "embed_in.weight")
    (table,) = (shape for name, (shape, _) in found.items() if name.endswith(names))
    assert table[0] == config["vocab_size"] == exported.model.tokens.eoi + 1
    tied = is_tied(exported.model.llm)
    assert config["tie_word_embeddings"] == tied == ("lm_head.weight" not in found)
    assert tied or found["lm_head.weight"][0] == table
    assert found.get("lm_head.bias", (table[:1], ""))[0] == table[:1]
    assert {kind for _, kind in found.values()} == {"F32"} and config["dtype"] == "float32"
    ids = AutoTokenizer.from_pretrained(exported.folder).get_vocab().values()
    assert sorted(ids) == list(range(config["vocab_size"]))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert config.get(name) is None or 0 <= config[name] < config["vocab_size"], name


def test_llama_cpp_knows_the_name_of_every_tensor(exported: Exported) -> None:
    names = gguf.get_tensor_name_map(
        ARCHITECTURES[exported.family], exported.model.llm.config.num_hidden_layers
    )
    unknown = [
        n for n in tensors(exported.folder) if names.get_name(n, try_suffixes=(".weight", ".bias")) is None
    ]
    assert not unknown


def test_tokenizers_alone_reads_the_added_tokens(exported: Exported) -> None:
    tokens, alone = exported.model.tokens, Tokenizer.from_file(str(exported.folder / "tokenizer.json"))
    names = ["<boi>", *map(visual_token, range(tokens.num_visual)), "<eoi>"]
    assert [alone.token_to_id(name) for name in names] == list(range(tokens.boi, tokens.eoi + 1))
    added = alone.get_added_tokens_decoder()
    assert all(added[i].special and not added[i].normalized for i in range(tokens.boi, tokens.eoi + 1))
    text = "a red house"
    ids = alone.encode(text + "<boi><v_3><eoi>").ids
    assert ids == [*exported.model.caption_ids([text])[0], tokens.boi, tokens.first + 3, tokens.eoi]


def test_gguf_reads_the_same_vocabulary(exported: Exported) -> None:
    config, words = exported.json("config"), exported.model.llm_tokenizer
    special = SpecialVocab(exported.folder, load_merges=True, n_vocab=config["vocab_size"])
    found = special.special_token_ids
    expected = {"bos": words.bos_token_id, "eos": words.eos_token_id, "pad": words.pad_token_id}
    assert {key: found[key] for key in expected} == expected
    assert len(special.merges) == len(exported.json("tokenizer")["model"]["merges"]) > 0
    assert special.add_special_token["bos"] and not special.add_special_token.get("eos")
    if exported.family == "gemma3":  # LlamaHfVocab reads no other kind
        rows = list(LlamaHfVocab(exported.folder).all_tokens())
        assert len(rows) == config["vocab_size"]
        assert rows[exported.model.tokens.first + 3][0] == b"<v_3>" and rows[-1][0] == b"<eoi>"


def test_generation_config_ends_at_the_end_of_a_picture(exported: Exported) -> None:
    generation, tokens = GenerationConfig.from_pretrained(exported.folder), exported.model.tokens
    generation.validate(strict=True)
    assert (
        generation.eos_token_id == tokens.eoi and generation.max_new_tokens == exported.model.num_tokens + 1
    )
    assert all(0 <= i <= tokens.eoi for i in (generation.bos_token_id, generation.pad_token_id))


def test_readers_of_transformers_4_find_what_has_moved(exported: Exported) -> None:
    config, settings = exported.json("config"), exported.json("tokenizer_config")
    if exported.family == "gpt2":
        assert config["n_ctx"] == 128
    else:
        assert config["rope_theta"] == FREQUENCY
    assert exported.family != "gemma3" or config["rope_local_base_freq"] == FREQUENCY
    assert exported.family != "phi" or config["partial_rotary_factor"] == 0.5
    again = AutoConfig.from_pretrained(exported.folder)
    assert getattr(again, "rope_parameters", None) == getattr(
        exported.model.llm.config, "rope_parameters", None
    )

    assert settings["tokenizer_class"] in ("PreTrainedTokenizerFast", "GemmaTokenizer")
    assert not settings.keys() & {"local_files_only", "is_local"}
    assert settings.get("add_prefix_space", False) == (exported.family != "gemma3")
    added = {t.pop("id"): t for t in exported.json("tokenizer")["added_tokens"]}
    assert {int(i): token for i, token in settings["added_tokens_decoder"].items()} == added


def test_scaled_rotary_positions_are_told_to_readers_of_transformers_4() -> None:
    scaled = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    expected = {"rope_theta": 1e6, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    assert old_config({"rope_parameters": scaled}) == expected
    plain = {"rope_type": "default", "rope_theta": 1e4}
    layers = {"full_attention": scaled, "sliding_attention": plain}
    assert old_config({"rope_parameters": layers}) == expected | {"rope_local_base_freq": 1e4}
    assert old_config({"rope_parameters": None}) == {}


@pytest.mark.parametrize("exported", ["llama"], indirect=True)
def test_in_several_files(exported: Exported, tmp_path: Path) -> None:
    """As transformers writes what is larger than one file may be."""
    before = tensors(exported.folder)
    exported.model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    exported.model.llm.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1 and tensors(tmp_path) == before
    again = V2FlowForTextToImage.from_pretrained(tmp_path)
    ids = exported.model.tokenizer.encode(pictures(1))
    likelihoods = [m.eval().log_likelihood(CAPTIONS[:1], ids) for m in (exported.model, again)]
    assert torch.equal(*likelihoods)


@pytest.mark.parametrize("exported", ["gemma3"], indirect=True)
def test_the_encoder_lies_beside_the_tokenizer(exported: Exported, tmp_path: Path) -> None:
    assert main(["export", str(exported.folder), str(tmp_path / "again"), "--encoder"]) == 0
    program = torch.export.load(tmp_path / "again" / "tokenizer" / "encoder.pt2").module()
    images = pictures(4)
    assert torch.equal(program(images), exported.model.tokenizer.encode(images))
    for name in ("config.json", "tokenizer_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (exported.folder / name).read_bytes(), name
