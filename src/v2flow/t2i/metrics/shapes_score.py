"""The shapes score: the share of pictures that show what their captions say, by task, beside floor and ceiling."""

from collections.abc import Mapping, Sequence

from torch import Tensor

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
