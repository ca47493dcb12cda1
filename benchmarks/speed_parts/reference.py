"""Part `reference`: a training step and a decoded picture at the size of the paper's recipe, each in its process."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from speed_parts.options import Options, tokenizer_config
from v2flow.config import to_dict
from v2flow.errors import V2FlowError
from v2flow.probes.frontier import LITERAL

LITERAL_WAY, OURS, REUSING, CODEC = "literal", "package", "package, reusing form", "codec alone"
"""Names of the rows of decoding; the others are presets."""
WORKER = Path(__file__).with_name("reference_worker.py")


def measure(options: Options) -> dict[str, Any]:
    """`train` and `decode` of the worker, with the peak of its resident memory."""
    config, _ = tokenizer_config(options.reference, options)
    common = {
        "tokenizer": to_dict(config),
        "memory_gb": options.memory_gb,
        "rounds": options.reference_rounds,
    }
    steps = 2 if options.smoke else LITERAL["steps"]
    found = {job: _run({"job": job, "steps": steps} | common) for job in ("train", "decode")}
    return {
        "image_size": config.image_size,
        "tokens": _tokens(config),
        "memory_gb": options.memory_gb,
    } | found


def _tokens(config: Any) -> int:
    rows, columns = config.resampler.token_grid
    return rows * columns


def _run(job: dict[str, Any]) -> dict[str, Any]:
    print(f"reference: {job['job']}", file=sys.stderr)
    finished = subprocess.run(
        [sys.executable, str(WORKER), json.dumps(job)], stdout=subprocess.PIPE, text=True
    )
    if finished.returncode:
        raise V2FlowError(
            f"part reference: {job['job']} ended with status {finished.returncode}; its last lines stand above"
        )
    result: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return result
