"""Shards of visual token ids: the pictures of captioned shards, encoded once for the training of stage 2.

Samples are KEY.txt, the caption, and KEY.json: what the pictures' own json says (such as a scene) and `ids`. Training
pictures may be there in several views, KEY-1, KEY-2 and so on (`v2flow.data.views`). The manifest names the tokenizer.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from v2flow.data.batches import EvaluationBatches, Reader, SampleReader
from v2flow.data.loaders import EvaluationLoader
from v2flow.data.manifest import FIELDS
from v2flow.data.shard_names import Shards, folder_of
from v2flow.data.shards import ShardSet, folder_manifest, open_shards
from v2flow.data.views import check_views, view_of
from v2flow.data.writer import SPLITS, Sample, finished_build, write_shards
from v2flow.devices import pick_device
from v2flow.errors import V2FlowError
from v2flow.fingerprint import tokenizer_sha256

_JSON = FIELDS.index("json")


@dataclass(frozen=True)
class TokenSource:
    """The tokenizer that token shards belong to.

    Attributes:
        tokenizer_sha256: see `v2flow.fingerprint.tokenizer_sha256`.
        codebook_size: ids are in [0, codebook_size).
        num_tokens: ids a picture.
    """

    tokenizer_sha256: str
    codebook_size: int
    num_tokens: int


def source_of(tokenizer: Any) -> TokenSource:
    """What shards of this tokenizer's ids say of it."""
    return TokenSource(tokenizer_sha256(tokenizer), tokenizer.codebook_size, tokenizer.num_tokens)


class TokenReader(Reader):
    """Reads the ids of token shards; captions are required."""

    def __init__(self, shards: ShardSet) -> None:
        super().__init__(shards, captions=True)

    def content(self, sample: int, place: float = 0.5) -> np.ndarray:
        """Ids, int64 [N].

        Raises:
            V2FlowError: the sample has none.
        """
        text = self.shards.read(sample, _JSON)
        try:
            ids = np.asarray(json.loads(text or b"{}")["ids"])
            if ids.ndim != 1 or ids.dtype.kind != "i" or not len(ids):
                raise ValueError(f"{ids.dtype} {ids.shape}")
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise V2FlowError(
                f"{self.shards.where(sample)}: expected a member json with a list of integers 'ids', found none "
                f"({error}); build token shards with `v2flow data tokens`"
            ) from error
        return ids.astype(np.int64)

    def blank(self) -> np.ndarray:
        """A sample without ids is not padded but an error."""
        raise NotImplementedError("a sample without ids is an error")

    def stack(self, contents: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
        """{"ids": int64 [B, N]}.

        Raises:
            V2FlowError: samples with different numbers of ids.
        """
        counts = sorted({len(ids) for ids in contents})
        if len(counts) > 1:
            raise V2FlowError(
                f"token shards: expected the same number of ids in every sample, found {counts[0]} and {counts[-1]}; "
                "do not mix shards of different tokenizers"
            )
        return {"ids": torch.from_numpy(np.stack(contents))}


def check_source(shards: ShardSet, expected: TokenSource) -> None:
    """Refuse token shards of another tokenizer, as far as their manifests say; shards without one pass.

    Raises:
        V2FlowError: what differs.
    """
    for folder in sorted({folder_of(shard.name) for shard in shards.shards if "pipe:" not in shard.name}):
        build, _ = folder_manifest(folder)
        if not build:
            continue
        if build.get("kind") != "tokens":
            raise V2FlowError(
                f"{folder}: expected shards of token ids, found {build.get('kind')!r}; build them with "
                "`v2flow data tokens`"
            )
        for name, what in _NAMES.items():
            found, wanted = (str(value)[:12] for value in (build.get(name), getattr(expected, name)))
            if found != wanted:
                raise V2FlowError(
                    f"{folder}: {what} {found} in the shards and {wanted} in the tokenizer checkpoint; name the "
                    "tokenizer that encoded them, or encode the pictures again with `v2flow data tokens`"
                )


_NAMES = {
    "codebook_size": "the codebook size K is",
    "num_tokens": "the number of tokens a picture N is",
    "tokenizer_sha256": "ids of another tokenizer: its SHA-256 is",
}


def build_tokens(
    checkpoint: str,
    shards: Shards,
    out: str | Path,
    batch_size: int = 64,
    num_workers: int = 0,
    allow_pipe: bool = False,
    views: int = 1,
    progress: bool = True,
) -> dict[str, int]:
    """Builds `train-*.tar`, `val-*.tar`, `test-*.tar` of token ids into `out`, unless they are there.

    Args:
        checkpoint: a V2Flow tokenizer: a .ckpt file, whose averaged weights are taken, or an exported folder.
        shards: captioned pictures; the names of their files begin with their split: `train-`, `val-` or `test-`.
        out: folder of the token shards.
        batch_size: pictures at a time; the ids do not depend on it.
        num_workers: processes that decode pictures.
        allow_pipe: accept shards `pipe:COMMAND`.
        views: of each training picture, see `v2flow.data.views`; what its json says of places holds for the first.
        progress: show a progress bar.

    Returns:
        Samples by split.

    Raises:
        V2FlowError: not a V2Flow tokenizer, a shard of no known split, a sample without caption or picture, or `out`
            holds shards of other settings.
    """
    from v2flow.tokenizer import V2FlowTokenizer
    from v2flow.training.checkpoint import load_model

    tokenizer, info = load_model(checkpoint)
    if not isinstance(tokenizer, V2FlowTokenizer):
        raise V2FlowError(
            f"{checkpoint}: expected a V2FlowTokenizer, found a {info['model']}, whose tokens lie in no LLM's space"
        )
    check_views(views, tokenizer.config.image_size)
    opened = open_shards(shards, allow_pipe)
    build = {"kind": "tokens", **asdict(source_of(tokenizer)), "pictures_sha256": pictures_sha256(opened)}
    if views > 1:
        build["views"] = views
    splits = [_split_of(shard.name) for shard in opened.shards]
    finished = finished_build(Path(out), build)
    if finished is not None:
        return finished
    _check_view_keys(opened, splits, views)
    tokenizer = tokenizer.to(pick_device())
    reader = SampleReader(opened, tokenizer.config.image_size, captions=True)
    loader = EvaluationLoader(EvaluationBatches(reader, len(opened)), batch_size, num_workers)
    return write_shards(Path(out), _samples(tokenizer, opened, splits, loader, views, progress), build)


def _view_key(key: str, view: int) -> str:
    return f"{key}-{view}" if view else key


def _check_view_keys(shards: ShardSet, splits: Sequence[str], views: int) -> None:
    """Refuses pictures whose own keys are those that views of others get."""
    if views == 1:
        return
    keys = [[shard.index.key(row) for row in range(len(shard.index))] for shard in shards.shards]
    taken = {key for own in keys for key in own}
    for shard, own, split in zip(shards.shards, keys, splits, strict=True):
        for key in own if split == "train" else ():
            for name in (_view_key(key, view) for view in range(1, views)):
                if name in taken:
                    raise V2FlowError(
                        f"{shard.name}, sample {key!r}: option --views: a view of it would have the key of another "
                        f"picture, {name!r}; rename that picture and build its shards again, or leave the option out"
                    )


def _samples(
    tokenizer: Any,
    shards: ShardSet,
    splits: Sequence[str],
    loader: EvaluationLoader,
    views: int,
    progress: bool,
) -> Iterator[Sample]:
    first = 0
    with tqdm(
        desc="encode", total=len(shards), unit="picture", disable=not progress, delay=2.0, leave=False
    ) as bar:
        for batch in loader:
            count = int(batch["valid"].sum())  # padding is at the end; no other sample is invalid
            places = [splits[shards.locate(first + row)[0]] for row in range(count)]
            for view in range(views):
                rows = [row for row, split in enumerate(places) if view == 0 or split == "train"]
                for row, ids in zip(rows, _encode(tokenizer, batch, rows, view), strict=True):
                    where = shards.where(first + row)
                    members = {
                        "txt": batch["caption"][row].encode(),
                        "json": _with_ids(shards.read(first + row, _JSON), ids, where),
                    }
                    yield Sample(places[row], _view_key(batch["key"][row], view), members)
            first += count
            bar.update(count)


def _encode(tokenizer: Any, batch: dict[str, Any], rows: list[int], view: int) -> list[list[int]]:
    """Ids of a view of some pictures of a batch."""
    if not rows:
        return []
    pictures = torch.stack(
        [view_of(batch["image"][row], batch["caption"][row], batch["key"][row], view) for row in rows]
    )
    ids: list[list[int]] = tokenizer.encode(pictures.to(tokenizer.visual_vocabulary.codes.device)).tolist()
    return ids


def _with_ids(text: bytes | None, ids: list[int], where: str) -> bytes:
    try:
        facts = json.loads(text) if text is not None else {}
        return json.dumps({**facts, "ids": ids}, separators=(",", ":")).encode()
    except (ValueError, TypeError, RecursionError) as error:
        raise V2FlowError(f"{where}: expected a member json with an object, found something else") from error


def _split_of(name: str) -> str:
    split = Path(name).name.partition("-")[0]
    if split not in SPLITS:
        raise V2FlowError(
            f"{name}: expected a shard named {', '.join(f'{s}-*' for s in SPLITS)}, found none of them; rename it"
        )
    return split


def pictures_sha256(shards: ShardSet) -> str:
    """Name of the pictures that something is built from: the shards' names, sizes, keys and places of members."""
    digest = hashlib.sha256()
    for shard in shards.shards:
        digest.update(f"{Path(shard.name).name} {shard.index.size}\n".encode())
        digest.update(shard.index.keys.tobytes() + shard.index.members.tobytes())
    return digest.hexdigest()
