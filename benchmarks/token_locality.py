"""How far a visual token says what its own patch shows: are the ids of equal patches equal?

    python benchmarks/token_locality.py checkpoints/tokenizers/shapes-32 --data data/shapes/test-000000.tar

The pictures are cut into the patches of the token grid. `entropy` is that of a token's id, in nats; `given_patch` that
of the ids which equal patches get, over all tokens whose patch occurs twice or more: 0 where a token depends on nothing
but its patch, and what an LLM cannot know from the picture's content alone. The last line is one JSON document.
"""

import argparse
import json
from collections import Counter, defaultdict
from typing import Any

import torch
from scipy.stats import entropy
from torch import Tensor

from v2flow.evaluate import describe_shards, evaluation_loader
from v2flow.fingerprint import tokenizer_sha256
from v2flow.images import to_uint8
from v2flow.training.checkpoint import load_tokenizer


def patches(pictures: Tensor, grid: tuple[int, int]) -> list[bytes]:
    """Pixels of each cell of the token grid, picture by picture and row by row; pictures uint8 `[B, 3, S, S]`."""
    rows, columns = grid
    high, wide = pictures.shape[-2] // rows, pictures.shape[-1] // columns
    cells = pictures.unfold(2, high, high).unfold(3, wide, wide).permute(0, 2, 3, 1, 4, 5)
    return [cell.tobytes() for cell in cells.reshape(-1, 3 * high * wide).numpy()]


def locality(ids: list[int], cells: list[bytes]) -> dict[str, Any]:
    """Figures of tokens and their patches, in the same order; see the top of the file."""
    by_patch: defaultdict[bytes, Counter[int]] = defaultdict(Counter)
    for token, cell in zip(ids, cells, strict=True):
        by_patch[cell][token] += 1
    repeated = [counts for counts in by_patch.values() if counts.total() > 1]
    tokens = sum(counts.total() for counts in repeated)
    return {
        "tokens": len(ids), "patches": len(by_patch), "repeated_tokens": tokens,
        "ids": len(set(ids)), "entropy": float(entropy(list(Counter(ids).values()))),
        "given_patch": float(sum(c.total() * entropy(list(c.values())) for c in repeated)) / max(tokens, 1),
        "most_frequent_id": sum(max(counts.values()) for counts in repeated) / max(tokens, 1),
    }  # fmt: skip


def measure(checkpoint: str, data: list[str], count: int) -> dict[str, Any]:
    """Figures of a tokenizer on the first pictures."""
    model = load_tokenizer(checkpoint)
    config = model.config
    ids: list[int] = []
    cells: list[bytes] = []
    for batch in evaluation_loader(data, config.image_size, 64, count):
        images = batch["image"][batch["valid"]]
        ids += model.encode(images).flatten().tolist()
        cells += patches(to_uint8(images), config.resampler.token_grid)
    resampler = {"depth": config.resampler.depth, "token_grid": list(config.resampler.token_grid)}
    return {
        "checkpoint": checkpoint, "tokenizer_sha256": tokenizer_sha256(model), "resampler": resampler,
        **locality(ids, cells),
    }  # fmt: skip


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", nargs="+", help=".ckpt files, or folders of `v2flow export`")
    parser.add_argument("--data", nargs="+", required=True, metavar="SHARDS", help="picture shards")
    parser.add_argument("--pictures", type=int, default=600)
    options = parser.parse_args(words)
    with torch.inference_mode():
        rows = [measure(checkpoint, options.data, options.pictures) for checkpoint in options.checkpoints]
    print(json.dumps({**describe_shards(options.data), "pictures": options.pictures, "rows": rows}))


if __name__ == "__main__":
    main()
