"""Text-to-image rows before anything is trained: what they are made of, whether captions are held out, their cost."""

import gc
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from v2flow.benchmark.held_out import check_captions_held_out, check_held_out
from v2flow.benchmark.overhead import measure_subjects
from v2flow.benchmark.plan import RowFacts, reference_first
from v2flow.benchmark.suite import Row, Suite, fit_command
from v2flow.benchmark.t2i_subject import TextToImageSubject
from v2flow.cli_training import build_experiment
from v2flow.errors import V2FlowError
from v2flow.t2i.config import TextToImageConfig
from v2flow.t2i.small_llm import PREFIXES

ROUNDS, WARMUP = 5, 1
"""A step of an LLM is dear: fewer rounds than a tokenizer's nine."""


@dataclass(kw_only=True)
class TextToImageFacts(RowFacts):
    """What a text-to-image row is made of.

    Attributes:
        parameters_total: of the LLM with its visual rows, without the frozen tokenizer.
        llm: name, how many of its blocks, and whether its weights are random.
        rows: where the rows of the visual tokens start.
        train: what learns.
        tokenizer_sha256: of the tokenizer whose ids are learned.
    """

    parameter_tolerance: ClassVar[float | None] = None
    parameters_total: int
    llm: str
    rows: str
    train: str
    tokenizer_sha256: str

    @property
    def inputs(self) -> list[str]:
        """What a result depends on beside its experiment: the tokenizer's weights."""
        return [self.tokenizer_sha256]

    @property
    def size(self) -> str:
        """Words on the size for the printed plan."""
        return f" of {self.parameters_total / 1e6:.1f} in all, {self.llm}"


class TextToImageRows:
    """Captions to pictures. A row is built to be looked at and let go; for the measurement all are built again."""

    def __init__(self, suite: Suite) -> None:
        self.suite = suite
        self.trained: list[str] = []
        self.batch_size = 1

    def check_evaluation(self, options: Any) -> None:
        """Refuses options of `v2flow evaluate` that only tokenizers have."""
        if options.probes or options.inception_weights:
            name = "probes" if options.probes else "inception-weights"
            raise V2FlowError(
                f"option --{name}: expected rows of tokenizers, found text-to-image models; leave it out"
            )
        if options.modes is not None and len(options.modes) != 1:
            raise V2FlowError(
                f"modes: expected one way to turn visual tokens into pixels, found {len(options.modes)}"
            )

    def build(self, row: Row) -> RowFacts:
        """Builds a row's model once for its facts, and checks data and held-out captions."""
        module, data = self._experiment(row)
        check_held_out(self.suite.evaluate.data, data.train, self.suite.file)
        check_captions_held_out(self.suite.evaluate.data, data.train, self.suite.file)
        data.check("train", module.source)
        facts = _facts(module)
        if not self.trained:
            self.batch_size = data.batch_size
        self.trained.append(row.name)
        del module, data
        gc.collect()  # Lightning's objects name each other: the LLM would stay until the next collection
        return facts

    def _experiment(self, row: Row) -> tuple[Any, Any]:
        return build_experiment(fit_command(self.suite, row, self.suite.seeds[0], None)[1:])

    def measure(self, progress: bool) -> dict[str, dict[str, Any]]:
        """All rows in turns in one process, as tokenizers.

        The weights of all rows lie in memory at once (four bytes a parameter), gradients and optimiser state of one
        row only: they are made anew in each turn, by a step that is not timed.
        """
        rows = {row.name: row for row in self.suite.rows if row.name in self.trained}
        names = reference_first(self.suite, self.trained)

        def subjects(device: torch.device) -> dict[str, TextToImageSubject]:
            return {name: TextToImageSubject(*self._experiment(rows[name]), device) for name in names}

        try:
            return measure_subjects(
                subjects, rounds=ROUNDS, warmup=WARMUP, threads=self.suite.threads, progress=progress
            )
        finally:
            gc.collect()


def _facts(module: Any) -> TextToImageFacts:
    model, config = module.model, module.config
    parts = [*model.llm.parameters(), *model.rows.parameters()]
    tokens, size = model.num_tokens, model.tokens.num_visual
    return TextToImageFacts(
        tokens=tokens,
        codebook_size=size,
        bits=tokens * math.log2(size),
        parameters=sum(p.numel() for p in parts if p.requires_grad),
        parameters_total=sum(p.numel() for p in parts),
        llm=_llm_text(config, model.llm.config.num_hidden_layers),
        rows=config.rows,
        train=f"last {config.train_layers} blocks" if config.train == "last_layers" else config.train,
        tokenizer_sha256=module.source.tokenizer_sha256,
    )


def _llm_text(config: TextToImageConfig, blocks: int) -> str:
    drawn = config.random_weights or config.llm.startswith(PREFIXES)
    return f"{config.llm}, {blocks} blocks" + (", random weights" if drawn else "")
