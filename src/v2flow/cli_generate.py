"""The verb `generate`: pictures of captions."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from v2flow.cli_words import sentence
from v2flow.errors import V2FlowError

if TYPE_CHECKING:
    from torch import Tensor

    from v2flow.t2i.prompts import Prompt

GRID_PICTURES, GRID_COLUMNS = 64, 8
REPORT = "generate.json"


def add_generate_verb(verbs: Any) -> None:
    """Adds the verb to the subparsers of `v2flow`."""
    summary = "pictures of captions, by a text-to-image model"
    parser = verbs.add_parser("generate", help=summary, description=sentence(summary))
    parser.set_defaults(run=run_generate)
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="a .ckpt file of `v2flow fit`, a folder of `v2flow export`, or a hub id",
    )
    parser.add_argument("captions", nargs="*", metavar="CAPTION", help="texts to draw")
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="more captions: one a line, or .jsonl with the key prompt",
    )
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="pictures a caption; default: 1")
    where = parser.add_argument_group("where to", "at least one of --out and --geneval")
    where.add_argument("--out", type=Path, metavar="DIR", help=f"folder for pictures and {REPORT}")
    where.add_argument(
        "--geneval", type=Path, metavar="DIR", help="folder that GenEval's official evaluator reads"
    )
    where.add_argument(
        "--grid", type=Path, metavar="FILE", help=f"also the first {GRID_PICTURES} pictures as one PNG"
    )
    how = parser.add_argument_group("how to draw")
    how.add_argument("--temperature", type=float, default=1.0, help="of the visual tokens; 0: most probable")
    how.add_argument("--top-k", type=int, metavar="K", help="among the K most probable tokens")
    how.add_argument("--top-p", type=float, metavar="P", help="among tokens of total probability P")
    how.add_argument("--guidance", type=float, default=1.0, help="classifier-free scale; 1 is none")
    how.add_argument("--seed", type=int, default=0, help="of all draws; default: 0")
    how.add_argument(
        "--mode",
        default="one_step",
        metavar="MODE",
        help="how tokens become pixels: one_step, a preset (fast, balanced, best), or written out: "
        "steps=8,temperature=0.5",
    )
    how.add_argument(
        "--batch-size", type=int, default=16, metavar="N", help="captions at a time; default: 16"
    )


def run_generate(options: argparse.Namespace) -> None:
    """`v2flow generate`."""
    from v2flow.t2i.prompts import Prompt, check_geneval, read_prompts

    if options.out is None and options.geneval is None:
        raise V2FlowError("options --out and --geneval: expected one of them, found neither; name a folder")
    if options.samples < 1:
        raise V2FlowError(f"option --samples: expected at least 1, found {options.samples}")
    if options.batch_size < 1:
        raise V2FlowError(f"option batch_size: expected at least 1, found {options.batch_size}")
    prompts = [Prompt(caption) for caption in options.captions]
    if options.prompts is not None:
        prompts += read_prompts(options.prompts)
    if not prompts:
        raise V2FlowError(
            "captions: expected at least one, found none; write some or name a file: --prompts FILE"
        )
    if options.geneval is not None:
        check_geneval(prompts)
    count = _draw(options, prompts)
    print(f"{count} pictures: {options.out if options.out is not None else options.geneval}")


def _draw(options: argparse.Namespace, prompts: "Sequence[Prompt]") -> int:
    """Draws and writes everything; returns the number of pictures."""
    import torch

    from v2flow.cli_progress import waiting
    from v2flow.decode_modes import PRESETS, presets_of, select_modes, shipped_presets
    from v2flow.devices import pick_device
    from v2flow.evaluate import FOLDER_MODES
    from v2flow.images import save_grid
    from v2flow.inference import load_text_to_image_model
    from v2flow.t2i.generation import generation_options

    names = ("temperature", "top_k", "top_p", "guidance")
    how = {name: getattr(options, name) for name in names}
    generation_options(how)  # refused before a model is loaded
    decode = next(iter(select_modes([options.mode], FOLDER_MODES, shipped_presets()).values()))
    with waiting(f"loading {options.checkpoint}"):
        model = load_text_to_image_model(options.checkpoint)
    if options.mode in PRESETS:
        decode = dict(presets_of(model.tokenizer)[options.mode])
    model.to(pick_device())
    captions = [prompt.caption for prompt in prompts for _ in range(options.samples)]
    model.caption_ids(captions)  # a bad one is refused before anything is drawn
    first: list[Tensor] = []
    for index, picture in enumerate(_pictures(options, model, captions, how, decode)):
        _write(options, captions[index], index, picture)
        if len(first) < GRID_PICTURES:
            first.append(picture)
    _write_records(options, prompts, captions, {**how, "decode": decode})
    if options.grid is not None:
        columns = options.samples if options.samples > 1 else GRID_COLUMNS
        save_grid([torch.stack(first)], options.grid, columns)
    return len(captions)


def _pictures(
    options: argparse.Namespace,
    model: Any,
    captions: Sequence[str],
    how: dict[str, Any],
    decode: dict[str, Any],
) -> "Iterator[Tensor]":
    """Pictures [3, S, S] of the captions, drawn a batch at a time."""
    import torch

    from v2flow.cli_progress import progress_bar
    from v2flow.t2i.generation import generate_ids
    from v2flow.training.module import seeded_generator

    draws, noise = (seeded_generator(torch.device("cpu"), options.seed, purpose) for purpose in (0, 1))
    with progress_bar("draw", total=len(captions)) as bar:
        for start in range(0, len(captions), options.batch_size):
            part = captions[start : start + options.batch_size]
            ids = generate_ids(model, part, batch_size=options.batch_size, generator=draws, **how)
            yield from model.tokenizer.decode(ids, noise, **decode).cpu()
            bar.update(len(part))


def _write(options: argparse.Namespace, caption: str, index: int, picture: "Tensor") -> None:
    from v2flow.images import save_image
    from v2flow.t2i.prompts import geneval_picture, picture_name

    if options.out is not None:
        save_image(picture, options.out / picture_name(index, caption))
    if options.geneval is not None:
        save_image(picture, geneval_picture(options.geneval, *divmod(index, options.samples)))


def _write_records(
    options: argparse.Namespace, prompts: "Sequence[Prompt]", captions: Sequence[str], how: dict[str, Any]
) -> None:
    from v2flow.metrics.files import write_json
    from v2flow.t2i.prompts import picture_name, write_geneval_records

    if options.geneval is not None:
        write_geneval_records(options.geneval, prompts)
    if options.out is not None:
        pictures = [
            {"file": picture_name(index, caption), "caption": caption}
            for index, caption in enumerate(captions)
        ]
        write_json(
            options.out / REPORT,
            {"checkpoint": options.checkpoint, "seed": options.seed, **how, "pictures": pictures},
        )
