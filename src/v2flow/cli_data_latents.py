"""`v2flow data latents`: pictures and their mirror images through a codec, once for every training on them."""

import argparse
from pathlib import Path
from typing import Any, get_args

from v2flow.cli_words import sentence
from v2flow.config import CodecConfig, from_dict
from v2flow.errors import V2FlowError, first_line

_CODEC_OPTIONS = {
    "codec": "kind",
    "codec_path": "path",
    "patch_size": "patch_size",
    "scale": "scale",
    "shift": "shift",
}


def add_latents_verb(kinds: Any) -> None:
    """Adds `latents` to the subparsers of `v2flow data`."""
    summary = (
        "codec latents of pictures and of their mirror images, encoded once for the training of a tokenizer"
    )
    parser = kinds.add_parser("latents", help=summary, description=sentence(summary))
    parser.set_defaults(run=run_latents)
    parser.add_argument(
        "--data",
        required=True,
        nargs="+",
        metavar="SHARDS",
        help="pictures; file names with the word train, val or test",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the shards")
    _add_codec_options(parser)
    parser.add_argument("--dtype", choices=("fp16", "bf16", "fp32"), default="fp16", help="default: fp16")
    parser.add_argument(
        "--flip",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also latents of the mirror images, for data.flip; default: --flip",
    )
    parser.add_argument(
        "--batch-size", type=int, default=32, metavar="N", help="pictures at a time; default: 32"
    )
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes that encode a shard each; default: 1"
    )
    parser.add_argument(
        "--device", metavar="DEVICE", help="e.g. cpu or cuda:1; default: all CUDA devices, else cpu"
    )
    parser.add_argument(
        "--allow-pipe", action="store_true", help="accept shards `pipe:COMMAND`, which run a shell command"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the counts here")


def _add_codec_options(parser: argparse.ArgumentParser) -> None:
    """Those left out stay out of the namespace."""
    group = parser.add_argument_group("codec", "that of an experiment file, or one of these options")
    unset = argparse.SUPPRESS
    group.add_argument(
        "--config", type=Path, metavar="EXPERIMENT", help="take the codec and the size of this experiment"
    )
    kinds = get_args(CodecConfig.__annotations__["kind"])
    group.add_argument("--codec", choices=kinds, default=unset, help="kind of the codec")
    group.add_argument("--codec-path", default=unset, metavar="PATH", help="folder or hub id of its weights")
    group.add_argument("--patch-size", type=int, default=unset, metavar="PX", help="with --codec patch")
    group.add_argument("--scale", type=float, default=unset, help="factor that brings latents to unit scale")
    group.add_argument("--shift", type=float, default=unset, help="with --codec patch")
    group.add_argument("--image-size", type=int, default=unset, metavar="PX", help="side of the pictures")


def run_latents(options: argparse.Namespace) -> None:
    """`v2flow data latents`."""
    config, image_size = _codec_of(options)
    from v2flow.data.latents_build import build_latents

    counts = build_latents(
        config,
        image_size,
        options.data,
        options.out,
        dtype=options.dtype,
        flip=options.flip,
        batch_size=options.batch_size,
        workers=options.workers,
        device=options.device,
        allow_pipe=options.allow_pipe,
    )
    if options.json is not None:
        from v2flow.metrics.files import write_json

        write_json(options.json, {"samples": counts or {}, "complete": counts is not None})
    if counts is None:
        print(f"this task's shards are done, others are not: {options.out}")
    else:
        print(", ".join(f"{count} {split}" for split, count in counts.items()) + f": {options.out}")


def _codec_of(options: argparse.Namespace) -> tuple[CodecConfig, int]:
    given = {
        name: getattr(options, name) for name in (*_CODEC_OPTIONS, "image_size") if hasattr(options, name)
    }
    if options.config is not None:
        if given:
            raise V2FlowError(
                f"option --{next(iter(given)).replace('_', '-')}: expected none beside --config, whose experiment "
                "names the codec; leave one of them out"
            )
        return read_codec(options.config)
    if "codec" not in given or "image_size" not in given:
        raise V2FlowError("options: expected --config EXPERIMENT, or --codec and --image-size")
    size = given.pop("image_size")
    return CodecConfig(**{_CODEC_OPTIONS[name]: value for name, value in given.items()}), size


def read_codec(experiment: Path) -> tuple[CodecConfig, int]:
    """The codec and the image size of an experiment file; no model is built.

    Raises:
        V2FlowError: not an experiment file of a model with a codec.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from v2flow.config import TokenizerConfig

    try:
        document: Any = OmegaConf.create(experiment.read_text())
        arguments = document["model"]["init_args"]
        name = next(name for name in ("tokenizer", "autoencoder") if name in arguments)
        values: Any = OmegaConf.to_container(arguments[name], resolve=True)
        codec = from_dict(CodecConfig, values.get("codec", {}), "codec")
        return codec, int(values.get("image_size", TokenizerConfig.image_size))
    except OmegaConfBaseException as error:
        raise V2FlowError(f"{experiment}: {first_line(error)}") from error
    except V2FlowError as error:
        raise V2FlowError(f"{experiment}: {error}") from error
    except (
        yaml.YAMLError,
        UnicodeDecodeError,
        LookupError,
        StopIteration,
        TypeError,
        AttributeError,
        ValueError,
    ):
        raise V2FlowError(
            f"{experiment}: expected an experiment file with a tokenizer or autoencoder under model.init_args, found "
            "none"
        ) from None
