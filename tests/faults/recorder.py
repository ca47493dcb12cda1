"""Callbacks for runs that are killed: one keeps what a run has seen, the other strikes at a chosen moment."""

import json
import os
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from v2flow.training import checkpoint_files

FAULT = "V2FLOW_TEST_FAULT"


class Recorder(Callback):
    """Every batch and validation, in order, as lines: samples, losses to the last bit, steps of optimiser and loggers.

    The lines are part of each checkpoint, so those of the last run are the whole line of checkpoints that survived.
    All lines that were ever written, also of batches that were lost and repeated, are in FOLDER/all.jsonl; those of a
    run that came to its end in FOLDER/lineage.json.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.lines: list[str] = []

    def state_dict(self) -> dict[str, Any]:
        return {"lines": list(self.lines)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.lines = list(state_dict["lines"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(f"start at {len(self.lines)}")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        parts = [(float(outputs["loss"]).hex(), batch["key"])]
        if trainer.world_size > 1:
            parts *= trainer.world_size
            torch.distributed.all_gather_object(parts, parts[0])
        logged = trainer.fit_loop.epoch_loop._batches_that_stepped
        losses = ",".join(loss for loss, _ in parts)
        found = " ".join(key for _, keys in parts for key in keys)
        self._add(f"train step {trainer.global_step} logged {logged} loss {losses} {found}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loss = float(trainer.callback_metrics["val/loss"])
        self._add(f"val step {trainer.global_step} batches {trainer.num_val_batches[0]} loss {loss.hex()}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            (self.folder / "lineage.json").write_text(json.dumps(self.lines))

    def _add(self, line: str) -> None:
        self.lines.append(line)
        self._write(line)

    def _write(self, line: str) -> None:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            with open(self.folder / "all.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")


class Saboteur(Callback):
    """Sends a signal at the n-th time that something happens in the first rank, as the environment says.

    `{"where": WHERE, "count": n, "signal": number, "ranks": those that get it, by default the first}`; WHERE is
    batch_start, batch_end, forward, validation, or, of a checkpoint, write (a part of it is written), fsync, link,
    replace (before each), saved, or time (after n thousandths of a second of training).
    """

    def __init__(self) -> None:
        self.fault = json.loads(os.environ.get(FAULT, "null"))
        self._seen: Counter[str] = Counter()
        self._processes = [os.getpid()]

    def strike(self, where: str) -> None:
        self._seen[where] += 1
        if self.fault and self.fault["where"] == where and self._seen[where] == self.fault["count"]:
            self._kill()

    def _kill(self) -> None:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            for rank in sorted(self.fault.get("ranks", [0]), reverse=True):  # this process comes last
                with suppress(ProcessLookupError):  # it may have come to its end
                    os.kill(self._processes[rank], self.fault["signal"])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.fault is None:
            return
        if trainer.world_size > 1:
            self._processes *= trainer.world_size
            torch.distributed.all_gather_object(self._processes, os.getpid())
        checkpoint_files.os = _Os(self)  # type: ignore[attr-defined]
        write = checkpoint_files._HashingFile.write

        def watched(file: Any, data: Any) -> int:
            self.strike("write")
            return write(file, data)

        checkpoint_files._HashingFile.write = watched  # type: ignore[method-assign]
        forward = pl_module.training_step

        def step(*arguments: Any) -> Any:
            result = forward(*arguments)
            self.strike("forward")
            return result

        pl_module.training_step = step  # type: ignore[method-assign]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.fault and self.fault["where"] == "time":
            timer = threading.Timer(self.fault["count"] / 1000, self._kill)
            timer.daemon = True
            timer.start()

    def on_train_batch_start(self, *_: Any) -> None:
        self.strike("batch_start")

    def on_train_batch_end(self, *_: Any) -> None:
        self.strike("batch_end")

    def on_validation_batch_end(self, *_: Any) -> None:
        self.strike("validation")


class _Os:
    """The module `os` as the writer of checkpoints sees it."""

    def __init__(self, saboteur: Saboteur) -> None:
        self._saboteur = saboteur

    def __getattr__(self, name: str) -> Any:
        if name in ("fsync", "link"):
            self._saboteur.strike(name)
        return getattr(os, name)

    def replace(self, source: Any, target: Any) -> None:
        self._saboteur.strike("replace")
        os.replace(source, target)
        if Path(target).name == "last.ckpt":
            self._saboteur.strike("saved")
