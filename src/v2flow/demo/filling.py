"""A picture while it is decoded, as a stream of frames."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Event, Lock, Thread
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from v2flow.decoding import DecodeMoment, watch_decoding

UNDRAWN = 0.6
"""Grey of positions that later AR iterations draw."""
FRAMES = 24
"""Of a picture about so many at most: making one costs a pass of the codec."""
PAUSE = 0.1
"""Seconds that a frame stays at least: a small model decodes faster than the eye can follow."""


@dataclass
class Frame:
    """A picture on its way, or the finished one.

    Attributes:
        picture: `[3, S, S]` in [0, 1].
        iteration: AR iteration, from 0.
        t: time of the ODE, from 1 (noise) to 0; 0 of the finished picture.
        done: whether this is the finished picture.
        seconds: what decoding took so far, without the making of frames.
    """

    picture: Tensor
    iteration: int
    t: float
    done: bool
    seconds: float


class _StoppedError(Exception):
    """Nobody looks any more."""


def frames(
    tokenizer: Any, decode: Callable[[], Tensor], lock: Lock, evaluations: int = 1, pause: float = PAUSE
) -> Iterator[Frame]:
    """What `decode` draws with a `V2FlowTokenizer`, the finished picture last.

    It runs in a thread of its own, which holds `lock` and ends early when the iterator is closed.

    Args:
        decode: gives the finished picture `[3, S, S]`.
        lock: of the model; it holds the modes of modules, so one thread at a time may use it.
        evaluations: of the velocity field that are expected; decides how many of them make one frame.
        pause: least time in seconds between two frames.

    Raises:
        V2FlowError: what `decode` raises.
    """
    found: SimpleQueue[Frame | BaseException] = SimpleQueue()
    worker = _Worker(tokenizer, decode, lock, -(-evaluations // FRAMES), found)
    thread = Thread(target=worker.run, daemon=True)
    thread.start()
    try:
        while True:
            item = found.get()
            if isinstance(item, BaseException):
                raise item
            yield item
            if item.done:
                return
            time.sleep(pause)
    finally:
        worker.stop.set()


class _Worker:
    def __init__(
        self, tokenizer: Any, decode: Callable[[], Tensor], lock: Lock, every: int,
        found: "SimpleQueue[Frame | BaseException]",
    ) -> None:  # fmt: skip
        self.tokenizer, self.decode, self.lock, self.every, self.found = tokenizer, decode, lock, every, found
        self.stop = Event()
        self.start = self.spent = 0.0
        self.iteration = self.seen = 0

    def run(self) -> None:
        """Decodes; a mistake is passed on through the queue."""
        try:
            with self.lock, watch_decoding(self.watch):
                self.start = time.perf_counter()
                picture = self.decode()
                self.found.put(Frame(picture, self.iteration, 0.0, True, self.seconds()))
        except BaseException as error:  # raised again where the frames are read
            self.found.put(error)

    def seconds(self) -> float:
        """Of decoding so far."""
        return time.perf_counter() - self.start - self.spent

    def watch(self, moment: DecodeMoment) -> None:
        """Makes a frame of each `every`-th moment, the first included."""
        if self.stop.is_set():
            raise _StoppedError
        begin = time.perf_counter()
        self.iteration = moment.iteration
        self.seen += 1
        if (self.seen - 1) % self.every:
            return
        seconds, picture = self.seconds(), partial_picture(self.tokenizer, moment)
        self.found.put(Frame(picture, moment.iteration, moment.t, False, seconds))
        self.spent += time.perf_counter() - begin


def partial_picture(tokenizer: Any, moment: DecodeMoment) -> Tensor:
    """The first picture `[3, S, S]` of a moment, positions not drawn yet in grey."""
    grid = tokenizer.latent_grid
    picture = tokenizer.codec.decode(moment.latents[:1].transpose(1, 2).unflatten(2, grid))[0]
    undrawn = F.interpolate(moment.mask[:1, None].unflatten(2, grid).float(), picture.shape[1:])[0] > 0
    return picture.float().clamp(0, 1).masked_fill(undrawn, UNDRAWN).cpu()
