"""Before anything is trained: are the rows comparable, is the evaluation held out, and how many steps is a minute?"""

import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from v2flow.benchmark.overhead import measure_overhead, steps_for_minutes
from v2flow.benchmark.suite import VALIDATIONS, Row, Suite, fit_command, words_sha256
from v2flow.cli_training import build_experiment
from v2flow.data.openmoji import group_of
from v2flow.data.shards import folder_manifest, open_shards, shard_places
from v2flow.errors import V2FlowError
from v2flow.metrics.files import write_json
from v2flow.training.checkpoint import load_own
from v2flow.training.module import ReconstructionModule

PARAMETER_TOLERANCE = 0.05
FRECHET_PICTURES = 2560
"""Pictures from which on the offline extractor's Fréchet distance is given (twice its 1,280 features)."""


@dataclass
class RowFacts:
    """What a row is made of.

    Attributes:
        tokens: a picture, N.
        codebook_size: K.
        bits: N·log2(K), bits a picture.
        parameters: trainable ones.
        steps: of its training, where the suite gives minutes.
    """

    tokens: int
    codebook_size: int
    bits: float
    parameters: int
    steps: int | None = None


@dataclass
class Plan:
    """The rows that can run, what they are made of, and what they cost."""

    rows: list[Row]
    facts: dict[str, RowFacts]
    overhead: dict[str, Any] = field(default_factory=dict)


def plan_suite(suite: Suite, out: Path, progress: bool = True) -> Plan:
    """Builds every row once, checks that the suite is fair, and turns minutes into steps.

    The measurement is kept in `overhead.json` of `out`, so that a suite that goes on later, or on a busier machine,
    trains the remaining rows for the same number of steps.

    Raises:
        V2FlowError: a row that cannot be built, unequal bits among comparable rows, or evaluation pictures that a row
            is trained on.
    """
    rows: list[Row] = []
    facts: dict[str, RowFacts] = {}
    modules: dict[str, ReconstructionModule] = {}
    batch_size = 1
    for row in suite.rows:
        try:
            if row.tokenizer is not None:
                facts[row.name] = _facts(load_own(row.tokenizer))
            else:
                module, data = build_experiment(fit_command(suite, row, suite.seeds[0], None)[1:])
                check_held_out(suite.evaluate.data, data.train, f"row {row.name!r}")
                facts[row.name], modules[row.name] = _facts(module.model), module
                batch_size = data.batch_size
        except V2FlowError as error:
            if not row.optional:
                raise V2FlowError(f"row {row.name!r}: {error}") from error
            warn(f"row {row.name!r} is left out: {error}")
            continue
        rows.append(row)
    check_comparable(rows, facts)
    if suite.evaluate.limit is not None and suite.evaluate.limit < FRECHET_PICTURES:
        warn(
            f"{suite.evaluate.limit} evaluation pictures: no Fréchet distance is given below {FRECHET_PICTURES}, only "
            "the kernel distance; raise evaluate.limit for it"
        )
    plan = Plan(rows, facts)
    if suite.minutes is not None and modules:
        plan.overhead = _overhead(suite, modules, batch_size, out / "overhead.json", progress)
        for name in modules:
            facts[name].steps = steps_for_minutes(plan.overhead[name], suite.minutes, multiple=VALIDATIONS)
    return plan


def _facts(model: Any) -> RowFacts:
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    bits = model.num_tokens * math.log2(model.codebook_size)
    return RowFacts(model.num_tokens, model.codebook_size, bits, parameters)


def check_comparable(rows: list[Row], facts: dict[str, RowFacts]) -> None:
    """Prints every row's size, and warns where parameters differ by more than 5 % from the first row's.

    Raises:
        V2FlowError: a comparable row has other tokens a picture or bits a token than the first row.
    """
    first = rows[0]
    wanted = facts[first.name]
    for row in rows:
        found = facts[row.name]
        share = found.parameters / max(wanted.parameters, 1) - 1
        print(
            f"v2flow: {row.name}: {found.tokens} tokens of {math.log2(found.codebook_size):g} bits, "
            f"{found.parameters / 1e6:.2f} million parameters ({share:+.1%})",
            flush=True,
        )
        if not row.comparable:
            continue
        if (found.tokens, found.codebook_size) != (wanted.tokens, wanted.codebook_size):
            raise V2FlowError(
                f"row {row.name!r}: expected {wanted.tokens} tokens from {wanted.codebook_size} codes ({wanted.bits:g} "
                f"bits a picture) as {first.name!r} has, found {found.tokens} from {found.codebook_size} "
                f"({found.bits:g} bits); make them equal or mark the row `comparable: false`"
            )
        if row.tokenizer is None and abs(share) > PARAMETER_TOLERANCE:
            warn(
                f"row {row.name!r}: {share:+.1%} parameters against {first.name!r}; a fair comparison keeps them "
                f"within {PARAMETER_TOLERANCE:.0%}"
            )


def check_held_out(evaluation: Any, training: Any, where: str) -> None:
    """Refuse evaluation pictures that are training pictures, or of a group with one.

    Keys are compared between shards of one folder, where a key names one picture; among OpenMoji's, whose manifest
    says so, groups of keys (skin tones of one drawing).

    Raises:
        V2FlowError: names the shard or the key.
    """
    if training is None:
        return
    train, test = shard_places(training), shard_places(evaluation)
    if train & test:
        raise V2FlowError(
            f"{where}: evaluate.data: {min(train & test)} is also a training shard; expected held-out pictures"
        )
    for folder in {_folder(place) for place in train} & {_folder(place) for place in test}:
        known, tested = (
            _groups([place for place in sorted(places) if _folder(place) == folder], folder)
            for places in (train, test)
        )
        shared = known & tested
        if shared:
            raise V2FlowError(
                f"{where}: evaluate.data: {len(shared)} groups of {folder} are in the training shards as well, "
                f"{min(shared)} among them; expected held-out pictures"
            )


def _folder(place: str) -> str:
    return place.rpartition("/")[0]


def _groups(shards: list[str], folder: str) -> set[str]:
    opened = open_shards(shards, progress=False)
    keys = (opened.key(sample) for sample in range(len(opened)))
    build, _ = folder_manifest(folder)
    return {group_of(key) if build.get("kind") == "openmoji" else key for key in keys}


def _overhead(
    suite: Suite, modules: dict[str, ReconstructionModule], batch_size: int, path: Path, progress: bool
) -> dict[str, Any]:
    commands = {row.name: fit_command(suite, row, 0, None) for row in suite.rows if row.name in modules}
    key = {"words": words_sha256(*commands.values()), "rows": list(commands), "threads": suite.threads}
    if path.is_file():
        kept = json.loads(path.read_text())
        if kept["key"] == key:
            return kept["rows"]
    print("v2flow: measuring what a step of each row costs; the machine should be idle", flush=True)
    ordered = dict(sorted(modules.items(), key=lambda item: item[0] != suite.reference))
    rows = measure_overhead(ordered, batch_size, threads=suite.threads, progress=progress)
    write_json(path, {"key": key, "batch_size": batch_size, "rows": rows})
    return rows


def warn(message: str) -> None:
    """One line on standard error."""
    print(f"v2flow: warning: {message}", file=sys.stderr, flush=True)
