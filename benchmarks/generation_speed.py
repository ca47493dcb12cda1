"""How fast visual tokens are generated, against `generate` of transformers on the same merged LLM.

    python benchmarks/generation_speed.py checkpoints/t2i/openmoji-32-gemma270m/version_0/checkpoints/last.ckpt \
        --prompts benchmarks/results/t2i-openmoji-32/test-grid.txt --out generation.json

The same captions in one batch, greedy, so that all ways give the same ids: v2flow's, transformers' with cached keys and
values and restricted to the visual tokens, and transformers' without a cache. In turns; a ratio is taken within a
round. The file is written at the end; the last line is the same JSON document.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from v2flow.benchmark.runs import machine
from v2flow.errors import V2FlowError
from v2flow.inference import load_text_to_image_model
from v2flow.metrics.files import write_json
from v2flow.origin import current_commit
from v2flow.t2i.prompts import read_prompts
from v2flow.t2i.speed import generation_speed


def measure(options: argparse.Namespace, command: list[str]) -> dict[str, Any]:
    """The document of a checkpoint.

    Raises:
        V2FlowError: fewer prompts than captions, or what cannot be read.
    """
    prompts = [prompt.caption for prompt in read_prompts(options.prompts)]
    if not 1 <= options.captions <= len(prompts):
        raise V2FlowError(
            f"option --captions: expected 1 to {len(prompts)}, the prompts of {options.prompts}, found "
            f"{options.captions}"
        )
    model = load_text_to_image_model(options.checkpoint)
    found = generation_speed(model, prompts[: options.captions], rounds=options.rounds)
    config = model.llm.config
    return {
        "llm": {"type": config.model_type, "blocks": config.num_hidden_layers, "width": config.hidden_size},
        **found, "command": command, "commit": current_commit(), "machine": machine(torch.get_num_threads()),
    }  # fmt: skip


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="a .ckpt file, or a folder of `v2flow export`")
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="captions, one a line")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the JSON document")
    parser.add_argument("--captions", type=int, default=16, metavar="N", help="in one batch; default: 16")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="default: 3")
    options = parser.parse_args(words)
    try:
        document = measure(
            options, ["python", "benchmarks/generation_speed.py", *(sys.argv[1:] if words is None else words)]
        )
        write_json(options.out, document)
    except V2FlowError as error:
        print(f"generation_speed: error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(document, allow_nan=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
