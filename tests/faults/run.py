"""Kills `v2flow fit` at random moments, resumes it, and says whether the trainings were those of a run in a piece.

python tests/faults/run.py --kills 50 --ranks --data 5 --seed 0 --out faults.json
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

for place in (Path(__file__).parent, Path(__file__).parent.parent):
    sys.path.insert(0, str(place))

from data_faults import FAULTS, run_data_faults  # noqa: E402
from harness import STAGES, Tally, origin, run_stage  # noqa: E402
from ranks import run_ranks  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Kill and resume small trainings; exit status 1 at a difference."
    )
    parser.add_argument("--kills", type=int, default=50, help="runs to kill, for each stage")
    parser.add_argument("--stages", nargs="*", choices=STAGES, default=list(STAGES))
    parser.add_argument(
        "--ranks", action="store_true", help="also kill two ranks, a tenth as often, at least twice"
    )
    parser.add_argument("--data", type=int, default=1, help="try each fault of data, disk and clock so often")
    parser.add_argument("--only", nargs="+", choices=list(FAULTS), default=None, help="of those, these alone")
    parser.add_argument("--seed", type=int, default=None, help="of the moments; by default a new one")
    parser.add_argument("--out", type=Path, default=None, help="JSON file for the result")
    parser.add_argument("--folder", type=Path, default=None, help="where the runs are left to be looked at")
    options = parser.parse_args()
    if options.only and not options.data:
        parser.error("--only chooses among the faults of --data; give both")
    seed = options.seed if options.seed is not None else int(time.time())
    print(f"seed {seed}", flush=True)
    # Imported once; each run is a fork of this process.
    import v2flow.cli_training
    import v2flow.training.t2i_module
    import v2flow.training.tokenizer_module  # noqa: F401

    result: dict[str, Any] = {**origin("tests/faults/run.py"), "seed": seed, "stages": {}}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for number, stage in enumerate(options.stages):
            begun = time.monotonic()
            tally = run_stage(stage, folder, options.kills, seed + number, _say)
            result["stages"][stage] = _figures(tally, begun)
        if options.ranks:
            begun = time.monotonic()
            tally = run_ranks(folder / "two-ranks", max(2, options.kills // 10), seed, _say)
            result["stages"]["ranks"] = _figures(tally, begun)
        if options.data:
            found = run_data_faults(folder / "data", seed, options.data, options.only, _say)
            result["data_faults"] = {
                name: {"rounds": options.data, "differences": d} for name, d in found.items()
            }
    text = json.dumps(result, indent=2)
    print(text)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")
    parts = [*result["stages"].values(), *result.get("data_faults", {}).values()]
    return int(any(part["differences"] for part in parts))


def _figures(tally: Tally, begun: float) -> dict[str, Any]:
    return {
        "kills": tally.kills.total(),
        "kills_by_moment": dict(sorted(tally.kills.items())),
        "starts_by_workers": dict(sorted(tally.workers.items())),
        "trainings": tally.rounds,
        "lines_a_training": tally.lines,
        "differences": tally.differences,
        "seconds": round(time.monotonic() - begun),
    }


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
