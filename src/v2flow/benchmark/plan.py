"""Before anything is trained: are the rows comparable, is the evaluation held out, and how many steps is a minute?"""

import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from v2flow.benchmark.held_out import check_held_out
from v2flow.benchmark.overhead import measure_overhead, steps_for_minutes
from v2flow.benchmark.suite import VALIDATIONS, Row, Suite, evaluate_command, fit_command, words_sha256
from v2flow.cli_evaluate import refuse_text_to_image_options
from v2flow.cli_experiment import TEXT_TO_IMAGE, model_class
from v2flow.cli_training import build_experiment
from v2flow.errors import V2FlowError
from v2flow.metrics.files import write_json
from v2flow.training.own_tokenizer import load_own

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
        parameter_tolerance: share by which its parameters may differ from the first row's without a warning; None where
            models of different sizes are what is compared.
    """

    parameter_tolerance: ClassVar[float | None] = 0.05
    tokens: int
    codebook_size: int
    bits: float
    parameters: int
    steps: int | None = None

    @property
    def inputs(self) -> list[str]:
        """Hashes of what a training reads beside its experiment file and its pictures; a result belongs to them."""
        return []

    @property
    def size(self) -> str:
        """Beside tokens and trainable parameters, in words."""
        return ""


@dataclass
class Plan:
    """The rows that can run, what they are made of, and what they cost."""

    rows: list[Row]
    facts: dict[str, RowFacts]
    overhead: dict[str, Any] = field(default_factory=dict)


class RowBuilder(Protocol):
    """Builds rows of one kind, and measures those that are trained.

    Attributes:
        batch_size: of a training step.
    """

    batch_size: int

    @property
    def trained(self) -> list[str]:
        """Names of the rows that were built and are trained here."""

    def check_evaluation(self, options: Any) -> None:
        """Refuses options of `v2flow evaluate`, read from the suite's words, that are for another kind of model."""

    def build(self, row: Row) -> RowFacts:
        """What a row is made of; refuses evaluation samples that it is trained on."""

    def measure(self, progress: bool) -> dict[str, dict[str, Any]]:
        """What the trained rows cost, see :func:`v2flow.benchmark.overhead.measure_overhead`."""


def plan_suite(suite: Suite, out: Path, progress: bool = True, measure: bool = True) -> Plan:
    """Builds every row once, checks that the suite is fair, and turns minutes into steps.

    The measurement is kept in `overhead.json` of `out`, so that a suite that goes on later, or on a busier machine,
    trains the remaining rows for the same number of steps.

    Args:
        measure: what is not known yet; without, that is an error.

    Raises:
        V2FlowError: a row that cannot be built, or none that can, rows of two kinds, unequal bits among comparable
            rows, an option that `v2flow evaluate` does not have, or evaluation pictures that a row is trained on.
    """
    builder = row_builder(suite)
    _check_evaluation(suite, builder)
    rows: list[Row] = []
    facts: dict[str, RowFacts] = {}
    for row in suite.rows:
        try:
            facts[row.name] = builder.build(row)
        except V2FlowError as error:
            if not row.optional:
                raise V2FlowError(f"row {row.name!r}: {error}") from error
            warn(f"row {row.name!r} is left out: {error}")
            continue
        rows.append(row)
    if not rows:
        raise V2FlowError(f"{suite.file}: rows: none of them can be built; see the warnings above")
    check_comparable(rows, facts)
    limit = suite.evaluate.limit
    if isinstance(builder, TokenizerRows) and limit is not None and limit < FRECHET_PICTURES:
        warn(
            f"{limit} evaluation pictures: no Fréchet distance is given below {FRECHET_PICTURES}, only the kernel "
            "distance; raise evaluate.limit for it"
        )
    plan = Plan(rows, facts)
    if suite.minutes is not None and builder.trained:
        plan.overhead = _overhead(suite, builder, facts, out / "overhead.json", progress, measure)
        for name in builder.trained:
            facts[name].steps = steps_for_minutes(plan.overhead[name], suite.minutes, multiple=VALIDATIONS)
    return plan


def row_builder(suite: Suite) -> RowBuilder:
    """The builder of the suite's kind of rows, which the class of their models tells.

    Raises:
        V2FlowError: some rows are tokenizers and some are text-to-image models.
    """
    classes = {
        row.name: model_class(fit_command(suite, row, 0, None)[1:]) for row in suite.rows if not row.tokenizer
    }
    drawing = [name for name, found in classes.items() if found.rpartition(".")[2] == TEXT_TO_IMAGE]
    # A row whose class cannot be read is of neither kind: building it says what is wrong.
    coding = [
        row.name for row in suite.rows if row.tokenizer or (classes[row.name] and row.name not in drawing)
    ]
    if drawing and coding:
        raise V2FlowError(
            f"{suite.file}: rows: expected tokenizers or text-to-image models, found both: {coding[0]!r} and "
            f"{drawing[0]!r}; make two suites of them"
        )
    if drawing:
        from v2flow.benchmark.t2i_plan import TextToImageRows  # needs transformers

        return TextToImageRows(suite)
    return TokenizerRows(suite)


class TokenizerRows:
    """Tokenizers. They stay in memory until all are measured in turns."""

    def __init__(self, suite: Suite) -> None:
        self.suite = suite
        self.modules: dict[str, Any] = {}
        self.batch_size = 1

    @property
    def trained(self) -> list[str]:
        """Names of the rows that are trained here."""
        return list(self.modules)

    def check_evaluation(self, options: Any) -> None:
        """Refuses options of `v2flow evaluate` that only text-to-image models have."""
        refuse_text_to_image_options(options)

    def build(self, row: Row) -> RowFacts:
        """Builds a row's model and checks that it does not train on the evaluation pictures."""
        if row.tokenizer is not None:
            return self._facts(load_own(row.tokenizer))
        module, data = build_experiment(fit_command(self.suite, row, self.suite.seeds[0], None)[1:])
        check_held_out(self.suite.evaluate.data, data.train, self.suite.file)
        self.modules[row.name], self.batch_size = module, data.batch_size
        return self._facts(module.model)

    def _facts(self, model: Any) -> RowFacts:
        parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        bits = model.num_tokens * math.log2(model.codebook_size)
        return RowFacts(model.num_tokens, model.codebook_size, bits, parameters)

    def measure(self, progress: bool) -> dict[str, dict[str, Any]]:
        """Time, FLOPs and memory of each trained row, measured in turns."""
        modules = {name: self.modules[name] for name in reference_first(self.suite, self.trained)}
        return measure_overhead(modules, self.batch_size, threads=self.suite.threads, progress=progress)


def reference_first(suite: Suite, names: list[str]) -> list[str]:
    """The names with the suite's reference before the others, which keep their order."""
    return sorted(names, key=lambda name: name != suite.reference)


def _check_evaluation(suite: Suite, builder: RowBuilder) -> None:
    """Refuses words of the suite that `v2flow evaluate` would refuse after the first training."""
    from v2flow.cli import build_parser

    for row in suite.rows:
        try:
            words = evaluate_command(suite, row, row.tokenizer or "CHECKPOINT", "OUT", "GRID")
            builder.check_evaluation(build_parser().parse_args(words))
        except V2FlowError as error:
            raise V2FlowError(f"{suite.file}: evaluate: {error}") from error


def check_comparable(rows: list[Row], facts: dict[str, RowFacts]) -> None:
    """Prints every row's size, and warns where a tokenizer's parameters differ by more than 5 % from the first row's.

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
            f"{found.parameters / 1e6:.2f} million parameters ({share:+.1%}){found.size}",
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
        tolerance = found.parameter_tolerance
        if row.tokenizer is None and tolerance is not None and abs(share) > tolerance:
            warn(
                f"row {row.name!r}: {share:+.1%} parameters against {first.name!r}; a fair comparison keeps them "
                f"within {tolerance:.0%}"
            )


def _overhead(
    suite: Suite, builder: RowBuilder, facts: dict[str, RowFacts], path: Path, progress: bool, measure: bool
) -> dict[str, Any]:
    commands = {
        row.name: fit_command(suite, row, 0, None) for row in suite.rows if row.name in builder.trained
    }
    key: dict[str, Any] = {
        "words": words_sha256(*commands.values()),
        "rows": list(commands),
        "threads": suite.threads,
    }
    inputs = [facts[name].inputs for name in commands]
    if any(inputs):
        key["inputs"] = inputs
    if path.is_file():
        kept = json.loads(path.read_text())
        if kept["key"] == key:
            return kept["rows"]
    if not measure:
        raise V2FlowError(
            f"{path}: expected the step times of {suite.file}, found none, or those of before a change of its rows or "
            "their experiment files; leave --report out to measure and train, or put the files back as they were"
        )
    print("v2flow: measuring what a step of each row costs; the machine should be idle", flush=True)
    rows = builder.measure(progress)
    write_json(path, {"key": key, "batch_size": builder.batch_size, "rows": rows})
    return rows


def warn(message: str) -> None:
    """One line on standard error."""
    print(f"v2flow: warning: {message}", file=sys.stderr, flush=True)
