"""What damaged samples cost: CPU seconds for each good sample, with 1 % of them damaged and with none.

python benchmarks/corrupt_samples.py

The training loader of `v2flow fit` reads two sets of shards that differ in damaged samples alone. As many batches of
as many good samples are taken from each, one batch of either in turn, so that what else the machine does falls on both.
CPU seconds are those of this process, which reads, decodes and logs. The last line is one JSON document: `ratio` is the
median of the `ratios`, damaged to clean, of the repetitions.
"""

import argparse
import io
import json
import logging
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from v2flow.benchmark.runs import machine
from v2flow.data.batches import SampleReader, TrainBatches
from v2flow.data.loaders import TrainLoader
from v2flow.data.shards import open_shards
from v2flow.data.writer import Sample, write_shards
from v2flow.origin import current_commit

SETS = ("clean", "damaged")
DAMAGES = ("cut", "text", "flipped")


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="CPU seconds a good sample with damaged samples, against none."
    )
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--share", type=float, default=0.01, help="of the samples, so many are damaged")
    parser.add_argument("--size", type=int, default=128, help="side of the JPEG pictures")
    parser.add_argument("--image-size", type=int, default=64, help="side that they are resized to")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["V2FLOW_CACHE"] = str(Path(temporary) / "cache")
        bad = write_data(Path(temporary), options)
        measure(Path(temporary), bad, options)  # thrown away
        runs = [measure(Path(temporary), bad, options) for _ in range(options.repetitions)]
    ratios = [run["damaged"] / run["clean"] for run in runs]
    report = {
        "benchmark": "corrupt_samples",
        "options": vars(options),
        "damaged_samples": bad,
        "cpu_ms_a_good_sample": {name: 1000 * median(run[name] for run in runs) for name in SETS},
        "ratio": median(ratios),
        "ratios": ratios,
        "limit": 1.05,
        "command": ["python", "benchmarks/corrupt_samples.py", *(sys.argv[1:] if words is None else words)],
        "commit": current_commit(),
        "machine": machine(torch.get_num_threads()),
    }
    print(json.dumps(report))


def write_data(folder: Path, options: Any) -> int:
    """Two sets of the same JPEG pictures, some damaged in one of them; gives how many."""
    draws = np.random.default_rng(options.seed)
    count = round(options.samples * options.share)
    bad = set(draws.choice(options.samples, count, replace=False).tolist())
    samples: dict[str, list[Sample]] = {name: [] for name in SETS}
    for number in range(options.samples):
        coarse = draws.integers(0, 256, (8, 8, 3), np.uint8)
        picture = Image.fromarray(coarse).resize((options.size, options.size), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=92)
        data = buffer.getvalue()
        members = {"clean": data, "damaged": damage(data, number, draws) if number in bad else data}
        for name in SETS:
            samples[name].append(
                Sample("train", f"s{number:06d}", {"jpg": members[name], "txt": b"a picture"})
            )
    for name in SETS:
        write_shards(folder / name, samples[name], {"kind": "benchmark"})
    return count


def damage(data: bytes, number: int, draws: np.random.Generator) -> bytes:
    """A file that ends too early, one of another kind, or one with a damaged header."""
    kind = DAMAGES[number % len(DAMAGES)]
    if kind == "cut":
        return data[: int(len(data) * draws.uniform(0.2, 0.8))]
    if kind == "text":
        return b"<html>404 Not Found</html>"
    return data[:2] + bytes(20) + data[22:]


def measure(folder: Path, bad: int, options: Any) -> dict[str, float]:
    """CPU seconds for each good sample of an epoch of either set, a batch of each in turns."""
    loaders = {name: new_loader(folder / name, bad if name == "damaged" else 0, options) for name in SETS}
    batches = {name: iter(loader) for name, loader in loaders.items()}
    seconds, keys = dict.fromkeys(SETS, 0.0), {name: list[str]() for name in SETS}
    count = len(loaders["clean"])
    for number in range(count):
        for name in SETS if number % 2 else reversed(SETS):
            begun = time.process_time()
            batch = next(batches[name])
            seconds[name] += time.process_time() - begun
            keys[name] += batch["key"]
    good = count * options.batch
    assert len(keys["clean"]) == len(keys["damaged"]) == good
    assert len({*keys["damaged"]}) <= options.samples - bad, "a damaged sample was handed out"
    return {name: seconds[name] / good for name in SETS}


def new_loader(place: Path, bad: int, options: Any) -> TrainLoader:
    """The loader of a training that begins."""
    shards = open_shards(str(place / "*.tar"), progress=False)
    reader = SampleReader(shards, options.image_size, captions=True)
    return TrainLoader(
        TrainBatches(reader, options.seed, random_crop=True, flip=True, max_bad=bad), options.batch
    )


if __name__ == "__main__":
    torch.set_num_threads(1)  # as in a data worker; threads that wait would be CPU seconds, too
    logging.basicConfig(filename=os.devnull)  # each damaged sample is a line
    main()
