"""The demo without a page: tokens in words, frames of a picture, captions, and mistakes in one line."""

import math
import socket
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from core_toys import pictures, small_config
from demo_toys import demo_baseline, demo_tokenizer, write_picture, write_text_to_image
from PIL import Image

from v2flow.cli import main
from v2flow.config import DecoderConfig, ResamplerConfig, VelocityConfig
from v2flow.decoding import DecodeMoment, watch_decoding
from v2flow.demo.filling import FRAMES, UNDRAWN, frames, partial_picture
from v2flow.demo.fragments import message, readable, token_details, token_grid
from v2flow.demo.session import TOP_WORDS, Reading, Session, TokenWords, load_session
from v2flow.errors import V2FlowError
from v2flow.images import load_image
from v2flow.inference import LoadedModel, picture_psnr
from v2flow.metrics.reconstruction import to_uint8
from v2flow.tokenizer import V2FlowTokenizer

SAMPLED = {"steps": 3, "iterations": 2, "temperature": 0.8, "guidance": 1.5}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "exported"
    demo_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_picture(tmp_path_factory.mktemp("pictures") / "two.jpg")


@pytest.fixture(scope="module")
def session(exported: str) -> Session:
    return Session(LoadedModel(exported), baseline=demo_baseline())


@pytest.fixture(scope="module")
def reading(session: Session, picture: str) -> Reading:
    return session.read(picture)


# --- watching ---------------------------------------------------------------------------------------------------


def velocities() -> list[VelocityConfig]:
    return [
        VelocityConfig(kind=kind, width=16, depth=1, heads=2, fine_width=8, target=target)
        for kind, target in (("joint", "residual"), ("per_position", "x0"))
    ]


@pytest.fixture(params=velocities(), ids=lambda config: f"{config.kind}-{config.target}")
def any_tokenizer(request: pytest.FixtureRequest) -> V2FlowTokenizer:
    return demo_tokenizer(small_config(velocity=request.param))


class TestWatching:
    def watched(
        self, model: V2FlowTokenizer, ids: torch.Tensor, **options: object
    ) -> tuple[list[DecodeMoment], torch.Tensor]:
        moments: list[DecodeMoment] = []
        with watch_decoding(moments.append):
            drawn = model.decode(ids, torch.Generator().manual_seed(1), **options)
        return moments, drawn

    def test_a_watched_picture_is_the_same(self, any_tokenizer: V2FlowTokenizer) -> None:
        ids = any_tokenizer.encode(pictures(2))
        moments, drawn = self.watched(any_tokenizer, ids, **SAMPLED)
        again = any_tokenizer.decode(ids, torch.Generator().manual_seed(1), **SAMPLED)
        assert torch.equal(drawn, again)
        assert [(m.iteration, round(m.t, 3)) for m in moments] == [
            (k, t) for k in (0, 1) for t in (1.0, 0.667, 0.333)
        ]

    def test_positions_fill_in_and_stay(self, any_tokenizer: V2FlowTokenizer) -> None:
        ids = any_tokenizer.encode(pictures(1))
        moments, _ = self.watched(any_tokenizer, ids, steps=2, iterations=3)
        left = [int(moment.mask.sum()) for moment in moments]
        assert left == sorted(left, reverse=True) and left[0] > left[2] > left[4] == 0
        for before, after in zip(moments[1::2], moments[2::2], strict=False):
            # The last step only moves along the estimate: what was drawn is close to it, and never changes again.
            drawn = ~before.mask
            assert torch.equal(after.latents[drawn], moments[-1].latents[drawn])
            assert after.latents[before.mask & ~after.mask].abs().sum() > 0
            assert after.latents[after.mask].abs().sum() == 0

    def test_the_last_estimate_of_euler_is_the_result(self, any_tokenizer: V2FlowTokenizer) -> None:
        ids = any_tokenizer.encode(pictures(1))
        moments, drawn = self.watched(any_tokenizer, ids, steps=4)
        shown = partial_picture(any_tokenizer, moments[-1])
        assert torch.allclose(shown, drawn[0], atol=1e-5)
        assert not torch.allclose(partial_picture(any_tokenizer, moments[0]), drawn[0], atol=1e-3)

    def test_nothing_watches_outside(self, any_tokenizer: V2FlowTokenizer) -> None:
        moments, _ = self.watched(any_tokenizer, any_tokenizer.encode(pictures(1)))
        any_tokenizer.decode(any_tokenizer.encode(pictures(1)))
        assert len(moments) == 1


# --- frames -----------------------------------------------------------------------------------------------------


class TestFrames:
    def test_undrawn_positions_are_grey(self) -> None:
        model = demo_tokenizer()
        mask = torch.zeros(1, 16, dtype=torch.bool)
        mask[0, 5] = True  # row 1, column 1 of 4 by 4 patches of 4 px
        shown = partial_picture(model, DecodeMoment(0, 0.5, torch.ones(1, 16, 48), mask))
        grey = (shown == UNDRAWN).all(0)
        assert grey[4:8, 4:8].all() and grey.sum() == 16

    def test_last_frame_is_what_the_command_writes(
        self, session: Session, reading: Reading, exported: str, picture: str, tmp_path: Path
    ) -> None:
        found = list(session.reconstruct(reading, SAMPLED, seed=3, pause=0))
        assert [(f.iteration, f.done) for f in found] == [(0, False)] * 3 + [(1, False)] * 3 + [(1, True)]
        words = [f"--{name}={value}" for name, value in SAMPLED.items()]
        assert main(["reconstruct", exported, picture, "--out", str(tmp_path), "--seed", "3", *words]) == 0
        expected = load_image(tmp_path / "two.png")
        assert torch.equal(to_uint8(found[-1].picture), to_uint8(expected))
        assert session.psnr(reading, found[-1].picture) == picture_psnr(reading.picture, expected)

    def test_long_decodes_make_few_frames(self, session: Session, reading: Reading) -> None:
        found = list(session.reconstruct(reading, {"steps": 60}, pause=0))
        assert FRAMES / 2 < len(found) <= FRAMES + 1

    def test_seconds_leave_out_the_frames(
        self, session: Session, reading: Reading, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def slow(*_: object) -> torch.Tensor:
            time.sleep(0.2)
            return torch.zeros(3, 16, 16)

        monkeypatch.setattr("v2flow.demo.filling.partial_picture", slow)
        begin = time.perf_counter()
        found = list(session.reconstruct(reading, {"steps": 5}, pause=0))
        taken = time.perf_counter() - begin
        assert taken > 1.0 and found[-1].seconds < taken - 0.9

    def test_pause_between_frames(self, session: Session, reading: Reading) -> None:
        begin = time.perf_counter()
        list(session.reconstruct(reading, {"steps": 4}, pause=0.1))
        assert time.perf_counter() - begin >= 0.4

    def test_an_abandoned_picture_stops_and_frees_the_model(self, session: Session, reading: Reading) -> None:
        lock = threading.Lock()

        def endless() -> torch.Tensor:
            while True:
                session.loaded.decode(reading.ids, {}, (0, 0))

        run = frames(session.tokenizer, endless, lock, pause=0)
        assert not next(run).done and lock.locked()
        run.close()  # type: ignore[attr-defined]
        assert lock.acquire(timeout=30), "it goes on"

    def test_one_thread_at_a_time_computes(self) -> None:
        busy, seen = threading.Lock(), []

        def decode() -> torch.Tensor:
            seen.append(busy.acquire(blocking=False))
            time.sleep(0.05)
            busy.release()
            return torch.zeros(3, 4, 4)

        lock = threading.Lock()
        runs = [threading.Thread(target=lambda: list(frames(None, decode, lock))) for _ in range(3)]
        for run in runs:
            run.start()
        for run in runs:
            run.join()
        assert seen == [True] * 3

    def test_mistakes_reach_the_reader(self, session: Session, reading: Reading) -> None:
        with pytest.raises(V2FlowError, match="option steps: expected at least 1"):
            list(session.reconstruct(reading, {"steps": 0}))
        config = small_config(
            decoder=DecoderConfig(width=16, heads=2, encoder_depth=1, decoder_depth=1, null_probability=0)
        )
        loaded = as_loaded(demo_tokenizer(config))
        with pytest.raises(V2FlowError, match="option guidance"):
            list(Session(loaded).reconstruct(reading, SAMPLED))


# --- tokens -----------------------------------------------------------------------------------------------------


def as_loaded(model: V2FlowTokenizer) -> LoadedModel:
    loaded = LoadedModel.__new__(LoadedModel)
    loaded.device, loaded.model, loaded.name, loaded.modes = torch.device("cpu"), model, "V2FlowTokenizer", {}
    return loaded


class TestTokens:
    def test_words_are_those_of_encode(self, session: Session, reading: Reading) -> None:
        soft = session.tokenizer.encode(reading.picture[None], return_soft=True, top_words=TOP_WORDS)
        assert torch.equal(reading.ids, soft.ids[0]) and len(reading.tokens) == 8
        for token, words, shares, entropy in zip(
            reading.tokens, soft.words[0], soft.probabilities[0], soft.entropy[0], strict=True
        ):
            assert token.probable[0][0] == session.tokenizer.words[words[0]]
            assert [p for _, p in token.probable] == pytest.approx(shares.tolist(), rel=1e-4)
            assert token.entropy == pytest.approx(entropy.item(), rel=1e-4)

    def test_the_picture_is_cropped_as_in_training(
        self, session: Session, reading: Reading, picture: str
    ) -> None:
        assert torch.equal(reading.picture, session.loaded.picture(picture)) and reading.name == "two.jpg"

    def test_nearest_words_of_a_code(self, session: Session) -> None:
        model = session.tokenizer
        table = torch.nn.functional.normalize(model.resampler.table.double(), dim=-1)
        cosines = table @ model.visual_vocabulary.codes[7].double()
        best = cosines.argsort(descending=True)[:TOP_WORDS]
        found = session.nearest(7)
        assert [word for word, _ in found] == [model.words[i] for i in best]
        assert [c for _, c in found] == pytest.approx(cosines[best].tolist(), abs=1e-5)

    def test_without_a_vocabulary_there_are_ids_only(self, picture: str) -> None:
        readout = ResamplerConfig(width=16, depth=1, token_grid=[4, 2], key_dim=8, readout="none")
        session = Session(as_loaded(demo_tokenizer(small_config(resampler=readout))))
        reading = session.read(picture)
        assert not reading.tokens[0].probable and session.nearest(reading.tokens[0].id) == []
        assert f"<bdi>{reading.tokens[0].id}</bdi>" in token_grid(reading, 2)
        assert "readout=none" in token_details(reading.tokens[0], (0, 0), 60, [])

    def test_baseline_is_its_own_reconstruction(self, session: Session, reading: Reading) -> None:
        frame = session.reconstruct_by_baseline(reading)
        assert frame is not None and session.baseline is not None
        model = session.baseline.model
        assert torch.equal(frame.picture, model.decode(model.encode(reading.picture[None]))[0])
        assert Session(session.loaded).reconstruct_by_baseline(reading) is None


# --- HTML -------------------------------------------------------------------------------------------------------


class TestFragments:
    def test_entropy_in_words(self) -> None:
        html = token_details(TokenWords(3, [("a", 0.25)], math.log(4)), (1, 0), 8, [("b", -0.5)])
        assert "row 2, column 1: id 3" in html and "1.39 nats" in html and "of at most 2.08" in html
        assert "as 4 equally" in html and "25.0 %" in html and "-0.500" in html and "width:0%" in html

    def test_nothing_of_a_name_or_word_becomes_markup(self) -> None:
        evil = '<img src=x onerror="alert(1)">'
        html = message(evil) + token_details(TokenWords(0, [(evil, 1.0)], 0.0), (0, 0), 2, [(evil, 1.0)])
        html += token_grid(Reading("x", torch.zeros(3, 4, 4), [TokenWords(0, [(evil, 1.0)], 0.0)]), 1)
        assert "<img" not in html and 'onerror="' not in html and html.count("&lt;img") == 5

    def test_words_that_cannot_be_seen(self) -> None:
        assert [readable(w) for w in ("\n\n", "▁dog", " ", "\x00", "犬")] == [
            "\\n\\n", "▁dog", " ", "\\x00", "犬"
        ]  # fmt: skip


# --- captions ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def painter(exported: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Session, str]:
    pytest.importorskip("transformers", reason="needs the extra t2i")
    folder = write_text_to_image(tmp_path_factory.mktemp("t2i") / "exported")
    return load_session(exported, text_to_image=folder), folder


class TestCaptions:
    def test_last_frame_is_what_the_command_draws(self, painter: tuple[Session, str], tmp_path: Path) -> None:
        session, folder = painter
        found = list(session.draw(" a dog ", {"steps": 2}, guidance=2.0, temperature=0.7, seed=5, pause=0))
        assert [f.done for f in found] == [False, False, True]
        how = ["--guidance=2", "--temperature=0.7", "--seed=5", "--mode=steps=2"]
        assert main(["generate", folder, "a dog", "--out", str(tmp_path), *how]) == 0
        expected = load_image(tmp_path / "0000-a-dog.png")
        assert torch.equal(to_uint8(found[-1].picture), to_uint8(expected))
        (other,) = [f for f in session.draw("a dog", {"steps": 2}, seed=6, pause=0) if f.done]
        assert not torch.equal(other.picture, found[-1].picture)

    def test_mistakes(self, painter: tuple[Session, str], session: Session) -> None:
        with pytest.raises(V2FlowError, match="caption"):
            list(painter[0].draw("  ", {}))
        with pytest.raises(V2FlowError, match="caption"):
            list(painter[0].draw("a dog " * 200, {}))
        with pytest.raises(V2FlowError, match="--text-to-image"):
            session.draw("a dog", {})

    def test_it_is_no_tokenizer(self, painter: tuple[Session, str]) -> None:
        with pytest.raises(V2FlowError, match="name it with --text-to-image"):
            load_session(painter[1])


# --- bad input --------------------------------------------------------------------------------------------------


def test_broken_files_are_named_in_one_line(session: Session, picture: str, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "cut.jpg").write_bytes(Path(picture).read_bytes()[:200])
    for name in ("broken.png", "cut.jpg"):
        with pytest.raises(
            V2FlowError, match=f"^{name}: expected a JPEG, PNG or WebP picture, found: [^\n]+$"
        ):
            session.read(str(tmp_path / name))
    with pytest.raises(V2FlowError, match="none.png: cannot be read .No such file or directory.; expected"):
        session.read(str(tmp_path / "none.png"))


def test_formats_beyond_the_allow_list_are_refused(session: Session, tmp_path: Path) -> None:
    """Pillow reads BMP, and runs Ghostscript for EPS: what a name says does not decide which decoder runs."""
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.bmp")
    (tmp_path / "a.bmp").rename(tmp_path / "a.png")
    with pytest.raises(V2FlowError, match="not a JPEG, PNG or WebP picture"):
        session.read(str(tmp_path / "a.png"))


def test_other_models_are_refused(exported: str) -> None:
    with pytest.raises(V2FlowError, match="found a VQAutoencoder; it can be shown beside one: --baseline"):
        Session(demo_baseline())
    with pytest.raises(V2FlowError, match="option --baseline: expected a tokenizer of 16 px .* 32 px"):
        Session(LoadedModel(exported), baseline=demo_baseline(32))


def test_the_command_refuses_before_it_loads(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for words, expected in (
            (["--port", port], f"cannot listen on 127.0.0.1 port {port}"),
            (["--host", "a..b", "--port", port], "cannot listen on a..b"),
            (["--port", "99999"], "option --port: expected a number from 1 to 65535"),
            (["--max-upload", "0"], "option --max-upload: expected at least 1 MB"),
        ):
            assert main(["demo", "nowhere", *words]) == 2
            assert expected in capsys.readouterr().err


def test_missing_gradio_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "v2flow.demo.app", raising=False)
    assert main(["demo", "nowhere", "--port", "7899"]) == 2
    assert 'pip install -e ".[demo]"' in capsys.readouterr().err
