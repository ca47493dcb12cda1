"""What is asked of a tokenizer beyond its reconstructions: decode settings, wrong tokens, alignment."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from core_toys import small_config
from metric_toys import ColourTokenizer, PlainTokenizer, ToyLoader
from training_toys import write_shards

from v2flow import V2FlowTokenizer
from v2flow.baselines.vq_autoencoder import VQAutoencoder, VQAutoencoderConfig
from v2flow.cli import main
from v2flow.config import DecoderConfig, ResamplerConfig
from v2flow.errors import V2FlowError
from v2flow.evaluate import evaluate_checkpoint, evaluate_model
from v2flow.metrics.reconstruction import psnr_per_image
from v2flow.probes import PROBES, ProbeSettings, run_probes
from v2flow.probes.alignment import (
    collect_tokens,
    compare_directions,
    compare_rows,
    describe_tokens,
    measure_alignment,
    nearest_rows,
    principal_directions,
)
from v2flow.probes.alignment_plane import plane_points, project
from v2flow.probes.decoding import POINTS, sweep_decoding
from v2flow.probes.robustness import MistakenTokenizer, codes_of, measure_robustness, nearest_other

FIDELITY = ProbeSettings(features=False)


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def tokenizer() -> V2FlowTokenizer:
    torch.manual_seed(0)
    model = V2FlowTokenizer(small_config()).eval()
    for parameter in model.head.parameters():  # an untrained field is zero: no option would change a picture
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return model


@pytest.fixture(scope="module")
def baseline() -> VQAutoencoder:
    torch.manual_seed(0)
    config = VQAutoencoderConfig(
        image_size=16, encoder=ResamplerConfig(width=16, depth=1, token_grid=[4, 2]), width=16, heads=2,
        depth=1, codebook_size=32, code_dim=8,
    )  # fmt: skip
    return VQAutoencoder(config).eval()


def without_vocabulary(key_dim: int) -> V2FlowTokenizer:
    readout = ResamplerConfig(width=16, depth=1, token_grid=[4, 2], key_dim=key_dim, readout="none")
    return V2FlowTokenizer(small_config(resampler=readout)).eval()


class TestDecoding:
    def test_points_are_scored_as_modes_are(self, tokenizer: V2FlowTokenizer) -> None:
        loader = ToyLoader(10, 4)
        found = sweep_decoding(tokenizer, loader, settings=FIDELITY)
        assert found.figures.keys() == POINTS.keys() and not found.notes
        expected = evaluate_model(tokenizer, loader, POINTS, features=False)["modes"]
        for point, figures in found.figures.items():
            assert {name: figures[name] for name in expected[point]} == expected[point]
            assert figures["seconds_per_picture"] > 0
        assert len({figures["psnr"] for figures in found.figures.values()}) == len(POINTS)
        assert found.protocol["decode_modes"] == POINTS and found.protocol["threads"] >= 1

    def test_field_evaluations_are_those_of_solver_iterations_and_guidance(
        self, tokenizer: V2FlowTokenizer
    ) -> None:
        found = sweep_decoding(tokenizer, ToyLoader(4, 4), settings=FIDELITY).figures
        counted = {point: figures["field_evaluations"] for point, figures in found.items()}
        assert counted == {
            "one_step": 1, "one_step_noise": 1, "euler_4": 4, "euler_8": 8, "euler_16": 16, "heun_8": 15,
            "multistep_8": 8, "temperature_0.3": 8, "temperature_0.5": 8, "temperature_0.7": 8,
            "guidance_1.5": 16, "guidance_2": 16, "iterations_2": 16, "iterations_4": 32,
        }  # fmt: skip
        assert not tokenizer.head.field._forward_hooks

    def test_seconds_are_a_median_without_the_first_batch(
        self, tokenizer: V2FlowTokenizer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        times = iter([0.0, 100.0, 100.0, 108.0, 108.0, 112.0, 112.0, 114.0])
        monkeypatch.setattr("v2flow.probes.decoding.time.perf_counter", lambda: next(times))
        found = sweep_decoding(tokenizer, ToyLoader(16, 4), {"point": {"steps": 1}}, FIDELITY)
        assert found.figures["point"]["seconds_per_picture"] == 1.0

    def test_without_guidance_those_points_are_left_out(self) -> None:
        decoder = DecoderConfig(width=16, heads=2, encoder_depth=1, decoder_depth=1, null_probability=0.0)
        model = V2FlowTokenizer(small_config(decoder=decoder))
        found = sweep_decoding(model, ToyLoader(4, 4), settings=FIDELITY)
        assert found.notes.keys() == {"guidance_1.5", "guidance_2"} == POINTS.keys() - found.figures.keys()
        with pytest.raises(V2FlowError, match="null_probability=0"):
            sweep_decoding(model, ToyLoader(4, 4), {"guided": {"guidance": 2.0}}, FIDELITY)

    def test_feature_distances_have_their_standard_error(
        self, tokenizer: V2FlowTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("V2FLOW_CACHE", str(tmp_path))
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        found = sweep_decoding(tokenizer, ToyLoader(4, 4), {"one_step": POINTS["one_step"]})
        assert found.figures["one_step"]["kid-efficientnet-lite0_se"] > 0
        assert "rfd-efficientnet-lite0" in found.notes


class TestRobustness:
    def test_share_0_is_plain_reconstruction(self, tokenizer: V2FlowTokenizer) -> None:
        loader = ToyLoader(10, 4)
        found = measure_robustness(tokenizer, loader, settings=FIDELITY).figures
        plain = evaluate_model(tokenizer, loader, {"m": POINTS["one_step"]}, features=False)["modes"]["m"]
        assert found.keys() == {"random", "near"}
        for curve in found.values():
            assert [point["share"] for point in curve] == [0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5]
            assert curve[0] == {"share": 0.0} | plain

    def test_figures_are_those_worked_out_directly(self) -> None:
        model, loader = ColourTokenizer().eval(), ToyLoader(4, 4)
        found = measure_robustness(model, loader, (0.0, 1.0), FIDELITY)
        assert found.figures.keys() == {"random"} and "ColourTokenizer" in found.notes["near"]
        ids, psnr = model.encode(loader.images), found.figures["random"][1]["psnr"]
        assert psnr < found.figures["random"][0]["psnr"] - 3
        # One generator state decides the mistakes: rebuilding them gives the figure.
        from v2flow.training.module import seeded_generator

        seed = seeded_generator(torch.device("cpu"), 0, 0).initial_seed()
        wrong = MistakenTokenizer(model, None).replace(ids, seed, "random", 1.0)
        assert (wrong != ids).all()
        assert psnr == pytest.approx(psnr_per_image(loader.images, model.decode(wrong)).mean().item())

    def test_wrong_positions_are_nested_and_of_the_right_share(self) -> None:
        codes = torch.randn(64, 5, generator=draws())
        mistaken = MistakenTokenizer(ColourTokenizer(), codes)
        ids = torch.randint(64, (500, 64), generator=draws(1))
        for kind in ("random", "near"):
            at = {share: mistaken.replace(ids, 7, kind, share) for share in (0.0, 0.02, 0.05, 0.5, 1.0)}
            assert torch.equal(at[0.0], ids)
            assert ((at[0.02] != ids) <= (at[0.05] != ids)).all()
            assert torch.equal(at[0.05][at[0.02] != ids], at[0.02][at[0.02] != ids])
            # Standard deviation of a share of 32,000 tokens: 0.0012 and 0.0028.
            assert (at[0.05] != ids).float().mean().item() == pytest.approx(0.05, abs=0.006)
            assert (at[0.5] != ids).float().mean().item() == pytest.approx(0.5, abs=0.014)
            assert torch.equal(at[0.5] != ids, mistaken.replace(ids, 7, "random", 0.5) != ids)
        assert not torch.equal(mistaken.replace(ids, 8, "near", 0.5), at[0.5])

    def test_random_ids_are_uniform_over_the_others(self) -> None:
        mistaken = MistakenTokenizer(ColourTokenizer(), None)
        wrong = mistaken.replace(torch.full((1000, 63), 5), 0, "random", 1.0)
        counts = torch.bincount(wrong.flatten(), minlength=64)
        assert counts[5] == 0 and counts.sum() == 63_000
        assert counts[torch.arange(64) != 5].min() > 840 and counts.max() < 1160  # five standard deviations

    def test_near_misses_are_the_nearest_other_codes(
        self, tokenizer: V2FlowTokenizer, baseline: VQAutoencoder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("v2flow.probes.robustness._CHUNK", 7)  # 32 codes in five chunks
        for model in (tokenizer, baseline):
            codes = codes_of(model)
            assert codes is not None and codes.shape[0] == 32
            slow = []
            for i, code in enumerate(codes):
                distances = [math.inf if i == j else float((code - c).norm()) for j, c in enumerate(codes)]
                slow.append(distances.index(min(distances)))
            assert nearest_other(codes).tolist() == slow
            ids = torch.arange(32)[None]
            assert MistakenTokenizer(model, codes).replace(ids, 0, "near", 1.0)[0].tolist() == slow
        # Cosine is what V2Flow's codes are looked up by.
        cosines = tokenizer.visual_vocabulary.codes @ tokenizer.visual_vocabulary.codes.T
        assert torch.equal(nearest_other(codes_of(tokenizer)), cosines.fill_diagonal_(-2).argmax(1))

    def test_codes_of_a_baseline_are_what_its_ids_look_up(self, baseline: VQAutoencoder) -> None:
        ids = torch.tensor([[3, 31, 0, 3]])
        assert torch.equal(codes_of(baseline)[ids], baseline.quantizer.lookup(ids))
        assert measure_robustness(baseline, ToyLoader(4, 4), (0.0, 0.5)).figures.keys() == {"random", "near"}

    def test_a_decoder_without_randomness(self) -> None:
        assert measure_robustness(PlainTokenizer(), ToyLoader(4, 4), (0.0,)).figures["random"][0]["psnr"] > 15

    def test_shares_are_checked(self) -> None:
        for shares in ((), (1.5,), (-0.1, 0.5)):
            with pytest.raises(V2FlowError, match="option shares"):
                measure_robustness(PlainTokenizer(), ToyLoader(4, 4), shares)


class TestAlignment:
    def test_identical_sets(self) -> None:
        table = torch.randn(50, 6, generator=draws(), dtype=torch.float64)
        found = compare_directions(3 * table, table, principal_directions(table), draws())
        cosine = found["nearest_cosine"]
        assert [cosine[name] for name in ("mean", "q05", "median", "q95")] == pytest.approx([1.0] * 4)
        assert found["frechet_distance"] == pytest.approx(0.0, abs=1e-7)
        # The unbiased estimate takes the two sets for independent: it lacks the 50 pairs of equal vectors.
        unit = table / table.norm(dim=1, keepdim=True)
        kernel = (unit @ unit.T + 1) ** 3
        others = (kernel.sum() - 8 * 50) / (50 * 49)
        assert found["kernel_distance"] == pytest.approx(float(2 * others - 2 * kernel.mean()), abs=1e-12)
        # Without those pairs it is 0.
        assert found["kernel_distance"] + 2 / 50 * (8 - float(others)) == pytest.approx(0.0, abs=1e-12)

    def test_worked_by_hand_on_axes(self) -> None:
        """Rows 4·e0, 3·e1, 2·e2, e3; vectors along e0, along e0 + e1 and along −e3."""
        table = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]).double())
        vectors = torch.tensor([[5.0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, -1]]).double()
        cosines, rows = nearest_rows(vectors, table, 2)
        half = 0.5**0.5
        assert cosines[:, 0].tolist() == pytest.approx([1.0, half, 0.0]) and rows[0, 0] == 0
        assert set(rows[1].tolist()) == {0, 1} and cosines[1, 1].item() == pytest.approx(half)
        basis = principal_directions(table)
        assert torch.allclose(basis.abs(), torch.eye(4).double())
        found = compare_directions(vectors, table, basis, draws())
        assert found["nearest_cosine"]["mean"] == pytest.approx((1 + half) / 3)
        # Kernel (cos + 1)^3. Among the vectors the cosines are half, 0, 0; among the rows all 0; between
        # (1, 0, 0, 0), (half, half, 0, 0), (0, 0, 0, -1).
        within = ((half + 1) ** 3 + 2) / 3 + 1
        between = (8 + 3 + 2 * (half + 1) ** 3 + 2 + 3 + 0) / 12
        assert found["kernel_distance"] == pytest.approx(within - 2 * between)
        assert found["energy_32"] == pytest.approx(1.0)  # there are but four directions

    def test_energy_is_the_share_in_the_first_directions(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("v2flow.probes.alignment.ENERGY_DIRECTIONS", (1, 2))
        table = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]).double())
        vectors = torch.tensor([[3.0, 0, 0, 4], [1, 1, 1, 1], [0, 2, 0, 0]]).double()
        found = compare_directions(vectors, table, principal_directions(table), draws())
        assert found["energy_1"] == pytest.approx((0.36 + 0.25 + 0) / 3)
        assert found["energy_2"] == pytest.approx((0.36 + 0.5 + 1) / 3)

    def test_rows_are_compared_with_the_other_rows(self) -> None:
        table = torch.randn(40, 6, generator=draws(), dtype=torch.float64)
        found = compare_rows(table, principal_directions(table), draws())
        unit = table / table.norm(dim=1, keepdim=True)
        best = (unit @ unit.T).fill_diagonal_(-2).amax(1)
        assert found["nearest_cosine"]["mean"] == pytest.approx(best.mean().item())
        halves = compare_directions(table[0::2], table[1::2], principal_directions(table), draws())
        assert found["kernel_distance"] == pytest.approx(halves["kernel_distance"])

    def test_codes_that_are_rows_are_told_from_random_ones(self) -> None:
        model = V2FlowTokenizer(small_config())
        table = model.resampler.table
        model.visual_vocabulary.codes.copy_(torch.nn.functional.normalize(table[5:37], dim=-1))
        found = measure_alignment(model, ToyLoader(4, 4), FIDELITY).figures
        assert found["codes"]["nearest_cosine"]["q05"] == pytest.approx(1.0, abs=1e-6)
        assert found["random"]["nearest_cosine"]["q95"] < 0.95
        assert found["codes"]["frechet_distance"] < found["random"]["frechet_distance"]
        first = found["top_tokens"][0]
        assert first["nearest"][0]["word"] == model.words[5 + first["id"]]

    def test_tokens_of_pictures(self, tokenizer: V2FlowTokenizer) -> None:
        loader = ToyLoader(10, 4)  # two pictures of padding
        soft = tokenizer.encode(loader.images, return_soft=True, top_words=60)
        found = collect_tokens(tokenizer, loader, draws())
        assert found.images == 10
        assert torch.equal(found.counts, torch.bincount(soft.ids.flatten(), minlength=32))
        assert found.mean_norm == pytest.approx(soft.embeddings.norm(dim=-1).mean().item(), rel=1e-5)
        assert found.sample.shape == (40, 16)
        gaps = torch.cdist(found.sample.float().unflatten(0, (10, 4)), soft.embeddings)
        assert gaps.amin(-1).max() < 1e-5  # each is a token of its picture
        assert (
            torch.cdist(found.sample.unflatten(0, (10, 4)), found.sample.unflatten(0, (10, 4))) == 0
        ).sum() == 40
        figures = measure_alignment(tokenizer, loader, FIDELITY).figures
        rows = tokenizer.resampler.table.norm(dim=-1).mean().item()
        assert figures["norm_ratio"] == pytest.approx(found.mean_norm / rows)
        json.dumps(figures, allow_nan=False)

    def test_words_are_those_of_the_mean_distribution(self, tokenizer: V2FlowTokenizer) -> None:
        loader = ToyLoader(10, 4)
        soft = tokenizer.encode(loader.images, return_soft=True, top_words=60)
        dense = torch.zeros(10, 8, 60).scatter(2, soft.words, soft.probabilities)
        counts = torch.bincount(soft.ids.flatten(), minlength=32)
        described = describe_tokens(tokenizer, loader, counts, 3, words=4)
        assert len(described) == min(3, int((counts > 0).sum()))
        assert [80 * d["share"] for d in described] == sorted(counts.tolist(), reverse=True)[: len(described)]
        for token in described:
            mean = dense[soft.ids == token["id"]].mean(0)
            best = mean.topk(4)
            assert [w["word"] for w in token["words"]] == [tokenizer.words[i] for i in best.indices]
            assert [w["probability"] for w in token["words"]] == pytest.approx(best.values.tolist(), rel=1e-4)

    def test_what_cannot_be_compared_has_a_note(self, baseline: VQAutoencoder) -> None:
        for model, reason in ((baseline, "no LLM vocabulary"), (without_vocabulary(8), "8 dimensions")):
            found = measure_alignment(model, ToyLoader(4, 4), FIDELITY)
            assert not found.figures and reason in found.notes["alignment"]
        with pytest.raises(V2FlowError, match="held no picture"):
            measure_alignment(without_vocabulary(16), ToyLoader(0, 4), FIDELITY)

    def test_queries_as_wide_as_the_table_are_compared_without_words(self) -> None:
        found = measure_alignment(without_vocabulary(16), ToyLoader(4, 4), FIDELITY)
        assert found.figures["codes"]["nearest_cosine"]["mean"] < 1
        assert found.figures["top_tokens"][0]["words"] == [] and "readout=none" in found.notes["words"]

    def test_plane_is_that_of_the_rows(self) -> None:
        table = torch.randn(200, 6, generator=draws()) * torch.tensor([9.0, 5, 1, 1, 1, 1])
        rows, codes, shares = project(table, table[:20])
        assert torch.allclose(rows[:20], codes) and torch.allclose(
            rows.mean(0), torch.zeros(2).double(), atol=1e-9
        )
        unit = (table / table.norm(dim=1, keepdim=True)).double()
        variance = (unit - unit.mean(0)).square().sum() / 199
        assert (rows.var(0) / variance).tolist() == pytest.approx(shares, rel=1e-5)
        assert shares[0] > shares[1] > 0.1

    def test_points_of_the_plane_say_how_often_a_code_is_used(self) -> None:
        table = torch.randn(40, 6, generator=draws())
        counts = torch.tensor([3, 0, 1])
        found = plane_points(table, table[:3] * 2, counts, draws())
        rows = project(table, table)[0]
        places = [rows[i].tolist() for i in range(3)]
        for x, y, share in found["codes"]:
            place = min(range(3), key=lambda i: abs(places[i][0] - x) + abs(places[i][1] - y))
            assert [x, y] == pytest.approx(places[place], rel=5e-3)
            assert share == [0.75, 0.0, 0.25][place]
        assert len(found["rows"]) == 40 and sum(found["variance"]) < 1
        json.dumps(found, allow_nan=False)


@pytest.fixture(scope="module")
def exported(tokenizer: V2FlowTokenizer, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "exported"
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shards(tmp_path_factory.mktemp("shards"))["train"]


class TestCommand:
    def evaluate(self, exported: str, shards: str, report: Path, *words: str) -> dict[str, Any]:
        words = (*words, "--batch-size", "4", "--no-features", "--json", str(report))
        assert main(["evaluate", exported, "--data", shards, *words]) == 0
        return json.loads(report.read_text())

    def test_report_and_lines(
        self, exported: str, shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        names = ["decoding", "robustness", "alignment"]
        report = self.evaluate(
            exported, shards, tmp_path / "r.json", "--probes", *names, "--probe-limit", "6", "--limit", "10"
        )
        assert list(report["probes"]) == names
        assert report["weights"]["exported"]["images"] == 10
        assert [report["probe_protocols"][name]["images"] for name in names] == [6, 6, 6]
        assert report["probes"]["decoding"].keys() == POINTS.keys()
        text = capsys.readouterr().out
        assert "iterations_4: 32 evaluations" in text and "near ids for 50% of the tokens" in text
        assert "alignment: tokens are" in text and "random: nearest row" in text

    def test_without_probes_nothing_changes(self, exported: str, shards: str, tmp_path: Path) -> None:
        report = self.evaluate(exported, shards, tmp_path / "r.json", "--limit", "4")
        assert not [key for key in report if "probe" in key]

    def test_seed_reaches_the_probes(self, exported: str, shards: str, tmp_path: Path) -> None:
        def robustness(seed: str) -> Any:
            words = ("--probes", "robustness", "--limit", "4", "--seed", seed)
            return self.evaluate(exported, shards, tmp_path / "r.json", *words)["probes"]["robustness"]

        assert robustness("1") == robustness("1") != robustness("2")

    def test_mistakes(self, exported: str, shards: str, capsys: pytest.CaptureFixture[str]) -> None:
        words = ["evaluate", exported, "--data", shards]
        for more, expected in (
            (["--probes", "decoding", "beauty"], "unknown probe 'beauty'; expected some of decoding"),
            (["--probes", "decoding", "--probe-limit", "0"], "option probe_limit"),
        ):
            assert main([*words, *more]) == 2
            assert expected in capsys.readouterr().err
        with pytest.raises(V2FlowError, match="raw alone"):
            evaluate_checkpoint("nowhere.ckpt", shards, weights=["raw"], probes=["decoding"])

    def test_help_names_every_probe(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            main(["evaluate", "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert ", ".join(PROBES) in text


def test_a_probe_without_a_question_is_in_the_notes_alone(baseline: VQAutoencoder) -> None:
    found = run_probes(["decoding", "alignment", "robustness"], baseline, ToyLoader(4, 4), FIDELITY)
    assert list(found["probes"]) == ["robustness"]
    assert found["probe_notes"].keys() == {"decoding", "alignment"}
    with pytest.raises(V2FlowError, match="unknown probe 'beauty'"):
        run_probes(["beauty"], baseline, ToyLoader(4, 4), FIDELITY)


def test_domains_that_are_there_are_scored(
    tokenizer: V2FlowTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("V2FLOW_DATA", str(tmp_path / "photographs"))
    assert "v2flow data domains" in PROBES["domains"](tokenizer, []).notes["domains"]
    (tmp_path / "data" / "openmoji").mkdir(parents=True)
    shards = Path(write_shards(tmp_path)["val"])
    shards.rename(tmp_path / "data" / "openmoji" / "test-000000.tar")
    found = PROBES["domains"](tokenizer, [], settings=ProbeSettings(features=False, limit=4)).figures
    assert found["openmoji"]["images"] == 4 and found["openmoji"]["modes"]["one_step"]["psnr"] > 0
