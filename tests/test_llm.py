"""The LLM's vocabulary: real packages, the documented subset, caches, refusals."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from v2flow.config import VocabularyConfig
from v2flow.errors import V2FlowError
from v2flow.llm import load_vocabulary, select_words


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
