"""Faults of data, disk, memory and clock in real runs of `v2flow fit`: each has an outcome that it must have.

Either the run comes to its end with the batches and losses of a run in a piece, to the last bit; or it stops with one
line and exit status 2, and when the fault is gone, `--ckpt_path last` goes on as if nothing had happened.
"""

import os
import random
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import injection
import yaml
from data_toys import write_tar
from harness import compare, fitting, in_processes, make_toys, uninterrupted, variant
from injection import Prepare, before_batch, in_step, kill_workers, small_disk
from server import FaultyServer, serving

from v2flow.data.manifest import index_tar, write_manifest

SHARDS, EACH = 6, 4
KIND = 1  # of harness.variant: a checkpoint after each step


class Bench:
    """Where one fault is tried.

    Attributes:
        data: folder of the training shards, a copy of its own.
        checkpoints: where they are written, if not where the logger is.
        draws: where in a training a fault strikes.
        differences: what was not as stated, one line each.
    """

    def __init__(
        self, folder: Path, config: dict[str, Any], expected: list[str], draws: random.Random
    ) -> None:
        self.folder, self.expected, self.draws = folder, expected, draws
        self.data = folder / "data"
        shutil.copytree(Path(config["data"]["train"]).parent, self.data)
        self.config = config | {"data": config["data"] | {"train": str(self.data / "train-*.tar")}}
        self.checkpoints: Path | None = None
        self.differences: list[str] = []
        self._log = folder / "log"

    def shard(self) -> Path:
        return self.data / f"train-{self.draws.randrange(SHARDS):06d}.tar"

    def fit(self, *faults: Prepare, **options: Any) -> tuple[int, str]:
        """Runs `v2flow fit --ckpt_path last` in a process with the faults; its status and what it said."""
        path = variant(self.config, self.folder, KIND)
        if self.checkpoints is not None:
            document = yaml.safe_load(Path(path).read_text())
            for callback in document["trainer"]["callbacks"]:
                if callback["class_path"].endswith("ModelCheckpoint"):
                    callback["init_args"]["dirpath"] = str(self.checkpoints)
            Path(path).write_text(yaml.safe_dump(document))
        begun = self._log.stat().st_size if self._log.is_file() else 0
        work = fitting(path, None, {"V2FLOW_CACHE": str(self.folder / "cache")}, **options)

        def faulty() -> int:
            for fault in faults:
                fault()
            return work()

        (status,) = in_processes([faulty], self._log)
        with open(self._log) as file:
            file.seek(begun)
            return status, file.read()

    def must_finish(self, *faults: Prepare, says: str = "", **options: Any) -> None:
        """The run comes to its end as a run in a piece does, and its log holds `says`."""
        status, text = self.fit(*faults, **options)
        if status != 0 or says not in text:
            self._differ(f"expected status 0 and {says!r}, found {status}")
        else:
            self.differences += compare(self.folder, self.expected)

    def must_stop(self, says: str, *faults: Prepare, **options: Any) -> None:
        """The run stops with status 2 and one line of error that holds `says`."""
        status, text = self.fit(*faults, **options)
        lines = [line for line in text.splitlines() if line.startswith("v2flow: error:")]
        if status != 2 or len(lines) != 1 or says not in lines[0] or "Traceback" in text:
            self._differ(f"expected status 2 and one line with {says!r}, found {status} and {lines}")

    def must_hold(self, condition: bool, what: str) -> None:
        if not condition:
            self._differ(what)

    def _differ(self, what: str) -> None:
        self.differences.append(f"{self.folder.name}: {what}; see {self._log}")


# --- workers ------------------------------------------------------------------------------------------------------


def worker_killed(bench: Bench) -> None:
    """Its batches are made again by a new worker."""
    batches = {bench.draws.randint(1, 6), bench.draws.randint(7, 20)}
    bench.must_finish(kill_workers(batches), says="a data worker was killed", data__num_workers=2)


def worker_always_killed(bench: Bench) -> None:
    """A batch that kills every worker stops the run; without workers it goes on."""
    fatal = before_batch(2, lambda: os.kill(os.getpid(), 9))  # each new worker counts its batches anew
    bench.must_stop("lower data.num_workers", injection.quick_watch, fatal, data__num_workers=1)
    bench.must_finish()


# --- local shards -------------------------------------------------------------------------------------------------


def shard_vanishes(bench: Bench) -> None:
    shard = bench.shard()
    bench.fit(trainer__max_steps=2)
    away = before_batch(1, lambda: shard.rename(shard.with_suffix(".away")))
    bench.must_stop(f"{shard}: was there and can no longer be opened", away)
    shard.with_suffix(".away").rename(shard)
    bench.must_finish()


def shard_cut_inside_a_member(bench: Bench) -> None:
    """In a shard that is open already."""
    shard = bench.shard()
    whole = shard.read_bytes()
    cut = before_batch(bench.draws.randint(9, 20), lambda: os.truncate(shard, 600))
    bench.must_stop(f"{shard}, sample", cut)
    shard.write_bytes(whole)
    bench.must_finish()


def shard_cut_at_a_member(bench: Bench) -> None:
    """Between the finding of its samples and its first use."""
    shard = bench.shard()
    whole = shard.read_bytes()
    with tarfile.open(shard) as archive:
        place = archive.getmembers()[2].offset
    bench.must_stop(
        f"{shard}: expected {len(whole)} bytes", before_batch(1, lambda: os.truncate(shard, place))
    )
    shard.write_bytes(whole)
    bench.must_finish()


# --- shards from a server -----------------------------------------------------------------------------------------


def quick_limits() -> None:
    from v2flow.data import http

    http.LIMITS = http.HttpLimits(stall=0.5, slowest=500.0, total=60.0, retries=3, backoff=0.01)


def _remote(server: FaultyServer) -> dict[str, Any]:
    return {"data__train": f"{server.url}/train-{{000000..{SHARDS - 1:06d}}}.tar"}


def _lasting(bench: Bench, fault: str, says: str) -> None:
    """A fault from the first use of a shard on; the run goes on when it is gone."""
    with serving(bench.data) as server:
        begins = before_batch(1, lambda: server.order.write_text(fault) and None)
        bench.must_stop(says, quick_limits, begins, **_remote(server))
        server.order.unlink()
        bench.must_finish(quick_limits, **_remote(server))


def server_errors_pass(bench: Bench) -> None:
    """Statuses 500 and 503 and broken transfers, again and again, but fewer in a row than are tried again."""
    choose = bench.draws.choice
    with serving(bench.data) as server:
        for _ in range(5):
            server.faults += [choose(["500", "503"]), choose(["500", "503", "cut", ""]), ""]
        bench.must_finish(quick_limits, **_remote(server))
        bench.must_hold(not server.faults, f"faults that never came: {server.faults}")


def server_errors_last(bench: Bench) -> None:
    _lasting(bench, "500", "gave up at byte 0 after 4 attempts: 500")


def server_is_slow(bench: Bench) -> None:
    """Above the limit: the run waits, and is the same. One connection that crawls is left for another."""
    with serving(bench.data) as server:
        server.pause = 0.02
        server.faults = [""] * SHARDS + ["crawl"]
        bench.must_finish(quick_limits, **_remote(server))
        bench.must_hold(not server.faults, "no connection crawled")


def server_crawls(bench: Bench) -> None:
    _lasting(bench, "crawl", "connections of")


# --- disk, memory, numbers, clock ---------------------------------------------------------------------------------


def disk_full(bench: Bench) -> None:
    """The checkpoint from before stays whole."""
    import torch

    with small_disk(bench.folder / "disk", 16384) as disk:
        place = disk or bench.folder / "disk"
        at = bench.draws.randint(9, 20)

        def full() -> None:
            injection.fill(disk) if disk is not None else injection.little_files()

        bench.checkpoints = place
        bench.must_stop("the checkpoint cannot be written", before_batch(at, full))
        last = place / "last.ckpt"
        bench.must_hold(
            last.is_file() and torch.load(last, weights_only=True)["global_step"] > 0,
            "no last.ckpt that loads",
        )
        bench.must_hold(not list(place.glob(".*.part")), "a part of a checkpoint was left behind")
        (place / "filler").unlink(missing_ok=True)
        bench.must_finish()


def output_read_only(bench: Bench) -> None:
    """Nothing is trained."""
    with small_disk(bench.folder / "disk", 1024) as disk:
        if disk is not None:
            injection.make_read_only(disk)
            place = disk
        else:
            place = bench.folder / "file"
            place.write_text("no folder")
        bench.must_stop(str(place), trainer__logger__init_args__save_dir=place / "out")
    seen = bench.folder / "all.jsonl"
    bench.must_hold(not seen.exists() or "train step" not in seen.read_text(), "batches were trained on")


def out_of_memory(bench: Bench) -> None:
    """Named, with advice, and the checkpoint from before stays."""

    def greedy(result: Any) -> Any:
        import torch

        injection.little_memory()
        torch.ones(1 << 28)  # 1 GB
        return result

    bench.must_stop("out of memory", in_step(bench.draws.randint(9, 20), greedy))
    bench.must_finish()


def loss_not_finite(bench: Bench) -> None:
    """Steps are left out and counted; ten of them in a row stop the run with a checkpoint."""
    import torch

    options = {"trainer__accumulate_grad_batches": 1, "model__init_args__optimizer__total_steps": 40}
    bench.must_stop(
        "10 steps in a row", in_step(bench.draws.randint(5, 9), lambda loss: loss * float("nan")), **options
    )
    saved = sorted(bench.folder.glob("run/version_*/checkpoints/last.ckpt"))
    state = torch.load(saved[-1], weights_only=True) if saved else {"state_dict": {}}
    bench.must_hold(
        bool(state["state_dict"]) and all(v.isfinite().all() for v in state["state_dict"].values()),
        "no checkpoint with finite weights",
    )


def clock_jumps(bench: Bench) -> None:
    """The run is the same; nothing ends early and nothing waits."""
    bench.must_finish(injection.jumping_clock, trainer__max_time="00:01:00:00")


FAULTS: dict[str, Callable[[Bench], None]] = {
    fault.__name__: fault
    for fault in (
        worker_killed, worker_always_killed, shard_vanishes, shard_cut_inside_a_member, shard_cut_at_a_member,
        server_errors_pass, server_errors_last, server_is_slow, server_crawls, disk_full, output_read_only,
        out_of_memory, loss_not_finite, clock_jumps,
    )
}  # fmt: skip


def _in_shards(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The toys' training pictures in several shards, with a manifest, so that each is read when it is needed."""
    with tarfile.open(config["data"]["train"]) as archive:
        members = [(member.name, archive.extractfile(member).read()) for member in archive]  # type: ignore[union-attr]
    for number in range(SHARDS):
        write_tar(folder / f"train-{number:06d}.tar", members[number * EACH : (number + 1) * EACH])
    write_manifest(folder, {path.name: index_tar(path) for path in folder.glob("*.tar")}, {"kind": "toys"})
    return config | {"data": config["data"] | {"train": str(folder / "train-*.tar")}}


def run_data_faults(
    folder: Path, seed: int, rounds: int = 1, only: list[str] | None = None, report: Any = print
) -> dict[str, list[str]]:
    """Tries every fault `rounds` times, at other moments each time; differences by fault."""
    config = _in_shards(make_toys("tokenizer", folder / "toys"), folder / "shards")
    expected = uninterrupted(config, folder / "whole", KIND)
    found: dict[str, list[str]] = {}
    for round_number in range(rounds):
        for name in only or FAULTS:
            place = folder / f"{name}-{round_number}"
            bench = Bench(place, config, expected, random.Random(f"{seed} {name} {round_number}"))
            FAULTS[name](bench)
            found.setdefault(name, []).extend(bench.differences)
            report(f"{name} {round_number}: {bench.differences or 'as stated'}")
    return found
