"""Sharded checkpoints, which are folders: sealed with checksums, and looked through before PyTorch unpickles them.

`torch.distributed.checkpoint` writes ``.metadata``, a pickle of where each tensor lies, and pickles what is no tensor
into the shards (``*.distcp``). It loads both as pickles, whatever they say; Lightning's ``meta.pt`` holds the rest.
"""

import io
import json
import os
import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint import metadata as parts
from torch.distributed.checkpoint.filesystem import _StorageInfo

from v2flow.errors import V2FlowError, first_line
from v2flow.fingerprint import file_sha256
from v2flow.training.checkpoint_files import METADATA, REST, previous_of, sync_folder

SEAL = "checksums.json"
_LARGEST = 1 << 24
"""Bytes of one value that is no tensor: options of an optimiser have hundreds."""
_CLASSES = (
    parts.Metadata, parts.MetadataIndex, parts.StorageMeta, parts.TensorStorageMetadata, parts.BytesStorageMetadata,
    parts.ChunkStorageMetadata, parts.TensorProperties, parts._MEM_FORMAT_ENCODING, _StorageInfo, torch.Size,
)  # fmt: skip
_NAMES = {(kind.__module__, kind.__name__) for kind in _CLASSES} | {
    ("pathlib", "PosixPath"), ("pathlib", "WindowsPath"), ("torch.serialization", "_get_layout"),
}  # fmt: skip


Sums = dict[str, tuple[int, str]]
"""Size and SHA-256 of files, by name."""


def sums_of(folder: Path, rank: int) -> Sums:
    """Of the files that this rank has written, which are then on the disk."""
    own = [*folder.glob(f"__{rank}_*")] + ([folder / METADATA, folder / REST] if rank == 0 else [])
    found = {}
    for path in own:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        found[path.name] = path.stat().st_size, file_sha256(path)
    return found


def seal_folder(part: Path, path: Path, sums: Sums) -> None:
    """Give a checkpoint that was written aside its checksums and its name; what `path` held is `previous_of(path)`.

    A folder cannot be put in the place of another at once: for a moment only the previous one is there.
    """
    with open(part / SEAL, "w") as file:
        json.dump(sums, file, indent=0)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(part)
    if path.exists() and folder_damage(path, quick=True) is None:
        remove(previous_of(path))
        path.rename(previous_of(path))
    remove(path)
    part.rename(path)
    sync_folder(path.parent)


def remove(path: Path) -> None:
    """A file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def folder_damage(folder: Path, quick: bool = False, rank: int = 0, ranks: int = 1) -> str | None:
    """What is wrong with a sharded checkpoint; None if nothing is known to be. Without checksums its parts are enough.

    Args:
        quick: of the shards, compare the sizes only.
        rank: of `ranks` that share the work, each with some of the files.
    """
    if not folder.is_dir():
        return "no such folder"
    missing = [name for name in (METADATA, REST) if not (folder / name).is_file()]
    if missing:
        return f"it has no {missing[0]}"
    if not (folder / SEAL).is_file():
        return None
    try:
        sums = json.loads((folder / SEAL).read_bytes())
        pairs = sorted((str(name), int(size), str(digest)) for name, (size, digest) in sums.items())
    except (ValueError, TypeError, AttributeError):
        return f"its {SEAL} is damaged"
    for name, size, digest in pairs[rank::ranks]:
        path = folder / Path(name).name
        if not path.is_file() or path.stat().st_size != size:
            return f"its {name} is cut short"
        if not (quick and name.startswith("__")) and file_sha256(path) != digest:
            return f"the checksum of its {name} is wrong"
    return None


class _PlainUnpickler(pickle.Unpickler):
    """Knows the classes of such a file alone, none of which does anything when it is made."""

    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if dtype or (module, name) in _NAMES:
            return super().find_class(module, name)
        raise ValueError(f"it names {module}.{name}")


def read_sharded(folder: Path) -> dict[str, Any]:
    """The contents of a sharded checkpoint without the optimiser's state, in one process, on the CPU.

    Raises:
        V2FlowError: see `check_sharded_checkpoint`; or a checksum does not fit.
    """
    check_sharded_checkpoint(folder)
    reason = folder_damage(folder)
    if reason is not None:
        raise V2FlowError(f"{folder}: not a readable sharded checkpoint ({reason}); is it damaged?")
    prefix = "state_dict."
    state = {
        name: torch.empty(kind.size, dtype=kind.properties.dtype)
        for name, kind in FileSystemReader(folder).read_metadata().state_dict_metadata.items()
        if name.startswith(prefix) and isinstance(kind, parts.TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "torch.distributed is", UserWarning
        )  # one process is what is asked for
        torch.distributed.checkpoint.load(state, checkpoint_id=folder, no_dist=True)
    rest = torch.load(folder / REST, map_location="cpu", weights_only=True)
    return rest | {"state_dict": {name.removeprefix(prefix): tensor for name, tensor in state.items()}}


def check_sharded_checkpoint(folder: Path) -> None:
    """Refuses a folder whose loading would run what it says; reads no tensor.

    Raises:
        V2FlowError: no sharded checkpoint, a damaged one, or one that holds other things than tensors and plain types.
    """
    if not (folder / METADATA).is_file() or not (folder / REST).is_file():
        raise V2FlowError(
            f"option --ckpt_path: expected a .ckpt file or a sharded checkpoint's folder, found {folder} without "
            f"{METADATA} and {REST}; start from an exported folder with --init-from"
        )
    try:
        _check_pickles(folder)
    except Exception as error:  # a pickle may raise anything
        reason = first_line(error)
        raise V2FlowError(
            f"{folder}: not a readable sharded checkpoint ({reason}); is it damaged or foreign?"
        ) from error


def _check_pickles(folder: Path) -> None:
    # PyTorch turns to these when it cannot read the other one.
    if any(folder.glob(f"__*{METADATA}")):
        raise ValueError(f"beside {METADATA}, ranks have files of their own")
    with open(folder / METADATA, "rb") as file:
        metadata = _PlainUnpickler(file).load()
    for index, place in metadata.storage_data.items():
        if type(metadata.state_dict_metadata.get(index.fqn)) is parts.TensorStorageMetadata:
            continue  # PyTorch reads these with weights_only
        if Path(place.relative_path).name != place.relative_path or place.transform_descriptors:
            raise ValueError(f"{index.fqn} is not in a plain file of it")
        if not 0 <= place.length <= _LARGEST:
            raise ValueError(f"{index.fqn} has {place.length} bytes")
        with open(folder / place.relative_path, "rb") as file:
            file.seek(place.offset)
            torch.load(io.BytesIO(file.read(place.length)), map_location="cpu", weights_only=True)
