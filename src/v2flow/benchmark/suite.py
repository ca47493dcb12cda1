"""What a suite file says: rows to train or load, the budget they share, and how they are scored."""

import hashlib
import json
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Optional

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from v2flow.errors import V2FlowError, first_line
from v2flow.paths import name_pictures_folder


@dataclass
class Row:
    """One tokenizer or text-to-image model of a suite.

    Attributes:
        name: what stands in the tables.
        arguments: words for `v2flow fit`.
        experiment: experiment file; when None the suite's, with the arguments that its rows share.
        tokenizer: `MODULE:FUNCTION` or `MODULE:FUNCTION=ARGUMENT` that gives a tokenizer which is not trained here;
            see `v2flow.training.own_tokenizer.load_own`.
        comparable: whether tokens a picture and bits a token must be those of the first row.
        modes: decode modes to score, by name or written out; None for the suite's.
        optional: leave the row out, and say so, where its tokenizer cannot be had.
    """

    name: str
    arguments: list[str] = field(default_factory=list)
    experiment: Optional[str] = None
    tokenizer: Optional[str] = None
    comparable: bool = True
    modes: Optional[list[str]] = None
    optional: bool = False

    @property
    def slug(self) -> str:
        """The name as a file name."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


@dataclass
class Evaluation:
    """How every row is scored once it is trained; the words of `v2flow evaluate`.

    Attributes:
        data: shards that no row is trained on.
        limit: the first so many pictures.
        modes: decode modes, by name or written out; None for all that the checkpoint has.
        probes: further questions, see `v2flow.probes.PROBES`.
        probe_limit: pictures for those.
        arguments: more words of `v2flow evaluate`, such as `--pictures=600` for text-to-image models.
    """

    data: str | list[str]
    limit: Optional[int] = None
    modes: Optional[list[str]] = None
    probes: list[str] = field(default_factory=list)
    probe_limit: int = 1000
    arguments: list[str] = field(default_factory=list)


@dataclass
class Suite:
    """Tokenizers to compare, or text-to-image models.

    Attributes:
        title: heading of the report.
        about: what the suite asks, in a few sentences.
        experiment: experiment file of the rows that name none.
        evaluate: how rows are scored.
        arguments: words for `v2flow fit` that the rows of `experiment` share.
        seeds: every row is run once for each.
        rows: what is compared; the first is the reference of what must be equal.
        minutes: computing that each row may use, turned into steps by the step time measured on this machine; None
            when the rows state their steps.
        reference: name of the row that costs are given as ratios to; None for the first.
        threads: threads of a training and of that measurement; None for all cores.
        file: where it was read.
    """

    title: str
    experiment: str
    evaluate: Evaluation
    rows: list[Row]
    about: str = ""
    arguments: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0])
    minutes: Optional[float] = None
    threads: Optional[int] = None
    reference: Optional[str] = None
    file: str = ""

    @property
    def name(self) -> str:
        """Name of the file, which the folders of its results and trainings are named after."""
        return Path(self.file).stem


def read_suite(path: Path) -> Suite:
    """The suite that a YAML file describes.

    Raises:
        V2FlowError: not YAML, an unknown or missing key, or two rows of one name.
    """
    name_pictures_folder()
    try:
        values = OmegaConf.to_container(OmegaConf.create(path.read_text()), resolve=True)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise V2FlowError(f"{path}: not a YAML file: {error}") from error
    except OmegaConfBaseException as error:
        raise V2FlowError(f"{path}: {first_line(error)}") from error
    suite = _build(Suite, values, str(path))
    suite.file = str(path)
    suite.evaluate = _build(Evaluation, suite.evaluate, f"{path}: evaluate")
    if not isinstance(suite.rows, list) or not suite.rows:
        raise V2FlowError(f"{path}: rows: expected a list of trainings, found {suite.rows!r}")
    _check_words(suite.arguments, f"{path}: arguments")
    _check_words(suite.evaluate.arguments, f"{path}: evaluate.arguments")
    seeds = suite.seeds
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds):
        raise V2FlowError(f"{path}: seeds: expected a list of integers such as [0, 1], found {seeds!r}")
    suite.rows = [_build(Row, row, f"{path}: row {i + 1}") for i, row in enumerate(suite.rows)]
    _check_rows(suite.rows, path)
    if suite.reference is None:
        suite.reference = suite.rows[0].name
    if suite.reference not in [row.name for row in suite.rows]:
        raise V2FlowError(f"{path}: reference: expected the name of a row, found {suite.reference!r}")
    if suite.minutes is not None and not (isinstance(suite.minutes, (int, float)) and suite.minutes > 0):
        raise V2FlowError(f"{path}: minutes: expected a positive number or null, found {suite.minutes!r}")
    return suite


def _check_words(words: Any, where: str) -> None:
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise V2FlowError(f"{where}: expected a list of words, found {words!r}; put numbers in quotes")


def _check_rows(rows: list[Row], path: Path) -> None:
    for row in rows:
        if not isinstance(row.name, str):
            raise V2FlowError(f"{path}: rows: expected a name in words, found {row.name!r}; put it in quotes")
        _check_words(row.arguments, f"{path}: row {row.name!r}: arguments")
        if row.tokenizer is not None and (row.arguments or row.experiment):
            raise V2FlowError(
                f"{path}: row {row.name!r}: expected either a tokenizer or an experiment with its arguments, found both"
            )
    slugs = [row.slug for row in rows]
    for slug in slugs:
        if slugs.count(slug) > 1 or not slug:
            raise V2FlowError(
                f"{path}: rows: expected a name of its own for each row, found {slug!r} more than once"
            )


def _build(kind: Any, values: Any, where: str) -> Any:
    known = [f.name for f in fields(kind) if not (kind is Suite and f.name == "file")]
    if not isinstance(values, dict):
        raise V2FlowError(f"{where}: expected the keys {', '.join(known)}, found {type(values).__name__}")
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise V2FlowError(f"{where}: unknown key {unknown[0]!r}; expected one of {', '.join(known)}")
    try:
        return kind(**values)
    except TypeError as error:
        raise V2FlowError(f"{where}: {str(error).split('__init__() ')[-1]}") from error


def fit_command(suite: Suite, row: Row, seed: int, steps: int | None) -> list[str]:
    """The words after `v2flow` that train a row.

    Args:
        steps: length of the training; None where the suite's words say it.
    """
    experiment, shared = (
        (suite.experiment, suite.arguments) if row.experiment is None else (row.experiment, [])
    )
    words = ["fit", "--config", experiment, f"--seed_everything={seed}", *shared, *row.arguments]
    if steps is not None:
        words += [
            f"--model.init_args.optimizer.total_steps={steps}",
            f"--trainer.val_check_interval={steps // VALIDATIONS}",
        ]
    return words


VALIDATIONS = 5
"""Times a row is validated on its way; its number of steps is a multiple of this."""


def words_sha256(*commands: list[str]) -> str:
    """SHA-256 of commands and of the experiment files that they name: what a result or a measurement belongs to."""
    digest = hashlib.sha256(json.dumps(commands).encode())
    for words in commands:
        if "--config" in words:
            digest.update(Path(words[words.index("--config") + 1]).read_bytes())
    return digest.hexdigest()


def evaluate_command(suite: Suite, row: Row, checkpoint: str, out: str, grid: str) -> list[str]:
    """The words after `v2flow` that score a checkpoint."""
    wanted = suite.evaluate
    data = [wanted.data] if isinstance(wanted.data, str) else wanted.data
    words = ["evaluate", checkpoint, "--weights", "ema", "--json", out, "--grid", grid, "--data", *data]
    if wanted.limit is not None:
        words += ["--limit", str(wanted.limit)]
    modes = row.modes if row.modes is not None else wanted.modes
    if modes is not None:
        words += ["--modes", *modes]
    if wanted.probes:
        words += ["--probes", *wanted.probes, "--probe-limit", str(wanted.probe_limit)]
    return [*words, *wanted.arguments]
