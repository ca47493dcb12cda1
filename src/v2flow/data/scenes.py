"""Scenes of coloured shapes with captions of the six tasks of GenEval (Ghosh et al. 2023, section 3).

What a caption says is recorded as demands, which a verifier can check exactly.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from v2flow.errors import V2FlowError

TASKS = ("single_object", "colors", "two_object", "color_attr", "position", "counting")
"""GenEval's names."""
COLOURS = {
    "red": (230, 20, 30),
    "green": (25, 190, 60),
    "blue": (35, 75, 235),
    "yellow": (240, 190, 0),
    "purple": (170, 30, 220),
    "black": (15, 15, 15),
}
"""8-bit RGB on a white canvas."""
SHAPES = ("circle", "square", "triangle", "cross", "ring", "bar")
SIZES = {"small": 9 / 32, "large": 13 / 32}
"""Diameters in sides of the canvas."""
SIZE_EDGE = 11 / 32
"""Between the two: how a verifier tells them apart."""
RELATIONS = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
"""How the first object lies to the second, and the words for it."""
PLACES = ("top left", "top right", "bottom left", "bottom right")
"""The quarters of the canvas."""
PLACE_EDGE = 3 / 32
"""From the middle of the canvas: what is nearer to it along an axis is in no quarter."""
REACH = 0.55
"""No shape reaches farther from its centre along an axis, in diameters."""


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

    @property
    def place(self) -> str | None:
        """The quarter of the canvas that the centre is in, one of PLACES; None near the middle lines."""
        if min(abs(self.x - 0.5), abs(self.y - 0.5)) < PLACE_EDGE:
            return None
        return PLACES[2 * (self.y > 0.5) + (self.x > 0.5)]


@dataclass(frozen=True)
class Demand:
    """What a caption says of one object; None is not said."""

    shape: str
    colour: str | None = None
    size: str | None = None
    place: str | None = None

    def fits(self, found: Object) -> bool:
        """Whether an object is what the caption says."""
        return (
            self.shape == found.shape
            and self.colour in (None, found.colour)
            and self.size in (None, found.size_word)
            and self.place in (None, found.place)
        )


def canonical_relation(first: str, relation: str, second: str) -> tuple[str, str, str]:
    """A relation said from the left or from above: `a right of b` is `b left of a`."""
    turned = {"right": "left", "below": "above"}
    return (second, turned[relation], first) if relation in turned else (first, relation, second)


@dataclass(frozen=True)
class Scene:
    """A picture to draw with its caption.

    Attributes:
        task: one of TASKS.
        caption: English text.
        objects: what is drawn.
        demands: what the caption says, one for each object.
        relation: one of RELATIONS, of the first demanded object to the second; None if the caption names none.
    """

    task: str
    caption: str
    objects: tuple[Object, ...]
    demands: tuple[Demand, ...]
    relation: str | None = None

    @property
    def group(self) -> str:
        """What is drawn and said of it, as `blue ring + red square`, `red bar at the top left` or `black ring above
        black bar`; none is in train and test."""
        things = [
            f"{thing.colour} {thing.shape}" + (f" at the {demand.place}" if demand.place else "")
            for thing, demand in zip(self.objects, self.demands, strict=True)
        ]
        if self.relation is None:
            return " + ".join(sorted(things))
        first, relation, second = canonical_relation(things[0], self.relation, things[1])
        return f"{first} {RELATIONS[relation][0]} {second}"

    def to_json(self) -> str:
        """The scene on one line, read back by :func:`scene_from_json`."""
        return json.dumps(asdict(self) | {"group": self.group})


def scene_from_json(text: str | bytes, where: str = "scene") -> Scene:
    """A scene from the `json` member of a sample.

    Args:
        text: what `Scene.to_json` wrote.
        where: names the source in messages.

    Raises:
        V2FlowError: it is not a scene, or names an unknown task, shape, colour, size, place or relation.
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
        if len(scene.objects) != len(scene.demands):
            raise ValueError(f"{len(scene.demands)} demands for {len(scene.objects)} objects")
        for each in scene.objects:
            checks += [("shape", each.shape, SHAPES), ("colour", each.colour, COLOURS)]
        for demand in scene.demands:
            checks += [("shape", demand.shape, SHAPES), ("colour", demand.colour, (None, *COLOURS))]
            checks += [("size", demand.size, (None, *SIZES)), ("place", demand.place, (None, *PLACES))]
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
