"""The shapes score: the share of pictures that show what their captions say, by task, beside floor and ceiling."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from v2flow.data.scene_sampler import held_out
from v2flow.data.scenes import Scene
from v2flow.metrics.scene_verifier import score_scenes
from v2flow.t2i.metrics.rows import GENERATED, SHUFFLED, WORDS


def shapes_rows(
    rows: Mapping[str, Tensor], scenes: Sequence[Scene], order: Tensor
) -> dict[str, dict[str, float]]:
    """Row name -> task -> share in [0, 1], and `overall`; see `score_scenes`.

    `captions_shuffled` is the generated pictures against other scenes' captions: chance. The row `words_shuffled` is
    left out: its captions say nothing.

    Args:
        rows: pictures `[n, 3, S, S]`, floating point in [0, 1] or uint8, with the row `generated`.
        scenes: one for each picture.
        order: permutation `[n]` of the scenes for `captions_shuffled`.

    Raises:
        V2FlowError: pictures of a size that the verifier does not read, or another number of scenes.
    """
    scores = {name: score_scenes(pictures, scenes) for name, pictures in rows.items() if name != WORDS}
    shuffled = {SHUFFLED: score_scenes(rows[GENERATED], [scenes[i] for i in order.tolist()])}
    return {GENERATED: scores.pop(GENERATED)} | shuffled | scores


def duo_rows(pictures: Tensor, scenes: Sequence[Scene]) -> dict[str, dict[str, float]]:
    """The scores of `new_duo`, two shapes that training never shows in one picture, and of `seen_duo`.

    Of the tasks whose held-out scenes are of both kinds, with two different shapes. The latter are new by their colours
    or by what is said of how they lie; see `scene_sampler.held_out`. Scenes without any held-out duo give no rows.

    Args:
        pictures: generated, `[n, 3, S, S]`, floating point in [0, 1] or uint8.
        scenes: one for each picture.

    Returns:
        Row -> task -> share in [0, 1], `overall`, and the number of `pictures`.
    """
    parts: dict[str, list[int]] = {"new_duo": [], "seen_duo": []}
    for index, scene in enumerate(scenes):
        shapes = frozenset(each.shape for each in scene.objects)
        if scene.task in ("color_attr", "position") and len(shapes) == 2:
            parts["new_duo" if shapes in held_out().duos else "seen_duo"].append(index)
    if not parts["new_duo"]:
        return {}
    return {
        name: score_scenes(pictures[part], [scenes[i] for i in part]) | {"pictures": len(part)}
        for name, part in parts.items()
        if part
    }
