"""Random and mutated input: a result or the project's own error, and nothing else.

`make test` tries a few of each; `make test-fuzz` (V2FLOW_FUZZ=long) at least 10,000, new ones each time.
"""

import copy
import io
import json
import os
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from core_toys import small_config
from data_toys import encode
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from v2flow import V2FlowTokenizer
from v2flow.config import to_dict
from v2flow.data.batches import EvaluationBatches, Request, SampleReader, TrainBatches
from v2flow.data.decode import BadSampleError, decode_caption, decode_image
from v2flow.data.manifest import index_tar, read_manifest, write_manifest
from v2flow.data.shards import Shard, ShardSet
from v2flow.data.tokens import TokenReader
from v2flow.data.validate import _check, _salvage
from v2flow.errors import V2FlowError
from v2flow.inference import read_ids, write_ids
from v2flow.training.checkpoint import build_model, load_model

LONG = os.environ.get("V2FLOW_FUZZ") == "long"
COMMON: dict[str, Any] = {
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
    # A seed of its own for each test in the short form: the same inputs everywhere.
    "derandomize": not LONG,
    "phases": [Phase.explicit, Phase.generate, Phase.shrink] if LONG else [Phase.explicit, Phase.generate],
}
settings.register_profile("short", max_examples=25, **COMMON)
settings.register_profile("long", max_examples=10_000, print_blob=True, **COMMON)
settings.load_profile("long" if LONG else "short")
pytestmark = pytest.mark.timeout(4 * 3600 if LONG else 300)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("V2FLOW_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def mutated(data: bytes, draw: Any) -> bytes:
    """Bytes changed, cut, doubled or put elsewhere at up to four places."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, max(len(changed) - 1, 0)))
        kind = draw(st.sampled_from(["byte", "bytes", "cut", "double", "remove"]))
        if kind == "byte" and changed:
            changed[place] = draw(st.integers(0, 255))
        elif kind == "bytes":
            changed[place : place + 8] = draw(st.binary(max_size=12))
        elif kind == "cut":
            del changed[place:]
        elif kind == "double":
            changed[place:place] = changed[place : place + 512]
        else:
            del changed[place : place + 512]
    return bytes(changed)


# --- shards -------------------------------------------------------------------------------------------------------

FIELDS = {  # of a tar's header: place and length
    "name": (0, 100), "mode": (100, 8), "size": (124, 12), "time": (136, 12), "type": (156, 1), "link": (157, 100),
    "magic": (257, 8), "major": (329, 8), "prefix": (345, 155), "sparse": (386, 97),
}  # fmt: skip
VALUES = [
    b"",
    b"\xff" * 12,
    b"\x80" + b"\xff" * 11,
    b"7" * 11 + b"\0",
    b"-1",
    b"00000000000\0",
    b"..",
    b"x" * 155,
    b"\0",
]


@cache
def tars() -> list[bytes]:
    """Small shards in each dialect of tar, with long names, links and headers of their own."""
    picture = encode(np.full((4, 4, 3), 9, np.uint8))
    members = [
        ("a.png", picture), ("a.txt", b"words"), ("a.json", b'{"caption": "c", "ids": [1, 2]}'), ("a.cls", b"3"),
        ("b" * 120 + ".jpg", picture), ("folder/c.webp", picture), ("c.pyd", b"cos\n"),
    ]  # fmt: skip
    found = []
    for dialect in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=dialect) as archive:
            for name, data in members:
                if dialect == tarfile.USTAR_FORMAT and len(name) > 100:
                    continue
                info = tarfile.TarInfo(name)
                info.size = len(data)
                if dialect == tarfile.PAX_FORMAT:
                    info.pax_headers = {"comment": "x", "GNU.sparse.major": "1"} if name == "a.cls" else {}
                archive.addfile(info, io.BytesIO(data))
            link = tarfile.TarInfo("d.png")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(link)
        found.append(buffer.getvalue())
    return found


@st.composite
def shards(draw: Any) -> bytes:
    """A shard with mutated bytes, and headers that are wrong but have a right checksum."""
    data = bytearray(draw(st.sampled_from(tars())))
    headers = [place for place in range(0, len(data), 512) if data[place + 257 : place + 262] == b"ustar"]
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.sampled_from(headers))
        start, length = FIELDS[draw(st.sampled_from(list(FIELDS)))]
        value = draw(st.one_of(st.sampled_from(VALUES), st.binary(max_size=length)))[:length]
        data[place + start : place + start + len(value)] = value
        data[place + 148 : place + 156] = b" " * 8
        data[place + 148 : place + 156] = b"%06o\0 " % sum(data[place : place + 512])
    return mutated(bytes(data), draw)


@given(shards())
def test_shards(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.tar"
    path.write_bytes(data)
    for found in _salvage(str(path)):
        _check(found, 0)
    with suppress(V2FlowError):
        shard = Shard(str(path), index_tar(path), "", False)
        opened = ShardSet([shard])
        for captions in (False, True):
            reader = SampleReader(opened, 8, captions)
            evaluated = EvaluationBatches(reader, len(opened))[Request(0, 0, len(opened) + 1)]
            assert evaluated.error is not None or len(evaluated.key) == len(opened) + 1
            TrainBatches(reader, 0, True, True, max_bad=2)[Request(0, 0, len(opened))]
        for sample in range(len(opened)):
            with suppress(V2FlowError):
                assert TokenReader(opened).content(sample).dtype == np.int64


@given(st.data())
def test_manifests(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.getbasetemp()
    (folder / "m.tar").write_bytes(tars()[0])
    write_manifest(folder, {"m.tar": index_tar(folder / "m.tar")}, {"kind": "fuzz"})
    document = change(json.loads((folder / "manifest.json").read_text()), data.draw)
    text = json.dumps(document)
    if data.draw(st.booleans()):
        text = mutated(text.encode(), data.draw).decode(errors="replace")
    with suppress(V2FlowError):
        for index in read_manifest(text, "manifest.json")[1].values():
            reader = ShardSet([Shard(str(folder / "m.tar"), index, "", False)])
            for sample in range(len(reader)):
                with suppress(V2FlowError):
                    reader.read(sample, 0)


@given(st.data())
def test_pictures(data: st.DataObject) -> None:
    pixels = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    whole = encode(pixels, data.draw(st.sampled_from(["PNG", "JPEG", "WEBP"])))
    with suppress(BadSampleError):
        assert decode_image(mutated(whole, data.draw)).mode == "RGB"


# --- captions -----------------------------------------------------------------------------------------------------

WORDS = st.sampled_from(
    ["<boi>", "<eoi>", "<v_0>", "<v_31>", "<bos>", "<eos>", "<pad>", " ", "\n", "\0", "é", "😀", "\u200d"]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["caption", "ids", "x"]), inner),
    max_leaves=8,
)


@given(
    st.none() | st.binary() | st.text().map(lambda text: text.encode()),
    st.none() | st.binary() | JSON.map(lambda value: json.dumps(value).encode()),
)
def test_captions(txt: bytes | None, json_text: bytes | None) -> None:
    with suppress(BadSampleError):
        caption = decode_caption(txt, json_text)
        assert caption is None or caption.encode().decode() == caption


@cache
def language() -> tuple[Any, Any]:
    from t2i_toys import tiny_llm, tiny_tokenizer

    from v2flow.t2i.extension import extend_vocabulary

    words = tiny_tokenizer()
    return words, extend_vocabulary(tiny_llm("gpt2", len(words)), words, 32)


@given(st.lists(st.lists(WORDS | st.text(), max_size=6).map("".join), max_size=4))
def test_no_caption_holds_a_visual_token(captions: list[str]) -> None:
    pytest.importorskip("transformers")
    from v2flow.t2i.extension import encode_captions

    words, tokens = language()
    with suppress(V2FlowError):
        encoded = encode_captions(words, captions, 64)
        assert len(encoded) == len(captions) and all(0 < len(ids) <= 64 for ids in encoded)
        assert all(0 <= index < tokens.boi for ids in encoded for index in ids)


# --- ids ----------------------------------------------------------------------------------------------------------

INTEGERS = [torch.int64, torch.int32, torch.int16, torch.uint8]
OTHERS = [torch.bool, torch.complex64, torch.float32, torch.float64, torch.float16, torch.bfloat16]


@cache
def tokenizer() -> V2FlowTokenizer:
    torch.manual_seed(0)
    return V2FlowTokenizer(small_config()).eval()


@st.composite
def id_tensors(draw: Any) -> torch.Tensor:
    fits = draw(st.booleans())
    shape = (draw(st.integers(0, 3)), 8) if fits else tuple(draw(st.lists(st.integers(0, 9), max_size=4)))
    count = int(np.prod(shape))
    numbers = (
        st.integers(0, 31) if draw(st.booleans()) else st.integers(-(2**63), 2**63 - 1) | st.integers(-2, 33)
    )
    values = draw(st.lists(numbers, min_size=count, max_size=count))
    dtype = draw(st.sampled_from(INTEGERS + ([] if fits and draw(st.booleans()) else OTHERS)))
    return torch.tensor(values, dtype=torch.int64).to(dtype).view(shape)


OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "steps": st.integers(-1, 2),
        "iterations": st.integers(-1, 3),
        "guidance": st.floats() | st.just(1.0),
        "temperature": st.floats(0, 4),
        "timestep_shift": st.floats(0.1, 9),
        "solver": st.sampled_from(["euler", "heun", "multistep", "dpm", ""]),
        "guidance_schedule": st.sampled_from(["constant", "linear", "x"]),
        "unknown": st.none(),
    },
)


@given(id_tensors(), OPTIONS)
def test_ids(ids: torch.Tensor, options: dict[str, Any]) -> None:
    with suppress(V2FlowError):
        pictures = tokenizer().decode(ids, generator=torch.Generator().manual_seed(0), **options)
        assert pictures.shape == (len(ids), 3, 16, 16)
        assert ids.dtype in INTEGERS and ((ids >= 0) & (ids < 32)).all(), "nothing else is drawn"


@given(st.data())
def test_files_of_ids(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.npz"
    write_ids(path, {"a": torch.arange(8), "b.png": torch.arange(8)})
    if data.draw(st.booleans()):
        with zipfile.ZipFile(path, "a", data.draw(st.sampled_from([0, 8, 12, 14]))) as archive:
            archive.writestr(
                data.draw(st.sampled_from(["c", "c.npy", "../c.npy", "d/"])), data.draw(st.binary())
            )
    path.write_bytes(mutated(path.read_bytes(), data.draw))
    with suppress(V2FlowError):
        assert all(ids.dtype == torch.int64 and ids.ndim == 1 for ids in read_ids(path).values())


# --- configurations -----------------------------------------------------------------------------------------------

ODD = st.sampled_from(
    [None, -1, 0, 10**30, 1e400, float("nan"), "x", "", "${nope}", [], {}, [1, [2]], {"a": {"b": 1}}, True,
     {"class_path": "os.system"}, "\x00", 3.5, 1 << 62, "64"]
)  # fmt: skip


def change(document: Any, draw: Any) -> Any:
    """A copy with values replaced, removed or renamed at one to three places."""
    changed = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        place = changed
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(place[key], (dict, list)) and place[key] and draw(st.integers(0, 3)):
                place = place[key]
                continue
            action = draw(st.sampled_from(["replace", "replace", "remove", "rename"]))
            if action == "replace":
                place[key] = copy.deepcopy(draw(ODD))
            else:
                value = place.pop(key)
                if action == "rename" and isinstance(place, dict):
                    place[f"{key}x"] = value
            break
    return changed


def small_enough(value: Any) -> bool:
    """Sizes that would only prove that memory is finite are left out."""
    if isinstance(value, dict):
        return all(small_enough(v) for v in value.values())
    if isinstance(value, list):
        return all(small_enough(v) for v in value)
    return not isinstance(value, (int, float)) or not abs(value) > 10**6 or value != value


@given(st.data())
def test_configurations_of_checkpoints(data: st.DataObject) -> None:
    info = change({"model": "V2FlowTokenizer", "config": to_dict(small_config())}, data.draw)
    if small_enough(info):
        with suppress(V2FlowError):
            assert isinstance(build_model(info, "x.ckpt"), torch.nn.Module)


def description() -> dict[str, Any]:
    """What a checkpoint of the small tokenizer says of it."""
    model = tokenizer()
    return {
        "model": "V2FlowTokenizer", "config": to_dict(model.config), "vocabulary_sha256": model.vocabulary_sha256,
        "codec_sha256": model.codec.fingerprint(), "decode_modes": {"one": {"steps": 1, "temperature": 0.5}},
    }  # fmt: skip


@given(st.data())
def test_checkpoints(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Sizes are not bounded here: a description that does not fit the tensors takes no memory."""
    state = {f"model.{name}": tensor for name, tensor in tokenizer().state_dict().items()}
    checkpoint = {"v2flow": description(), "state_dict": state, "global_step": 3}
    path = tmp_path_factory.getbasetemp() / "fuzzed.ckpt"
    torch.save(change(checkpoint, data.draw), path)
    if data.draw(st.booleans()):
        path.write_bytes(mutated(path.read_bytes(), data.draw))
    with suppress(V2FlowError):
        model, info = load_model(path)
        assert isinstance(model, V2FlowTokenizer) and info["model"] == "V2FlowTokenizer"


@cache
def text_to_image() -> dict[str, Any]:
    from v2flow.t2i.small_llm import backend_text, train_caption_llm_tokenizer

    path = Path(os.environ["V2FLOW_CACHE"]) / "tokenizer"
    tokenizer().save_pretrained(path)
    words = backend_text(train_caption_llm_tokenizer(["a dog", "two cats"], 300))
    config = {"tokenizer": str(path), "llm": "gpt2-style:tiny", "train": "rows", "max_caption": 8}
    info = {"model": "V2FlowForTextToImage", "config": config, "llm_tokenizer": words}
    return {
        "v2flow": info | {"tokenizer_sha256": "a", "llm_sha256": "b"},
        "state_dict": {"model.x": torch.ones(1)},
    }


@given(st.data())
def test_text_to_image_checkpoints(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    pytest.importorskip("transformers")
    from v2flow.t2i.checkpoint import load_text_to_image

    path = tmp_path_factory.getbasetemp() / "fuzzed-t2i.ckpt"
    torch.save(change(text_to_image(), data.draw), path)
    with pytest.raises(V2FlowError):  # at the latest by the names of the models, which are none
        load_text_to_image(path)


@given(st.data())
def test_exported_folders(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.getbasetemp() / "exported"
    tokenizer().save_pretrained(folder)
    document = change(json.loads((folder / "config.json").read_text()), data.draw)
    (folder / "config.json").write_text(json.dumps(document))
    name = data.draw(st.sampled_from(["config.json", "model.safetensors", "vocabulary.safetensors", None]))
    if name is not None:
        (folder / name).write_bytes(mutated((folder / name).read_bytes(), data.draw))
    with suppress(V2FlowError):
        assert isinstance(V2FlowTokenizer.from_pretrained(folder), V2FlowTokenizer)


@cache
def parser() -> Any:
    from training_toys import experiment

    from v2flow.cli_training import experiment_cli

    folder = Path(os.environ["V2FLOW_CACHE"])
    document = experiment({"train": "train.tar", "val": "val.tar"}, folder)
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(document))
    return experiment_cli(["--config", str(path)]).parser, document


@settings(max_examples=10_000 if LONG else 2)
@given(st.data())
def test_experiment_files(data: st.DataObject) -> None:
    """Read and checked as by `v2flow fit`; what they describe is not built."""
    from v2flow.cli_experiment import model_class
    from v2flow.cli_training import _clear_errors

    reader, document = parser()
    text = yaml.safe_dump(change(document, data.draw))
    if data.draw(st.booleans()):
        text = mutated(text.encode(), data.draw).decode(errors="replace")
    path = Path(os.environ["V2FLOW_CACHE"]) / "fuzzed.yaml"
    path.write_text(text)
    assert isinstance(model_class(["fit", "--config", str(path)]), str)
    with suppress(V2FlowError), _clear_errors("v2flow fit"):
        reader.parse_args(["--config", str(path)])
