"""A callback that measures the process it runs in: memory, live tensors, file descriptors, processes."""

import gc
import json
import time
from pathlib import Path

import psutil
import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class Gauge(Callback):
    """Appends a line to FILE every `every` seconds, between two training batches."""

    def __init__(self, file: str, every: float = 5.0) -> None:
        self.file = Path(file)
        self.every = every
        self._next = 0.0
        self._validations = 0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validations += 1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        gc.collect()
        gc.freeze()  # what is there already cannot be a leak, and looking through it takes seconds

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + self.every
        gc.collect()
        process = psutil.Process()
        workers = process.children(recursive=True)
        line = {
            "seconds": time.monotonic(),
            "step": trainer.global_step,
            "validations": self._validations,
            "rss_mb": process.memory_info().rss / 2**20,
            "workers_mb": sum(_rss(worker) for worker in workers) / 2**20,
            "tensors": sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()),
            "descriptors": process.num_fds(),
            "processes": len(workers),
            "threads": process.num_threads(),
        }
        with open(self.file, "a") as file:
            file.write(json.dumps(line) + "\n")


def _rss(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0
