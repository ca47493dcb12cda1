"""Part `step`: a training step against the machine's matrix products and against the reference's way."""

import sys
from typing import Any

from speed_parts.hooks import hook_costs
from speed_parts.literal import LiteralSubject, reference_recipe
from speed_parts.operators import DeviceReads, operator_shares
from speed_parts.options import CPU, Options, module_of
from speed_parts.turns import take_turns
from v2flow.benchmark.subject import Subject
from v2flow.training.tokenizer_module import TokenizerModule

SHIPPED, RECIPE, LITERAL = "shipped", "reference's recipe", "reference's recipe, literal"
PROFILED = 5
"""Steps under the profiler."""


def measure(options: Options) -> dict[str, Any]:
    """Rows `shipped` (the experiment), its sizes with the reference's recipe, and that one taken literally.

    Useful FLOPs are torch's count of products and convolutions of the real step, a mean over the draws that were
    timed. The literal step's are counted for itself: what it throws away is in them.
    """
    module, batch = module_of(options)
    recipe = TokenizerModule(reference_recipe(module.model.config))
    subjects: dict[str, Subject] = {
        SHIPPED: Subject(module, batch, CPU),
        RECIPE: Subject(recipe, batch, CPU),
        LITERAL: LiteralSubject(recipe, batch, CPU),
    }
    stage = next(iter(subjects[SHIPPED].stages))

    def step(subject: Subject, draw: int) -> None:
        subject.step(stage if stage in subject.stages else "all", draw)

    ways = {name: lambda draw, s=subject: step(s, draw) for name, subject in subjects.items()}
    turns = take_turns(ways, options.rounds)
    rows = {}
    for name, subject in subjects.items():
        print(f"step: operators, FLOPs and memory of {name}", file=sys.stderr)
        kind = next(iter(subject.stages))
        flops = [subject.flops(kind, draw) for draw in range(options.rounds)]
        rows[name] = turns.row(name, sum(flops) / len(flops)) | {
            "parameters": sum(p.numel() for p in subject.trained),
            "peak_memory_bytes": subject.peak_memory(kind, 1),
            "shares": operator_shares(lambda s=subject: [step(s, draw) for draw in range(PROFILED)]),
        }
    reads = DeviceReads()
    with reads:
        subjects[SHIPPED].loss(stage, 0).backward()
    return {
        "batch_size": batch,
        "stage": stage,
        "products_flops_per_second": turns.products(),
        "rows": rows,
        "literal_to_shipped": turns.ratio(LITERAL, SHIPPED),
        "literal_to_recipe": turns.ratio(LITERAL, RECIPE),
        "device_reads": reads.where,
        "hooks": hook_costs(module, subjects[SHIPPED].images, options.hook_steps),
    }
