"""The benchmark's report: its arithmetic, what it claims and what it does not, and pages that are whole."""

import copy
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from v2flow.benchmark.document import escape_markdown
from v2flow.benchmark.grids import MAX_BYTES, cut_grid, picture_strips
from v2flow.benchmark.html import html_report
from v2flow.benchmark.plan import Plan
from v2flow.benchmark.plots import CAPTIONS, figures, frontier
from v2flow.benchmark.report import write_report
from v2flow.benchmark.spread import KID, Spread, over_seeds, told_apart
from v2flow.benchmark.suite import Evaluation, Row, Suite
from v2flow.benchmark.tables import markdown_report, report_sections
from v2flow.data.attribution import report_attribution
from v2flow.errors import V2FlowError
from v2flow.images import read_picture, save_grid

Results = dict[str, Any]


def mode(psnr: float, kid: float) -> dict[str, float]:
    return {
        "psnr": psnr,
        "psnr_pooled": psnr - 0.6,
        "ssim": psnr / 30,
        KID: kid,
        f"{KID}_se": 0.0005,
        "rfd-efficientnet-lite0": 100 * kid,
    }


def run(name: str, seed: int, modes: dict[str, dict[str, float]], **changes: Any) -> Results:
    """A row of results.json as `v2flow benchmark` writes it."""
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    first = next(iter(modes.values()))["psnr"]
    return {
        "name": name,
        "slug": slug,
        "seed": seed,
        "comparable": True,
        "command": ["v2flow", "fit", "--config", f"{slug}.yaml", f"--seed_everything={seed}", "--a={b: 1}"],
        "evaluate_command": ["v2flow", "evaluate", "CHECKPOINT", "--data", "test-{000000..000001}.tar"],
        "commit": "abc1234567",
        "minutes": 13.0 + seed,
        "budget_minutes": 6.0,
        "step": 1000,
        "tokens": 64,
        "codebook_size": 1024,
        "bits": 640.0,
        "parameters": 4305942,
        "machine": {"processor": "a processor", "cores": 2, "gpu": None, "torch": "2.8.0", "threads": 1},
        "protocol": {"set": "cifar10", "height": 32, "width": 32, "libraries": {"torch": "2.8.0"}},
        "weights": {
            "ema": {
                "images": 2560,
                "modes": modes,
                "codebook": {"size": 1024, "usage": 1.0, "perplexity": 950.0 + seed},
                "notes": {"rfid": "no weights"},
            }
        },
        "curve": [{"step": step, "psnr": first - 1000 / step} for step in (200, 400, 600, 800, 1000)],
        "probes": {},
        "grid": f"pictures/{slug}-seed{seed}.png",
    } | changes


def spread(median: float) -> dict[str, float]:
    return {"median": median, "low": 0.9 * median, "high": 1.2 * median}


def cost(step_seconds: float, **decoders: float) -> dict[str, Any]:
    return {
        "reference": "VQ",
        "parameters": 4305942,
        "step_seconds": spread(step_seconds),
        "step_flops": 25.3e9,
        "peak_memory_bytes": 600_000_000,
        "encode_images_per_second": spread(310.0),
        "decode_images_per_second": {name: spread(speed) for name, speed in decoders.items()},
        "step_time_ratio": spread(step_seconds / 0.2),
        "step_flops_ratio": 1.25,
        "decode_speed_ratio": {name: spread(speed / 400) for name, speed in decoders.items()},
    }


def example() -> Results:
    """Two comparable rows of three seeds, one of one seed, and one of other tokens with the best figures."""
    rows = []
    for seed in range(3):
        wobble = (-0.1, 0.0, 0.1)[seed]
        v2flow = {
            "one_step": mode(25.8 + wobble, 0.061 + wobble / 100),
            "sampled": mode(24.5 + wobble, 0.040 + wobble / 100),
        }
        probes = {
            "decoding": {
                "one_step": mode(25.9, 0.062) | {"seconds_per_picture": 0.002, "field_evaluations": 1},
                "euler_8": mode(24.0, 0.05) | {"seconds_per_picture": 0.01, "field_evaluations": 8},
                "worse": mode(23.9, 0.055),
            },
            "robustness": {
                "random": [{"share": 0.0, "psnr": 25.8 + wobble}, {"share": 0.1, "psnr": 22.0 + wobble}],
                "near": [{"share": 0.0, "psnr": 25.8 + wobble}, {"share": 0.1, "psnr": 24.0 + wobble}],
            },
            "alignment": {
                "norm_ratio": 1.5,
                "codes": {"energy_32": 0.5},
                "top_tokens": [
                    {
                        "id": 3,
                        "share": 0.25,
                        "words": [{"word": "\u2581tree", "probability": 0.031}],
                        "nearest": [{"word": "leaf", "cosine": 0.417}],
                    }
                ],
                "plane": {
                    "variance": [0.3, 0.2],
                    "rows": [[0.1, 0.2], [0.3, -0.1]],
                    "codes": [[0.1, 0.1, 0.5], [0, 0, 0]],
                },
            },
            "domains": {"histology": {"images": 48, "modes": {"one_step": mode(30.0 + wobble, 0.2)}}},
        }
        rows += [
            run("V2Flow", seed, v2flow, probes=probes),
            run("VQ", seed, {"decode": mode(26.2 + wobble, 0.0612 + wobble / 100)}),
            run("16 tokens", seed, {"decode": mode(30.0, 0.01)}, comparable=False, tokens=16, bits=160.0),
        ]
    rows.append(run("FSQ", 0, {"decode": mode(25.0, 0.3)}))
    order = ["V2Flow", "VQ", "FSQ", "16 tokens"]
    rows.sort(key=lambda row: (row["seed"], order.index(row["name"])))
    suite = {
        "name": "cpu",
        "title": "Tokenizers",
        "about": "What they reach.",
        "file": "experiments/benchmark/cpu.yaml",
        "minutes": 6.0,
        "threads": 1,
        "seeds": [0, 1, 2],
    }
    overhead = {"VQ": cost(0.2, decode=400.0), "V2Flow": cost(0.3, one_step=390.0, sampled=60.0)}
    pending = [["FSQ", 1], ["FSQ", 2]]
    return {"suite": suite, "overhead": overhead, "rows": rows, "pending": pending}


def write_grids(
    results: Results, folder: Path, size: int = 32, count: int = 16
) -> dict[str, list[torch.Tensor]]:
    """A grid file for every run, as `v2flow evaluate --grid` writes it; row -> its strips."""
    generator = torch.Generator().manual_seed(0)
    original = torch.rand(count, 3, size, size, generator=generator)
    strips: dict[str, list[torch.Tensor]] = {}
    for row in results["rows"]:
        modes = row["weights"]["ema"]["modes"]
        decoded = [torch.rand(count, 3, size, size, generator=generator) for _ in modes]
        strips.setdefault(row["name"], [original, *decoded])
        row["protocol"] = row["protocol"] | {"height": size, "width": size}
        save_grid([original, *decoded], folder / row["grid"])
    return strips


def table(text: str, title: str) -> list[list[str]]:
    """Cells of the first Markdown table under a heading, its headings first."""
    lines = text.split(f"## {title}\n")[1].split("\n## ")[0].splitlines()
    rows = [[c.strip() for c in line.strip("| ").split(" | ")] for line in lines if line.startswith("|")]
    return [row for row in rows if set(row[0]) != {"-"}]


def cell(text: str, title: str, row: str, decode: str, heading: str) -> str:
    headings, *rows = table(text, title)
    found = [cells for cells in rows if cells[0] == row and cells[1] == decode]
    assert len(found) == 1
    return found[0][headings.index(heading)]


def test_mean_and_standard_deviation_over_seeds() -> None:
    values = [25.7, 25.8, 26.2]
    found = over_seeds([*values, None], [0.1, 0.3, None])
    assert found is not None and found.n == 3 and found.error == pytest.approx(0.2)
    assert found.mean == pytest.approx(np.mean(values)) and found.std == pytest.approx(np.std(values, ddof=1))
    assert over_seeds([1.5]) == Spread(1.5, None, 1) and over_seeds([None]) is None
    assert found.text("{:.2f}") == "25.90 ± 0.26" and Spread(1.5, None, 1).text("{:.2f}") == "1.50"


@pytest.mark.parametrize(
    ("first", "second", "answer"),
    [
        (Spread(26.0, 0.1, 3), Spread(25.0, 0.1, 3), True),
        (Spread(26.0, 0.1, 3), Spread(25.9, 0.1, 3), False),
        # Two seeds whose means are three standard deviations apart are still too few (t = 3, 2 degrees of freedom).
        (Spread(26.0, 0.1, 2), Spread(25.7, 0.1, 2), False),
        (Spread(26.0, 0.1, 9), Spread(25.7, 0.1, 9), True),
        (Spread(26.0, None, 1), Spread(20.0, 0.1, 3), None),
        (Spread(26.0, 0.0, 2), Spread(26.1, 0.0, 2), True),
        (Spread(26.0, 0.0, 2), Spread(26.0, 0.0, 2), False),
        # Beyond the spread of seeds, within what the choice of pictures leaves; for one seed, too.
        (Spread(0.060, 0.0001, 3, 0.002), Spread(0.055, 0.0001, 3, 0.002), False),
        (Spread(0.060, None, 1, 0.002), Spread(0.055, None, 1, 0.002), False),
        (Spread(0.070, 0.0001, 3, 0.002), Spread(0.055, 0.0001, 3, 0.002), True),
    ],
)
def test_differences_are_told_apart_only_beyond_the_spread(
    first: Spread, second: Spread, answer: bool | None
) -> None:
    assert told_apart(first, second) is answer and told_apart(second, first) is answer


def test_main_table() -> None:
    text = markdown_report(example())
    headings, *rows = table(text, "Results")
    assert (
        headings[:4] == ["row", "decode", "n", "psnr ↑"]
        and f"{KID} ↓" in headings
        and "rfid ↓" not in headings
    )
    names = [tuple(cells[:3]) for cells in rows]
    assert names == [
        ("V2Flow", "one_step", "3"),
        ("V2Flow", "sampled", "3"),
        ("VQ", "decode", "3"),
        ("FSQ", "decode", "1"),
        ("16 tokens †", "decode", "3"),
    ]
    assert cell(text, "Results", "V2Flow", "one_step", "psnr ↑") == "25.80 ± 0.10"
    assert cell(text, "Results", "V2Flow", "one_step", "wall-clock minutes") == "14.0 ± 1.0"
    assert cell(text, "Results", "V2Flow", "one_step", "parameters, M") == "4.31"
    assert cell(text, "Results", "FSQ", "decode", "psnr ↑") == "25.00"  # one seed: no deviation


def test_the_best_comparable_row_is_bold_in_each_column() -> None:
    text = markdown_report(example())
    headings, *rows = table(text, "Results")
    bold = {headings[i]: cells[0] for cells in rows for i, c in enumerate(cells) if c.startswith("**")}
    # The 16 tokens of 30 dB are not compared.
    assert bold == {
        "psnr ↑": "VQ",
        "psnr_pooled ↑": "VQ",
        "ssim ↑": "VQ",
        f"{KID} ↓": "V2Flow",
        "rfd-efficientnet-lite0 ↓": "V2Flow",
    }
    tied = example()
    tied["rows"] = [run("A", 0, {"m": mode(25.001, 0.5)}), run("B", 0, {"m": mode(25.002, 0.4)})]
    column = [cells[3] for cells in table(markdown_report(tied), "Results")[1:]]
    assert column == ["**25.00**", "**25.00**"]


def test_the_verdict_says_what_the_figures_allow() -> None:
    text = markdown_report(example())
    verdict = text.split("## What the figures say\n")[1].split("\n## ")[0]
    kid, psnr = (
        next(line for line in verdict.splitlines() if line.startswith(f"- {start}"))
        for start in (f"Lowest {KID}", "Highest psnr")
    )
    assert "V2Flow (sampled) 0.0400 ± 0.0010, 3 seeds" in kid
    assert "Told apart from VQ (decode) 0.0612 ± 0.0010." in kid and "Not judged (one seed): FSQ" in kid
    assert "Highest psnr: VQ (decode) 26.20 ± 0.10, 3 seeds. Told apart from V2Flow (one_step)" in psnr
    assert (
        f"- V2Flow: psnr 0.40 dB below (one_step; more than the spread), {KID} 0.0212 below (sampled; more"
        in verdict
    )
    assert "- FSQ: psnr 1.20 dB below (decode; one seed, not judged)" in verdict
    assert "Not compared, since tokens or bits differ: 16 tokens." in verdict

    close = example()
    for row in close["rows"]:
        if row["name"] == "V2Flow":
            row["weights"]["ema"]["modes"]["one_step"]["psnr"] += 0.38
    verdict = markdown_report(close).split("## What the figures say\n")[1]
    assert "Cannot be told apart from V2Flow (one_step) 26.18 ± 0.10" in verdict
    assert "psnr 0.02 dB below (one_step; cannot be told apart)" in verdict


def test_every_run_has_its_command_seed_commit_protocol_and_machine() -> None:
    results = example()
    results["rows"][1]["machine"] = results["rows"][1]["machine"] | {"cores": 64}
    results["rows"][2] |= {"command": None}
    text = markdown_report(results)
    commands = text.split("## Commands\n")[1].split("\n## ")[0]
    assert commands.count("seed_everything=") == len(results["rows"]) - 1
    assert "- V2Flow, seed 0, commit abc1234567, protocol 1, machine 1\n" in commands
    assert "  - `v2flow fit --config v2flow.yaml --seed_everything=0 '--a={b: 1}'`" in commands
    assert "- VQ, seed 0, commit abc1234567, protocol 1, machine 2\n" in commands
    assert "- FSQ, seed 0, commit abc1234567, protocol 1, machine 1; not trained here\n" in commands
    protocol = text.split("## Protocol, library versions and machine\n")[1]
    assert (
        protocol.count("| libraries.torch | 2.8.0 |") == 1
        and "Machine 2 differs from 1 in cores: 64." in protocol
    )


def test_per_seed_costs_and_probes() -> None:
    text = markdown_report(example())
    assert len(table(text, "Each seed")) == 1 + 3 * 4 + 1
    assert (
        "| VQ | 1 | decode | 26.20 | 25.60 | 0.8733 | 0.0612 ± 0.0005 | 6.1 | 100.0 % | 951 | 1000 | 14.0 | abc"
        in text
    )
    costs = table(text, "What a row costs")
    assert costs[1][:4] == ["VQ", "4.31", "200 (180–240)", "25.3"] and costs[1][-2:] == ["–", "–"]
    assert "Ratios to VQ" in text and ["V2Flow", "1.50 (1.35–1.80)", "1.25"] in [c[:3] for c in costs]
    assert "| V2Flow | near | 25.80 ± 0.10 | 24.00 ± 0.10 |" in text
    assert "| V2Flow | euler_8 | 8 | 0.01 | 24.00 ± 0.00 |" in text
    assert "| V2Flow | histology | 48 | one_step | 30.00 ± 0.10 |" in text
    assert "| codes.energy_32 | 0.5 ± 0 |" in text and "top_tokens" not in text
    assert "| V2Flow | 3 | 25.00% | ' tree' 0.031 | 'leaf' 0.42 |" in text


def test_pending_rows_are_named_and_missing_parts_left_out(tmp_path: Path) -> None:
    text = markdown_report(example())
    assert "Not run yet, so this report is incomplete: FSQ (seeds 1, 2)." in text
    bare = {
        "suite": {"title": "Bare"},
        "rows": [{"name": "Mine", "seed": 0, "weights": {"exported": {"modes": {"m": {"psnr": 20.0}}}}}],
        "pending": [],
    }
    text = markdown_report(bare)
    assert "Not run yet" not in text and "| Mine | m | 1 | **20.00** |" in text and "None" not in text
    assert [section.title for section in report_sections(bare)] == ["Results", "Each seed", "Commands"]
    assert figures(bare) == {} and "<svg" not in html_report(bare, tmp_path)
    nothing = {"suite": {"title": "Empty"}, "rows": [], "pending": [["VQ", 0]]}
    for page in (markdown_report(nothing), html_report(nothing, tmp_path)):
        assert "No row has been run yet." in page and "VQ (seed 0)" in page


def test_a_report_that_shows_openmoji_says_so_in_both_pages(tmp_path: Path) -> None:
    line = report_attribution("data/openmoji/test-*.tar")
    for part in ("OpenMoji", "https://openmoji.org/", "CC BY-SA 4.0", "reconstructions", "same licence"):
        assert part in line
    for data in ("data/openmoji/test-*.tar", "data/cifar10/test-*.tar"):
        suite = Suite("Emojis", "e.yaml", Evaluation(data), [Row("V2Flow")], file="emojis.yaml")
        write_report(suite, Plan(suite.rows, {}), [], tmp_path)
        shows = "openmoji" in data
        assert (f"\n\n{line}\n\n" in (tmp_path / "README.md").read_text()) == shows
        assert (f"<p>{line}</p>" in (tmp_path / "report.html").read_text()) == shows
        assert json.loads((tmp_path / "results.json").read_text())["suite"]["attribution"] == line * shows


def test_the_committed_quick_look_is_what_its_results_give() -> None:
    """And carries the attribution of its pictures."""
    folder = Path(__file__).parents[1] / "benchmarks" / "results" / "quick"
    results = json.loads((folder / "results.json").read_text())
    assert results["suite"]["attribution"] == report_attribution("data/openmoji/test-*.tar")
    assert (folder / "README.md").read_text() == markdown_report(results)
    assert results["suite"]["attribution"] in (folder / "report.html").read_text()


def test_plots_are_whole_svg_and_the_same_each_time() -> None:
    results = example()
    drawn = figures(results)
    assert list(drawn) == list(CAPTIONS)
    assert drawn == figures(copy.deepcopy(results))
    ids: list[str] = []
    for name, svg in drawn.items():
        root = ElementTree.fromstring(svg)
        found = {element.get("id") for element in root.iter() if element.get("id")}
        used = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', svg))
        assert {a or b for a, b in used} <= found, name
        ids += [str(identifier) for identifier in found]
        assert "currentColor" in svg and "V2Flow" in "".join(root.itertext())
    assert len(ids) == len(set(ids))
    for row in results["rows"]:
        row |= {"curve": [], "probes": {}, "tokens": 64}
    assert list(figures(results | {"overhead": {}})) == ["tradeoff"]


def test_frontier_of_decode_settings() -> None:
    points = [(24.0, 0.5), (26.0, 0.9), (25.0, 0.6), (24.5, 0.7), (26.0, 0.8), (23.0, 0.5)]
    assert frontier(points) == [(26.0, 0.8), (25.0, 0.6), (24.0, 0.5)]
    assert frontier([]) == []


class Page(HTMLParser):
    """Refuses tags that do not close in order; gathers references and text."""

    VOID = {"meta", "img", "br", "link", "input", "hr"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [v or "" for name, v in attrs if name in ("src", "href", "xlink:href", "srcset")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_is_whole_and_needs_nothing_beside_itself(tmp_path: Path) -> None:
    results = example()
    write_grids(results, tmp_path, size=16, count=8)
    text = html_report(results, tmp_path)
    page = Page(text)
    assert page.references and all(r.startswith(("#", "data:image/")) for r in page.references)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert "@import" not in text and "url(http" not in text
    assert page.tags.count("svg") == len(CAPTIONS) and page.tags.count("table") >= 7
    assert page.tags.count("img") == 1 + 5  # the originals once, then a strip for each row and decode mode
    assert page.tags.count("details") == len(results["rows"])
    assert "FSQ (seeds 1, 2)" in page.text and "26.20 ± 0.10" in page.text
    assert text == html_report(copy.deepcopy(results), tmp_path)


def test_names_are_escaped(tmp_path: Path) -> None:
    name = '<script>alert("x")</script> | *a* _b_ & $c$'
    results = example()
    results["suite"] |= {"title": f"A {name}", "about": name}
    results["pending"] = [[name, 3]]
    results["overhead"] = {name: results["overhead"]["VQ"]}
    for row in results["rows"]:
        if row["name"] == "VQ":
            row |= {"name": name, "command": ["v2flow", "`a`", "</pre><b>"]}
    page = Page(html_report(results, tmp_path))
    assert not {"script", "b"} & set(page.tags) and name in page.text
    markdown = markdown_report(results)
    rows = table(markdown.replace(escape_markdown(name), "VQ"), "Results")
    assert len({len(row) for row in rows}) == 1 and rows[3][0] == "VQ"
    assert markdown.count("<script") == markdown.count("\\<script") > 0
    assert "  - `` v2flow '`a`' '</pre><b>' ``" in markdown


def test_markdown_escapes_only_what_markdown_reads() -> None:
    assert escape_markdown("steps=8,temperature=0.7 one_step") == "steps=8,temperature=0.7 one_step"
    assert escape_markdown("_a_ *b* c|d\ne `f` <g>") == r"\_a\_ \*b\* c\|d e \`f\` \<g>"


@pytest.mark.parametrize(("size", "count"), [(32, 16), (64, 16), (24, 5)])
def test_grid_files_are_cut_into_the_pictures_they_were_made_of(
    size: int, count: int, tmp_path: Path
) -> None:
    results = example()
    results["rows"] = results["rows"][:1]
    strips = write_grids(results, tmp_path, size, count)
    row = results["rows"][0]
    cut = cut_grid(read_picture(tmp_path / row["grid"]), row)
    assert [len(strip) for strip in cut] == [count] * 3
    for strip, expected in zip(cut, strips["V2Flow"], strict=True):
        for picture, values in zip(strip, expected, strict=True):
            eight_bit = (values * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
            assert np.array_equal(np.asarray(picture), eight_bit)


def test_strips_stay_small_and_a_row_without_a_grid_is_left_out(tmp_path: Path) -> None:
    results = example()
    results["rows"] = results["rows"][:6]  # seed 0, and V2Flow and VQ of seed 1
    write_grids(results, tmp_path, size=64)
    (tmp_path / "pictures" / "fsq-seed0.png").unlink()
    (tmp_path / "pictures" / "vq-seed0.png").unlink()  # its next seed stands in
    strips, note = picture_strips(results, tmp_path)
    labels = [strip.label for strip in strips]
    assert labels == ["originals", "V2Flow, one_step", "V2Flow, sampled", "VQ, decode", "16 tokens, decode"]
    assert sum(len(strip.source) for strip in strips) < MAX_BYTES * 1.4 and "WebP" in note
    (tmp_path / "pictures" / "v2flow-seed0.png").write_bytes(b"no picture")
    with pytest.raises(V2FlowError, match="v2flow-seed0.png: expected a picture"):
        picture_strips(results, tmp_path)


def test_results_survive_json(tmp_path: Path) -> None:
    """The report of a file that was read again is the report of the run."""
    results = example()
    again = json.loads(json.dumps(results))
    assert markdown_report(again) == markdown_report(results)
