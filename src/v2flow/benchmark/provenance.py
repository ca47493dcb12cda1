"""Where a figure comes from: a run's commands, seed and commit, and the machines and protocols behind them."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from v2flow.benchmark.document import Block, Bullets, Commands, Section, Table
from v2flow.benchmark.spread import Run


def commands_section(results: Mapping[str, Any]) -> Section | None:
    """Every run with its commands; None before the first."""
    runs = results.get("rows", [])
    if not runs:
        return None
    protocols, machines = numbered(runs, "protocol"), numbered(runs, "machine")
    items = []
    for run, protocol, machine in zip(runs, protocols, machines, strict=True):
        label = f"{run['name']}, seed {run['seed']}, commit {run.get('commit') or 'unknown'}"
        label += f", protocol {protocol + 1}, machine {machine + 1}"
        label += "" if run.get("command") else "; not trained here"
        commands = [list(run[key]) for key in ("command", "evaluate_command") if run.get(key)]
        items.append((label, commands))
    about = (
        "A + after a commit: files differed from it. Protocols and machines are numbered; they stand below."
    )
    return Section("Commands", [about, Commands(items)])


def protocol_section(results: Mapping[str, Any]) -> Section | None:
    """Protocols with their library versions, and machines: the first in full, of others what differs."""
    runs = results.get("rows", [])
    if not runs:
        return None
    blocks: list[Block] = []
    for key in ("protocol", "machine"):
        numbers = numbered(runs, key)
        documents = [flat(runs[numbers.index(n)].get(key) or {}) for n in range(max(numbers) + 1)]
        if documents[0]:
            blocks.append(Table([f"{key} 1", "value"], [[name, text] for name, text in documents[0].items()]))
        others = [
            f"{key.capitalize()} {number + 1} differs from 1 in {_difference(documents[0], document)}."
            for number, document in enumerate(documents)
            if number
        ]
        blocks += [Bullets(others)] if others else []
    return Section("Protocol, library versions and machine", blocks) if blocks else None


def numbered(runs: Sequence[Run], key: str) -> list[int]:
    """For each run the number, from 0, of its document under `key` among the distinct ones."""
    texts = [json.dumps(flat(run.get(key) or {}), sort_keys=True) for run in runs]
    distinct = list(dict.fromkeys(texts))
    return [distinct.index(text) for text in texts]


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings as `outer.inner` -> text."""
    result: dict[str, str] = {}
    for name, inner in value.items():
        if isinstance(inner, Mapping):
            result |= flat(inner, f"{prefix}{name}.")
        else:
            result[f"{prefix}{name}"] = inner if isinstance(inner, str) else json.dumps(inner)
    return result


def _difference(first: Mapping[str, str], other: Mapping[str, str]) -> str:
    names = [name for name in {**first, **other} if first.get(name) != other.get(name)]
    return "; ".join(f"{name}: {other.get(name, 'not given')}" for name in names)
