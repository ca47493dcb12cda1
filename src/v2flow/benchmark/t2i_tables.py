"""Tables of text-to-image rows: what they are made of, tasks of the shapes score, distances, controls, language."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from v2flow.benchmark.document import ABSENT, Block, Bullets, Section, Table
from v2flow.benchmark.spread import DIRECTIONS, FORMS, Run, Spread, cells_of, over_seeds, runs_by_name
from v2flow.benchmark.t2i_figures import GENERATED, NATS, RETRIEVAL, SHAPES, drawing_figures, findings

CONTROLS = {
    "real": "real: the pictures of the captions themselves.",
    "real_vs_real": "real_vs_real: one half of the real pictures against the other.",
    "reconstructed": "reconstructed: the tokenizer's pictures of the true ids, the ceiling for every LLM.",
    "captions_shuffled": "captions_shuffled: the generated pictures against the captions of others, chance.",
    "words_shuffled": "words_shuffled: drawn of captions whose words were dealt out anew among all of them.",
    "marginal_ids": "marginal_ids: each position's ids drawn as often as training pictures have them there.",
    "untrained": "untrained: drawn by the row's model before its training.",
    "nearest_training_picture": "nearest_training_picture: for each generated picture the training picture like it.",
}
"""Rows of pictures beside the generated ones -> what they are, in the order of the tables."""
EVERY_ROW = "every row"
Figures = Mapping[str, float]


def made_of_section(results: Mapping[str, Any]) -> Section | None:
    """LLM, start of the visual rows, what learns, and the number of codes; None for tokenizers."""
    columns = {"LLM": "llm", "visual rows from": "rows", "what learns": "train", "K": "codebook_size"}
    lines = [
        [name, *(str(runs[0].get(key, ABSENT)) for key in columns.values())]
        for name, runs in drawing_rows(results).items()
    ]
    return Section("What the rows are made of", [Table(["row", *columns], lines)]) if lines else None


def text_to_image_sections(results: Mapping[str, Any]) -> list[Section]:
    """The sections of text-to-image rows, mean ± standard deviation over seeds; none for tokenizers."""
    rows = drawing_rows(results)
    if not rows:
        return []
    sections = (_shapes(rows), _retrieval(rows), _distances(rows), _language(rows), _absent(rows))
    return [section for section in sections if section is not None]


def drawing_rows(results: Mapping[str, Any]) -> dict[str, list[Run]]:
    """Row name -> its runs, of the rows that draw pictures of captions."""
    rows = {name: [run for run in runs if findings(run)] for name, runs in runs_by_name(results).items()}
    return {name: runs for name, runs in rows.items() if runs}


def _shapes(rows: Mapping[str, Sequence[Run]]) -> Section | None:
    def scores(run: Run, kind: str) -> Figures:
        return (findings(run).get("shapes") or {}).get(kind) or {}

    table, kinds = _kinds_table(rows, scores, lambda name: ("{:.3f}", 1))
    if table is None:
        return None
    drawn = max(findings(run)["drawn"] for runs in rows.values() for run in runs)
    note = (
        f"Share of {drawn} pictures that show what their captions say, as a program finds it, by task; overall is the "
        "mean over tasks. Bold: the best of the comparable rows."
    )
    return Section("Shapes score by task", [note, table, *_explained(kinds)])


def _retrieval(rows: Mapping[str, Sequence[Run]]) -> Section:
    columns = {"retrieval": "accuracy", "chance": "chance", "captions": "ways", "pictures": "pictures"}
    lines = []
    for name, runs in rows.items():
        spreads = [over_seeds(_of(run, "retrieval").get(key) for run in runs) for key in columns.values()]
        accuracy, *setting = spreads
        cells = [ABSENT if s is None else f"{s.mean:g}" for s in setting]
        lines.append([name, ABSENT if accuracy is None else accuracy.text("{:.3f}"), *cells])
    note = (
        "Share of pictures whose own caption makes their visual tokens likeliest, among so many captions, the others "
        "untrue of them."
    )
    return Section("Retrieval", [note, Table(["row", *columns], lines)])


def _distances(rows: Mapping[str, Sequence[Run]]) -> Section | None:
    def distances(run: Run, kind: str) -> Figures:
        figures = drawing_figures(run, kind)
        others = (SHAPES, RETRIEVAL, NATS)
        return {name: figures[name] for name in DIRECTIONS if name in figures and name not in others}

    table, kinds = _kinds_table(rows, distances, lambda name: (FORMS[name], DIRECTIONS[name]))
    if table is None:
        return None
    note = (
        "kid: distance between the sets of generated and real pictures. pair: mean cosine between the features of a "
        "picture and of the real picture of its caption, less the mean feature: 1 for the same picture, near 0 for any "
        "other. Bold: the best of the comparable rows."
    )
    return Section("Distances to real pictures", [note, table, *_explained(kinds)])


def _kinds_table(
    rows: Mapping[str, Sequence[Run]],
    get: Callable[[Run, str], Figures],
    look: Callable[[str], tuple[str, int]],
) -> tuple[Table | None, list[str]]:
    """A line for each row's generated pictures, then one for each of its controls; a control that is the same in all
    runs stands there once.

    Args:
        get: figures of a run's pictures of a kind.
        look: of a figure how it is written, and 1 where more is better or -1 where less is.

    Returns:
        The table and the controls in it; no table where there is no figure.
    """
    every = [run for runs in rows.values() for run in runs]
    names = list(dict.fromkeys(name for run in every for name in get(run, GENERATED)))
    if not names:
        return None, []
    fair = [bool(runs[0].get("comparable", True)) for runs in rows.values()]
    drawn = {name: _figures_of(runs, GENERATED, get) for name, runs in rows.items()}
    columns = [
        cells_of([_spread(found, name) for found in drawn.values()], fair, *look(name)) for name in names
    ]
    lines = [
        [name, GENERATED, str(len(found)), *(cells[number] for cells in columns)]
        for number, (name, found) in enumerate(drawn.items())
    ]
    kinds = [kind for kind in CONTROLS if any(get(run, kind) for run in every)]
    for kind in kinds:
        found = [get(run, kind) for run in every]
        if all(figures == found[0] for figures in found):
            lines.append(_kind_line(EVERY_ROW, every[:1], kind, names, get, look))
        else:
            lines += [_kind_line(name, runs, kind, names, get, look) for name, runs in rows.items()]
    return Table(["row", "pictures", "n", *names], lines), kinds


def _kind_line(
    name: str, runs: Sequence[Run], kind: str, names: Sequence[str], get: Callable[[Run, str], Figures],
    look: Callable[[str], tuple[str, int]],
) -> list[str]:  # fmt: skip
    found = _figures_of(runs, kind, get)
    spreads = [_spread(found, each) for each in names]
    cells = [ABSENT if s is None else s.text(look(each)[0]) for s, each in zip(spreads, names, strict=True)]
    return [name, kind, str(len(found)), *cells]


def _figures_of(runs: Sequence[Run], kind: str, get: Callable[[Run, str], Figures]) -> list[Figures]:
    """Of the runs that have pictures of this kind."""
    return [figures for run in runs if (figures := get(run, kind))]


def _spread(found: Sequence[Figures], name: str) -> Spread | None:
    return over_seeds(figures.get(name) for figures in found)


def _explained(kinds: Sequence[str]) -> list[Block]:
    return [Bullets([CONTROLS[kind] for kind in kinds])] if kinds else []


def _language(rows: Mapping[str, Sequence[Run]]) -> Section:
    columns: dict[str, tuple[Callable[[Run], float | None], str]] = {
        "text perplexity before": (lambda run: _of(run, "language").get("perplexity_before"), "{:.1f}"),
        "after": (lambda run: _of(run, "language").get("perplexity"), "{:.1f}"),
        "text mass": (lambda run: _of(run, "language").get("text_mass"), "{:.2g}"),
        "nearest training picture, dB": (
            lambda run: _of(run, "memorisation").get("psnr_to_nearest_training_picture"),
            "{:.2f}",
        ),
    }
    lines = []
    for name, runs in rows.items():
        spreads = [(over_seeds(get(run) for run in runs), form) for get, form in columns.values()]
        lines.append([name, *(ABSENT if s is None else s.text(form) for s, form in spreads)])
    note = (
        "Perplexity of a held-out English text, a token, before and after the training; LLMs of different vocabularies "
        "cannot be compared in it. Text mass: probability of text where a visual token should be. Nearest training "
        "picture: mean PSNR of the generated pictures to it; memorised ones have a high one."
    )
    return Section("Language and memory", [note, Table(["row", *columns], lines)])


def _of(run: Run, key: str) -> Figures:
    return findings(run).get(key) or {}


def _absent(rows: Mapping[str, Sequence[Run]]) -> Section | None:
    """Figures that no run has or could have, and why."""
    notes = dict.fromkeys(
        f"{name}: {reason}" for runs in rows.values() for run in runs for name, reason in _notes(run).items()
    )
    return Section("What could not be measured", [Bullets(list(notes))]) if notes else None


def _notes(run: Run) -> Mapping[str, str]:
    return findings(run).get("notes") or {}
