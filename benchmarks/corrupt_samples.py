"""What damaged samples cost: CPU seconds for each good sample, with 1 % of them damaged and with none.

python benchmarks/corrupt_samples.py

The training loader of `v2flow fit` reads the same number of batches from two sets of shards that differ in the damaged
samples alone, in turn; in each repetition both begin anew, one before the other by turns. CPU seconds are those of this
process, which reads and decodes. The last line is one JSON document.
"""

import argparse
import io
import json
import logging
import os
import platform
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from v2flow.data.batches import SampleReader, TrainBatches
from v2flow.data.loaders import TrainLoader
from v2flow.data.shards import open_shards
from v2flow.data.writer import Sample, write_shards

DAMAGES = ("cut", "text", "flipped")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="CPU seconds a good sample with damaged samples, against none."
    )
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--share", type=float, default=0.01, help="of the samples, so many are damaged")
    parser.add_argument("--size", type=int, default=128, help="side of the JPEG pictures")
    parser.add_argument("--image-size", type=int, default=64, help="side that they are resized to")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.getLogger("v2flow").setLevel(logging.ERROR)  # else each damaged sample is a line here
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["V2FLOW_CACHE"] = str(Path(temporary) / "cache")
        places = {name: Path(temporary) / name for name in ("clean", "damaged")}
        bad = write_data(places, options)
        seconds: dict[str, list[float]] = {name: [] for name in places}
        for repetition in range(options.repetitions + 1):
            names = list(places) if repetition % 2 else list(reversed(places))
            for name in names:
                found = cpu_seconds(places[name], bad if name == "damaged" else 0, options)
                if repetition:  # the first one warms up
                    seconds[name].append(found)
    ratios = [damaged / clean for clean, damaged in zip(seconds["clean"], seconds["damaged"], strict=True)]
    report = {
        "benchmark": "corrupt_samples",
        "options": vars(options),
        "damaged_samples": bad,
        "cpu_ms_a_good_sample": {name: round(1000 * median(values), 5) for name, values in seconds.items()},
        "runs": {name: [round(1000 * value, 5) for value in values] for name, values in seconds.items()},
        "ratio": round(median(seconds["damaged"]) / median(seconds["clean"]), 4),
        "median_of_ratios": round(median(ratios), 4),
        "limit": 1.05,
        "machine": {"platform": platform.platform(), "cores": os.cpu_count()},
    }
    print(json.dumps(report))


def write_data(places: dict[str, Path], options: Any) -> int:
    """Two sets of the same JPEG pictures, some damaged in one of them; gives how many."""
    draws = np.random.default_rng(options.seed)
    count = round(options.samples * options.share)
    bad = set(draws.choice(options.samples, count, replace=False).tolist())
    samples: dict[str, list[Sample]] = {name: [] for name in places}
    for number in range(options.samples):
        coarse = draws.integers(0, 256, (8, 8, 3), np.uint8)
        picture = Image.fromarray(coarse).resize((options.size, options.size), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=92)
        data = buffer.getvalue()
        members = {"clean": data, "damaged": damage(data, number, draws) if number in bad else data}
        for name in places:
            samples[name].append(
                Sample("train", f"s{number:06d}", {"jpg": members[name], "txt": b"a picture"})
            )
    for name, place in places.items():
        write_shards(place, samples[name], {"kind": "benchmark"})
    return count


def damage(data: bytes, number: int, draws: np.random.Generator) -> bytes:
    """A file that ends too early, one of another kind, or one with a damaged header."""
    kind = DAMAGES[number % len(DAMAGES)]
    if kind == "cut":
        return data[: int(len(data) * draws.uniform(0.2, 0.8))]
    if kind == "text":
        return b"<html>404 Not Found</html>"
    return data[:2] + bytes(20) + data[22:]


def cpu_seconds(place: Path, bad: int, options: Any) -> float:
    """CPU seconds for each good sample that a training gets, on average over the epochs."""
    reader = SampleReader(
        open_shards(str(place / "*.tar"), progress=False), options.image_size, captions=True
    )
    batches = TrainBatches(reader, options.seed, random_crop=True, flip=True, max_bad=bad)
    loader = TrainLoader(batches, options.batch)
    good, keys = 0, set()
    begun = time.process_time()
    for _ in range(options.epochs):
        for batch in loader:
            good += len(batch["key"])
            keys.update(batch["key"])
    seconds = time.process_time() - begun
    assert good == options.epochs * len(loader) * options.batch
    assert len(keys) <= options.samples - bad, "a damaged sample was handed out"
    return seconds / good


if __name__ == "__main__":
    main()
