"""Kills two ranks at random moments, together or one alone; they go on as two, or as one with batches twice as big."""

import os
import random
import signal
import socket
import time
from pathlib import Path
from typing import Any

from harness import (
    MOMENTS,
    Tally,
    _fork,
    compare,
    fit,
    fitting,
    lineage,
    make_toys,
    saved_state,
    uninterrupted,
    variant,
    without_loss,
)

WAYS = [
    (signal.SIGKILL, (0, 1)),  # the machine dies
    (signal.SIGKILL, (1,)),
    (signal.SIGTERM, (0, 1)),
    (signal.SIGKILL, (0,)),
    (signal.SIGTERM, (1,)),
    (signal.SIGTERM, (0,)),
]
"""Signals, and the ranks that get them; taken in turns."""
LOST, SAYS = 2, "the connection to another rank broke"
"""How a rank ends when another one was killed, with one line of error."""
PATIENCE = 180.0
"""Seconds after the end of one rank in which the other has to end as well."""


def run_ranks(folder: Path, kills: int, seed: int, report: Any = print) -> Tally:
    """Kills two ranks at `kills` random moments; every third training, the second first, goes on as one rank.

    Two ranks must have the losses of two in a piece to the last bit; one must have the samples of one in a piece in
    their order. The first two trainings are also stopped in the middle of an accumulation.
    """
    draws, tally, struck, number = random.Random(seed), Tally(), 0, 0
    config = make_toys("tokenizer", folder)
    while struck < kills or number < 2:
        faults = [_draw(draws, struck + n) for n in range(min(kills - struck, 3, (kills + 1) // 2))]
        struck += _train(config, folder / f"ranks-{number}", number, faults, draws, tally)
        report(f"ranks training {number}: {struck} kills, {len(tally.differences)} differences so far")
        number += 1
    return tally


def _draw(draws: random.Random, number: int) -> dict[str, Any]:
    way, ranks = WAYS[number % len(WAYS)]
    where = draws.choice(sorted(MOMENTS))
    # Both have taken over the signals when the first thousandths of a second are over.
    count = draws.randint(1, MOMENTS[where]) + (200 if where == "time" else 0)
    return {"where": where, "count": count, "signal": int(way), "ranks": ranks}


def _train(
    config: dict[str, Any], folder: Path, number: int, faults: list[dict[str, Any]], draws: random.Random,
    tally: Tally,
) -> int:  # fmt: skip
    """One training with these faults, one after the other, and then let through; gives how many struck."""
    path, log, alone = variant(config, folder, number), folder / "log", number % 3 == 1
    whole = folder.with_name(f"{folder.name}-whole")
    if alone:
        expected = uninterrupted(config, whole, number)
    else:
        if any(fit_ranks(variant(config, whole, number), whole / "log")):
            raise RuntimeError(f"two ranks in a piece did not come to their end; see {whole / 'log'}")
        expected = lineage(whole)
    tally.lines = len(expected)
    if number < 2:
        _stop_in_accumulation(path, log, tally)
    struck = 0
    for fault in faults:
        workers = draws.randrange(3)
        tally.workers[workers] += 1
        statuses = fit_ranks(path, log, fault, workers)
        if not any(statuses):
            break
        struck += 1
        tally.kills[f"{signal.Signals(fault['signal']).name} of {fault['ranks']} at {fault['where']}"] += 1
        if not _lawful(statuses, fault) or (LOST in statuses and SAYS not in log.read_text()):
            tally.differences.append(f"{folder.name}: {fault} ended with statuses {statuses}; see {log}")
    statuses = [fit(path, log)] if alone else fit_ranks(path, log)
    if any(statuses):
        tally.differences.append(f"{folder.name}: the resumed run ended with {statuses}; see {log}")
        return struck
    tally.rounds += 1
    tally.differences += compare(folder, expected, without_loss if alone else str)
    return struck


def _stop_in_accumulation(path: str, log: Path, tally: Tally) -> None:
    """The first validation is after five batches: one of an accumulation's four is done."""
    fault = {"where": "validation", "count": 1, "signal": int(signal.SIGTERM), "ranks": [0]}
    statuses = fit_ranks(path, log, fault)
    tally.kills["SIGTERM of (0,) amid an accumulation"] += 1
    if statuses != [143, 0]:
        tally.differences.append(f"{log}: expected statuses [143, 0], found {statuses}")
    if "accumulated_gradients" not in saved_state(log.parent):
        tally.differences.append(f"{log}: no gradients of the accumulation that has begun are saved")


def _lawful(statuses: list[int | None], fault: dict[str, Any]) -> bool:
    """A signal to one rank stops both, with a checkpoint; after the last step it ends the process that gets it."""
    number, ranks = fault["signal"], fault["ranks"]
    if number == signal.SIGTERM and statuses == [143, 0]:
        return True
    struck, others = [{statuses[rank] for rank in (0, 1) if (rank in ranks) is hit} for hit in (True, False)]
    return -number in struck and struck <= {-number, 0} and others <= {LOST, 0}


def fit_ranks(
    path: str, log: Path, fault: dict[str, Any] | None = None, workers: int = 0
) -> list[int | None]:
    """As `fit`, by two ranks with half of the batch each; None for one that did not end when the other had."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    options = {
        "trainer__devices": 2,
        "trainer__strategy": "ddp",
        "data__batch_size": 2,
        "data__eval_batch_size": 1,
        "data__num_workers": workers,
    }
    works = [
        fitting(path, fault, address | {"LOCAL_RANK": str(rank), "NODE_RANK": "0"}, **options)
        for rank in range(2)
    ]
    return _wait([_fork(work, log) for work in works])


def _wait(children: list[int]) -> list[int | None]:
    statuses: dict[int, int | None] = {}
    ended = float("inf")
    while len(statuses) < len(children):
        for child in children:
            if child not in statuses and (found := os.waitpid(child, os.WNOHANG))[0]:
                statuses[child] = os.waitstatus_to_exitcode(found[1])
                ended = min(ended, time.monotonic())
            elif child not in statuses and time.monotonic() > ended + PATIENCE:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                statuses[child] = None
        time.sleep(0.02)
    return [statuses[child] for child in children]
