"""Input that somebody made to do harm: nothing of it runs, nothing is written outside, and each has an outcome."""

import builtins
import importlib
import io
import json
import os
import pickle
import socket
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint
from data_toys import encode, numbered_picture, write_tar
from PIL import Image

from v2flow.cli_training import _checked
from v2flow.config import CodecConfig, TokenizerConfig, from_dict, to_dict
from v2flow.data.batches import EvaluationBatches, Request, SampleReader, TrainBatches
from v2flow.data.decode import MAX_CAPTION, MAX_PIXELS, BadSampleError, decode_caption, decode_image
from v2flow.data.folder import build_folder
from v2flow.data.manifest import FORMAT, MAX_KEY, index_tar, read_manifest, write_manifest
from v2flow.data.shard_names import expand_shards
from v2flow.data.shards import Shard, ShardSet, open_shards
from v2flow.data.tokens import TokenReader
from v2flow.data.validate import _check, validate_shards
from v2flow.errors import V2FlowError
from v2flow.images import read_picture
from v2flow.inference import read_ids
from v2flow.training.checkpoint_files import write_checkpoint
from v2flow.training.checkpoint_folders import check_sharded_checkpoint
from v2flow.training.checkpoint_io import CheckedCheckpointIO

SIZE = 16


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("V2FLOW_CACHE", str(tmp_path / "cache"))


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.place),)


def refused(action: Callable[[], Any], *parts: str) -> None:
    with pytest.raises(V2FlowError) as caught:
        action()
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value), str(caught.value)


# --- what runs nothing --------------------------------------------------------------------------------------------

RUNNABLE = (
    "pkl",
    "pickle",
    "pyd",
    "pth",
    "pt",
    "dill",
    "npy",
    "npz",
    "joblib",
    "bin",
    "ckpt",
    "py",
    "so",
    "cbor",
    "mp",
)


def test_members_that_could_run_are_never_opened(tmp_path: Path) -> None:
    """By no reader, and neither under the names of pictures, captions and class numbers."""
    place = tmp_path / "ran"
    payload = pickle.dumps(Bomb(place))
    members = [("a.png", numbered_picture(5)), ("a.txt", b"words")]
    members += [(f"a.{extension}", payload) for extension in RUNNABLE]
    members += [("b.png", payload), ("b.txt", payload), ("b.json", payload), ("b.cls", payload)]
    path = write_tar(tmp_path / "s.tar", members)
    shards = open_shards(path, progress=False)
    assert len(shards) == 2
    for batches in (
        TrainBatches(SampleReader(shards, SIZE), 0, False, False, max_bad=9),
        EvaluationBatches(SampleReader(shards, SIZE), 2),
    ):
        batch = batches[Request(0, 0, 2)]
        assert batch.error is None and list(batch.bad) == [1] and batch.tensors["image"][0, 0, 0, 0] == 5
    refused(lambda: TokenReader(shards).content(1), "sample 'b'", "list of integers 'ids'")
    report = validate_shards(path, processes=1, progress=False)
    assert not report.ok and report.samples == 2
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.png").write_bytes(numbered_picture(5))
    for extension in (*RUNNABLE, "jpg"):
        (folder / f"b.{extension}").write_bytes(payload)
    built = build_folder(
        folder, tmp_path / "out", val_fraction=0, test_fraction=0, processes=1, progress=False
    )
    assert built.samples == {"train": 1} and len(built.bad) == 1
    assert not place.exists()
    pickle.loads(payload)
    assert place.is_dir(), "the payload is real"


def test_checkpoints_are_not_unpickled_whatever_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on the road that Lightning takes to resume, from which v2flow's own reader is away."""
    torch.save({"v2flow": {}, "x": Bomb(tmp_path / "ran")}, tmp_path / "evil.ckpt")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(pickle.UnpicklingError):
        CheckedCheckpointIO().load_checkpoint(tmp_path / "evil.ckpt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["os:mkdir=RAN", "os:system=mkdir RAN", "subprocess:getoutput=mkdir RAN"])
def test_a_checkpoints_words_name_no_code(tmp_path: Path, name: str) -> None:
    """A text-to-image checkpoint says where its tokenizer lies; `v2flow evaluate` takes such words from users."""
    pytest.importorskip("transformers")
    from v2flow.t2i.checkpoint import load_text_to_image
    from v2flow.training.checkpoint import load_model
    from v2flow.training.own_tokenizer import load_own

    name = name.replace("RAN", str(tmp_path / "ran"))
    info = {"model": "V2FlowForTextToImage", "config": {"tokenizer": name, "llm": "gpt2-style:tiny"}}
    info |= {"llm_tokenizer": "{}", "tokenizer_sha256": "a", "llm_sha256": "b"}
    write_checkpoint({"v2flow": info, "state_dict": {}}, tmp_path / "evil.ckpt")
    refused(lambda: load_text_to_image(tmp_path / "evil.ckpt"), "no such checkpoint")
    refused(lambda: load_model(name), "no such checkpoint")
    assert not (tmp_path / "ran").exists()
    refused(lambda: load_own(name), "expected a torch.nn.Module")
    assert (tmp_path / "ran").exists(), "the payload is real"


def sharded(folder: Path, **values: Any) -> Path:
    """A sharded checkpoint as Lightning's ModelParallelStrategy leaves one."""
    state = {"weight": torch.arange(6.0), "lr": 0.1, "betas": (0.9, 0.95), "names": ["a"]} | values
    torch.distributed.checkpoint.save(state, checkpoint_id=folder, no_dist=True)
    torch.save({"v2flow": {}, "global_step": 3}, folder / "meta.pt")
    return folder


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
def test_a_sharded_checkpoint_runs_nothing(tmp_path: Path) -> None:
    """PyTorch unpickles ``.metadata``, what is no tensor, and a rank's own metadata where the first cannot be read."""
    check_sharded_checkpoint(sharded(tmp_path / "good"))
    ran = tmp_path / "ran"
    evil = sharded(tmp_path / "value", lr=Bomb(ran))
    refused(lambda: check_sharded_checkpoint(evil), str(evil), "not a readable sharded checkpoint")
    for name in (".metadata", "__0.metadata", "meta.pt"):
        evil = sharded(tmp_path / name.strip("."))
        (evil / name).write_bytes(pickle.dumps(Bomb(ran)))
        refused(lambda evil=evil: _checked(str(evil)), str(evil))
        refused(lambda evil=evil: CheckedCheckpointIO().load_checkpoint(evil), "found a folder")
    refused(
        lambda: check_sharded_checkpoint(tmp_path), "expected a .ckpt file or a sharded checkpoint's folder"
    )
    assert not ran.exists()
    with pytest.raises(torch.distributed.checkpoint.CheckpointException):
        torch.distributed.checkpoint.load({"lr": 0.0}, checkpoint_id=tmp_path / "metadata", no_dist=True)
    assert ran.exists(), "the payload is real"


def test_a_folder_of_pickled_weights_is_refused(tmp_path: Path) -> None:
    from v2flow.hub import read_weights

    torch.save({"x": Bomb(tmp_path / "ran")}, tmp_path / "model.safetensors")
    refused(lambda: read_weights(tmp_path / "model.safetensors"), "not a readable safetensors file")
    assert not (tmp_path / "ran").exists()


def test_code_beside_an_exported_model_is_neither_run_nor_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    from core_toys import small_config

    from v2flow import V2FlowForTextToImage, V2FlowTokenizer

    V2FlowTokenizer(small_config()).save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "v2flow.json").write_text('{"model_type": "v2flow-text-to-image", "max_caption": 9}')
    code = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", None]}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": code}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T", "auto_map": code}))
    (tmp_path / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    refused(lambda: V2FlowForTextToImage.from_pretrained(tmp_path), str(tmp_path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("key", ["_target_", "class_path", "__class__", "__reduce__"])
def test_a_checkpoints_config_names_no_class(key: str) -> None:
    refused(lambda: from_dict(TokenizerConfig, {key: "os.system"}), "unknown option", key)
    refused(lambda: from_dict(TokenizerConfig, {"codec": {key: "os.system"}}), "unknown option", key)


def test_a_checkpoint_names_a_model_of_a_list(tmp_path: Path) -> None:
    from v2flow.training.checkpoint import build_model

    for name in ("os.system", "subprocess.Popen", "torch.nn.Linear", "TokenizerConfig", "__import__"):
        refused(lambda name=name: build_model({"model": name, "config": {}}, "x.ckpt"), "unknown model", name)


def tokenizer_checkpoint(
    path: Path, change: Callable[[dict[str, Any]], Any] = lambda checkpoint: None
) -> Path:
    """A checkpoint of a small tokenizer, with `change` applied to what it says."""
    from core_toys import small_config

    from v2flow import V2FlowTokenizer

    model = V2FlowTokenizer(small_config())
    info = {
        "model": "V2FlowTokenizer",
        "config": to_dict(model.config),
        "decode_modes": {"one": {"steps": 1}},
    }
    info |= {"vocabulary_sha256": model.vocabulary_sha256, "codec_sha256": model.codec.fingerprint()}
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    checkpoint = {"v2flow": info, "state_dict": state, "global_step": 3}
    change(checkpoint)
    write_checkpoint(checkpoint, path)
    return path


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda c: c.update(v2flow=5), "not a v2flow checkpoint"),
        (lambda c: c.pop("state_dict"), "'state_dict'"),
        (lambda c: c.update(state_dict=[1]), "state_dict: expected a dict"),
        (lambda c: c["state_dict"].update(x=5), "expected tensors by name"),
        (lambda c: c["v2flow"].pop("config"), "'config'"),
        (lambda c: c["v2flow"].update(vocabulary_sha256=5), "vocabulary_sha256: expected a str"),
        (lambda c: c["v2flow"].update(decode_modes=[]), "decode_modes: expected a dict"),
        (lambda c: c["v2flow"].update(decode_modes={"a": 1}), "decode_modes"),
        (lambda c: c["v2flow"].update(decode_modes={"a": {"steps": 10**12}}), "at most"),
        (lambda c: c["v2flow"].update(decode_modes={"a": {"steps": "9"}}), "decode option steps"),
        (lambda c: c["v2flow"]["config"]["resampler"].update(depth=10**9), "resampler.depth"),
        (lambda c: c["v2flow"]["config"]["velocity"].update(fine_depth=10**9), "velocity.fine_depth"),
        # 26 GB and 40 GB, of which not one is taken.
        (lambda c: c["v2flow"]["config"]["decoder"].update(width=40_000), "has shape"),
        (lambda c: c["v2flow"]["config"]["visual_vocabulary"].update(size=625_000_000), "has shape"),
        (lambda c: c["v2flow"]["config"]["vocabulary"].update(size=10**9), "random numbers"),
    ],
)
def test_what_a_checkpoint_says_of_itself_is_checked(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], found: str
) -> None:
    from v2flow.training.checkpoint import load_model

    path = tokenizer_checkpoint(tmp_path / "x.ckpt", change)
    refused(lambda: load_model(path), str(path), found)


@pytest.mark.parametrize(
    "missing", ["config", "tokenizer_sha256", "llm_sha256", "state_dict", "llm_tokenizer"]
)
def test_a_text_to_image_checkpoint_without_an_entry(tmp_path: Path, missing: str) -> None:
    pytest.importorskip("transformers")
    from v2flow.t2i.checkpoint import load_text_to_image

    tokenizer = str(tokenizer_checkpoint(tmp_path / "tokenizer.ckpt"))
    info = {"model": "V2FlowForTextToImage", "config": {"tokenizer": tokenizer, "llm": "gpt2-style:tiny"}}
    info |= {"llm_tokenizer": "no tokenizer", "tokenizer_sha256": "a", "llm_sha256": "b"}
    checkpoint: dict[str, Any] = {"v2flow": info, "state_dict": {}}
    (info if missing in info else checkpoint).pop(missing)
    write_checkpoint(checkpoint, tmp_path / "x.ckpt")
    refused(
        lambda: load_text_to_image(tmp_path / "x.ckpt"), missing if missing != "llm_tokenizer" else "pictures"
    )
    write_checkpoint({"v2flow": info | {missing: "x"}, "state_dict": {}}, tmp_path / "y.ckpt")
    refused(lambda: load_text_to_image(tmp_path / "y.ckpt"))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (lambda d: json.dumps({k: v for k, v in d.items() if k != "tokenizer"}), "makes no V2FlowTokenizer"),
        (lambda d: json.dumps(d | {"tokenizer": None}), "makes no V2FlowTokenizer"),
        (lambda d: json.dumps(d | {"tokenizer": 5}), "tokenizer: expected a dict"),
        (lambda d: json.dumps(d | {"vocabulary_sha256": 5}), "vocabulary_sha256: expected a str"),
        (lambda d: json.dumps(d | {"tokenizer": d["tokenizer"] | {"codec": {"scale": "x"}}}), "makes no"),
        (lambda d: json.dumps(d | {"x": "caf\xe9"}, ensure_ascii=False).encode("latin-1"), "not JSON"),
        (lambda d: "[" * 100_000, "not JSON"),
    ],
)
def test_an_exported_folders_configuration_is_checked(
    tmp_path: Path, text: Callable[[dict[str, Any]], str | bytes], found: str
) -> None:
    from core_toys import small_config

    from v2flow import V2FlowTokenizer

    V2FlowTokenizer(small_config()).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    written = text(json.loads(path.read_text()))
    path.write_bytes(written if isinstance(written, bytes) else written.encode())
    refused(lambda: V2FlowTokenizer.from_pretrained(tmp_path), str(path), found)


def test_a_checkpoint_downloads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub id in it stands for what the local cache holds; one that the user has named is asked for."""
    pytest.importorskip("transformers")
    pytest.importorskip("diffusers")
    from v2flow.codec import build_codec
    from v2flow.t2i.checkpoint import load_text_to_image
    from v2flow.training.checkpoint import load_model

    asked: list[Any] = []

    def offline(*address: Any, **_: Any) -> Any:
        asked.append(address)
        raise OSError("no network in tests")

    monkeypatch.setattr(socket, "getaddrinfo", offline)
    for name in ("huggingface_hub.constants", "transformers.utils.hub"):
        module = importlib.import_module(name)
        for switch in ("HF_HUB_OFFLINE", "_is_offline_mode"):
            monkeypatch.setattr(module, switch, False, raising=False)
    codec = {"kind": "kl", "path": "nobody/nothing", "scale": 1.0}
    refused(lambda: build_codec(CodecConfig(**codec)), "a hub id that this machine can reach")
    assert asked, "else this test could not fail"
    asked.clear()  # huggingface_hub's own question of the day among them
    named = tokenizer_checkpoint(tmp_path / "a.ckpt", lambda c: c["v2flow"]["config"].update(codec=codec))
    refused(lambda: load_model(named), "nobody/nothing", "hf download nobody/nothing")
    tokenizer = str(tokenizer_checkpoint(tmp_path / "tokenizer.ckpt"))
    info = {"model": "V2FlowForTextToImage", "config": {"tokenizer": tokenizer, "llm": "nobody/nothing"}}
    info |= {"tokenizer_sha256": "a", "llm_sha256": "b"}
    write_checkpoint({"v2flow": info, "state_dict": {}}, tmp_path / "b.ckpt")
    refused(lambda: load_text_to_image(tmp_path / "b.ckpt"), "hf download nobody/nothing")
    assert asked == []


@pytest.mark.parametrize(
    "name", ["pipe:touch ran", "PIPE:touch ran", "{pipe:touch ran,a.tar}", "  pipe:touch ran"]
)
def test_pipes_run_only_when_they_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for opener in (open_shards, expand_shards, lambda n: validate_shards(n, progress=False, processes=1)):
        try:
            opened = opener(name)
        except V2FlowError:
            continue
        assert name.startswith("  ") and opened is not None  # a file of this name, which there is none of
    assert not (tmp_path / "ran").exists()


# --- names and links ----------------------------------------------------------------------------------------------


def tar_with(path: Path, *entries: tuple[tarfile.TarInfo, bytes]) -> str:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for info, data in entries:
            info.size = len(data) if info.isreg() else 0
            archive.addfile(info, io.BytesIO(data))
    return str(path)


def entry(
    name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, target: str = ""
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info, data


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if "cache" not in path.parts}


def test_paths_in_names_lead_nowhere(tmp_path: Path) -> None:
    work = tmp_path / "a" / "b"
    work.mkdir(parents=True)
    names = ["../../up.png", "/abs.png", "x/../../../y.png", "C:\\w.png", "~/home.png"]
    path = tar_with(work / "s.tar", *(entry(name, numbered_picture(i)) for i, name in enumerate(names)))
    before = everything(tmp_path)
    shards = open_shards(path, progress=False)
    batch = EvaluationBatches(SampleReader(shards, SIZE), len(names))[Request(0, 0, len(names))]
    assert batch.tensors["image"][:, 0, 0, 0].tolist() == list(range(len(names))) and not batch.bad
    assert validate_shards(path, processes=1, progress=False).ok
    assert everything(tmp_path) == before


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE]
)
def test_links_and_devices_in_a_tar_are_not_followed(tmp_path: Path, kind: bytes) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(numbered_picture(200))
    path = tar_with(
        tmp_path / "s.tar",
        entry("a.png", numbered_picture(1)),
        entry("a.txt", kind=kind, target=str(secret)),
        entry("b.png", kind=kind, target=str(secret)),
        entry("b.txt", b"words"),
    )
    shards = open_shards(path, progress=False)
    assert shards.read(0, 1) is None and shards.read(1, 0) is None
    batch = EvaluationBatches(SampleReader(shards, SIZE), 2)[Request(0, 0, 2)]
    assert list(batch.bad) == [1] and "no member jpg" in batch.bad[1]
    (problem,) = validate_shards(path, processes=1, progress=False).bad_members
    assert "sample 'b'" in problem


def test_links_out_of_a_folder_of_pictures_are_left_out(tmp_path: Path) -> None:
    source, secret = tmp_path / "pictures", tmp_path / "secret"
    source.mkdir()
    secret.mkdir()
    (secret / "s.png").write_bytes(numbered_picture(200))
    (secret / "s.txt").write_text("a password")
    (source / "own.png").write_bytes(numbered_picture(1))
    (source / "alias.png").symlink_to("own.png")
    (source / "out.png").symlink_to(secret / "s.png")
    (source / "folder").symlink_to(secret)
    options: dict[str, Any] = {"val_fraction": 0, "test_fraction": 0, "processes": 1, "progress": False}
    report = build_folder(source, tmp_path / "out", **options)
    assert report.samples == {"train": 2} and list(report.bad) == [str(source / "out.png")]
    assert "a link out of" in str(report)
    (source / "own.txt").symlink_to(secret / "s.txt")
    refused(lambda: build_folder(source, tmp_path / "out2", **options), "own.txt", "a link out of")


def test_a_manifest_names_files_beside_it_and_bytes_inside_them(tmp_path: Path) -> None:
    write_tar(tmp_path / "s.tar", [("a.png", numbered_picture(1))])
    write_manifest(tmp_path, {"s.tar": index_tar(tmp_path / "s.tar")}, {})
    document = json.loads((tmp_path / "manifest.json").read_text())
    for change in (
        {"file": "../s.tar"}, {"file": "/etc/passwd"}, {"image": [[-5, 10]]}, {"image": [[512, -1]]},
        {"image": [[512, 1 << 40]]}, {"image": [[1 << 62, 1 << 62]]}, {"image": [[1 << 70, 1]]}, {"bytes": "x"},
        {"keys": [None]}, {"keys": ["\ud800"]}, {"image": "x"}, {"samples": 2},
    ):  # fmt: skip
        changed = document | {"shards": [document["shards"][0] | change]}
        refused(
            lambda text=json.dumps(changed): read_manifest(text, "manifest.json"),
            "not a manifest of v2flow's",
        )
    refused(lambda: read_manifest("[" * 100_000, "manifest.json"), "not a manifest")


@pytest.mark.parametrize("long", [4_000_000, MAX_KEY], ids=["too long a key", "as long as is allowed"])
def test_a_manifest_takes_no_more_memory_than_it_has_bytes_for(long: int) -> None:
    """Each key of a shard gets the room of the longest one."""
    keys = ["k" * long] + [str(i) for i in range(200_000)]
    shards = [{"file": "s.tar", "bytes": 1 << 40, "samples": len(keys), "keys": keys}]
    text = json.dumps({"format": FORMAT, "build": {}, "shards": shards})
    tracemalloc.start()
    refused(lambda: read_manifest(text, "manifest.json"), "not a manifest", f"one of them of {long} bytes")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 << 20


def test_headers_that_make_no_sense_end_the_reading(tmp_path: Path) -> None:
    picture = numbered_picture(1)
    for name, headers in (
        ("negative", {"size": "-1024"}), ("endless", {"size": str(1 << 62)}), ("text", {"size": "many"}),
        ("key", {"path": "k" * (MAX_KEY + 1) + ".png"}),
    ):  # fmt: skip
        info, data = entry("a.png", picture)
        info.pax_headers = headers
        path = tar_with(tmp_path / f"{name}.tar", entry("first.png", picture), (info, data))
        refused(lambda path=path: open_shards(path, progress=False), path)
        assert not validate_shards(path, processes=1, progress=False).ok
    info, data = entry("b\udcff.png", picture)
    with tarfile.open(
        tmp_path / "latin.tar", "w", format=tarfile.GNU_FORMAT, errors="surrogateescape"
    ) as archive:
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    refused(lambda: open_shards(str(tmp_path / "latin.tar"), progress=False), "is not UTF-8")
    assert not validate_shards(str(tmp_path / "latin.tar"), processes=1, progress=False).ok


def test_long_names_upon_long_names_end_the_reading(tmp_path: Path) -> None:
    """The tarfile module reads them by recursion."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2
    header = info.tobuf(tarfile.GNU_FORMAT) + b"a".ljust(tarfile.BLOCKSIZE, b"\0")
    path = tmp_path / "s.tar"
    path.write_bytes(header * 1200)
    refused(lambda: open_shards(str(path), progress=False), str(path))
    assert not validate_shards(str(path), processes=1, progress=False).ok


def test_members_that_are_too_large_are_not_read(tmp_path: Path) -> None:
    """The file has holes there, which take no room on the disk."""
    path, size = tmp_path / "s.tar", 3 << 30  # more than one call can read
    write_tar(path, [("a.png", numbered_picture(1)), ("b.png", numbered_picture(2))])
    index = replace(index_tar(path), size=2 * size)
    index.members[0, 1:] = index.members[1, 0] = [1 << 20, size]
    os.truncate(path, index.size)
    shards = ShardSet([Shard(str(path), index, "", False)])
    tracemalloc.start()
    batch = EvaluationBatches(SampleReader(shards, SIZE), 2)[Request(0, 0, 2)]
    assert list(batch.bad) == [1] and f"sample 'b': image: {size:,} bytes" in batch.bad[1]
    assert batch.caption == ["", ""]
    batch = EvaluationBatches(SampleReader(shards, SIZE, captions=True), 2)[Request(0, 0, 2)]
    assert batch.error == f"{path}, sample 'a': txt: {size:,} bytes, more than {MAX_CAPTION:,}"
    refused(lambda: TokenReader(shards).content(0), f"{path}, sample 'a': json: {size:,} bytes")
    found = _check(shards.shards[0], 0)
    assert [line.split(":")[1].strip() for line in found.bad] == ["cls", "image"]
    assert tracemalloc.get_traced_memory()[1] < 50 << 20
    tracemalloc.stop()


# --- pictures -----------------------------------------------------------------------------------------------------


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *extra: tuple[bytes, bytes]) -> bytes:
    """A PNG of raw rows (each with its filter byte), with further chunks before the pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    middle = b"".join(chunk(*one) for one in extra)
    return b"\x89PNG\r\n\x1a\n" + header + middle + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def animated(format: str) -> bytes:
    frames = [Image.new("RGB", (8, 8), (40 * i, 0, 0)) for i in range(1, 4)]
    return encode(frames[0], format, save_all=True, append_images=frames[1:], duration=10, lossless=True)


def rotated(orientation: Any) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(Image.new("RGB", (8, 24), (90, 0, 0)), "JPEG", exif=exif, quality=95)


SIXTEEN = png(2, 2, 16, 2, (b"\0" + struct.pack(">6H", *[40 * 257, 0, 0] * 2)) * 2)
SEEN: dict[str, tuple[bytes, int]] = {
    # -> red of the middle pixel
    "16 bits a channel": (SIXTEEN, 40),
    "16 bits with alpha": (png(1, 1, 16, 6, b"\0" + struct.pack(">4H", 40 * 257, 0, 0, 65535)), 40),
    "16-bit grey": (encode(Image.fromarray(np.full((8, 8), 40 * 257, np.uint16))), 40),
    "1-bit": (encode(Image.new("1", (8, 8), 1)), 255),
    "CMYK": (encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95), 254),
    "palette": (encode(Image.new("RGB", (8, 8), (40, 0, 0)).quantize(4)), 40),
    "palette with alpha": (encode(Image.new("RGBA", (8, 8), (40, 0, 0, 255)).quantize(4)), 40),
    "grey with alpha": (encode(Image.new("LA", (8, 8), (40, 255))), 40),
    "animated WebP": (animated("WEBP"), 40),
    "animated PNG": (animated("PNG"), 40),
    "EXIF-rotated": (rotated(6), 90),
    "EXIF without sense": (rotated(77), 90),
    "1 x 1": (encode(Image.new("RGB", (1, 1), (40, 0, 0))), 40),
    "20,000 wide": (encode(Image.new("RGB", (20_000, 2), (40, 0, 0))), 40),
    "20,000 high": (encode(Image.new("RGB", (1, 20_000), (40, 0, 0))), 40),
    "20,000 x 3,000": (encode(Image.new("L", (20_000, 3_000), 40)), 40),
}
REFUSED: dict[str, tuple[bytes, str]] = {
    "20,000 x 20,000": (png(20_000, 20_000, 1, 0, b""), "pixels"),
    "2 billion pixels": (png(65_000, 32_000, 8, 2, b""), "pixels"),
    "no pixel": (png(0, 4, 8, 0, b""), ""),
    "rows too few": (png(64, 64, 8, 2, bytes(50)), ""),
    "text that unfolds": (png(1, 1, 8, 0, b"\0\0", (b"zTXt", b"k\0\0" + zlib.compress(bytes(1 << 26)))), ""),
    "animated GIF": (animated("GIF"), "not a JPEG, PNG or WebP"),
    "SVG": (
        b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
        "not a JPEG",
    ),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(x) run\n", "not a JPEG"),
}


@pytest.mark.parametrize("name", list(SEEN))
def test_odd_pictures_are_seen_as_they_are_meant(tmp_path: Path, name: str) -> None:
    data, red = SEEN[name]
    path = write_tar(tmp_path / "s.tar", [("a.jpg", data)])
    (square,) = [SampleReader(open_shards(path, progress=False), SIZE).content(0)]
    assert square.shape == (SIZE, SIZE, 3) and square.dtype == np.uint8
    assert abs(int(square[SIZE // 2, SIZE // 2, 0]) - red) <= 2


@pytest.mark.parametrize("name", list(REFUSED))
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_pictures_that_would_do_harm_are_bad_samples(name: str) -> None:
    data, reason = REFUSED[name]
    assert len(data) < 100_000
    with pytest.raises(BadSampleError) as caught:
        decode_image(data)
    assert reason in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".png", ".gif", ".bmp", ".tif", ".jp2"])
def test_no_other_program_is_run_on_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    """Pillow hands PostScript to Ghostscript, whatever the file is called."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / f"a{suffix}"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    refused(lambda: read_picture(path), str(path), "JPEG/PNG/")
    options: dict[str, Any] = {"val_fraction": 0, "test_fraction": 0, "processes": 1, "progress": False}
    (path.parent / "good.png").write_bytes(numbered_picture(1))
    assert list(build_folder(path.parent, tmp_path / "out", **options).bad) == [str(path)]
    assert not (tmp_path / "ran").exists()
    with pytest.raises(OSError), Image.open(path) as image:
        image.load()
    assert (tmp_path / "ran").exists(), "else this test could not fail"


PEAK = """
import resource, sys
from v2flow.data.decode import decode_image
data = open(sys.argv[1], "rb").read()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
size = decode_image(data).size
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / size[0] / size[1])
"""


def test_no_picture_takes_more_than_a_gigabyte(tmp_path: Path) -> None:
    """Of the 64 million pixels that are allowed; 16-bit grey is the worst one, and measured on fewer."""
    Image.new("I;16", (4000, 4000)).save(tmp_path / "a.png", compress_level=1)
    command = [sys.executable, "-c", PEAK, str(tmp_path / "a.png")]
    bytes_a_pixel = float(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    assert bytes_a_pixel * MAX_PIXELS < 1 << 30


# --- ids ----------------------------------------------------------------------------------------------------------


def test_files_that_hold_no_ids(tmp_path: Path) -> None:
    path = tmp_path / "ids.npz"
    np.save(tmp_path / "plain.npy", np.arange(4))
    (tmp_path / "plain.npy").rename(path)
    refused(lambda: read_ids(path), str(path), "expected an .npz file")
    payload = pickle.dumps(Bomb(tmp_path / "ran"))
    zeros = io.BytesIO()
    np.save(zeros, np.zeros(1 << 24, np.uint8))
    for name, data in (("notes.txt", b"words"), ("a.npy", payload), ("a.npy", zeros.getvalue())):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(name, data)
        refused(lambda: read_ids(path), str(path), "expected an .npz file")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a.npy", bytes(2000))
    damaged = bytearray(path.read_bytes())
    damaged[50:60] = b"\xff" * 10
    path.write_bytes(damaged)
    refused(lambda: read_ids(path), str(path), "expected an .npz file")
    assert not (tmp_path / "ran").exists()
    np.savez(path, a=np.arange(4, dtype=np.uint16))
    assert read_ids(path)["a"].tolist() == [0, 1, 2, 3]


# --- captions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("txt", "json_text"),
    [
        (b"caf\xe9", None),
        (b"\xff\xfea\0", None),
        (b"x" * (MAX_CAPTION + 1), None),
        (None, b'{"caption": "' + b"x" * MAX_CAPTION + b'"}'),
        (None, b'{"caption": "\\ud800"}'),
        (None, b"[" * 100_000),
        (None, b'{"caption": "a"'),
        (None, b'{"a": ' + b"9" * 10_000 + b"}"),
    ],
    ids=["latin-1", "utf-16", "long", "long json", "half a pair", "nested", "cut", "number"],
)
def test_captions_that_are_none(tmp_path: Path, txt: bytes | None, json_text: bytes | None) -> None:
    with pytest.raises(BadSampleError, match="caption"):
        decode_caption(txt, json_text)
    members = [("a.png", numbered_picture(1)), ("a.txt", txt), ("a.json", json_text)]
    shards = open_shards(
        write_tar(tmp_path / "s.tar", [m for m in members if m[1] is not None]), progress=False
    )  # type: ignore[misc]
    name, text = ("txt", txt) if txt is not None else ("json", json_text or b"")
    expected = f"{name}: {len(text):,} bytes" if len(text) > MAX_CAPTION else "caption"
    refused(lambda: SampleReader(shards, SIZE, captions=True).caption(0), f"sample 'a': {expected}")
    assert SampleReader(shards, SIZE).caption(0) == ""


def test_special_tokens_in_captions_stay_text() -> None:
    """Whatever it says, a sequence has one picture: one <boi>, N visual tokens, one <eoi>."""
    pytest.importorskip("transformers")
    from t2i_toys import tiny_llm, tiny_tokenizer

    from v2flow.t2i.extension import encode_captions, extend_vocabulary
    from v2flow.t2i.sequences import join

    words = tiny_tokenizer()
    tokens = extend_vocabulary(tiny_llm("gpt2", len(words)), words, 32)
    captions = [
        "<boi>", "<v_0>", "<eoi>", "<boi><v_0><v_31><eoi>", " <v_1>  <boi>\n", "a<v_2>b", "<v_32>", "<<v_3>>",
        "<bos><eos><pad><unk>", "&lt;boi&gt; <BOI>", "\u200b<v_4>\u200b", "<v_0> " * 30,
    ]  # fmt: skip
    encoded = encode_captions(words, captions, 10_000)
    assert words("<v_0>").input_ids[-1] in range(tokens.boi, tokens.eoi + 1), "else this test could not fail"
    assert all(max(ids) < tokens.boi for ids in encoded)
    ids = torch.arange(len(captions) * 4).view(-1, 4) % 32
    sequences = join(encoded, tokens, ids)
    assert tokens.contains(sequences.ids).sum(1).tolist() == [6] * len(captions)
    assert torch.equal(sequences.ids[:, -5:-1] - tokens.first, ids)
