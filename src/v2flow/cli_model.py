"""Verbs that use a trained model: evaluate, encode, decode, reconstruct, export."""

import argparse
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from v2flow.cli_evaluate import (
    add_text_to_image_options,
    refuse_text_to_image_options,
    run_evaluate_text_to_image,
)
from v2flow.cli_words import sentence
from v2flow.errors import V2FlowError

CHECKPOINT_HELP = "a .ckpt file of `v2flow fit`, or a folder of `v2flow export`"


class _Solvers:
    """Names of `samplers.SOLVERS`; that module, and torch with it, is imported when they are asked for."""

    def __iter__(self) -> Iterator[str]:
        from v2flow.samplers import SOLVERS

        return iter(SOLVERS)


def add_model_verbs(verbs: Any) -> None:
    """Adds the verbs to the subparsers of `v2flow`."""
    _add_evaluate(verbs)
    encode = _add_verb(verbs, "encode", run_encode, "visual token ids of pictures, as an .npz file")
    encode.add_argument(
        "images", nargs="+", metavar="IMAGE", help="picture files; centre-cropped and resized"
    )
    encode.add_argument(
        "--out", required=True, type=Path, metavar="FILE", help="one array [N] for each file name"
    )
    decode = _add_verb(verbs, "decode", run_decode, "pictures from an .npz file of ids")
    decode.add_argument("ids", type=Path, metavar="IDS", help="file made by `v2flow encode`")
    decode.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for NAME.png")
    _add_decode_options(decode)
    reconstruct = _add_verb(verbs, "reconstruct", run_reconstruct, "encode and decode pictures")
    reconstruct.add_argument(
        "images", nargs="+", metavar="IMAGE", help="picture files; centre-cropped and resized"
    )
    reconstruct.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for NAME.png")
    reconstruct.add_argument(
        "--grid", type=Path, metavar="FILE", help="also originals above reconstructions, a PNG"
    )
    reconstruct.add_argument("--json", type=Path, metavar="FILE", help="also the PSNR of each picture")
    _add_decode_options(reconstruct)
    export = _add_verb(verbs, "export", run_export, "a folder for from_pretrained, in the Hugging Face way")
    export.add_argument("folder", type=Path, metavar="DIR", help="new or empty folder to write")
    export.add_argument("--encoder", action="store_true", help="also write encoder.pt2 beside the tokenizer: pictures "
                        "to ids, for plain torch without v2flow")  # fmt: skip


def _add_verb(verbs: Any, name: str, run: Any, summary: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=summary, description=sentence(summary))
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=CHECKPOINT_HELP)
    if name != "evaluate":
        parser.add_argument(
            "--weights", choices=("ema", "raw"), default="ema", help="of a .ckpt file; default: ema"
        )
    parser.set_defaults(run=run)
    return parser


def _add_evaluate(verbs: Any) -> None:
    parser = _add_verb(
        verbs,
        "evaluate",
        run_evaluate,
        "score reconstructions of shards in all decode modes, or pictures of captions",
    )
    parser.add_argument(
        "--data", required=True, nargs="+", metavar="SHARDS", help="tar files; brace globs are expanded"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write figures and their protocol here")
    parser.add_argument("--grid", type=Path, metavar="FILE", help="write the first 16 pictures, originals first; of "
                        "captions the first 64")  # fmt: skip
    parser.add_argument(
        "--weights", nargs="+", choices=("ema", "raw"), default=["ema", "raw"], help="default: both"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="the first N pictures only")
    parser.add_argument(
        "--modes",
        nargs="+",
        metavar="MODE",
        help="some of the checkpoint's decode modes, presets (fast, balanced, best), or written out: "
        "steps=8,temperature=0.5",
    )
    parser.add_argument(
        "--batch-size", type=int, default=64, metavar="N", help="decides which noise a picture gets"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the decoding noise")
    parser.add_argument(
        "--no-features", action="store_true", help="leave out feature distances: fidelity only"
    )
    parser.add_argument("--inception-weights", metavar="FILE", help="torch-fidelity's weights, for rFID")
    parser.add_argument("--floors-train", nargs="+", metavar="SHARDS", help="training shards: adds the rows of the "
                        "mean picture and of the nearest training picture")  # fmt: skip
    parser.add_argument(
        "--allow-pipe", action="store_true", help="accept shards `pipe:COMMAND`, which run a shell command"
    )
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="loader processes")
    parser.add_argument("--probes", nargs="+", default=[], metavar="PROBE", help="further questions put to the "
                        "averaged weights: decoding, robustness, alignment, domains")  # fmt: skip
    parser.add_argument("--probe-limit", type=int, default=1000, metavar="N", help="the first N pictures for "
                        "each of them; default: 1000")  # fmt: skip
    add_text_to_image_options(parser)


def _add_decode_options(parser: argparse.ArgumentParser) -> None:
    """Options left out stay out of the namespace; without any, the checkpoint's first decode mode is used."""
    group = parser.add_argument_group(
        "how to decode", "either --mode, or options of your own; neither: the checkpoint's first mode"
    )
    group.add_argument("--mode", metavar="NAME", help="one of the checkpoint's decode modes, or a preset: fast, "
                       "balanced or best")  # fmt: skip
    unset = argparse.SUPPRESS
    group.add_argument("--steps", type=int, default=unset, help="ODE steps in each AR iteration")
    group.add_argument("--iterations", type=int, default=unset, help="AR iterations")
    group.add_argument("--guidance", type=float, default=unset, help="guidance scale; 1 is none")
    group.add_argument("--guidance-schedule", choices=("constant", "linear"), default=unset)
    group.add_argument("--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), default=unset,
                       help="times from 0 to 1 between which guidance acts")  # fmt: skip
    # With a metavar argparse does not look at the choices before they are needed.
    group.add_argument(
        "--solver", choices=_Solvers(), default=unset, metavar="NAME", help="of the ODE: %(choices)s"
    )
    group.add_argument("--timestep-shift", type=float, default=unset, help="above 1: more steps near noise")
    group.add_argument(
        "--temperature", type=float, default=unset, help="standard deviation of the first noise"
    )
    group.add_argument("--seed", type=int, default=0, help="of the noise; default: 0")


def run_evaluate(options: argparse.Namespace) -> None:
    """`v2flow evaluate`."""
    from v2flow.inference import is_text_to_image

    if is_text_to_image(options.checkpoint):
        run_evaluate_text_to_image(options)
        return
    refuse_text_to_image_options(options)
    from v2flow.evaluate import evaluate_checkpoint

    report = evaluate_checkpoint(
        options.checkpoint,
        options.data,
        weights=options.weights,
        limit=options.limit,
        batch_size=options.batch_size,
        seed=options.seed,
        modes=options.modes,
        features=not options.no_features,
        inception_weights=options.inception_weights,
        floors_train=options.floors_train,
        json_path=options.json,
        grid_path=options.grid,
        allow_pipe=options.allow_pipe,
        num_workers=options.workers,
        probes=options.probes,
        probe_limit=options.probe_limit,
        progress=True,
    )
    from v2flow.cli_report import evaluation_table
    from v2flow.probes.lines import probe_lines

    print("\n".join([evaluation_table(report), *probe_lines(report)]))


def run_encode(options: argparse.Namespace) -> None:
    """`v2flow encode`."""
    from v2flow.cli_progress import progress_bar, waiting
    from v2flow.inference import LoadedModel, named_pictures, write_ids

    names = named_pictures(options.images)
    with waiting(f"loading {options.checkpoint}"):
        loaded = LoadedModel(options.checkpoint, options.weights)
    ids = {name: loaded.encode(loaded.picture(path)) for name, path in progress_bar("encode", names.items())}
    write_ids(options.out, ids)
    print(f"{len(ids)} pictures, {loaded.model.num_tokens} ids each: {options.out}")


def run_decode(options: argparse.Namespace) -> None:
    """`v2flow decode`."""
    from v2flow.cli_progress import progress_bar, waiting
    from v2flow.images import save_image
    from v2flow.inference import LoadedModel, read_ids

    ids = read_ids(options.ids)
    with waiting(f"loading {options.checkpoint}"):
        loaded = LoadedModel(options.checkpoint, options.weights)
    how = loaded.decode_options(options.mode, chosen_decode_options(options))
    for i, (name, row) in enumerate(progress_bar("decode", ids.items())):
        save_image(loaded.decode(row, how, (options.seed, i)), options.out / f"{Path(name).stem}.png")
    print(f"{len(ids)} pictures: {options.out}")


def run_reconstruct(options: argparse.Namespace) -> None:
    """`v2flow reconstruct`."""
    import torch

    from v2flow.cli_progress import progress_bar, waiting
    from v2flow.images import save_grid, save_image
    from v2flow.inference import LoadedModel, named_pictures, picture_psnr
    from v2flow.metrics.files import write_json

    names = named_pictures(options.images)
    with waiting(f"loading {options.checkpoint}"):
        loaded = LoadedModel(options.checkpoint, options.weights)
    how = loaded.decode_options(options.mode, chosen_decode_options(options))
    originals = {name: loaded.picture(path) for name, path in names.items()}
    results = {}
    for i, (name, picture) in enumerate(progress_bar("reconstruct", originals.items())):
        results[name] = loaded.decode(loaded.encode(picture), how, (options.seed, i))
        save_image(results[name], options.out / f"{Path(name).stem}.png")
    figures = {name: picture_psnr(originals[name], result) for name, result in results.items()}
    for name, figure in figures.items():
        print(f"{name}: psnr {figure:.2f} dB")
    if options.grid is not None:
        save_grid([torch.stack(list(originals.values())), torch.stack(list(results.values()))], options.grid)
    if options.json is not None:
        write_json(
            options.json,
            {"checkpoint": options.checkpoint, "decode": how, "seed": options.seed, "psnr": figures},
        )


def run_export(options: argparse.Namespace) -> None:
    """`v2flow export`."""
    from v2flow.cli_progress import waiting
    from v2flow.inference import export_model, is_text_to_image

    with waiting(f"exporting {options.checkpoint}"):
        export_model(options.checkpoint, options.weights, options.folder)
    if options.encoder:
        inside = options.folder / "tokenizer" if is_text_to_image(str(options.folder)) else options.folder
        with waiting("exporting the encoder"):
            _export_encoder(inside, options.folder)
    print(f"exported: {options.folder}")


def _export_encoder(tokenizer: Path, exported: Path) -> None:
    """Adds the encoder's program to a tokenizer's folder; without it `exported` goes again: all of it or nothing."""
    from v2flow import V2FlowTokenizer
    from v2flow.encoder_export import save_encoder

    try:
        save_encoder(V2FlowTokenizer.from_pretrained(tokenizer), tokenizer)
    except BaseException:
        shutil.rmtree(exported, ignore_errors=True)
        raise


def chosen_decode_options(options: argparse.Namespace) -> dict[str, Any]:
    """The decode options that the user gave, by the names that `decode` has for them."""
    names = (
        "steps",
        "iterations",
        "guidance",
        "guidance_schedule",
        "guidance_interval",
        "solver",
        "timestep_shift",
        "temperature",
    )
    chosen = {name: getattr(options, name) for name in names if hasattr(options, name)}
    if chosen and options.mode is not None:
        raise V2FlowError(f"options --mode and --{next(iter(chosen))}: expected one of them")
    return chosen
