"""`v2flow plan`: every shipped experiment without weights or data, the committed table, and what is refused."""

import json
import re
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml
from data_toys import numbered_shards
from training_toys import TOKENIZER

from v2flow.cli import main
from v2flow.planning.experiment import read_experiment
from v2flow.planning.hardware import DEVICES
from v2flow.planning.plan import Plan, Setting, plan_experiment
from v2flow.planning.report import HEADINGS, WIDTH, plan_table, plan_text

ROOT = Path(__file__).parent.parent
EXPERIMENTS = sorted((ROOT / "experiments").glob("t*/*.yaml"))
TABLE = ROOT / "benchmarks" / "results" / "plans" / "README.md"
WHERE_THINGS_LIE = {"LLAMA", "DCAE", "AUTOENCODER", "TOKENIZER", "V2FLOW_TOKENS", "V2FLOW_SHARDS", "IMAGENET"}


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Plans by path, each made once, in an empty folder, without environment variables and without a network."""
    made: dict[Path, Plan] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("empty"))
        for name in WHERE_THINGS_LIE:
            patch.delenv(name, raising=False)
        patch.setenv("V2FLOW_DATA", "nowhere")
        patch.setenv("V2FLOW_CACHE", "nothing-cached")

        def refuse(*_: Any) -> None:
            raise AssertionError("a plan asked for the network")

        patch.setattr(socket.socket, "connect", refuse)

        def plan(path: Path) -> Plan:
            if path not in made:
                experiment = read_experiment(path)
                setting = Setting(
                    DEVICES["h100"],
                    experiment.devices,
                    experiment.nodes,
                    experiment.bf16,
                    experiment.batch_size,
                    0.35,
                )
                made[path] = plan_experiment(experiment, setting)
            return made[path]

        yield plan


@pytest.fixture(scope="module")
def committed() -> dict[str, dict[str, str]]:
    """The committed table: experiment -> heading -> cell."""
    rows = [
        re.split(r" *\| *", line.strip("| \n"))
        for line in TABLE.read_text().splitlines()
        if line.startswith("| ")
    ]
    assert rows[0] == list(HEADINGS)
    return {row[0]: dict(zip(HEADINGS, row, strict=True)) for row in rows[2:]}


def test_every_experiment_is_in_the_committed_table(committed: dict[str, Any]) -> None:
    assert sorted(committed) == sorted(map(name_of, EXPERIMENTS))


@pytest.mark.slow
@pytest.mark.parametrize("path", EXPERIMENTS, ids=name_of)
def test_every_experiment_is_planned_without_weights_or_data(
    path: Path, plans: Any, committed: dict[str, dict[str, str]]
) -> None:
    """And its parameters and FLOPs are those of the committed table: `v2flow plan --all --out` writes it anew."""
    plan: Plan = plans(path)
    row = committed[name_of(path)]
    assert row["trained"] == f"{plan.parameters('trained'):,}"
    assert row["frozen"] == f"{plan.parameters('frozen'):,}"
    assert float(row["FLOPs a step"]) == pytest.approx(plan.flops, rel=1e-3)
    options = yaml.safe_load(path.read_text())["model"]["init_args"]["optimizer"]
    assert plan.steps == options["total_steps"] == int(row["steps"].replace(",", ""))
    assert sum(cost.share for cost in plan.stages.values()) == pytest.approx(1.0)
    assert all(cost.activations >= cost.saved > 0 for cost in plan.stages.values())
    assert all(strategy.days > 0 for strategy in plan.strategies.values())


def test_parameters_are_those_that_the_experiments_speak_of(plans: Any) -> None:
    trained = {name_of(path): plans(path).parameters("trained") for path in EXPERIMENTS}
    for ours, baseline in (("cifar10-32", "cifar10-32-vq"), ("cifar10-32", "cifar10-32-titok")):
        assert trained[f"tokenizer/{baseline}"] == pytest.approx(trained[f"tokenizer/{ours}"], rel=0.1)
    # LLaMA-2-7B's body, and 16,386 rows at the input and at the head.
    assert trained["t2i/reference-llama2-7b"] == 6_476_271_616 + 2 * 16386 * 4096


def test_llama_needs_sharding(plans: Any) -> None:
    (path,) = [path for path in EXPERIMENTS if path.stem == "reference-llama2-7b"]
    plan: Plan = plans(path)
    ddp, fsdp = plan.strategies["DDP"], plan.strategies["FSDP2"]
    assert ddp.memory.total > 16 * 6.4e9 and not ddp.fits and fsdp.fits
    assert plan.verdict.startswith("FSDP2 fits") and "DDP does not fit" in plan.verdict
    assert fsdp.memory.optimizer == pytest.approx(ddp.memory.optimizer / 32)


def test_text_is_narrow_and_says_what_it_rests_on(plans: Any) -> None:
    for path in EXPERIMENTS:
        text = plan_text(plans(path))
        assert max(map(len, text.splitlines())) <= WIDTH
        peak = "989" if plans(path).setting.bf16 else "67"
        assert f"products at 35% of {peak} TFLOP/s" in text


# --- the command ------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> str:
    """A small experiment, whose training shards are not there."""
    document = {
        "model": {
            "class_path": "v2flow.training.tokenizer_module.TokenizerModule",
            "init_args": {"tokenizer": TOKENIZER, "optimizer": {"total_steps": 1000}},
        },
        "data": {"train": str(tmp_path / "shards" / "s-*.tar"), "batch_size": 4},
        "trainer": {"max_steps": 1000, "devices": 1},
    }
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(document))
    return str(path)


def test_figures_are_written_as_they_are_printed(
    small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures, table = tmp_path / "out" / "plan.json", tmp_path / "out" / "plan.md"
    words = ["--devices", "4", "--nodes", "2", "--json", str(figures), "--out", str(table)]
    assert main(["plan", "--config", small, *words]) == 0
    printed = capsys.readouterr().out
    (found,) = json.loads(figures.read_text()).values()
    assert found["setting"]["hardware"]["name"] == "h100" and found["setting"]["devices"] == 4
    assert set(found["strategies"]) == {"DDP", "FSDP2"}
    memory = found["strategies"]["FSDP2"]["memory"]
    assert memory.pop("total") == pytest.approx(sum(memory.values()))
    assert found["flops_per_step"] == sum(s["share"] * s["flops"] for s in found["stages"].values())
    days = found["strategies"]["DDP"]["days"]
    assert days == pytest.approx(1000 * found["strategies"]["DDP"]["seconds"]["step"] / 86400)
    assert f"{found['parameters']['trained']:,}" in printed and "2 x 4 h100" in printed
    assert f"{found['parameters']['trained']:,}" in table.read_text()


def test_options_change_what_they_say(small: str, tmp_path: Path) -> None:
    def planned(*words: str) -> Any:
        path = tmp_path / "plan.json"
        assert main(["plan", "--config", small, "--json", str(path), *words]) == 0
        (found,) = json.loads(path.read_text()).values()
        return found

    base = planned()
    assert planned("--batch-size", "8")["flops_per_step"] == pytest.approx(
        2 * base["flops_per_step"], rel=0.1
    )
    deeper = planned("--set", "model.init_args.tokenizer.decoder.decoder_depth=3")
    assert deeper["parameters"]["trained"] > base["parameters"]["trained"]
    cpu = planned("--device", "cpu", "--tflops", "0.1", "--memory-bandwidth", "10")["strategies"]["DDP"][
        "seconds"
    ]
    assert cpu["compute"] == pytest.approx(cpu["products"] + cpu["memory"]) and cpu["launches"] == 0
    assert cpu["products"] == pytest.approx(base["flops_per_step"] / 0.1e12)
    two = ("--devices", "2")
    broadcast, local = (
        planned(*two, "--set", f"trainer.strategy={name}")["strategies"]["DDP"]["sent"]
        for name in ("ddp", "ddp_local_buffers")
    )
    # The table of 64 x 16, and the codes and their sums of 32 x 16.
    assert 0 < broadcast - local - 4 * (64 * 16 + 2 * 32 * 16) < 0.2 * (broadcast - local)
    options = "{class_path: lightning.pytorch.strategies.DDPStrategy, init_args: {broadcast_buffers: false}}"
    spelt = planned(*two, "--set", f"trainer.strategy={options}")
    assert spelt["strategies"]["DDP"]["sent"] == local
    assert planned("--set", "trainer.devices=[0,1]") == planned(*two)
    accumulated = planned("--set", "trainer.accumulate_grad_batches=2")
    assert accumulated["flops_per_step"] == 2 * base["flops_per_step"]


def test_what_does_not_fit_is_told_what_would(small: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--config", small, "--batch-size", "4096", "--memory-gb", "0.6"]
    assert main(words) == 0
    text = " ".join(capsys.readouterr().out.split())
    (batch,) = re.findall(r"Nothing fits into .*: DDP does with --batch-size (\d+)", text)
    assert 1 <= int(batch) < 4096
    for size, verdict in ((int(batch), "One device is enough"), (int(1.1 * int(batch)), "Nothing fits")):
        assert main([*words[:3], "--memory-gb", "0.6", "--batch-size", str(size)]) == 0
        assert verdict in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "h10"], "option --device: unknown device 'h10'; did you mean h100?"),
        (["--devices", "0"], "option --devices: expected at least 1, found 0"),
        (["--utilisation", "1.5"], "option --utilisation: expected a share in (0, 1], found 1.5"),
        (["--draws", "0"], "option --draws: expected at least 1"),
        (["--set", "model.init_args.tokenizer.decoder.widht=3"], "widht"),
        (["--caption-tokens", "3"], "expected a text-to-image experiment"),
        (["--config", "no-such.yaml"], "no-such.yaml: no such file"),
    ],
)
def test_mistakes_are_one_line(
    small: str, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--config", small, *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("v2flow: error: ")


def test_nothing_to_plan_is_a_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["plan"]) == 2
    assert "option --config: expected an experiment file, found none" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "--all"]) == 2
    assert "option --all: expected experiment files in experiments/tokenizer" in capsys.readouterr().err


def test_a_batch_larger_than_the_training_set_is_refused(
    small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("V2FLOW_CACHE", str(tmp_path / "cache"))
    numbered_shards(tmp_path / "shards", [6, 4])
    assert main(["plan", "--config", small, "--devices", "2"]) == 0
    assert "of 8 of 10 samples" in capsys.readouterr().out
    assert main(["plan", "--config", small, "--devices", "4"]) == 2
    error = capsys.readouterr().err
    assert "4 devices with 4 samples each take 16 a step, but its training shards hold 10" in error
    assert "use --batch-size 2 or less, or 2 devices in all" in error


def test_a_table_has_a_row_for_each_plan(plans: Any) -> None:
    chosen = [(name_of(path), plans(path)) for path in EXPERIMENTS[:2]]
    lines = plan_table(chosen).splitlines()
    assert len(lines) == 4 and all(line.count("|") == len(HEADINGS) + 1 for line in lines)


def test_fp32_and_bf16_use_their_own_peaks(plans: Any) -> None:
    (path,) = [path for path in EXPERIMENTS if path.stem == "openmoji-32-vq"]
    plan: Plan = plans(path)
    products = plan.strategies["DDP"].seconds.products
    assert products == pytest.approx(plan.flops / (0.35 * 67e12))
