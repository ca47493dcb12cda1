"""`v2flow evaluate` of a text-to-image model: its own options, and which of the others do not go with it."""

import argparse
from typing import Any

from v2flow.errors import V2FlowError

_SAMPLING = ("temperature", "top_k", "top_p", "guidance")
_OWN = ("pictures", "retrieval_pictures", "ways", "no_untrained", "draws", *_SAMPLING)


def add_text_to_image_options(parser: argparse.ArgumentParser) -> None:
    """Options left out stay out of the namespace."""
    group = parser.add_argument_group("text to image", "for checkpoints of captions to pictures only")
    unset = argparse.SUPPRESS
    group.add_argument(
        "--pictures", type=int, default=unset, metavar="N", help="draw the first N captions; default: 256"
    )
    group.add_argument("--retrieval-pictures", type=int, default=unset, metavar="N", help="find the captions of the "
                       "first N pictures; default: 256")  # fmt: skip
    group.add_argument("--ways", type=int, default=unset, metavar="N", help="among N captions; default: 16")
    group.add_argument("--draws", type=int, default=unset, metavar="N", help="draw every caption N times for the "
                       "distances of sets; default: 1")  # fmt: skip
    group.add_argument("--no-untrained", action="store_true", default=unset, help="leave out the row of the model "
                       "before its training")  # fmt: skip
    group.add_argument(
        "--temperature", type=float, default=unset, help="of the visual tokens; 0: most probable"
    )
    group.add_argument(
        "--top-k", type=int, default=unset, metavar="K", help="among the K most probable tokens"
    )
    group.add_argument(
        "--top-p", type=float, default=unset, metavar="P", help="among tokens of total probability P"
    )
    group.add_argument("--guidance", type=float, default=unset, help="classifier-free scale; 1 is none")


def refuse_text_to_image_options(options: argparse.Namespace) -> None:
    """Refuse the options of a text-to-image model for a tokenizer.

    Raises:
        V2FlowError: one was given.
    """
    given = next((name for name in _OWN if hasattr(options, name)), None)
    if given is not None:
        raise V2FlowError(
            f"option --{given.replace('_', '-')}: expected a text-to-image model, found another one: "
            f"{options.checkpoint}; leave it out"
        )


def run_evaluate_text_to_image(options: argparse.Namespace) -> None:
    """`v2flow evaluate` of a text-to-image model."""
    _refuse_tokenizer_options(options)
    from v2flow.decode_modes import PRESETS
    from v2flow.t2i.metrics.checkpoint import evaluate_text_to_image_checkpoint
    from v2flow.t2i.metrics.table import text_to_image_table

    numbers = ("pictures", "retrieval_pictures", "ways")
    given: dict[str, Any] = {name: getattr(options, name) for name in numbers if hasattr(options, name)}
    report = evaluate_text_to_image_checkpoint(
        options.checkpoint,
        options.data,
        train=options.floors_train,
        limit=options.limit,
        drawing=_drawing(options),
        preset=next((mode for mode in options.modes or [] if mode in PRESETS), None),
        features=not options.no_features,
        untrained=not getattr(options, "no_untrained", False),
        json_path=options.json,
        grid_path=options.grid,
        num_workers=options.workers,
        allow_pipe=options.allow_pipe,
        progress=True,
        **given,
    )
    print(text_to_image_table(report))


def _drawing(options: argparse.Namespace) -> Any:
    """How to draw, as the options say; of a preset what is shipped, as the model's own is not read yet."""
    from v2flow.decode_modes import select_modes, shipped_presets
    from v2flow.evaluate import FOLDER_MODES
    from v2flow.t2i.metrics.rows import Drawing

    modes = select_modes(options.modes, FOLDER_MODES, shipped_presets())
    if len(modes) != 1:
        raise V2FlowError(
            f"option --modes: expected one way to turn visual tokens into pixels, found {len(modes)}"
        )
    sampling = {name: getattr(options, name) for name in _SAMPLING if hasattr(options, name)}
    decode = next(iter(modes.values()))
    return Drawing(sampling, decode, options.batch_size, options.seed, getattr(options, "draws", 1))


def _refuse_tokenizer_options(options: argparse.Namespace) -> None:
    for name, given in (
        ("probes", options.probes),
        ("inception-weights", options.inception_weights),
        ("weights raw", "ema" not in options.weights),
    ):
        if given:
            raise V2FlowError(
                f"option --{name}: expected a tokenizer, found a text-to-image model: {options.checkpoint}; "
                "leave it out"
            )
