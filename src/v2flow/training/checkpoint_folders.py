"""Sharded checkpoints, which are folders: looked through before PyTorch unpickles them.

`torch.distributed.checkpoint` writes ``.metadata``, a pickle of where each tensor lies, and pickles what is no tensor
into the shards (``*.distcp``). It loads both as pickles, whatever they say; Lightning's ``meta.pt`` holds the rest.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as parts
from torch.distributed.checkpoint.filesystem import _StorageInfo

from v2flow.errors import V2FlowError, first_line

METADATA, REST = ".metadata", "meta.pt"
_LARGEST = 1 << 24
"""Bytes of one value that is no tensor: options of an optimiser have hundreds."""
_CLASSES = (
    parts.Metadata, parts.MetadataIndex, parts.StorageMeta, parts.TensorStorageMetadata, parts.BytesStorageMetadata,
    parts.ChunkStorageMetadata, parts.TensorProperties, parts._MEM_FORMAT_ENCODING, _StorageInfo, torch.Size,
)  # fmt: skip
_NAMES = {(kind.__module__, kind.__name__) for kind in _CLASSES} | {
    ("pathlib", "PosixPath"), ("pathlib", "WindowsPath"), ("torch.serialization", "_get_layout"),
}  # fmt: skip


class _PlainUnpickler(pickle.Unpickler):
    """Knows the classes of such a file alone, none of which does anything when it is made."""

    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if dtype or (module, name) in _NAMES:
            return super().find_class(module, name)
        raise ValueError(f"it names {module}.{name}")


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
