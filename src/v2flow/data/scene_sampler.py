"""Draws captioned scenes without end, and says which combinations of attributes training never shows.

What a caption says varies over all that is not held out. A colour that it does not say is always black, and an only
object whose place it does not say lies in the middle. Were they free, they could not be any that is held out, and what
training never says it would still teach: to avoid it.
"""

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Any

from v2flow.data.scenes import (
    COLOURS,
    PLACES,
    REACH,
    RELATIONS,
    SHAPES,
    SIZES,
    TASKS,
    Demand,
    Object,
    Scene,
    canonical_relation,
)
from v2flow.data.writer import SPLITS
from v2flow.errors import V2FlowError

INK = "black"
"""The colour of things whose colour the caption does not say."""
MAX_COUNT = 4
PITCH = 2 / 32
"""Centres lie on a lattice of this pitch, so that what tokenizer and LLM learn goes to what captions say."""
HELD_OUT_SEED = 0
LEVELS = ("whole", "pairs")
"""How new a held-out combination is, see :func:`held_out`."""
TRAIN_TASKS = (*TASKS, "two_object", "color_attr", "position", "position")
"""The order in which training's tasks come round: two things, which are learned last, come more often than one."""
_SAID = {
    "single_object": ((), ("size",), ("place",), ("size", "place"), ("size", "colour")),
    "colors": (("colour",), ("size", "colour"), ("colour", "place"), ("size", "colour", "place")),
    "two_object": ((),),
    "color_attr": (("colour",),),
    "position": ((), ("colour",)),
    "counting": ((), ("colour",)),
}
"""Attributes beside the shape that a caption may name, by task."""
_NUMBERS = ("one", "two", "three", "four")
_MARGIN = 0.5 / 32
_GAP = 1.5 / 32
_ASIDE = 4 / 32
"""From the middle of the canvas, a centre whose place the caption says lies at least so far along both axes."""


@dataclass(frozen=True)
class HeldOut:
    """What training never shows.

    Attributes:
        duos: two shapes in one picture, whatever their colours.
        object_pairs: two objects, (colour, shape) each, in one picture.
        relations: (shape, relation, shape) that a caption says, see :func:`v2flow.data.scenes.canonical_relation`.
        places: (colour, shape, place) of an only object whose place the caption says.
        counts: (colour, shape, number) of equal objects.
        pairs: (colour, shape) of any object.
    """

    duos: frozenset[frozenset[str]]
    object_pairs: frozenset[frozenset[tuple[str, str]]] = frozenset()
    relations: frozenset[tuple[str, str, str]] = frozenset()
    places: frozenset[tuple[str, str, str]] = frozenset()
    counts: frozenset[tuple[str, str, int]] = frozenset()
    pairs: frozenset[tuple[str, str]] = frozenset()

    def among(self, kinds: Sequence[Demand], relation: str | None = None) -> bool:
        """Whether things are a held-out combination.

        Args:
            kinds: what is drawn, all with a colour, and with a place if the caption says one.
            relation: of the first to the second, if the caption says it.
        """
        things = Counter((str(kind.colour), kind.shape) for kind in kinds)
        shapes = {kind.shape for kind in kinds}
        return (
            any(duo <= shapes for duo in self.duos)
            or frozenset(things) in self.object_pairs
            or (relation and canonical_relation(kinds[0].shape, relation, kinds[1].shape) in self.relations)
            or any((kind.colour, kind.shape, kind.place) in self.places for kind in kinds)
            or any((*thing, number) in self.counts for thing, number in things.items())
            or any(thing in self.pairs for thing in things)
        )


@cache
def held_out(level: str = "whole") -> HeldOut:
    """The combinations that only the split `test` shows, the same for every seed of samples.

    At either level each shape is never in one picture with one of the others: 3 of 15 duos. For what else a caption
    says, the level decides:

    - `whole`: as a whole it is new, each two attributes of it are not. A quarter of two objects in two colours is never
      shown together, though the same shapes with their colours swapped may be. Of two shapes one of the four ways in
      which they can lie is never said: 12 of 48. (A picture whose caption says no relation may show it.) A shape in a
      colour is never shown alone at one of the four places (beside others it may lie there), and never in one of the
      numbers two, three and four: 36 of 144 and of 108. The task `single_object` says no colour with a place: its new
      ones are black.
    - `pairs`: each colour but INK loses a shape, everywhere: 5 of 30 pairs.

    Raises:
        V2FlowError: an unknown level.
    """
    if level not in LEVELS:
        raise V2FlowError(f"option held-out: expected one of {', '.join(LEVELS)}, found {level!r}")
    rng = random.Random(f"held out {HELD_OUT_SEED}")
    shapes, shuffled = (sorted(SHAPES, key=lambda _: rng.random()) for _ in range(2))
    circle = shuffled[::2] + shuffled[1::2]
    duos = frozenset(frozenset(duo) for duo in zip(circle[:3], circle[3:], strict=True))
    if level == "pairs":
        colours = [colour for colour in COLOURS if colour != INK]
        return HeldOut(duos, pairs=frozenset(zip(colours, shapes, strict=False)))
    # In this order each colour and each shape loses every place once or twice, every number twice.
    order = [
        (colour, shape, row + column)
        for row, colour in enumerate(COLOURS)
        for column, shape in enumerate(shapes)
    ]
    return HeldOut(
        duos,
        object_pairs=_unseen_object_pairs(shapes, duos),
        # Every shape is once on each side of what is never said.
        relations=frozenset(
            (shape, side, circle[(i + step) % 6])
            for i, shape in enumerate(circle)
            for side, step in (("left", 1), ("above", 2))
        ),
        places=frozenset((colour, shape, PLACES[turn % 4]) for colour, shape, turn in order),
        counts=frozenset((colour, shape, 2 + turn % 3) for colour, shape, turn in order),
    )


def _unseen_object_pairs(
    shapes: Sequence[str], duos: frozenset[frozenset[str]]
) -> frozenset[frozenset[tuple[str, str]]]:
    """A quarter of two (colour, shape) in two colours, other duos aside."""
    # A Latin square: each colour and each shape has the numbers 1 to 6. No sum of one of the colour and one of the
    # shape, or the same two shapes with their colours swapped would be held out too.
    number = {
        (colour, shape): row * column % 7
        for row, colour in enumerate(COLOURS, 1)
        for column, shape in enumerate(shapes, 1)
    }
    return frozenset(
        frozenset(pair)
        for pair in combinations(number, 2)
        if pair[0][0] != pair[1][0]
        and frozenset((pair[0][1], pair[1][1])) not in duos
        and sum(number[each] for each in pair) % 4 == 0
    )


def sample_scene(seed: int, split: str, index: int, level: str = "whole") -> Scene:
    """Scene `index` of an endless split: a pure function of its arguments.

    `train` and `val` never show a combination of :func:`held_out`; each caption of `test` says at least one.

    Args:
        seed: not negative.
        split: `train`, `val` or `test`.
        index: not negative; it is the task's turn of TRAIN_TASKS in `train`, of TASKS in the other splits.
        level: one of LEVELS.

    Raises:
        V2FlowError: an unknown split or level, a negative seed or index.
    """
    if split not in SPLITS:
        raise V2FlowError(f"split: expected one of {', '.join(SPLITS)}, found {split!r}")
    if seed < 0 or index < 0:
        raise V2FlowError(f"seed, index: expected numbers that are not negative, found {seed}, {index}")
    rng = random.Random(f"{seed} {split} {index}")
    tasks = TRAIN_TASKS if split == "train" else TASKS
    task = tasks[index % len(tasks)]
    while True:
        demands, relation, kinds = _draw(task, rng)
        if held_out(level).among(kinds, relation) == (split == "test"):
            break
    objects = _quarters(kinds, rng) if len(kinds) > 1 and task == "counting" else _place(kinds, relation, rng)
    return Scene(task, _caption(task, demands, relation, rng), objects, demands, relation)


# Only `random()` is drawn from: Python promises its sequence for a seed, but not that of `choice` or `sample`.
def _pick(rng: random.Random, options: Sequence[Any]) -> Any:
    return options[int(rng.random() * len(options))]


def _pick_two(rng: random.Random, options: Sequence[str]) -> tuple[str, str]:
    """Two different ones."""
    first = _pick(rng, options)
    return first, _pick(rng, [option for option in options if option != first])


def _draw(task: str, rng: random.Random) -> tuple[tuple[Demand, ...], str | None, tuple[Demand, ...]]:
    """What a caption says, the relation, and all that is drawn: every attribute, said or not."""
    shapes, colours = _pick_two(rng, SHAPES), _pick_two(rng, tuple(COLOURS))
    sizes = ("small", "small") if task == "counting" else tuple(_pick(rng, tuple(SIZES)) for _ in range(2))
    names = _pick(rng, _SAID[task])
    if task in ("color_attr", "position") and "colour" in names and rng.random() * len(SHAPES) < 1:
        shapes = (shapes[0], shapes[0])  # or training would teach that the second shape is always another
    if "colour" not in names:
        colours = (INK, INK)
    place = _pick(rng, PLACES) if "place" in names else None
    kinds = tuple(Demand(*each, place) for each in zip(shapes, colours, sizes, strict=True))
    demands = tuple(Demand(kind.shape, **{name: getattr(kind, name) for name in names}) for kind in kinds)
    if task == "counting":
        count = 1 + int(rng.random() * MAX_COUNT)
        return demands[:1] * count, None, kinds[:1] * count
    if task in ("single_object", "colors"):
        return demands[:1], None, kinds[:1]
    return demands, _pick(rng, tuple(RELATIONS)) if task == "position" else None, kinds


def _place(kinds: Sequence[Demand], relation: str | None, rng: random.Random) -> tuple[Object, ...]:
    """One object in the middle or at its place; or two anywhere on the canvas, side by side or one above the other with
    a gap between them: large ones at opposite edges."""
    if len(kinds) == 1:
        return (_alone(kinds[0], rng),)
    side = relation or _pick(rng, tuple(RELATIONS))
    while True:
        first, second = (_anywhere(kind, rng) for kind in kinds)
        along, across = second.x - first.x, second.y - first.y
        if side in ("above", "below"):
            along, across = across, along
        if side in ("right", "below"):
            along = -along
        # A relation that the caption names is clear: within 27 degrees of the axis.
        clear = relation is None or abs(across) <= 0.5 * along
        if clear and along >= REACH * (first.size + second.size) + _GAP:
            return first, second


def _alone(kind: Demand, rng: random.Random) -> Object:
    if kind.place is None:
        return _object(kind, *(_on_lattice(0.5 - PITCH, 0.5 + PITCH, rng) for _ in range(2)))
    x, y = (_on_lattice(_nearest(kind), 0.5 - _ASIDE, rng) for _ in range(2))
    return _object(kind, 1 - x if "right" in kind.place else x, 1 - y if "bottom" in kind.place else y)


def _anywhere(kind: Demand, rng: random.Random) -> Object:
    edge = _nearest(kind)
    return _object(kind, *(_on_lattice(edge, 1 - edge, rng) for _ in range(2)))


def _nearest(kind: Demand) -> float:
    """How near to the edge of the canvas a centre may lie."""
    return REACH * SIZES[str(kind.size)] + _MARGIN


def _on_lattice(low: float, high: float, rng: random.Random) -> float:
    first, last = math.ceil(low / PITCH), math.floor(high / PITCH)
    return PITCH * (first + int(rng.random() * (last - first + 1)))


def _quarters(kinds: Sequence[Demand], rng: random.Random) -> tuple[Object, ...]:
    """Each object somewhere in its own quarter of the canvas, so that four can be told apart at 32 pixels."""
    quarters = sorted(((0, 0), (0, 1), (1, 0), (1, 1)), key=lambda _: rng.random())
    objects = []
    reach = REACH * SIZES["small"]
    for kind, (right, low) in zip(kinds, quarters, strict=False):
        x, y = (_on_lattice(reach + _MARGIN, 0.5 - reach - _GAP / 2, rng) for _ in range(2))
        objects.append(_object(kind, 1 - x if right else x, 1 - y if low else y))
    return tuple(objects)


def _object(kind: Demand, x: float, y: float) -> Object:
    return Object(kind.shape, str(kind.colour), SIZES[str(kind.size)], x, y)


def _caption(task: str, demands: Sequence[Demand], relation: str | None, rng: random.Random) -> str:
    """One of a few ways to say it."""
    if task == "counting":
        number = len(demands)
        text = f"{_NUMBERS[number - 1]} {_noun(demands[0], plural=number > 1)}"
        return _pick(rng, ("{}", "a picture of {}", f"there {'are' if number > 1 else 'is'} {{}}")).format(
            text
        )
    nouns = [f"a {_noun(demand)}" for demand in demands]
    if relation is not None:
        text = f" {_pick(rng, RELATIONS[relation])} ".join(nouns)
    elif len(nouns) == 2:
        text = _pick(rng, ("{} and {}", "both {} and {}", "{} with {}")).format(*nouns)
    else:
        text = nouns[0]
    return _pick(rng, ("{}", "a picture of {}", "there is {}")).format(text)


def _noun(demand: Demand, plural: bool = False) -> str:
    words = [word for word in (demand.size, demand.colour, demand.shape) if word]
    ending = "" if not plural else "es" if demand.shape.endswith("s") else "s"
    return " ".join(words) + ending + (f" at the {demand.place}" if demand.place else "")
