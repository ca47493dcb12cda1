"""Builds shards of codec latents: in parallel, and from where an interrupted build stopped."""

import os
import re
import shutil
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from contextlib import ExitStack, suppress
from dataclasses import astuple, dataclass
from functools import lru_cache
from multiprocessing import get_context, parent_process
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from v2flow.codec import ImageCodec, build_codec
from v2flow.config import CodecConfig
from v2flow.data.batches import EvaluationBatches, SampleReader
from v2flow.data.latents import DTYPES, MEMBER, PLACE, LatentFormat, source_of
from v2flow.data.loaders import EvaluationLoader
from v2flow.data.manifest import FIELDS, MANIFEST, ShardIndex, index_tar, read_manifest, write_manifest
from v2flow.data.shard_names import Shards
from v2flow.data.shards import Shard, ShardSet, open_shards
from v2flow.data.tokens import pictures_sha256
from v2flow.data.writer import STAGING, Sample, count_by_split, finished_build, write_shards
from v2flow.devices import pick_device
from v2flow.errors import V2FlowError

_KEPT = ("txt", "json", "cls")
_SPLIT_WORDS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


@dataclass(frozen=True)
class _Job:
    """A shard of pictures to encode, and the shard of latents that it becomes."""

    shard: Shard
    path: Path
    config: CodecConfig
    form: LatentFormat
    batch_size: int
    device: str
    threads: int


def build_latents(
    config: CodecConfig,
    image_size: int,
    shards: Shards,
    out: str | Path,
    dtype: str = "fp16",
    flip: bool = True,
    batch_size: int = 32,
    workers: int = 1,
    device: str | None = None,
    allow_pipe: bool = False,
    progress: bool = True,
) -> dict[str, int] | None:
    """Builds `train-*.tar`, `val-*.tar`, `test-*.tar` of latents into `out`, as far as they are not there.

    Under `srun` the shards are shared out over the tasks; whichever finishes last writes the manifest. What an
    interrupted call has finished is kept, and a shard is only ever there as a whole.

    Args:
        config: the codec.
        image_size: side of the pictures in pixels; they are resized and cropped at the centre.
        shards: pictures; their file names have the word train, val, validation or test in them.
        out: folder of the latents.
        dtype: fp16, bf16 or fp32.
        flip: also store latents of the mirror images.
        batch_size: pictures at a time.
        workers: processes of this task.
        device: where the codec runs; by default over the CUDA devices of this machine, else the CPU.
        allow_pipe: accept shards `pipe:COMMAND`.
        progress: show a progress bar.

    Returns:
        Samples by split, or None while other tasks have shards to finish.

    Raises:
        V2FlowError: a bad option, a shard of no known split, a picture that cannot be decoded, two samples of one
            key, or `out` holds shards of other settings.
    """
    out = Path(out)
    _check_options(config, dtype, batch_size, workers)
    rank, ranks = slurm_rank()
    codec = _codec(astuple(config), _device(device, 0, workers))
    name = config.kind if config.path is None else config.path.rstrip("/").rpartition("/")[2]
    form = LatentFormat(name, source_of(config, codec, image_size), dtype, flip)
    opened = open_shards(shards, allow_pipe)
    build = {"kind": "latents", **form.facts(), "pictures_sha256": pictures_sha256(opened)}
    paths = [out / name for name in _names(opened)]
    _reopen(out, build)
    finished = finished_build(out, build)
    if finished is not None:
        return finished
    _begin(out, build)
    own = list(zip(opened.shards, paths, strict=True))[rank::ranks]
    todo = [(shard, path) for shard, path in own if not path.is_file()]
    workers = max(1, min(workers, len(todo)))
    jobs = [
        _Job(shard, path, config, form, batch_size, _device(device, number % workers, workers),
             max(1, torch.get_num_threads() // workers))
        for number, (shard, path) in enumerate(todo)
    ]  # fmt: skip
    _encode_all(jobs, workers, progress)
    return _seal(out, paths, build) if all(path.is_file() for path in paths) else None


def slurm_rank() -> tuple[int, int]:
    """(number of this task, number of tasks) of `srun`; (0, 1) elsewhere.

    Raises:
        V2FlowError: the variables make no sense.
    """
    names = ("SLURM_PROCID", "SLURM_NTASKS")
    found = [os.environ.get(name, default) for name, default in zip(names, ("0", "1"), strict=True)]
    rank, ranks = (int(text) if text.isdecimal() else -1 for text in found)
    if not 0 <= rank < ranks:
        raise V2FlowError(
            f"variables {' and '.join(names)}: expected 0 <= task < tasks, found {' and '.join(found)}"
        )
    return rank, ranks


def _check_options(config: CodecConfig, dtype: str, batch_size: int, workers: int) -> None:
    kinds = get_args(CodecConfig.__dataclass_fields__["kind"].type)
    for option, holds, expected, found in (
        ("codec", config.kind in kinds, f"one of {', '.join(kinds)}", config.kind),
        ("dtype", dtype in DTYPES, f"one of {', '.join(DTYPES)}", dtype),
        ("batch_size", batch_size >= 1, "at least 1", batch_size),
        ("workers", workers >= 1, "at least 1", workers),
    ):
        if not holds:
            raise V2FlowError(f"option {option}: expected {expected}, found {found!r}")


def _device(device: str | None, worker: int, workers: int) -> str:
    if device is None and torch.cuda.is_available():
        place = int(os.environ.get("SLURM_LOCALID", "0")) * workers + worker
        return f"cuda:{place % torch.cuda.device_count()}"
    try:
        return str(torch.empty(0, device=pick_device(device)).device)
    except (RuntimeError, AssertionError) as error:
        raise V2FlowError(
            f"option device: expected one of this machine's, e.g. cpu or cuda:1, found {device!r}"
        ) from error


def _names(shards: ShardSet) -> list[str]:
    """File names of the shards of latents: `SPLIT-NNNNNN.tar`, numbered through each split."""
    keys = np.concatenate([shard.index.keys for shard in shards.shards])
    unique, counts = np.unique(keys, return_counts=True)
    if len(unique) < len(keys):
        raise V2FlowError(
            f"shards: two samples of the key {unique[counts > 1][0].decode()!r}; keys must be unique in the folder "
            "of the latents: build those of each folder of pictures by itself"
        )
    splits = [split_of(shard.name) for shard in shards.shards]
    return [f"{split}-{splits[:number].count(split):06d}.tar" for number, split in enumerate(splits)]


def split_of(name: str) -> str:
    """The split that a shard's file name says: `imagenet1k-validation-07.tar` is of `val`.

    Raises:
        V2FlowError: none, or two.
    """
    words = re.split("[^a-z]+", Path(name).name.lower())
    found = {_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS}
    if len(found) != 1:
        raise V2FlowError(
            f"{name}: expected a shard with one of the words {', '.join(_SPLIT_WORDS)} in its file name; rename it"
        )
    return found.pop()


def _reopen(out: Path, build: Mapping[str, Any]) -> None:
    """Makes a finished build whose shards are lost or damaged an unfinished one of those that are whole."""
    manifest = out / MANIFEST
    if not manifest.is_file():
        return
    found, indexes = read_manifest(manifest.read_text(errors="replace"), str(manifest))
    bad = [
        path for path, index in ((out / name, index) for name, index in indexes.items())
        if not path.is_file() or path.stat().st_size != index.size
    ]  # fmt: skip
    if bad and found == dict(build):
        (out / STAGING).mkdir(exist_ok=True)
        _write_manifest(out / STAGING, out / STAGING, {}, build)
        for path in bad:
            path.unlink(missing_ok=True)
        manifest.unlink(missing_ok=True)


def _begin(out: Path, build: Mapping[str, Any]) -> None:
    """Opens the staging folder, whose manifest says what the finished shards beside it are part of.

    Raises:
        V2FlowError: an unfinished build of other settings is in the way.
    """
    staging = out / STAGING
    begun = staging / MANIFEST
    strange = any(out.glob("*.tar"))  # looked for first: another task's shards come after its manifest
    if begun.is_file():
        found, _ = read_manifest(begun.read_text(errors="replace"), str(begun))
        changed = sorted(k for k in found.keys() | build.keys() if found.get(k) != build.get(k))
    else:
        changed = ["kind"] if strange else []
    if changed:
        raise V2FlowError(
            f"{out}: holds unfinished shards of other settings ({', '.join(changed)}); choose another folder or "
            "remove this one"
        )
    staging.mkdir(parents=True, exist_ok=True)
    _write_manifest(staging, staging, {}, build)


def _write_manifest(
    folder: Path, staging: Path, indexes: Mapping[str, ShardIndex], build: Mapping[str, Any]
) -> None:
    """Through a folder of its own: tasks on other machines may have the same process number."""
    with TemporaryDirectory(dir=staging, ignore_cleanup_errors=True) as own:
        write_manifest(Path(own), indexes, build)
        os.replace(Path(own) / MANIFEST, folder / MANIFEST)


def _seal(out: Path, paths: Sequence[Path], build: Mapping[str, Any]) -> dict[str, int]:
    indexes = {path.name: _index(path) for path in paths}
    with suppress(FileNotFoundError):  # a task that finished at the same moment has done it
        _write_manifest(out, out / STAGING, indexes, build)
    shutil.rmtree(out / STAGING, ignore_errors=True)
    return count_by_split(indexes)


def _index(path: Path) -> ShardIndex:
    index = index_tar(path)
    with tarfile.open(path, "r:") as archive:
        index.members[:, PLACE] = [(m.offset_data, m.size) for m in archive if m.name.endswith(f".{MEMBER}")]
    return index


def _encode_all(jobs: Sequence[_Job], workers: int, progress: bool) -> None:
    """Each worker is a process with a codec of its own; after a failure no further shard is begun."""
    bar = tqdm(desc="encode", total=len(jobs), unit="shard", disable=not progress, delay=2.0, leave=False)
    if workers == 1:
        for job in jobs:
            _encode_shard(job)
            bar.update()
        return
    with ExitStack() as stack:
        # One pool a worker: its jobs are those of its device.
        pools = [stack.enter_context(ProcessPoolExecutor(1, get_context("spawn"))) for _ in range(workers)]
        try:
            futures = [pools[number % workers].submit(_encode_shard, job) for number, job in enumerate(jobs)]
            for future in as_completed(futures):
                future.result()
                bar.update()
        except BaseException as error:
            for pool in pools:
                pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(error, BrokenExecutor):
                raise V2FlowError(
                    "a worker process was killed, maybe for lack of memory; call again with fewer workers or a "
                    "smaller batch_size: finished shards are kept"
                ) from error
            raise


@lru_cache(1)
def _codec(config: tuple[Any, ...], device: str) -> ImageCodec:
    return build_codec(CodecConfig(*config)).to(device)


def _encode_shard(job: _Job) -> None:
    if parent_process() is not None:
        torch.set_num_threads(job.threads)
    codec = _codec(astuple(job.config), job.device)
    with TemporaryDirectory(dir=job.path.parent / STAGING, ignore_cleanup_errors=True) as own:
        write_shards(Path(own), _samples(codec, job), {}, samples_per_shard=len(job.shard.index))
        os.replace(next(Path(own).glob("*.tar")), job.path)


def _samples(codec: ImageCodec, job: _Job) -> Iterator[Sample]:
    shards = ShardSet([job.shard])
    reader = SampleReader(shards, job.form.source.image_size)
    split = job.path.name.partition("-")[0]
    sample = 0
    for batch in EvaluationLoader(EvaluationBatches(reader, len(shards)), job.batch_size):
        latents = _encode(codec, batch["image"].to(job.device), job.form.flip)
        for row in latents[: int(batch["valid"].sum())]:  # padding is at the end; no other sample is invalid
            kept = {name: shards.read(sample, FIELDS.index(name)) for name in _KEPT}
            members = {name: data for name, data in kept.items() if data is not None}
            try:
                members[MEMBER] = job.form.pack(row)
            except V2FlowError as error:
                raise V2FlowError(f"{shards.where(sample)}: {error}") from error
            yield Sample(split, shards.key(sample), members)
            sample += 1


@torch.no_grad()
def _encode(codec: ImageCodec, images: Tensor, flip: bool) -> Tensor:
    """Pictures `[B, 3, S, S]` to latents `[B, M, C, h, w]` on the CPU."""
    from v2flow.tokenizer import inference

    views = [images, images.flip(-1)] if flip else [images]
    with inference(codec), torch.autocast(images.device.type, enabled=False):
        return torch.stack([codec.encode(view) for view in views], dim=1).cpu()
