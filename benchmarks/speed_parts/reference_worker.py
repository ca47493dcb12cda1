"""A process of the part `reference`: one training step, or one picture decoded, at the size of the paper's recipe.

    python benchmarks/speed_parts/reference_worker.py '{"job": "train", …}'

Weights of the codec, the vocabulary and the tokenizer are random: nothing is downloaded. Memory for data beyond the
job's `memory_gb` is refused by the system, so a step that does not fit ends here with one line and leaves the machine
alone. The last line of standard output is one JSON document.
"""

import json
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import v2flow.tokenizer
from speed_parts.options import CPU
from speed_parts.reference import CODEC, LITERAL_WAY, OURS, REUSING
from speed_parts.turns import take_turns
from v2flow.benchmark.subject import TrainingSubject, count_flops, peak_rise
from v2flow.codec import build_codec
from v2flow.config import TokenizerConfig, VocabularyConfig, from_dict
from v2flow.decode_modes import shipped_presets
from v2flow.planning.language_models import vocabulary_shape
from v2flow.planning.step import step_costs
from v2flow.planning.training import tokenizer_training
from v2flow.planning.without_weights import nothing_loaded
from v2flow.probes.frontier import LITERAL, literal
from v2flow.tokenizer import V2FlowTokenizer
from v2flow.training.module import seeded_generator
from v2flow.training.tokenizer_module import TokenizerModule

STATUS = Path("/proc/self/status")  # Linux


@contextmanager
def random_codec() -> Iterator[None]:
    """Inside, tokenizers are built with a codec of random weights."""
    with mock.patch.object(
        v2flow.tokenizer, "build_codec", lambda config, weights: build_codec(config, False)
    ):
        yield


def random_module(config: TokenizerConfig) -> TokenizerModule:
    """A module of this size; its vocabulary has as many rows of the same width, drawn at random."""
    rows, width = vocabulary_shape(config.vocabulary)
    vocabulary = VocabularyConfig(source="random", size=rows, dim=width, center=config.vocabulary.center)
    with random_codec():
        return TokenizerModule(replace(config, vocabulary=vocabulary))


class PictureSubject(TrainingSubject):
    """Training steps on one picture of noise; the module itself, not a copy."""

    def loss(self, stage: str, draw: int) -> torch.Tensor:
        """The loss of a step; the draw decides its random numbers."""
        generator, size = seeded_generator(self.device, draw), self.model.config.image_size
        images = torch.rand(self.batch_size, 3, size, size, generator=generator)
        losses: Any = self.module
        return losses.training_losses(images, 0.5, generator)["loss"]


def train(config: TokenizerConfig, job: dict[str, Any]) -> dict[str, Any]:
    """Training steps of the experiment's own optimiser, fp32, a picture each; the first makes the optimiser's state."""
    subject = PictureSubject(random_module(config), 1, CPU)
    for group in subject.optimizer.param_groups:
        group["lr"] = 1e-6  # a real step
    turns = take_turns({"step": partial(subject.step, "all")}, job["rounds"])
    flops = useful_flops(config)
    trained = sum(p.numel() for p in subject.trained)
    return turns.row("step", flops) | {
        "parameters": trained, "optimizer": type(subject.optimizer).__name__,
        "resident_bytes": subject.resident_bytes() + 4 * trained,  # and gradients
        "checkpointing": config.decoder.checkpointing, "products_flops_per_second": turns.products(),
    }  # fmt: skip


def useful_flops(config: TokenizerConfig) -> float:
    """FLOPs of forward and backward, without what checkpointing computes again."""
    with nothing_loaded():
        module = TokenizerModule(replace(config, decoder=replace(config.decoder, checkpointing=False)))
    return sum(
        cost.share * cost.flops for cost in step_costs(tokenizer_training(module), 1, bf16=False).values()
    )


def decode(config: TokenizerConfig, job: dict[str, Any]) -> dict[str, Any]:
    """One picture decoded in each way, in turns.

    `literal` and `package` have the same weights and settings, and give the same picture. The reusing form has as many
    weights: a prefix that attends to itself and a field that is modulated by the timestep. The presets are the
    shipped ones, with the weights of the reusing form; which settings are equal in quality, this size cannot say.
    """
    model = random_module(config).model.eval()
    with torch.no_grad():  # a new field is zero
        for parameter in model.head.parameters():
            parameter.normal_(0, 0.02)
    form = replace(config, decoder=replace(config.decoder, prefix_attention="self"))
    if config.velocity.kind == "per_position":
        form = replace(form, velocity=replace(config.velocity, modulation="timestep"))
    reusing = _with_weights_of(model, form)
    reference = {**LITERAL, "steps": job["steps"]}
    ids = torch.randint(0, model.codebook_size, (1, model.num_tokens), generator=seeded_generator(CPU, 1))
    settings = {
        LITERAL_WAY: (literal(model), reference),
        OURS: (model, reference),
        REUSING: (reusing, reference),
    }
    settings |= {name: (reusing, dict(options)) for name, options in shipped_presets().items()}

    def run(name: str, draw: int, **changes: Any) -> torch.Tensor:
        way, chosen = settings[name]
        return way.decode(ids, seeded_generator(CPU, draw), **{**chosen, **changes})

    channels, (height, width) = model.head.residual_std.shape[0], model.latent_grid
    latents = torch.randn(1, channels, height, width, generator=seeded_generator(CPU, 2))
    ways: dict[str, Callable[[int], Any]] = {name: partial(run, name) for name in settings}
    ways[CODEC] = lambda draw: model.codec.decode(latents)
    difference = float((run(LITERAL_WAY, 0, steps=2) - run(OURS, 0, steps=2)).abs().max())
    turns = take_turns(ways, job["rounds"], warmup=0)  # the two pictures before it were the warm-up
    rows = {}
    for name in ways:
        # The peak of a decoding is that of any of its steps.
        brief = partial(run, name, 0, steps=1) if name in settings else partial(ways[name], 0)
        flops = (
            _decode_flops(partial(run, name, 0), settings[name][1])
            if name in settings
            else count_flops(brief)
        )
        rows[name] = turns.row(name, flops) | {
            "to_literal": turns.ratio(name, LITERAL_WAY),
            "peak_extra_bytes": peak_rise(brief, CPU),
            "options": settings[name][1] if name in settings else {},
        }
    held = [
        *model.parameters(),
        *model.buffers(),
        *getattr(model.codec, "_held", [torch.nn.Module()])[0].parameters(),
    ]
    return {
        "rows": rows, "resident_bytes": sum(x.numel() * x.element_size() for x in held),
        "largest_difference": difference, "products_flops_per_second": turns.products(),
    }  # fmt: skip


def _decode_flops(run: Callable[..., Any], options: dict[str, Any]) -> int:
    """Of a whole decoding. All of many steps with the reference's settings cost the same: two of them are enough."""
    if options.keys() != LITERAL.keys():
        return count_flops(run)
    one, two = (count_flops(partial(run, steps=steps)) for steps in (1, 2))
    return one + (options["steps"] - 1) * (two - one)


def _with_weights_of(model: V2FlowTokenizer, config: TokenizerConfig) -> V2FlowTokenizer:
    """A tokenizer of another form around the same tensors."""
    vocabulary = replace(model.vocabulary, table=model.vocabulary.table.to("meta"))
    with random_codec(), torch.device("meta"):
        other = V2FlowTokenizer(replace(config, vocabulary=model.config.vocabulary), vocabulary)
    other.codec, other.resampler = model.codec, model.resampler
    for name in ("visual_vocabulary", "decoder", "head"):
        _share(getattr(other, name), getattr(model, name))
    return other.eval()


def _share(part: torch.nn.Module, source: torch.nn.Module) -> None:
    for own, given in zip(part.modules(), source.modules(), strict=True):
        own._parameters, own._buffers = dict(given._parameters), dict(given._buffers)


def peak_rss_bytes() -> int:
    """Most memory this program held; `ru_maxrss` would count what the process held before it as well."""
    if not STATUS.is_file():
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


def main() -> None:
    job = json.loads(sys.argv[1])
    limit = int(job["memory_gb"] * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    torch.manual_seed(0)
    config = from_dict(TokenizerConfig, job["tokenizer"])
    try:
        found = {"train": train, "decode": decode}[job["job"]](config, job)
    except (RuntimeError, MemoryError) as error:
        if "memory" not in str(error).lower() and not isinstance(error, MemoryError):
            raise
        found = {"error": f"does not fit into {job['memory_gb']:g} GB: {str(error).splitlines()[0]}"}
    found["peak_rss_bytes"] = peak_rss_bytes()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
