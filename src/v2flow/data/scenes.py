"""Captioned scenes of coloured shapes, sampled without end by the six tasks of GenEval (Ghosh et al. 2023, section 3).

What a caption does not say is free; what it says is recorded as demands, which a verifier can check exactly.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import combinations
from typing import Any

import numpy as np

from v2flow.data.writer import SPLITS
from v2flow.errors import V2FlowError

TASKS = ("single_object", "colors", "two_object", "color_attr", "position", "counting")
"""GenEval's names; sample i of a split is of task i mod 6."""
COLOURS = {
    "red": (225, 25, 30),
    "green": (20, 155, 50),
    "blue": (35, 75, 235),
    "yellow": (255, 215, 0),
    "purple": (150, 35, 190),
    "black": (15, 15, 15),
}
"""8-bit RGB on a white canvas."""
SHAPES = ("circle", "square", "triangle", "cross", "ring")
SIZES = {"small": (8.25 / 32, 9.5 / 32), "large": (12.5 / 32, 14.0 / 32)}
"""Shortest and longest diameter in sides of the canvas: 8 to 14 pixels of 32."""
SIZE_EDGE = 11 / 32
RELATIONS = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
"""How the first object lies to the second, and the words for it."""
MAX_COUNT = 4
REACH = 0.55
"""No shape reaches farther from its centre along an axis, in diameters."""
HELD_OUT_SEED = 0
HELD_OUT_DUOS = 2
_NUMBERS = ("one", "two", "three", "four")
_MARGIN = 0.5 / 32
_GAP = 2.0 / 32


@dataclass(frozen=True)
class Object:
    """One thing in a picture.

    Attributes:
        shape, colour: one of SHAPES and of COLOURS; a verifier may also find the shape `unknown`.
        size: diameter in sides of the canvas.
        x, y: centre in sides of the canvas, from the left and from the top.
    """

    shape: str
    colour: str
    size: float
    x: float
    y: float

    @property
    def size_word(self) -> str:
        return "small" if self.size < SIZE_EDGE else "large"


@dataclass(frozen=True)
class Demand:
    """What a caption says of one object; None is not said."""

    shape: str
    colour: str | None = None
    size: str | None = None

    def fits(self, found: Object) -> bool:
        """Whether an object is what the caption says."""
        return (
            self.shape == found.shape
            and self.colour in (None, found.colour)
            and self.size in (None, found.size_word)
        )


@dataclass(frozen=True)
class Scene:
    """A picture to draw with its caption.

    Attributes:
        task: one of TASKS.
        caption: English text.
        objects: what is drawn.
        demands: what the caption says, one for each object it asks for.
        relation: one of RELATIONS, of the first demanded object to the second; None if the caption names none.
    """

    task: str
    caption: str
    objects: tuple[Object, ...]
    demands: tuple[Demand, ...]
    relation: str | None = None

    @property
    def group(self) -> str:
        """The combination of attributes that is drawn, as `blue ring + red square`; no group lies in train and test."""
        return " + ".join(sorted(f"{o.colour} {o.shape}" for o in self.objects))

    def to_json(self) -> str:
        """The scene on one line, read back by :func:`scene_from_json`."""
        return json.dumps(asdict(self) | {"group": self.group})


def scene_from_json(text: str | bytes, where: str = "scene") -> Scene:
    """A scene from the `json` member of a sample.

    Args:
        text: what `Scene.to_json` wrote.
        where: names the source in messages.

    Raises:
        V2FlowError: it is not a scene, or names an unknown task, shape, colour, size or relation.
    """
    try:
        value: dict[str, Any] = json.loads(text)
        scene = Scene(
            value["task"],
            value["caption"],
            tuple(Object(**each) for each in value["objects"]),
            tuple(Demand(**each) for each in value["demands"]),
            value["relation"],
        )
        checks: list[tuple[str, Any, Iterable[Any]]] = [
            ("task", scene.task, TASKS),
            ("relation", scene.relation, (None, *RELATIONS)),
        ]
        for each in (*scene.objects, *scene.demands):
            checks += [("shape", each.shape, SHAPES), ("colour", each.colour, (None, *COLOURS))]
        checks += [("size", demand.size, (None, *SIZES)) for demand in scene.demands]
        if scene.task == "position" and (scene.relation is None or len(scene.demands) != 2):
            raise ValueError("task position needs a relation and two demands")
    except (ValueError, KeyError, TypeError) as error:
        raise V2FlowError(
            f"{where}: expected the JSON of a scene, found {str(text)[:60]!r} ({error}); "
            "build the shards with `v2flow data shapes`"
        ) from error
    for name, found, expected in checks:
        if found not in expected:
            raise V2FlowError(f"{where}: {name}: expected one of {', '.join(map(str, expected))}, found {found!r}")
    return scene


@dataclass(frozen=True)
class HeldOut:
    """What training never shows.

    Attributes:
        pairs: (colour, shape) of one object.
        duos: two shapes in one picture, whatever their colours.
    """

    pairs: frozenset[tuple[str, str]]
    duos: frozenset[frozenset[str]]

    def among(self, things: Sequence[Object | Demand]) -> bool:
        """Whether objects, or what a caption says of them, hold a held-out combination."""
        shapes = {thing.shape for thing in things}
        return any((thing.colour, thing.shape) in self.pairs for thing in things) or any(
            duo <= shapes for duo in self.duos
        )


@cache
def held_out() -> HeldOut:
    """The combinations that only the split `test` shows, the same for every seed of samples.

    Each colour loses one shape, so that each shape loses one or two of its six colours, and two of the ten duos of
    different shapes, without a shape in common, are never seen together.
    """
    rng = np.random.default_rng(HELD_OUT_SEED)
    shapes = [SHAPES[i] for i in rng.permutation(len(SHAPES))]
    colours = [list(COLOURS)[i] for i in rng.permutation(len(COLOURS))]
    pairs = frozenset((colour, shapes[i % len(shapes)]) for i, colour in enumerate(colours))
    order = [SHAPES[i] for i in rng.permutation(len(SHAPES))]
    duos = frozenset(frozenset(order[2 * i : 2 * i + 2]) for i in range(HELD_OUT_DUOS))
    return HeldOut(pairs, duos)


def sample_scene(seed: int, split: str, index: int) -> Scene:
    """Scene `index` of an endless split: a pure function of its three arguments.

    `train` and `val` never show a combination of :func:`held_out`; each caption of `test` names at least one.

    Args:
        seed: not negative.
        split: `train`, `val` or `test`.
        index: not negative; `index` mod 6 is the task.

    Raises:
        V2FlowError: an unknown split, a negative seed or index.
    """
    if split not in SPLITS:
        raise V2FlowError(f"split: expected one of {', '.join(SPLITS)}, found {split!r}")
    if seed < 0 or index < 0:
        raise V2FlowError(f"seed, index: expected numbers that are not negative, found {seed}, {index}")
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    task = TASKS[index % len(TASKS)]
    while True:
        demands, relation, kinds = _draw(task, rng)
        if held_out().among(demands) if split == "test" else not held_out().among(kinds):
            break
    objects = _quarters(kinds, rng) if task == "counting" else _place(kinds, relation, rng)
    return Scene(task, _caption(task, demands, relation, rng), objects, demands, relation)


def _pick(rng: np.random.Generator, options: Iterable[Any]) -> Any:
    options = tuple(options)
    return options[rng.integers(len(options))]


def _draw(task: str, rng: np.random.Generator) -> tuple[tuple[Demand, ...], str | None, tuple[Demand, ...]]:
    """What a caption says, the relation, and all that is drawn: every attribute, said or not."""
    count = {"single_object": 1, "colors": 1, "counting": int(rng.integers(1, MAX_COUNT + 1))}.get(task, 2)
    number = 1 if task == "counting" else count  # of different things
    shapes = rng.permutation(len(SHAPES))[:number]
    colours = rng.permutation(len(COLOURS))[:number]
    kinds = tuple(
        Demand(SHAPES[s], list(COLOURS)[c], "small" if task == "counting" else _pick(rng, SIZES))
        for s, c in zip(shapes, colours, strict=True)
    )
    said = {
        "single_object": ((), ("size",), ("size", "colour")),
        "colors": (("colour",),),
        "two_object": ((),),
        "color_attr": (("colour",),),
        "position": ((), ("colour",)),
        "counting": ((), ("colour",)),
    }[task]
    names = _pick(rng, said)
    demands = tuple(Demand(kind.shape, **{name: getattr(kind, name) for name in names}) for kind in kinds)
    relation = _pick(rng, RELATIONS) if task == "position" else None
    if task == "counting":
        return demands * count, relation, kinds * count
    return demands, relation, kinds


def _place(kinds: Sequence[Demand], relation: str | None, rng: np.random.Generator) -> tuple[Object, ...]:
    """Anywhere on the canvas, apart from each other; a relation holds by a clear margin."""
    while True:
        sizes = [rng.uniform(*SIZES[kind.size or "small"]) for kind in kinds]
        places = [rng.uniform(REACH * s + _MARGIN, 1 - REACH * s - _MARGIN, 2) for s in sizes]
        apart = all(
            np.abs(places[a] - places[b]).max() >= REACH * (sizes[a] + sizes[b]) + _GAP
            for a, b in combinations(range(len(kinds)), 2)
        )
        if apart and (relation is None or _clearly(relation, *places)):
            return tuple(_object(*each) for each in zip(kinds, sizes, places, strict=True))


def _clearly(relation: str, first: np.ndarray, second: np.ndarray) -> bool:
    """Within 27 degrees of the axis: the offset across is at most half of the offset along it."""
    axis = 0 if relation in ("left", "right") else 1
    offset = (first - second) * (1 if relation in ("right", "below") else -1)
    return bool(offset[axis] > 0 and abs(offset[1 - axis]) <= 0.5 * offset[axis])


def _quarters(kinds: Sequence[Demand], rng: np.random.Generator) -> tuple[Object, ...]:
    """Each object somewhere in its own quarter of the canvas, so that four can be told apart at 32 pixels."""
    objects = []
    for kind, quarter in zip(kinds, rng.permutation(4), strict=False):
        size = rng.uniform(*SIZES["small"])
        outer, inner = REACH * size + _MARGIN, 0.5 - REACH * size - _GAP / 2
        place = rng.uniform(outer, inner, 2)
        mirrored = np.array([quarter % 2, quarter // 2], dtype=bool)
        objects.append(_object(kind, size, np.where(mirrored, 1 - place, place)))
    return tuple(objects)


def _object(kind: Demand, size: float, place: np.ndarray) -> Object:
    x, y = place.tolist()
    return Object(kind.shape, str(kind.colour), round(size, 5), round(x, 5), round(y, 5))


def _caption(task: str, demands: Sequence[Demand], relation: str | None, rng: np.random.Generator) -> str:
    """One of a few ways to say it."""
    if task == "counting":
        number = len(demands)
        text = f"{_NUMBERS[number - 1]} {_noun(demands[0], plural=number > 1)}"
        return _pick(rng, ("{}", "a picture of {}", f"there {'are' if number > 1 else 'is'} {{}}")).format(text)
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
    return " ".join(words) + ending
