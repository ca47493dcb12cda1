"""Tables of the further questions put to a tokenizer: decode settings, altered tokens, alignment, other domains."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from v2flow.benchmark.document import ABSENT, Section, Table
from v2flow.benchmark.spread import (
    DIRECTIONS,
    Run,
    Spread,
    figure_spreads,
    figure_text,
    over_seeds,
    runs_by_name,
)

POINT_COSTS = {"field_evaluations": "field evaluations", "seconds_per_picture": "seconds a picture"}
"""What a decode setting costs -> heading."""
TOKENS = 4
"""Visual tokens of each row that are described in words."""


def probe_sections(results: Mapping[str, Any]) -> list[Section]:
    """The sections of the probes that were run, mean ± standard deviation over seeds."""
    rows = runs_by_name(results)
    parts = (_decoding(rows), _robustness(rows), _alignment(rows), _domains(rows))
    return [section for section in parts if section is not None]


def probes(runs: Iterable[Run], name: str) -> list[Mapping[str, Any]]:
    """What a probe found, for the runs in which it was run."""
    found = [(run.get("probes") or {}).get(name) for run in runs]
    return [probe for probe in found if probe]


def decoding_points(runs: Sequence[Run]) -> dict[str, dict[str, Spread]]:
    """Decode setting -> figures over seeds."""
    sets = probes(runs, "decoding")
    points = dict.fromkeys(point for found in sets for point in found)
    return {point: figure_spreads(found[point] for found in sets if point in found) for point in points}


def robustness_points(runs: Sequence[Run]) -> dict[str, dict[float, Spread]]:
    """Kind of replacement -> share of tokens replaced -> psnr over seeds."""
    values: dict[str, dict[float, list[float]]] = {}
    for found in probes(runs, "robustness"):
        for kind, points in found.items():
            for point in points:
                values.setdefault(kind, {}).setdefault(point["share"], []).append(point["psnr"])
    return {
        kind: {share: spread for share, v in sorted(by.items()) if (spread := over_seeds(v)) is not None}
        for kind, by in values.items()
    }


def _decoding(rows: Mapping[str, Sequence[Run]]) -> Section | None:
    lines = []
    for name, runs in rows.items():
        found = probes(runs, "decoding")
        for point, figures in decoding_points(runs).items():
            costs = [[probe[point].get(key) for probe in found if point in probe] for key in POINT_COSTS]
            spreads = [over_seeds(values) for values in costs]
            cells = [ABSENT if s is None else f"{s.mean:.3g}" for s in spreads]
            lines.append(([name, point, *cells], figures))
    return _figures_section("Decode settings", ["row", "setting", *POINT_COSTS.values()], lines)


def _domains(rows: Mapping[str, Sequence[Run]]) -> Section | None:
    lines = []
    for name, runs in rows.items():
        found = probes(runs, "domains")
        for domain in dict.fromkeys(domain for probe in found for domain in probe):
            sets = [probe[domain] for probe in found if domain in probe]
            for mode in dict.fromkeys(mode for s in sets for mode in s.get("modes", {})):
                figures = figure_spreads(s["modes"][mode] for s in sets if mode in s["modes"])
                lines.append(([name, domain, str(sets[0].get("images", ABSENT)), mode], figures))
    return _figures_section("Other domains", ["row", "domain", "pictures", "decode"], lines)


def _figures_section(
    title: str, headings: list[str], lines: Sequence[tuple[list[str], Mapping[str, Spread]]]
) -> Section | None:
    if not lines:
        return None
    names = [name for name in DIRECTIONS if any(name in figures for _, figures in lines)]
    rows = [
        [*start, *(figure_text(name, figures[name]) if name in figures else ABSENT for name in names)]
        for start, figures in lines
    ]
    return Section(title, [Table([*headings, *names], rows)])


def _robustness(rows: Mapping[str, Sequence[Run]]) -> Section | None:
    found = {name: robustness_points(runs) for name, runs in rows.items()}
    shares = sorted({share for kinds in found.values() for by in kinds.values() for share in by})
    lines = [
        [name, kind, *(figure_text("psnr", by[share]) if share in by else ABSENT for share in shares)]
        for name, kinds in found.items()
        for kind, by in kinds.items()
    ]
    if not lines:
        return None
    table = Table(["row", "replaced by", *(f"{share:.3g}" for share in shares)], lines)
    return Section("Altered tokens", ["psnr when this share of the tokens is replaced.", table])


def _alignment(rows: Mapping[str, Sequence[Run]]) -> Section | None:
    found = {name: [numbers(probe) for probe in probes(runs, "alignment")] for name, runs in rows.items()}
    found = {name: sets for name, sets in found.items() if sets}
    measures = list(dict.fromkeys(key for sets in found.values() for values in sets for key in values))
    if not measures:
        return None
    lines = []
    for measure in measures:
        spreads = [over_seeds(values.get(measure) for values in sets) for sets in found.values()]
        lines.append([measure, *(ABSENT if spread is None else spread.text("{:.4g}") for spread in spreads)])
    return Section("Alignment with the vocabulary", [Table(["measure", *found], lines), *_words(rows)])


def _words(rows: Mapping[str, Sequence[Run]]) -> list[str | Table]:
    """The most used visual tokens in words, of the first seed of each row."""
    lines = []
    for name, runs in rows.items():
        for token in [token for probe in probes(runs, "alignment")[:1] for token in probe["top_tokens"]][
            :TOKENS
        ]:
            probable = ", ".join(f"{_word(w)} {w['probability']:.2g}" for w in token["words"])
            nearest = ", ".join(f"{_word(w)} {w['cosine']:.2f}" for w in token["nearest"])
            lines.append([name, str(token["id"]), f"{token['share']:.2%}", probable or ABSENT, nearest])
    if not lines:
        return []
    headings = ["row", "visual token", "share", "most probable words", "nearest words, by cosine"]
    return ["The most used visual tokens, in words of the LLM; the first seed.", Table(headings, lines)]


def _word(entry: Mapping[str, Any]) -> str:
    """A word of the vocabulary in quotes; a leading space as SentencePiece writes it becomes one."""
    return "'" + str(entry["word"]).replace("\u2581", " ") + "'"


def numbers(value: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers among nested mappings, by dotted name."""
    found: dict[str, float] = {}
    for name, inner in value.items():
        if isinstance(inner, Mapping):
            found |= numbers(inner, f"{prefix}{name}.")
        elif isinstance(inner, (int, float)):
            found[f"{prefix}{name}"] = float(inner)
    return found
