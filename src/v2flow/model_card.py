"""The README.md of an exported tokenizer, and what the files of a run add to that of any exported model."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from v2flow.data.attribution import card_attribution
from v2flow.errors import V2FlowError, first_line

if TYPE_CHECKING:
    from v2flow.tokenizer import V2FlowTokenizer

TERMS = "## Terms"
GEMMA_NOTICE = (
    "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms."
)


def tokenizer_card(model: "V2FlowTokenizer") -> str:
    """Markdown: what the tokenizer is, how to use it, and whose terms hold."""
    config = model.config
    source = Path(config.vocabulary.source).name  # of a file of one's own without its folder
    gemma = "gemma" in source.lower()
    metadata = [
        "---",
        "library_name: v2flow",
        f"license: {'gemma' if gemma else 'other'}",
        "tags:",
        "- image-tokenizer",
        "- rectified-flow",
        "---",
    ]
    size = config.image_size
    return (
        "\n".join(metadata)
        + f"""

# A V2Flow image tokenizer

Pictures of {size}×{size} pixels become {model.num_tokens} tokens of a visual vocabulary of {model.codebook_size}, which
lies among the word embeddings of {source}; a masked autoregressive decoder with a rectified flow makes
pictures of them again ([V2Flow](https://arxiv.org/abs/2503.07493)).

```python
from v2flow import V2FlowTokenizer

tokenizer = V2FlowTokenizer.from_pretrained("FOLDER")
ids = tokenizer.encode(images)  # [B, 3, H, W] in [0, 1] -> [B, {model.num_tokens}]
pictures = tokenizer.decode(ids)  # [B, 3, {size}, {size}] in [0, 1]
```

{TERMS}

{terms(gemma, source)}
"""
    )


def terms(gemma: bool, *sources: str) -> str:
    """Whose terms hold for weights that derive from `sources`: pretrained models by name, or `random`, which is none.

    Args:
        gemma: Gemma's weights are among them.
    """
    if gemma:
        return (
            f"{GEMMA_NOTICE} Pass these terms, and the Prohibited Use Policy that they name, on with the model.\n"
            "Weights of other origin keep their own terms."
        )
    named = " and ".join(dict.fromkeys(source for source in sources if source != "random"))
    if not named:
        return (
            "The weights derive from no pretrained model: what is not trained is random numbers. The terms of the\n"
            "training data hold."
        )
    return f"The weights derive from {named}, whose terms they keep."


def with_record(card: str, record: str) -> str:
    """The text of a card with the record of its training before its terms."""
    above, heading, below = card.partition(TERMS)
    return above + record + heading + below


def training_record(card: Path) -> str:
    """What `add_training` added to the README.md of an exported folder, for its next export; empty without it."""
    if not card.is_file():
        return ""
    above, terms_follow, _ = card.read_text(errors="replace").partition(TERMS)
    start = re.search(r"^## (Training|Figures)$", above, re.MULTILINE)
    return above[start.start() :] if start and terms_follow else ""


def add_training(card: Path, checkpoint: Path, table: Callable[[Mapping[str, Any]], str]) -> None:
    """Adds to a card what the run of a .ckpt file says of data, recipe and figures; nothing where it has no files.

    Args:
        card: the exported README.md.
        checkpoint: `RUN/checkpoints/NAME.ckpt`; config.yaml and metrics.json lie in `RUN`.
        table: text of the report in metrics.json.

    Raises:
        V2FlowError: a damaged file.
    """
    if checkpoint.suffix != ".ckpt":
        return
    run = checkpoint.parent.parent
    added = _section(run / "config.yaml", _recipe) + _section(
        run / "metrics.json", lambda text: _figures(text, table)
    )
    card.write_text(with_record(card.read_text(), added))


def _section(path: Path, write: Callable[[str], str]) -> str:
    if not path.is_file():
        return ""
    try:
        return write(path.read_text())
    except (OSError, ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError) as error:
        reason = first_line(error)
        raise V2FlowError(
            f"{path}: expected the file that `v2flow fit` wrote, found another ({reason}); move it away to export "
            "without what it says"
        ) from error


def _recipe(text: str) -> str:
    config = yaml.safe_load(text)
    data, trainer = config["data"], config["trainer"]
    # Of a path as much as says which data these are; the rest is the machine's.
    shards = "/".join(Path(str(data["train"])).parts[-2:])
    steps, batch, seed = trainer["max_steps"], data["batch_size"], config["seed_everything"]
    origin = card_attribution(data["train"])
    return (
        f"## Training\n\nData: `{shards}`. {origin and origin + ' '}{steps} steps of {batch} samples a device, seed "
        f"{seed}. Of the run's `config.yaml`:\n\n```yaml\n"
        + yaml.safe_dump({"model": config["model"]["init_args"]}, sort_keys=False)
        + "```\n\n"
    )


def _figures(text: str, table: Callable[[Mapping[str, Any]], str]) -> str:
    report = json.loads(text)
    scored = Path(report["checkpoint"]).name
    return f"## Figures\n\nOf `{scored}`, at the end of the training:\n\n```text\n{table(report)}\n```\n\n"
