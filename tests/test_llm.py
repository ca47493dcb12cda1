"""The LLM's vocabulary: real packages, the documented subset, caches, refusals."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from v2flow.config import VocabularyConfig
from v2flow.errors import V2FlowError
from v2flow.llm import load_vocabulary, select_words
from v2flow.paths import atomic_path


def test_gemma_rows_are_those_the_design_describes_and_the_cache_gives_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = VocabularyConfig(source="gemma3-270m", size=256)
    first = load_vocabulary(config)
    assert first.table.shape == (256, 640)
    norms = first.table.norm(dim=1)
    assert abs(norms.mean() - 1.031) < 0.005 and norms.std() < 0.01
    assert all(word.startswith("▁") and word[1:].isascii() for word in first.words)
    again = load_vocabulary(config)
    assert again.sha256 == first.sha256 and again.words == first.words


def test_wordllama_neighbours_are_related_words() -> None:
    vocabulary = load_vocabulary(VocabularyConfig(source="wordllama", size=None))
    assert vocabulary.table.shape == (32000, 256)
    rows = torch.nn.functional.normalize(vocabulary.table - vocabulary.table.mean(0), dim=1)
    nearest = (rows @ rows[vocabulary.words.index("▁dog")]).topk(4).indices.tolist()
    assert {"▁dogs", "▁Dog"} <= {vocabulary.words[i] for i in nearest}


def test_a_subset_takes_whole_words_first_and_never_control_tokens() -> None:
    words = ["<unk>", "<0x0A>", "▁a", "ing", "▁the", "[CLS]", "Ġdog", "▁über", "▁cat"]
    assert select_words(words, 3) == [4, 6, 8]
    assert select_words(words, 99) == [4, 6, 8, 2, 3, 7]


def test_more_entries_than_there_are_is_refused() -> None:
    with pytest.raises(V2FlowError, match="option vocabulary.size: 40000 .* use at most"):
        load_vocabulary(VocabularyConfig(source="wordllama", size=40000))


def test_an_unknown_source_is_refused_by_name() -> None:
    with pytest.raises(V2FlowError, match="option vocabulary.source: 'gema3'"):
        load_vocabulary(VocabularyConfig(source="gema3"))


def test_a_model_folder_with_more_rows_than_words(tmp_path: Path) -> None:
    table = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    save_file({"model.embed_tokens.weight": table.half()}, tmp_path / "model.safetensors")
    vocab = {"▁one": 1, "▁two": 2, "<s>": 0, "x": 3}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}}))
    whole = load_vocabulary(VocabularyConfig(source=str(tmp_path), size=None))
    assert whole.words[:4] == ["<s>", "▁one", "▁two", "x"] and len(whole.words) == 6
    torch.testing.assert_close(whole.table, table.half().float())
    part = load_vocabulary(VocabularyConfig(source=str(tmp_path), size=3))
    assert part.words == ["▁one", "▁two", "x"]
    torch.testing.assert_close(part.table, table.half().float()[[1, 2, 3]])


def test_a_folder_without_a_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(V2FlowError, match="no embed_tokens.weight"):
        load_vocabulary(VocabularyConfig(source=str(tmp_path)))


def test_random_rows_depend_on_the_seed_alone() -> None:
    a, b, c = (load_vocabulary(VocabularyConfig(source="random", size=8, dim=4, seed=s)) for s in (0, 0, 1))
    assert a.sha256 == b.sha256 != c.sha256


# --- GGUF files and the cache -----------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("V2FLOW_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_gguf(path: Path, seed: int, words: list[str]) -> torch.Tensor:
    """A GGUF that holds nothing but a vocabulary; returns its rows."""
    from gguf import GGUFWriter

    table = torch.randn(len(words), 32, generator=torch.Generator().manual_seed(seed))
    writer = GGUFWriter(str(path), "llama")
    writer.add_token_list(words)
    writer.add_tensor("token_embd.weight", table.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return table


WORDS = ["<unk>", "▁cat", "ing", "▁dog", "▁über"]


def test_a_gguf_is_read_once_and_then_comes_from_the_cache(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "model.gguf"
    table = write_gguf(path, 0, WORDS)
    config = VocabularyConfig(source=str(path), size=3)
    first = load_vocabulary(config)
    assert first.words == ["▁cat", "▁dog", "ing"]
    assert torch.equal(first.table, table[[1, 3, 2]])
    (cached,) = (cache / "vocabularies").iterdir()
    stamp = cached.stat().st_mtime_ns
    second = load_vocabulary(config)
    assert cached.stat().st_mtime_ns == stamp
    assert (second.sha256, second.words) == (first.sha256, first.words) and torch.equal(
        second.table, first.table
    )
    # The name of the rows is that of their values, wherever they were read.
    whole = load_vocabulary(VocabularyConfig(source=str(path), size=None))
    assert whole.words == WORDS and torch.equal(whole.table, table) and whole.sha256 != first.sha256


@pytest.mark.parametrize("folders", [("a", "b"), ("a", "a")], ids=["elsewhere", "overwritten"])
def test_another_file_of_the_same_name_and_size_is_another_vocabulary(
    tmp_path: Path, cache: Path, folders: tuple[str, str]
) -> None:
    """Fine-tunes of one architecture differ in their rows alone."""
    found = []
    for seed, folder in enumerate(folders):
        path = tmp_path / folder / "model.gguf"
        path.parent.mkdir(exist_ok=True)
        table = write_gguf(path, seed, WORDS)
        os.utime(path, (seed, seed))
        vocabulary = load_vocabulary(VocabularyConfig(source=str(path), size=2))
        assert torch.equal(vocabulary.table, table[[1, 3]])
        found.append((path.stat().st_size, vocabulary.sha256))
    assert found[0][0] == found[1][0] and found[0][1] != found[1][1]


def test_a_damaged_cache_is_made_again(tmp_path: Path, cache: Path) -> None:
    write_gguf(tmp_path / "model.gguf", 0, WORDS)
    config = VocabularyConfig(source=str(tmp_path / "model.gguf"), size=2)
    first = load_vocabulary(config)
    (cached,) = (cache / "vocabularies").iterdir()
    whole = cached.read_bytes()
    cached.write_bytes(whole[:-20])
    assert load_vocabulary(config).sha256 == first.sha256
    assert [path.name for path in (cache / "vocabularies").iterdir()] == [cached.name]
    assert len(cached.read_bytes()) == len(whole)


@pytest.mark.parametrize(
    "content", [b"", b"not a model", b"GGUF" + bytes(60)], ids=["empty", "text", "header"]
)
def test_a_file_that_is_no_gguf_is_refused_by_name(tmp_path: Path, cache: Path, content: bytes) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(V2FlowError, match="model.gguf: ") as error:
        load_vocabulary(VocabularyConfig(source=str(tmp_path / "model.gguf")))
    assert "\n" not in str(error.value)
    assert not (cache / "vocabularies").exists()


# --- damaged model folders --------------------------------------------------------------------------------------


def write_folder(folder: Path, tokenizer: str) -> None:
    save_file({"model.embed_tokens.weight": torch.zeros(4, 2)}, folder / "model.safetensors")
    (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")


@pytest.mark.parametrize(
    "tokenizer",
    [
        "{", "[]", "{}", '{"model": {"type": "BPE"}}', "[" * 100_000, '{"model": {"vocab": [[5, 0.1], [null, 0.1]]}}',
        '{"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 1, "content": 7}]}',
    ],
)  # fmt: skip
def test_a_tokenizer_without_words_is_refused_by_name(tmp_path: Path, tokenizer: str) -> None:
    write_folder(tmp_path, tokenizer)
    with pytest.raises(V2FlowError, match="tokenizer.json: not a readable vocabulary") as error:
        load_vocabulary(VocabularyConfig(source=str(tmp_path), size=None))
    assert "\n" not in str(error.value)


def test_weights_cut_short_are_refused_by_name(tmp_path: Path) -> None:
    write_folder(tmp_path, '{"model": {"vocab": {"a": 0}}}')
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(V2FlowError, match="model.safetensors: not a readable vocabulary"):
        load_vocabulary(VocabularyConfig(source=str(tmp_path), size=None))


def test_added_tokens_have_their_names(tmp_path: Path) -> None:
    document = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 2, "content": "<eos>"}]}
    write_folder(tmp_path, json.dumps(document))
    whole = load_vocabulary(VocabularyConfig(source=str(tmp_path), size=None))
    assert whole.words == ["a", "b", "<eos>", "<unused_row_3>"]


def test_no_file_is_left_by_a_write_that_fails(tmp_path: Path) -> None:
    final = tmp_path / "file"
    final.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(final) as temporary:
        temporary.write_text("half")
        raise RuntimeError("the disk is full")
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and final.read_text() == "old"
    with atomic_path(final) as temporary:
        temporary.write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and final.read_text() == "new"
