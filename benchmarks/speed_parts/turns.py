"""Ways to do a thing timed in turns, with the machine's rate of matrix products measured in every turn."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from speed_parts.options import CPU
from v2flow.benchmark.overhead import Spread, time_rounds
from v2flow.benchmark.subject import seconds_of
from v2flow.planning.rates import SIDE, measured_tflops

PRODUCT = "matrix product"
PRODUCT_FLOPS = 2 * SIDE**3


class _Way:
    def __init__(self, action: Callable[[int], Any], prepare: Callable[[], Any] | None) -> None:
        self.action, self.prepare = action, prepare

    def time(self, draw: int) -> dict[str, float]:
        if self.prepare is not None:
            self.prepare()
        return {"": seconds_of(partial(self.action, draw), CPU)}


class _Product:
    def time(self, draw: int) -> dict[str, float]:
        return {"": PRODUCT_FLOPS / (measured_tflops(3) * 1e12)}


@dataclass
class Turns:
    """Seconds of each way in each round, those of a product of fp32 matrices among them.

    Ratios are taken within a round, so that what else the machine does falls on both sides. All results are spreads,
    `{"median", "low", "high"}` with the quartiles over the rounds.
    """

    seconds: dict[str, list[float]]

    def spread(self, name: str) -> dict[str, float]:
        """Seconds of a way."""
        return asdict(Spread.of(self.seconds[name]))

    def ratio(self, upper: str, lower: str) -> dict[str, float]:
        """Seconds of one way over those of another."""
        pairs = zip(self.seconds[upper], self.seconds[lower], strict=True)
        return asdict(Spread.of([a / b for a, b in pairs]))

    def row(self, name: str, flops: float) -> dict[str, Any]:
        """`seconds`, `flops`, `flops_per_second`, and `of_products`: that rate over the one of matrix products."""
        pairs = list(zip(self.seconds[name], self.seconds[PRODUCT], strict=True))
        return {
            "seconds": self.spread(name),
            "flops": flops,
            "flops_per_second": asdict(Spread.of([flops / s for s, _ in pairs])),
            "of_products": asdict(Spread.of([flops / s / (PRODUCT_FLOPS / p) for s, p in pairs])),
        }

    def products(self) -> dict[str, float]:
        """FLOP/s of the matrix products."""
        return asdict(Spread.of([PRODUCT_FLOPS / s for s in self.seconds[PRODUCT]]))


def take_turns(
    ways: Mapping[str, Callable[[int], Any]],
    rounds: int,
    warmup: int = 1,
    prepare: Mapping[str, Callable[[], Any]] | None = None,
) -> Turns:
    """Times each way once a round, in an order that alternates; a way is given the round's number as its draw.

    Args:
        prepare: what is called before a way each time, and not timed.
    """
    prepare = prepare or {}
    subjects: Any = {PRODUCT: _Product()}
    subjects |= {name: _Way(action, prepare.get(name)) for name, action in ways.items()}
    times = time_rounds(subjects, rounds, warmup, progress=True)
    return Turns({name: found[""] for name, found in times.items()})
