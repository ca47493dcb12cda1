"""The README.md of an exported text-to-image model."""

from pathlib import Path
from typing import TYPE_CHECKING

from v2flow.model_card import TERMS, terms

if TYPE_CHECKING:
    from v2flow.t2i.text_to_image import V2FlowForTextToImage


def model_card(model: "V2FlowForTextToImage") -> str:
    """Markdown: what the model is, how to use it with and without v2flow, and whose terms hold."""
    tokens, tokenizer = model.tokens, model.tokenizer
    base = base_name(model)
    size = tokenizer.config.image_size
    gemma = holds_gemma(model)
    vocabulary = Path(tokenizer.config.vocabulary.source).name
    metadata = [
        "---", "library_name: transformers", "pipeline_tag: text-to-image",
        f"license: {'gemma' if gemma else 'other'}",
        "tags:", "- text-to-image", "- v2flow", "---",
    ]  # fmt: skip
    return (
        "\n".join(metadata)
        + f"""

# A V2Flow text-to-image model

An LLM ({base}) that writes pictures as {model.num_tokens} tokens of a visual vocabulary of {tokens.num_visual}, and
the [V2Flow](https://arxiv.org/abs/2503.07493) tokenizer that turns these into {size}×{size} pixels. Captions have
at most {model.max_caption} LLM tokens.

## With v2flow

```python
from v2flow import V2FlowForTextToImage

model = V2FlowForTextToImage.from_pretrained("FOLDER")
pictures = model.generate(["a strawberry"])  # [1, 3, {size}, {size}] in [0, 1]
```

## With transformers alone

This folder is a plain causal LLM. After a caption and `<boi>` it writes the picture's tokens (`<v_0>` has id
{tokens.first}) and `<eoi>`:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
llm = AutoModelForCausalLM.from_pretrained("FOLDER")
prompt = tokenizer("a strawberry<boi>", return_tensors="pt")
ids = llm.generate(**prompt)[0, prompt.input_ids.shape[1] : -1] - {tokens.first}
```

`V2FlowTokenizer.from_pretrained("FOLDER/tokenizer").decode(ids[None])` is the picture.

{TERMS}

{terms(gemma, pretrained_name(model) or "random", vocabulary)}
"""
    )


def base_name(model: "V2FlowForTextToImage") -> str:
    """The pretrained LLM's name or, for one made anew, its family."""
    return pretrained_name(model) or str(model.llm.config.model_type)


def pretrained_name(model: "V2FlowForTextToImage") -> str:
    """The pretrained LLM's hub id or the last part of its folder; empty for one made anew."""
    name = str(getattr(model.llm.config, "_name_or_path", "") or "")
    if Path(name).is_absolute() or name.startswith("."):
        name = Path(name).name
    return name


def holds_gemma(model: "V2FlowForTextToImage") -> bool:
    """Whether rows of a Gemma model are inside, as the LLM's weights or as the tokenizer's frozen vocabulary."""
    vocabulary = model.tokenizer.config.vocabulary.source
    return model.llm.config.model_type.startswith("gemma") or "gemma" in vocabulary.lower()
