"""Suites of text-to-image experiments: planned, trained, scored and reported as tokenizers are, by the same command."""

import json
import xml.etree.ElementTree as ElementTree
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from PIL import Image
from t2i_training_toys import Toys, toy_tokenizer
from test_benchmark import results, run, write_suite
from test_benchmark_report import Page, table

from v2flow.benchmark import runs, t2i_plan
from v2flow.benchmark.held_out import check_captions_held_out, check_held_out
from v2flow.benchmark.html import html_report
from v2flow.benchmark.plots import figures
from v2flow.benchmark.processes import HeldRow, RowProcesses
from v2flow.benchmark.t2i_figures import SHAPES, drawing_figures, shapes_error
from v2flow.benchmark.t2i_grids import cut_drawings
from v2flow.benchmark.t2i_subject import TextToImageSubject
from v2flow.benchmark.tables import markdown_report
from v2flow.cli import main
from v2flow.cli_training import build_experiment
from v2flow.data.scenes import TASKS
from v2flow.data.shapes import build_shapes, read_scenes, render
from v2flow.data.tokens import build_tokens
from v2flow.errors import V2FlowError
from v2flow.images import read_picture, save_grid
from v2flow.tokenizer import V2FlowTokenizer
from v2flow.training.t2i_callbacks import TextToImageCallback
from v2flow.training.token_data_module import TokenDataModule

pytestmark = pytest.mark.filterwarnings(
    "ignore:The '.*_dataloader' does not have many workers",
    r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning on a newer torch
)
STEPS = "--model.init_args.optimizer.total_steps=4"
ROWS = "--model.init_args.text_to_image.rows"


class SceneToys(Toys):
    """Scenes of 32 px, which the verifier reads, as 4 tokens."""

    def __init__(self, folder: Path) -> None:
        build_shapes(folder / "pictures", train=24, val=12, test=12, size=32, progress=False)
        self.pictures = str(folder / "pictures/*.tar")
        self.tokenizer = str(folder / "tokenizer")
        V2FlowTokenizer(replace(toy_tokenizer().config, image_size=32)).save_pretrained(self.tokenizer)
        self.tokens = folder / "tokens"
        build_tokens(self.tokenizer, self.pictures, self.tokens, progress=False)

    def experiment(self, folder: Path, **options: Any) -> dict[str, Any]:
        config = super().experiment(folder, **options)
        callback = {
            "class_path": "v2flow.training.t2i_callbacks.TextToImageCallback",
            "init_args": {
                "retrieval_pictures": 3, "ways": 4, "shapes_pictures": 6, "final_pictures": 2,
                "final_retrieval_pictures": 2, "final_features": False,
            },
        }  # fmt: skip
        config["trainer"]["callbacks"].append(callback)
        return config


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> SceneToys:
    torch.manual_seed(0)
    return SceneToys(tmp_path_factory.mktemp("scenes"))


class Here:
    """A pool of the thread that asks it: a training takes over the signals of its process, which only that one may."""

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs

    def submit(self, function: Any, *arguments: Any) -> Future:
        future: Future = Future()
        future.set_result(function(*arguments))
        return future

    def shutdown(self, cancel_futures: bool) -> None:
        assert cancel_futures


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Rows' commands run in this process, which imports everything once; the list of their verbs."""
    verbs: list[str] = []

    def call(processes: RowProcesses, row: HeldRow, command: list[str], log: Path) -> None:
        verbs.append(command[0])
        assert main(command) == 0

    monkeypatch.setattr(RowProcesses, "call", call)
    monkeypatch.setattr(runs, "ThreadPoolExecutor", Here)
    return verbs


def scene_suite(toys: SceneToys, folder: Path, **changes: Any) -> Path:
    toys.write(folder)
    words = ["--ways=4", "--retrieval-pictures=6", f"--floors-train={toys.shards('train')}"]
    rows = [{"name": "Codes"}, {"name": "Random rows", "arguments": [f"{ROWS}=random"]}]
    evaluate = {"data": toys.shards("test"), "arguments": words} | changes.pop("evaluate", {})
    return write_suite(folder, **{"arguments": [STEPS], "rows": rows, "evaluate": evaluate, **changes})


@pytest.mark.filterwarnings("ignore:the tokenizer keeps")  # a toy
def test_rows_are_trained_once_scored_and_reported(
    toys: SceneToys, tmp_path: Path, called: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    suite = scene_suite(toys, tmp_path)
    assert run(suite) == 0
    assert "Codes: 4 tokens of 5 bits, " in capsys.readouterr().out
    first, second = results(tmp_path)
    assert first["step"] == 4 and first["tokens"] == 4 and first["codebook_size"] == 32
    assert first["llm"] == "gpt2-style:tiny, 2 blocks, random weights" and (
        first["rows"],
        second["rows"],
    ) == (
        "vocabulary",
        "random",
    )
    assert 0 < first["parameters"] < first["parameters_total"]
    assert second["command"][-1] == f"{ROWS}=random" and first["protocol"]["split"] == "test"
    assert [point["step"] for point in first["curve"]] == [2, 4]
    assert {"visual", "text_perplexity", "retrieval", "shapes/overall"} <= first["curve"][0].keys()
    assert not {"weights", "probes"} & first.keys()
    assert {"untrained", "marginal_ids", "reconstructed", "real"} <= first["text_to_image"]["shapes"].keys()
    check_report(tmp_path / "out", [first, second])

    # The same command again has nothing to do, and a row of another tokenizer's tokens would be another result.
    called.clear()
    assert run(suite) == 0 and called == []
    assert results(tmp_path) == [first, second]


@pytest.mark.parametrize(("kept", "said"), [(6, "overall 100.0%"), (0, "overall 0.0%")])
def test_the_ceiling_is_said_before_the_first_step(
    toys: SceneToys, kept: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.datamodule = TokenDataModule(toys.shards("train"), toys.shards("val"))
    tokenizer = V2FlowTokenizer.from_pretrained(toys.tokenizer)
    true = torch.from_numpy(np.stack([render(scene) for scene in read_scenes(toys.shards("val"))[:6]]))
    true = true.permute(0, 3, 1, 2) / 255.0
    true[kept:] = 1.0
    monkeypatch.setattr(tokenizer, "decode", lambda ids, *noise, **options: true)
    module: Any = SimpleNamespace(model=SimpleNamespace(tokenizer=tokenizer))
    callback = TextToImageCallback(ways=4, shapes_pictures=6)
    callback.setup(trainer, module, "fit")
    with pytest.warns(match="less than 97%: no LLM can score more") if not kept else nullcontext():
        callback.on_fit_start(trainer, module)
    assert said in capsys.readouterr().out


def check_report(folder: Path, rows: list[dict[str, Any]]) -> None:
    page = (folder / "README.md").read_text()
    assert "decode" not in table(page, "Results")[0] and "None" not in page
    headings, *lines = table(page, "Shapes score by task")
    assert headings[3:] == [*TASKS, "overall"]
    for row in rows:
        scores = row["text_to_image"]["shapes"]["generated"]
        (line,) = [cells for cells in lines if cells[:2] == [row["name"], "generated"]]
        assert [cell.strip("*") for cell in line[3:]] == [f"{scores[name]:.3f}" for name in headings[3:]]
        found = row["text_to_image"]
        figures = {f"{found['language']['nats_per_token']:.3f}", f"{found['retrieval']['accuracy']:.3f}"}
        (line,) = [cells for cells in table(page, "Results") if cells[0] == row["name"]]
        assert figures <= {cell.strip("*") for cell in line}
        assert f"- {row['name']}, seed 3, commit " in page
    # What every row shares stands there once, what differs once a row.
    assert ["every row", "real", "1", *["1.000"] * 7] in lines
    distances = table(page, "Distances to real pictures")
    assert [cells[0] for cells in distances if cells[1] == "reconstructed"] == ["every row"]
    assert [cells[0] for cells in distances if cells[1] == "untrained"] == ["Codes", "Random rows"]
    assert table(page, "Retrieval")[1][:1] + table(page, "Retrieval")[1][2:] == ["Codes", "0.25", "4", "6"]
    assert "Highest shapes score: " in page and "Against Codes:" in page and "one seed, not judged" in page
    text = (folder / "report.html").read_text()
    html = Page(text)
    assert html.tags.count("img") == 2 * 12 and 'aria-label="learning"' in text
    captions = (folder / "pictures/codes-seed3.txt").read_text().splitlines()
    assert len(captions) == 12 and captions[0] in html.text
    assert all(reference.startswith(("#", "data:image/")) for reference in html.references)


def drawing_run(name: str, seed: int, score: float, nats: float) -> dict[str, Any]:
    """A row of results.json: tasks of one score, and one of its controls."""
    shapes = {kind: dict.fromkeys((*TASKS, "overall"), s) for kind, s in
              (("generated", score), ("reconstructed", 0.9), ("captions_shuffled", score / 4))}  # fmt: skip
    return {
        "name": name, "seed": seed, "comparable": True, "minutes": 13.0, "budget_minutes": 6.0, "step": 1000,
        "llm": "gemma3-270m", "rows": "random", "train": "full", "codebook_size": 1024, "tokens": 16,
        "curve": [{"step": step, "visual": nats + 100 / step, "shapes/overall": score} for step in (500, 1000)],
        "text_to_image": {
            "samples": 1200, "drawn": 600, "shapes": shapes, "notes": {},
            "retrieval": {"accuracy": score, "accuracy_se": 0.01, "chance": 1 / 16, "ways": 16, "pictures": 256},
            "language": {"perplexity": 90.0, "perplexity_before": 30.0, "text_mass": 1e-5, "nats_per_token": nats},
        },
    }  # fmt: skip


def test_figures_over_seeds_and_what_is_said_of_them(tmp_path: Path) -> None:
    rows = [drawing_run("pretrained", seed, 0.70 + 0.02 * seed, 3.0 + 0.01 * seed) for seed in (0, 1)]
    rows += [drawing_run("random LLM", seed, 0.40 + 0.02 * seed, 3.5 + 0.01 * seed) for seed in (0, 1)]
    document = {"suite": {"title": "Two", "reference": "random LLM"}, "rows": rows, "pending": []}
    page = markdown_report(document)
    headings, first, second = table(page, "Results")
    assert first[:5] == ["pretrained", "2", "**0.710 ± 0.014**", "**0.710 ± 0.014**", "**3.005 ± 0.007**"]
    tasks = table(page, "Shapes score by task")
    assert tasks[1] == ["pretrained", "generated", "2", *["**0.710 ± 0.014**"] * 7]
    assert ["every row", "reconstructed", "1", *["0.900"] * 7] in tasks
    assert ["random LLM", "captions_shuffled", "2", *["0.103 ± 0.004"] * 7] in tasks
    assert "Highest shapes score: pretrained 0.710 ± 0.014, 2 seeds. Told apart from random LLM" in page
    assert "- pretrained: shapes score 0.300 above (more than the spread), " in page
    assert table(page, "Language and memory")[1][:4] == [
        "pretrained",
        "30.0 ± 0.0",
        "90.0 ± 0.0",
        "1e-05 ± 0",
    ]
    drawn = figures(document)
    assert list(drawn) == ["learning"] and drawn == figures(document)
    text = "".join(ElementTree.fromstring(drawn["learning"]).itertext())
    assert all(
        part in text for part in ("steps", "minutes", "nats a visual token", "shapes score", "random LLM")
    )
    assert "drawn by every row" not in html_report(document, tmp_path)  # there is no grid file


def test_minutes_become_steps_of_each_rows_own(toys: SceneToys, tmp_path: Path) -> None:
    wide = {
        "name": "wide",
        "arguments": ["--model.init_args.text_to_image.llm=gpt2-style:small", f"{ROWS}=random"],
    }
    suite = scene_suite(toys, tmp_path, rows=[{"name": "narrow"}, wide], minutes=0.05, threads=1)
    assert run(suite, "--plan") == 0
    kept = (tmp_path / "out" / "overhead.json").read_text()
    rows = json.loads(kept)["rows"]
    assert rows["wide"]["step_flops"] > 5 * rows["narrow"]["step_flops"] > 0
    assert rows["wide"]["peak_memory_bytes"] > 4 * 4 * rows["wide"]["parameters"]
    assert rows["narrow"]["generate_images_per_second"]["median"] > 0
    assert rows["narrow"]["generate_speed_ratio"]["median"] == 1.0
    assert "encode_images_per_second" not in rows["wide"]
    assert run(suite, "--plan") == 0
    assert (tmp_path / "out" / "overhead.json").read_text() == kept, "measured once"


def test_a_measured_row_learns_nothing_and_lets_its_state_go(toys: SceneToys, tmp_path: Path) -> None:
    module, data = build_experiment(["--config", toys.write(tmp_path)])
    subject = TextToImageSubject(module, data, torch.device("cpu"))
    before = {name: parameter.clone() for name, parameter in module.named_parameters()}
    assert subject.batch(0)[0] != subject.batch(1)[0] and subject.most == 6
    assert set(subject.time(0)) == {"step all", "step", "generate"}
    assert subject.flops("all", 0) > 0 and subject.peak_memory("all", 1) > subject.resident_bytes()
    assert all(torch.equal(before[name], parameter) for name, parameter in module.named_parameters())
    assert not subject.optimizer.state and all(p.grad is None for p in module.parameters())


def test_a_result_belongs_to_the_tokenizer_of_its_tokens(toys: SceneToys, tmp_path: Path) -> None:
    from v2flow.benchmark.plan import plan_suite
    from v2flow.benchmark.suite import read_suite

    suite = read_suite(scene_suite(toys, tmp_path))
    plan = plan_suite(suite, tmp_path)
    facts: Any = plan.facts["Codes"]
    known = runs.identity(suite, plan, suite.rows[0], 3)
    facts.tokenizer_sha256 = "another"
    assert runs.identity(suite, plan, suite.rows[0], 3) != known


def test_two_kinds_of_rows_are_refused(
    toys: SceneToys, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tokenizer.yaml"
    path.write_text(
        yaml.safe_dump({"model": {"class_path": "v2flow.training.tokenizer_module.TokenizerModule"}})
    )
    for other in ({"experiment": str(path)}, {"tokenizer": "mine:build"}):
        suite = scene_suite(toys, tmp_path, rows=[{"name": "Draws"}, {"name": "Codes", **other}])
        assert run(suite) == 2
        error = capsys.readouterr().err
        assert "found both: 'Codes' and 'Draws'; make two suites of them" in error and error.count("\n") == 1


def test_training_samples_are_refused_as_evaluation(
    toys: SceneToys, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = scene_suite(toys, tmp_path, evaluate={"data": toys.shards("train")})
    assert run(suite) == 2
    error = capsys.readouterr().err
    assert "train-000000.tar is also a training shard" in error and error.count("\n") == 1
    pictures = toys.pictures.replace("*", "train-*")
    with pytest.raises(
        V2FlowError, match="24 samples with their captions are in the training shards as well"
    ):
        check_captions_held_out(pictures, toys.shards("train"), "here")
    check_captions_held_out(toys.pictures.replace("*", "test-*"), toys.shards("train"), "here")
    check_held_out(toys.shards("test"), toys.shards("train"), "here")


def test_samples_that_are_only_counted_alike_are_no_training_samples(tmp_path: Path) -> None:
    from data_toys import write_tar

    for folder, captions in (("a", ("one", "two")), ("b", ("one", "three"))):
        members = [(f"{i:06d}.txt", caption.encode()) for i, caption in enumerate(captions)]
        write_tar(tmp_path / folder / "train-000000.tar", members)
    train, other = (str(tmp_path / folder / "train-000000.tar") for folder in "ab")
    check_captions_held_out(other, train, "here")


@pytest.mark.parametrize(
    ("evaluate", "message"),
    [
        ({"arguments": ["--picture=3", "--nothing"]}, "--nothing"),
        ({"arguments": "--ways=4"}, "evaluate.arguments: expected a list of words, found '--ways=4'"),
        ({"probes": ["alignment"]}, "option --probes: expected rows of tokenizers"),
        (
            {"modes": ["one_step", "steps=4"]},
            "modes: expected one way to turn visual tokens into pixels, found 2",
        ),
    ],
)
def test_options_that_evaluation_does_not_have_are_refused_before_any_training(
    evaluate: dict[str, Any],
    message: str,
    toys: SceneToys,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(scene_suite(toys, tmp_path, evaluate=evaluate)) == 2
    error = capsys.readouterr().err
    assert message in error and "suite.yaml" in error and not (tmp_path / "runs").exists()


def test_a_standard_error_of_the_mean_over_tasks() -> None:
    """Of 2 tasks of 50 pictures each: half the root of the sum of p(1 - p)/50."""
    scores = {"colors": 0.5, "counting": 0.2, "overall": 0.35}
    assert shapes_error(scores, 100) == pytest.approx(0.5 * (0.25 / 50 + 0.16 / 50) ** 0.5)
    run = {"text_to_image": {"shapes": {"real": scores}, "drawn": 100}}
    assert drawing_figures(run, "real")[SHAPES] == 0.35 and drawing_figures({}, "real") == {}


@pytest.mark.parametrize("count", [3, 8, 21])
def test_grids_are_cut_into_their_pictures(count: int, tmp_path: Path) -> None:
    levels = torch.arange(count) / 255
    save_grid([levels[:, None, None, None].expand(-1, 3, 64, 64)], tmp_path / "grid.png", 8)
    cut = cut_drawings(read_picture(tmp_path / "grid.png"), count)
    assert len(cut) == count
    for level, picture in zip(levels.tolist(), cut, strict=True):
        assert isinstance(picture, Image.Image) and picture.size == (64, 64)
        assert picture.getextrema() == ((round(255 * level),) * 2,) * 3


def test_the_plan_names_what_learns() -> None:
    facts = t2i_plan.TextToImageFacts(
        tokens=4, codebook_size=32, bits=20.0, parameters=1, parameters_total=2_000_000, llm="gemma3-270m",
        rows="words", train="full", tokenizer_sha256="x",
    )  # fmt: skip
    assert facts.size == " of 2.0 in all, gemma3-270m" and facts.inputs == ["x"]
