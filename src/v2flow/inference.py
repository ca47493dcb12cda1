"""A trained model on single picture files: what `v2flow encode`, `decode`, `reconstruct` and `export` share."""

import os
import shutil
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from v2flow.cli_report import evaluation_table
from v2flow.data.decode import square_crop
from v2flow.decode_modes import presets_of, select_modes
from v2flow.devices import pick_device
from v2flow.errors import V2FlowError
from v2flow.evaluate import FOLDER_MODES
from v2flow.images import read_picture
from v2flow.metrics.files import write_atomically
from v2flow.metrics.reconstruction import psnr_per_image
from v2flow.model_card import add_training
from v2flow.training.checkpoint import load_model, read_checkpoint
from v2flow.training.checkpoint_files import is_sharded
from v2flow.training.module import seeded_generator


class LoadedModel:
    """A model of a checkpoint or exported folder, used one picture at a time: no result depends on its neighbours.

    Raises:
        V2FlowError: an unusable checkpoint.
    """

    def __init__(self, checkpoint: str, weights: Literal["ema", "raw"] = "ema") -> None:
        model, info = load_model(checkpoint, weights)
        self.device = pick_device()
        self.model: Any = model.to(self.device)
        self.name: str = info["model"]
        self.modes: dict[str, dict[str, Any]] = info["decode_modes"] or FOLDER_MODES

    def picture(self, path: str | Path) -> Tensor:
        """The picture file as fp32 `[3, S, S]` in [0, 1], resized and centre-cropped as in training.

        Raises:
            V2FlowError: missing, or no picture that can be decoded.
        """
        pixels = square_crop(read_picture(path), self.model.config.image_size)
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255

    def encode(self, picture: Tensor) -> Tensor:
        """Ids `[N]` of a picture `[3, S, S]`."""
        return self.model.encode(picture[None].to(self.device))[0].cpu()

    def decode_options(self, mode: str | None, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """Options of `decode`: those chosen, else those of the mode or preset `mode`, else those of the model's first
        mode.

        Raises:
            V2FlowError: an unknown mode, or options for a model whose decoder has none.
        """
        if chosen and self.name != "V2FlowTokenizer":
            raise V2FlowError(
                f"option --{next(iter(chosen))}: {self.name} decodes in one way only; leave it out"
            )
        if chosen:
            return dict(chosen)
        wanted = [mode] if mode is not None else None
        return next(iter(select_modes(wanted, self.modes, presets_of(self.model)).values()))

    def decode(self, ids: Tensor, options: Mapping[str, Any], key: Sequence[int]) -> Tensor:
        """The picture `[3, S, S]` of ids `[N]`; the integers `key` seed its noise."""
        arguments = dict(options)
        if self.name == "V2FlowTokenizer":
            arguments["generator"] = seeded_generator(torch.device("cpu"), *key)
        return self.model.decode(ids[None].to(self.device), **arguments)[0].cpu()


def named_pictures(paths: Sequence[str]) -> dict[str, Path]:
    """File name -> path, in the order given.

    Raises:
        V2FlowError: two files whose results would have one name.
    """
    found: dict[str, Path] = {}
    stems: dict[str, Path] = {}
    for path in map(Path, paths):
        if path.stem in stems:
            raise V2FlowError(
                f"{path}: its result would be named like that of {stems[path.stem]}; rename one"
            )
        found[path.name] = stems[path.stem] = path
    return found


def write_ids(path: Path, ids: Mapping[str, Tensor]) -> None:
    """Writes name -> ids `[N]` as an .npz file, atomically."""

    def write(file: Any) -> None:
        # numpy.savez takes names as keyword arguments, so it has no way to store one called "file".
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for name, row in ids.items():
                with archive.open(f"{name}.npy", "w") as member:
                    np.lib.format.write_array(member, row.numpy(), allow_pickle=False)

    write_atomically(path, write)


def read_ids(path: Path) -> dict[str, Tensor]:
    """What `write_ids` wrote.

    Raises:
        V2FlowError: not an .npz file, empty, not integer vectors, or a name that is a path.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            arrays = {
                info.filename.removesuffix(".npy"): _array(archive, info) for info in archive.infolist()
            }
    except FileNotFoundError as error:
        raise V2FlowError(f"{path}: no such file; expected one made by `v2flow encode`") from error
    except _UNREADABLE as error:
        raise V2FlowError(
            f"{path}: expected an .npz file made by `v2flow encode`, found something else"
        ) from error
    if not arrays:
        raise V2FlowError(f"{path}: expected at least one array of ids, found none")
    for name, array in arrays.items():
        if Path(name).name != name:
            raise V2FlowError(f"{path}: entry {name!r}: expected a plain file name, found a path")
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise V2FlowError(
                f"{path}: entry {name!r}: expected integers of shape [N], found {array.dtype} {array.shape}"
            )
    return {name: torch.from_numpy(array.astype(np.int64)) for name, array in arrays.items()}


# What zipfile and numpy raise on a damaged archive.
_UNREADABLE = (
    OSError, ValueError, EOFError, TypeError, LookupError, AttributeError, ArithmeticError, MemoryError, RuntimeError,
    SyntaxError, struct.error, zlib.error, zipfile.BadZipFile,
)  # fmt: skip
MAX_ROW = 1 << 24
"""Bytes of one picture's ids: a few kilobytes of an archive can unfold to gigabytes."""


def _array(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    if info.file_size > MAX_ROW or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{info.filename}: too large, or not packed as numpy does")
    with archive.open(info) as member:
        array: np.ndarray = np.lib.format.read_array(member, allow_pickle=False)
    return array


def picture_psnr(original: Tensor, result: Tensor) -> float:
    """PSNR in dB of one picture `[3, H, W]` in [0, 1] on 8-bit values, as in every report."""
    return psnr_per_image(original[None], result[None]).item()


def load_text_to_image_model(checkpoint: str) -> Any:
    """The text-to-image model of a .ckpt file, an exported folder or a hub id, in evaluation mode on the CPU.

    Raises:
        V2FlowError: none of these, or the extra `t2i` is not installed.
    """
    from v2flow import V2FlowForTextToImage  # first: it says what is missing without the extra

    if not Path(checkpoint).is_file() and not is_sharded(checkpoint):
        return V2FlowForTextToImage.from_pretrained(checkpoint)
    from v2flow.t2i.checkpoint import load_text_to_image

    return load_text_to_image(checkpoint)


def is_text_to_image(checkpoint: str) -> bool:
    """Whether a .ckpt file or a folder holds a text-to-image model."""
    path = Path(checkpoint)
    if not path.is_file() and not is_sharded(path):
        return (path / "v2flow.json").is_file()
    return bool(read_checkpoint(path, mmap=True)["v2flow"].get("model") == "V2FlowForTextToImage")


def export_model(checkpoint: str, weights: Literal["ema", "raw"], folder: Path) -> None:
    """Writes the model of a checkpoint as a folder for `from_pretrained` of `V2FlowTokenizer` or, with its LLM, of
    `V2FlowForTextToImage`; all of it or nothing.

    Raises:
        V2FlowError: a folder that holds something, or a model without an exported form.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise V2FlowError(f"{folder}: expected a new or empty folder, found files; name another one")
    model: Any
    table: Callable[[Mapping[str, Any]], str] = evaluation_table
    if is_text_to_image(checkpoint):
        from v2flow.t2i.metrics.table import text_to_image_table

        table = text_to_image_table
        if weights != "ema":
            raise V2FlowError(
                f"option --weights: {checkpoint} is a text-to-image model and has one set of weights; leave it out"
            )
        model = load_text_to_image_model(checkpoint)
    else:
        model, info = load_model(checkpoint, weights)
        if not hasattr(model, "save_pretrained"):
            raise V2FlowError(
                f"{checkpoint}: expected a V2FlowTokenizer, found a {info['model']}, which has no exported form"
            )
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        model.save_pretrained(temporary)
        add_training(temporary / "README.md", Path(checkpoint), table)
        temporary.chmod(0o755)
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
