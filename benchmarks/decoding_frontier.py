"""Quality against speed of decoding: which settings are on the frontier, and which become the presets.

    python benchmarks/decoding_frontier.py CHECKPOINT --data '../shared/data/cifar10/test-{000000..000001}.tar' \
        --tuning-data ../shared/data/cifar10/train-000009.tar \
        --out benchmarks/results/decoding --presets src/v2flow/decode_presets.json

Four phases: every setting of the probe of decoding on a few pictures; the reference's way (4 AR iterations of 20
second-order steps with guidance, everything recomputed) on fewer, with its guidance and steps tuned; the frontier of
the first and the tuned literal rows on all pictures; and their speed, a batch of each in turns. The first two may have
pictures of their own (`--tuning-data`), so that nothing is chosen on the pictures that it is then judged by. The noise
of a picture is the same in all of them. `frontier.json` is written after every setting: started again, the script goes
on from there. The last line is one JSON document.
"""

import argparse
import hashlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from v2flow.benchmark.document import Section, Table, section_markdown
from v2flow.benchmark.drawing import SETTINGS, axis_scale, legend, looks_of, panels, point, svg
from v2flow.benchmark.plots import frontier as better_in_both
from v2flow.benchmark.runs import machine
from v2flow.benchmark.spread import Spread
from v2flow.benchmark.subject import seconds_of
from v2flow.decode_modes import read_presets
from v2flow.devices import pick_device
from v2flow.errors import V2FlowError
from v2flow.evaluate import describe_shards, evaluation_loader
from v2flow.fingerprint import tokenizer_sha256
from v2flow.metrics.files import write_json
from v2flow.probes.decoding import FRONTIER, sweep_decoding, trained_points
from v2flow.probes.findings import ProbeSettings
from v2flow.probes.frontier import (
    KID,
    LITERAL,
    STRONGER,
    TUNING,
    decode_batch,
    equal_in_quality,
    literal,
    pareto,
    pick_presets,
    thinned,
    tune,
)
from v2flow.tokenizer import V2FlowTokenizer
from v2flow.training.checkpoint import load_tokenizer

LITERAL_ROW = "literal"
"""The reference's settings; the tuned ones have names that begin so."""


class Remembered:
    """Ids of pictures that were encoded before."""

    def __init__(self, encode: Callable[[Tensor], Tensor]) -> None:
        self.encode, self.ids = encode, dict[str, Tensor]()

    def __call__(self, images: Tensor) -> Tensor:
        key = hashlib.sha256(images.cpu().numpy().tobytes()).hexdigest()
        if key not in self.ids:
            self.ids[key] = self.encode(images)
        return self.ids[key]


class Frontier:
    """A measurement and its document, which is on disk after every step.

    Args:
        model: a V2FlowTokenizer in evaluation mode, on its device.
        options: of the command line.

    Raises:
        V2FlowError: the document in the folder is of another measurement.
    """

    def __init__(self, model: V2FlowTokenizer, options: argparse.Namespace) -> None:
        model.encode = Remembered(model.encode)  # type: ignore[method-assign]
        self.ways = {False: model, True: literal(model)}
        self.options = options
        self.path = options.out / "frontier.json"
        setting: dict[str, Any] = {
            "tokenizer_sha256": tokenizer_sha256(model), **describe_shards(options.data), "seed": options.seed,
            "batch_size": options.batch_size, "pictures": options.pictures, "screen": options.screen,
            "literal_screen": options.literal_screen, "tuning_data": options.tuning_data,
        }  # fmt: skip
        self.document: dict[str, Any] = {
            "setting": setting, "machine": machine(torch.get_num_threads()), "screen": {}, "literal": {}, "final": {},
            "seconds": {}, "minutes": 0.0,
        }  # fmt: skip
        if self.path.exists():
            self.document = json.loads(self.path.read_text())
            if self.document["setting"] != setting:
                raise V2FlowError(
                    f"{self.path}: expected the measurement that is asked for, found that of "
                    f"{self.document['setting']}; name another folder: --out"
                )
        self.started = time.perf_counter() - 60 * self.document["minutes"]

    def save(self) -> None:
        """Writes the document."""
        self.document["minutes"] = (time.perf_counter() - self.started) / 60
        write_json(self.path, self.document)

    def score(self, phase: str, name: str, settings: Mapping[str, Any], limit: int) -> dict[str, Any]:
        """Figures of a setting on the first pictures, kept in the phase's part of the document."""
        rows = self.document[phase]
        if name not in rows:
            model = self.ways[name.startswith(LITERAL_ROW)]
            size, batch = model.config.image_size, self.options.batch_size
            shards = self.options.data if phase == "final" else self.options.tuning_data or self.options.data
            loader = evaluation_loader(shards, size, batch, limit)
            found = sweep_decoding(model, loader, {name: settings}, ProbeSettings(seed=self.options.seed))
            figures = found.figures[name]
            rows[name] = {"options": dict(settings), **figures, "seconds": figures["seconds_per_picture"]}
            self.document["protocol"] = {k: v for k, v in found.protocol.items() if k != "decode_modes"}
            self.save()
            print(f"{phase} {name}: psnr {figures['psnr']:.2f}, {KID} {figures[KID]:.4f}", flush=True)
        return rows[name]

    def tuned(self) -> dict[str, dict[str, Any]]:
        """Literal row -> options: the reference's, with its guidance and steps tuned, and with its noise as well."""

        def measure(settings: dict[str, Any]) -> dict[str, Any]:
            name = ",".join([LITERAL_ROW, *(f"{key}={settings[key]}" for key in (*TUNING, *STRONGER))])
            return self.score("literal", name, settings, self.options.literal_screen)

        trained = self.ways[False].config.decoder.null_probability > 0
        reference = LITERAL | {"temperature": 1.0} | ({} if trained else {"guidance": 1.0})
        choices = {name: values for name, values in TUNING.items() if trained or name != "guidance"}
        first = tune(measure, reference, choices)
        return {
            LITERAL_ROW: reference, f"{LITERAL_ROW} tuned": first,
            f"{LITERAL_ROW} tuned, noise too": tune(measure, first, STRONGER),
        }  # fmt: skip

    def time(self, rows: Mapping[str, Mapping[str, Any]]) -> None:
        """Seconds a picture of each row, a batch of each in turns."""
        model = self.ways[False]
        size, count = model.config.image_size, self.options.batch_size
        batch = next(iter(evaluation_loader(self.options.data, size, count, count)))
        device = model.visual_vocabulary.codes.device
        ids = model.encode(batch["image"].to(device))
        if self.document["seconds"].keys() != rows.keys():  # ratios are within a round: all rows anew
            self.document["seconds"] = {name: [] for name in rows}
        seconds = self.document["seconds"]
        done = min(map(len, seconds.values()))  # before the script was started again
        for number in range(done - 1, self.options.rounds) if done < self.options.rounds else ():
            for name in rows if number % 2 else reversed(rows):
                way = self.ways[name.startswith(LITERAL_ROW)]
                spent = seconds_of(partial(decode_batch, way, ids, rows[name]["options"], number), device)
                if number >= done:  # the round before it warms up
                    seconds[name].append(spent / len(ids))
            self.save()

    def run(self) -> dict[str, Any]:
        """All phases; returns what was found."""
        options = self.options
        points = trained_points(self.ways[False], FRONTIER)
        if options.points:
            points = {name: points[name] for name in options.points}
        screened = {name: self.score("screen", name, o, options.screen) for name, o in points.items()}
        slow = self.tuned()
        for name in thinned(pareto(screened), options.finalists):
            self.score("final", name, points[name], options.pictures)
        scored: list[dict[str, Any]] = []
        for name in list(slow)[1:]:  # tuning its noise may have changed nothing
            if slow[name] not in scored:
                self.score("final", name, slow[name], options.pictures)
            scored.append(slow[name])
        reference = {LITERAL_ROW: {"options": slow[LITERAL_ROW]}}
        self.time(self.document["final"] | reference)
        return self.conclude()

    def conclude(self) -> dict[str, Any]:
        """Speeds, the frontier, presets and how much faster than the literal way, from what was measured."""
        options, seconds = self.options, self.document["seconds"]
        for name, row in self.document["final"].items():
            row["seconds"] = statistics.median(seconds[name])
        rows = {n: row for n, row in self.document["final"].items() if not n.startswith(LITERAL_ROW)}
        picked = pick_presets(rows, options.fast_loss, options.balanced_loss)
        found: dict[str, Any] = {"frontier": pareto(rows), "presets": picked, "against": {}}
        for name in [n for n in self.document["final"] if n.startswith(LITERAL_ROW)]:
            equal = equal_in_quality(rows, self.document["final"][name])
            ratios = [a / b for a, b in zip(seconds[name], seconds[equal], strict=True)] if equal else None
            found["against"][name] = {
                "equal": equal,
                "speed_ratio": statistics.median(ratios) if ratios else None,
            }
        best = rows[picked["best"]]
        ratios = [a / b for a, b in zip(seconds[LITERAL_ROW], seconds[picked["best"]], strict=True)]
        found["best_to_untuned_literal"] = statistics.median(ratios)
        found["losses"] = {"fast": options.fast_loss, "balanced": options.balanced_loss, "of": best[KID]}
        self.document["found"] = found
        self.save()
        return found


def presets_document(document: Mapping[str, Any]) -> dict[str, Any]:
    """What `v2flow.decode_modes.read_presets` reads."""
    setting, losses = document["setting"], document["found"]["losses"]
    source = (
        f"benchmarks/decoding_frontier.py: {setting['set']}, {setting['split']}, {setting['pictures']} pictures, seed "
        f"{setting['seed']}, tokenizer {setting['tokenizer_sha256'][:12]}; best has the lowest {KID}, fast and "
        f"balanced are the cheapest within {losses['fast']:.0%} and {losses['balanced']:.0%} of it"
    )
    presets = {}
    for preset, name in document["found"]["presets"].items():
        row = document["final"][name]
        presets[preset] = {
            "options": row["options"], "psnr": row["psnr"], KID: row[KID], f"{KID}_se": row[f"{KID}_se"],
            "images_per_second": 1 / row["seconds"],
        }  # fmt: skip
    result = {"source": source, "presets": presets}
    read_presets(result, "presets")
    return result


def write_presets(path: Path, presets: Mapping[str, Any]) -> None:
    """Writes them as a file of their own or, given an exported tokenizer's folder, into its config.json."""
    if path.is_dir():
        config = path / "config.json"
        write_json(config, json.loads(config.read_text()) | {"decode_presets": dict(presets)})
    else:
        write_json(path, presets)


def tables(document: Mapping[str, Any]) -> str:
    """The document as Markdown."""
    setting, found, seconds = document["setting"], document["found"], document["seconds"]
    names = {row: preset for preset, row in found["presets"].items()}

    def line(name: str, row: Mapping[str, Any]) -> list[str]:
        settings = ", ".join(f"{key} {value}" for key, value in row["options"].items())
        rate = f"{1 / row['seconds']:.1f}"
        kid = f"{row[KID]:.4f} ± {row[f'{KID}_se']:.4f}"
        return [
            name,
            names.get(name, ""),
            settings,
            f"{row['psnr']:.2f}",
            kid,
            str(row["field_evaluations"]),
            rate,
        ]

    heads = ["setting", "preset", "options", "psnr ↑", f"{KID} ↓", "field evaluations", "pictures a second ↑"]
    sections = [Section("All pictures", [
        f"{setting['pictures']} pictures of {setting['set']} ({setting['split']}), seed {setting['seed']}, batches of "
        f"{setting['batch_size']}, {document['machine']['threads']} threads; speeds are medians of rounds in turns.",
        Table(heads, [line(n, row) for n, row in sorted(document["final"].items(), key=lambda i: i[1]["seconds"])]),
        *(f"Equal in quality to {name} or better and fastest: {r['equal']}, {r['speed_ratio']:.1f} times as many "
          "pictures a second." if r["equal"] else f"No row is equal in quality to {name}."
          for name, r in found["against"].items()),
        f"The reference's own settings decode {1 / statistics.median(seconds[LITERAL_ROW]):.2f} pictures a second.",
    ])]  # fmt: skip
    for phase, title in (("screen", "First look"), ("literal", "The literal way, tuned")):
        count = setting["screen" if phase == "screen" else "literal_screen"]
        where = f" of {', '.join(setting['tuning_data'])}" if setting["tuning_data"] else ""
        about = (
            f"{count} pictures{where}: distances compare with those of this table only; speeds not in turns."
        )
        sections.append(Section(title, [about, Table(heads, [line(*i) for i in document[phase].items()])]))
    return "# Decoding: quality against speed\n\n" + "\n\n".join(section_markdown(s) for s in sections) + "\n"


def plot(document: Mapping[str, Any]) -> str:
    """Kernel distance against pictures a second, of the first look and of all pictures, as SVG."""
    from matplotlib import style

    looks = looks_of(["V2Flow", LITERAL_ROW])
    with style.context(["default", SETTINGS]):
        figure, axes = panels([2.6, 2.6])
        for axis, phase in zip(axes, ("screen", "final"), strict=True):
            for name, row in document[phase].items():
                look = looks[LITERAL_ROW if name.startswith(LITERAL_ROW) else "V2Flow"]
                point(axis, Spread(1 / row["seconds"], None, 1), Spread(row[KID], row[f"{KID}_se"], 1), look)
            fast = [(1 / row["seconds"], row[KID]) for name, row in document[phase].items()]
            line = better_in_both(fast)
            axis.plot([x for x, _ in line], [y for _, y in line], color=looks["V2Flow"].color, alpha=0.6)
            axis_scale(axis.xaxis, axis.set_xscale, [x for x, _ in fast])
            axis.set(xlabel="pictures a second →", ylabel=f"← {KID}")
            count = document["setting"]["screen" if phase == "screen" else "pictures"]
            axis.set_title(f"{count} pictures", loc="left")
        legend(figure, list(looks), looks)
        return svg(figure, "frontier")


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="a .ckpt file of `v2flow fit`, or a folder of `v2flow export`")
    parser.add_argument(
        "--data", nargs="+", required=True, metavar="SHARDS", help="tar files, or brace globs"
    )
    parser.add_argument(
        "--tuning-data", nargs="+", metavar="SHARDS", help="of the first two phases; default: those of --data"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="frontier.json, README.md, frontier.svg"
    )
    parser.add_argument("--presets", type=Path, metavar="PATH", help="also write the presets: a file, or the folder of "
                        "an exported tokenizer")  # fmt: skip
    parser.add_argument("--pictures", type=int, default=2560, help="of the final figures; default: 2560")
    parser.add_argument("--screen", type=int, default=384, help="of the first look; default: 384")
    parser.add_argument(
        "--literal-screen", type=int, default=256, help="of the literal way's tuning; default: 256"
    )
    parser.add_argument(
        "--points", nargs="+", choices=list(FRONTIER), metavar="POINT", help="only some settings"
    )
    parser.add_argument(
        "--finalists", type=int, default=5, help="most settings that all pictures are spent on"
    )
    parser.add_argument("--rounds", type=int, default=5, help="of the timing; default: 5")
    parser.add_argument(
        "--fast-loss", type=float, default=0.25, help="share of KID that fast may lose; default: 0.25"
    )
    parser.add_argument(
        "--balanced-loss", type=float, default=0.08, help="the same of balanced; default: 0.08"
    )
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(words)
    frontier = Frontier(load_tokenizer(options.checkpoint).to(pick_device()), options)
    found = frontier.run()
    (options.out / "README.md").write_text(tables(frontier.document), encoding="utf-8")
    (options.out / "frontier.svg").write_text(plot(frontier.document) + "\n", encoding="utf-8")
    if options.presets is not None:
        write_presets(options.presets, presets_document(frontier.document))
    print(json.dumps(found))


if __name__ == "__main__":
    try:
        main()
    except V2FlowError as error:
        print(f"decoding_frontier: error: {error}", file=sys.stderr)
        sys.exit(2)
