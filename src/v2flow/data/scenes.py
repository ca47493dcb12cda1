"""Captioned scenes of coloured shapes, sampled without end by the six tasks of GenEval (Ghosh et al. 2023, section 3).

What a caption does not say is free; what it says is recorded as demands, which a verifier can check exactly.
"""

import json
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from v2flow.data.writer import SPLITS
from v2flow.errors import V2FlowError

TASKS = ("single_object", "colors", "two_object", "color_attr", "position", "counting")
"""GenEval's names; sample i of a split is of task i mod 6."""
COLOURS = {
    "red": (230, 20, 30),
    "green": (25, 190, 60),
    "blue": (35, 75, 235),
    "yellow": (240, 190, 0),
    "purple": (170, 30, 220),
    "black": (15, 15, 15),
}
"""8-bit RGB on a white canvas."""
INK = "black"
"""The colour of things whose colour the caption does not say. Were it any, those of held-out combinations would be
missing from it, and what training never says it would still teach: to avoid them."""
SHAPES = ("circle", "square", "triangle", "cross", "ring", "bar")
SIZES = {"small": 9 / 32, "large": 13 / 32}
"""Diameters in sides of the canvas."""
SIZE_EDGE = 11 / 32
"""Between the two: how a verifier tells them apart."""
PITCH = 2 / 32
"""Centres lie on a lattice of this pitch, so that what tokenizer and LLM learn goes to what captions say."""
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
LEVELS = ("things", "pairs")
"""How new a held-out thing is, see :func:`held_out`."""
_SAID = {
    "single_object": ((), ("size",), ("size", "colour")),
    "colors": (("colour",), ("size", "colour")),
    "two_object": ((),),
    "color_attr": (("colour",),),
    "position": ((), ("colour",)),
    "counting": ((), ("colour",), ("size", "colour")),
}
"""Attributes beside the shape that a caption may name, by task."""
_NUMBERS = ("one", "two", "three", "four")
_MARGIN = 0.5 / 32
_GAP = 1.5 / 32


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
        """The word of a caption for the size."""
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
        """The attributes that are drawn, as `large blue ring + small red square`; none is in train and test."""
        return " + ".join(sorted(f"{o.size_word} {o.colour} {o.shape}" for o in self.objects))

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
        things: tuple[Object | Demand, ...] = (*scene.objects, *scene.demands)
        for each in things:
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
            raise V2FlowError(
                f"{where}: {name}: expected one of {', '.join(map(str, expected))}, found {found!r}"
            )
    return scene


@dataclass(frozen=True)
class HeldOut:
    """What training never shows.

    Attributes:
        things: (size, colour, shape) of one object.
        duos: two shapes in one picture, whatever their colours.
    """

    things: frozenset[tuple[str, str, str]]
    duos: frozenset[frozenset[str]]

    def among(self, demands: Sequence[Demand]) -> bool:
        """Whether a held-out combination is certain from what is demanded; a size that is not said may be any."""
        shapes = {demand.shape for demand in demands}
        return any(duo <= shapes for duo in self.duos) or any(
            all(
                (size, each.colour, each.shape) in self.things
                for size in ([each.size] if each.size else SIZES)
            )
            for each in demands
        )


@cache
def held_out(level: str = "things") -> HeldOut:
    """The combinations that only the split `test` shows, the same for every seed of samples.

    Each colour but INK loses two of its twelve pairs of size and shape, drawn at random: 10 of 60 things. At level
    `pairs` it loses one shape in both sizes, so that even the pair of colour and shape is new; at level `things`
    two shapes, one in either size, and the pair is seen in the other size. Shapes that are neighbours when the
    six stand in a circle in random order are never in one picture: 6 of 15 duos, each shape keeps three partners.

    Raises:
        V2FlowError: an unknown level.
    """
    if level not in LEVELS:
        raise V2FlowError(f"held_out: expected one of {', '.join(LEVELS)}, found {level!r}")
    rng = random.Random(f"held out {HELD_OUT_SEED}")
    shapes, circle = (sorted(SHAPES, key=lambda _: rng.random()) for _ in range(2))
    turn = 0 if level == "pairs" else 1
    things = frozenset(
        (size, colour, shapes[(place + turn * number) % len(shapes)])
        for place, colour in enumerate(colour for colour in COLOURS if colour != INK)
        for number, size in enumerate(SIZES)
    )
    duos = frozenset(frozenset(duo) for duo in zip(circle, circle[1:] + circle[:1], strict=True))
    return HeldOut(things, duos)


def sample_scene(seed: int, split: str, index: int, level: str = "things") -> Scene:
    """Scene `index` of an endless split: a pure function of its three arguments.

    `train` and `val` never show a combination of :func:`held_out`; each caption of `test` names at least one.

    Args:
        seed: not negative.
        split: `train`, `val` or `test`.
        index: not negative; `index` mod 6 is the task.
        level: one of LEVELS.

    Raises:
        V2FlowError: an unknown split, another level, a negative seed or index.
    """
    if split not in SPLITS:
        raise V2FlowError(f"split: expected one of {', '.join(SPLITS)}, found {split!r}")
    if seed < 0 or index < 0:
        raise V2FlowError(f"seed, index: expected numbers that are not negative, found {seed}, {index}")
    rng = random.Random(f"{seed} {split} {index}")
    task = TASKS[index % len(TASKS)]
    while True:
        demands, relation, kinds = _draw(task, rng)
        if held_out(level).among(demands if split == "test" else kinds) == (split == "test"):
            break
    objects = _quarters(kinds, rng) if task == "counting" else _place(kinds, relation, rng)
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
    if "colour" not in names:
        colours = (INK, INK)
    kinds = tuple(Demand(*each) for each in zip(shapes, colours, sizes, strict=True))
    demands = tuple(Demand(kind.shape, **{name: getattr(kind, name) for name in names}) for kind in kinds)
    if task == "counting":
        count = 1 + int(rng.random() * MAX_COUNT)
        return demands[:1] * count, None, kinds[:1] * count
    if task in ("single_object", "colors"):
        return demands[:1], None, kinds[:1]
    return demands, _pick(rng, tuple(RELATIONS)) if task == "position" else None, kinds


def _place(kinds: Sequence[Demand], relation: str | None, rng: random.Random) -> tuple[Object, ...]:
    """One or two objects anywhere on the canvas, two side by side or one above the other with a gap between them: large
    ones at opposite edges."""
    if len(kinds) == 1:
        return (_anywhere(kinds[0], rng),)
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


def _anywhere(kind: Demand, rng: random.Random) -> Object:
    reach = REACH * SIZES[str(kind.size)] + _MARGIN
    return _object(kind, *(_on_lattice(reach, 1 - reach, rng) for _ in range(2)))


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
    return " ".join(words) + ending
