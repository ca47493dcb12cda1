"""The page of `v2flow demo`, in Gradio. It asks nothing of other hosts, and no `share` link is ever made."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio as gr

from v2flow.decode_modes import presets_of
from v2flow.decoding import DecodeOptions
from v2flow.demo.filling import Frame
from v2flow.demo.fragments import figure, gallery, message, token_details, token_grid
from v2flow.demo.session import Reading, Session
from v2flow.errors import V2FlowError

HERE = Path(__file__).parent
MODEL: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
"""Of events that compute: one at a time."""
KEEP = 600
"""Seconds after which an uploaded file is deleted."""
INTRODUCTION = """# v2flow
A picture becomes visual tokens, each a mixture of words of a language model; the tokens become a picture again."""

HINT = "One step without noise is the mean picture, best in PSNR. Guidance 1 is none."


class Page:
    """Builds the page of a session and answers its events.

    Args:
        session: the models.
        max_upload: largest file in MB.
    """

    def __init__(self, session: Session, max_upload: int) -> None:
        self.session, self.max_upload = session, max_upload
        self.preset = dict(presets_of(session.tokenizer).get("best", {}))
        self.title = f"V2Flow, {session.tokenizer.num_tokens} tokens"

    def build(self) -> gr.Blocks:
        """The page."""
        with gr.Blocks(title="v2flow", analytics_enabled=False, delete_cache=(KEEP, KEEP)) as page:
            gr.Markdown(INTRODUCTION)
            with gr.Tabs():
                with gr.Tab("Picture"):
                    self._picture_tab()
                if self.session.text_to_image is not None:
                    with gr.Tab("Caption"):
                        self._caption_tab()
        return page

    def _picture_tab(self) -> None:
        state = gr.State(None)
        upload = gr.File(
            label=f"Picture: JPEG, PNG or WebP, up to {self.max_upload} MB", elem_id="upload",
            file_types=[".jpg", ".jpeg", ".png", ".webp"], height=140,
        )  # fmt: skip
        sliders = decode_sliders(self.session.tokenizer, self.preset)
        gr.Markdown(HINT)
        seed = seed_field()
        button = gr.Button("Reconstruct", variant="primary", elem_id="reconstruct")
        status = gr.HTML(elem_id="status")
        pictures = gr.HTML(elem_id="pictures")
        tokens = gr.HTML(elem_id="tokens", js_on_load=(HERE / "tokens.js").read_text())
        details = gr.HTML(elem_id="details")
        how = [seed, *sliders]
        shown = [status, pictures]
        upload.upload(self.on_upload, [upload, *how], [state, tokens, details, *shown], **MODEL)
        upload.clear(self.on_clear, state, [state, tokens, details, *shown], api_visibility="private")
        button.click(self.on_reconstruct, [state, *how], shown, **MODEL)
        for slider in sliders:
            slider.release(self.on_reconstruct, [state, *how], shown, trigger_mode="always_last", **MODEL)
        tokens.click(self.on_token, state, details, api_visibility="private")

    def _caption_tab(self) -> None:
        caption = gr.Textbox(label="Caption", placeholder="a strawberry", max_lines=1, elem_id="caption")
        with gr.Row():
            guidance = gr.Slider(1, 10, 2, step=0.1, label="Guidance of the LLM", elem_id="llm-guidance")
            temperature = gr.Slider(0, 2, 1, step=0.05, label="Temperature of the LLM")
        with gr.Accordion("How tokens become pixels", open=False):
            sliders = decode_sliders(self.session.text_to_image.tokenizer, {"temperature": 0.0})
        seed = seed_field()
        button = gr.Button("Draw", variant="primary", elem_id="draw")
        status = gr.HTML(elem_id="draw-status")
        pictures = gr.HTML(elem_id="drawn")
        how = [caption, guidance, temperature, seed, *sliders]
        gr.on([caption.submit, button.click], self.on_draw, how, [status, pictures], **MODEL)

    def on_upload(self, path: str, *how: Any) -> Iterator[tuple[Any, ...]]:
        """Tokens, then the picture as they are decoded."""
        try:
            reading = self.session.read(path)
        except V2FlowError as error:
            yield None, "", "", message(str(error), mistake=True), ""
            return
        grid = token_grid(reading, self.session.token_grid[1])
        hint = message("Choose a token to see its distribution.")
        yield reading, grid, hint, message("Decoding …"), gallery([self._original(reading)])
        for shown in self.on_reconstruct(reading, *how):
            yield gr.skip(), gr.skip(), gr.skip(), *shown

    def on_clear(self, reading: Reading | None) -> tuple[None, str, str, str, str]:
        """An empty page, to which a picture that is being decoded does not come back."""
        if reading is not None:
            reading.dropped.set()
        return None, "", "", "", ""

    def on_reconstruct(
        self, reading: Reading | None, seed: float, *sliders: float
    ) -> Iterator[tuple[str, str]]:
        """The picture as its tokens are decoded."""
        if reading is None:
            yield message("Choose a picture first.", mistake=True), ""
            return
        options = self.preset | decode_settings(*sliders)
        try:
            beside = self.session.reconstruct_by_baseline(reading)
            others = [] if beside is None else [self._result(reading, beside, self._baseline_title())]
            for frame in self.session.reconstruct(reading, options, int(seed or 0)):
                if reading.dropped.is_set():
                    break
                note = (
                    self._result(reading, frame, self.title)
                    if frame.done
                    else progress(frame, options, self.title)
                )
                status = "Done." if frame.done else "Decoding …"
                yield message(status), gallery([self._original(reading), note, *others])
        except V2FlowError as error:
            yield message(str(error), mistake=True), gallery([self._original(reading)])
        if (
            reading.dropped.is_set()
        ):  # here too, as the last frame may have been on its way when the page was cleared
            yield "", ""

    def on_token(self, reading: Reading | None, event: gr.EventData) -> str:
        """The distribution of the token that was chosen."""
        if reading is None:
            return ""
        index = int(event._data["index"])
        token = reading.tokens[index]
        place = divmod(index, self.session.token_grid[1])
        words = len(self.session.tokenizer.words)
        return token_details(token, place, words, self.session.nearest(token.id))

    def on_draw(
        self, caption: str, guidance: float, temperature: float, seed: float, *sliders: float
    ) -> Iterator[tuple[str, str]]:
        """The picture of a caption as it is decoded."""
        options = decode_settings(*sliders)
        yield message("The LLM writes tokens …"), ""
        try:
            for frame in self.session.draw(caption, options, guidance, temperature, int(seed or 0)):
                picture = (
                    figure(frame.picture, caption, f"{frame.seconds:.2f} s, seed {int(seed or 0)}")
                    if frame.done
                    else progress(frame, options, caption)
                )
                yield message("Done." if frame.done else "Decoding …"), gallery([picture])
        except V2FlowError as error:
            yield message(str(error), mistake=True), ""

    def _original(self, reading: Reading) -> str:
        size = reading.picture.shape[-1]
        return figure(reading.picture, "Original", f"{reading.name}, at {size} px")

    def _result(self, reading: Reading, frame: Frame, title: str) -> str:
        psnr = self.session.psnr(reading, frame.picture)
        return figure(frame.picture, title, f"PSNR {psnr:.2f} dB, {frame.seconds:.2f} s")

    def _baseline_title(self) -> str:
        assert self.session.baseline is not None
        return f"{self.session.baseline.name}, {self.session.baseline.model.num_tokens} tokens"


def progress(frame: Frame, options: dict[str, Any], title: str) -> str:
    """A picture on its way."""
    note = f"iteration {frame.iteration + 1} of {options['iterations']}, t = {frame.t:.2f}"
    return figure(frame.picture, title, note)


def decode_sliders(tokenizer: Any, chosen: Mapping[str, Any]) -> list[gr.Slider]:
    """Sliders for steps, iterations, noise and, where it was trained, guidance, in the order of `decode_settings`.

    Args:
        chosen: options of `decode` that they start at.
    """
    start = DecodeOptions(**chosen)
    positions = tokenizer.latent_grid[0] * tokenizer.latent_grid[1]
    with gr.Row():
        sliders = [
            gr.Slider(1, max(50, start.steps), start.steps, step=1, label="ODE steps"),
            gr.Slider(1, max(2, min(16, positions)), start.iterations, step=1, label="AR iterations"),
            gr.Slider(0, 1.5, start.temperature, step=0.05, label="Noise"),
        ]
        if tokenizer.config.decoder.null_probability > 0:
            sliders.append(gr.Slider(1, 5, start.guidance, step=0.1, label="Guidance"))
    return sliders


def decode_settings(
    steps: float, iterations: float, temperature: float, guidance: float = 1.0
) -> dict[str, Any]:
    """Fields of `DecodeOptions` from the values of `decode_sliders`."""
    return {
        "steps": int(steps), "iterations": int(iterations), "temperature": float(temperature),
        "guidance": float(guidance),
    }  # fmt: skip


def seed_field() -> gr.Number:
    """A whole number that seeds all draws."""
    return gr.Number(0, label="Seed", precision=0, minimum=0)


def launch(
    session: Session, host: str, port: int, max_upload: int, block: bool = True
) -> tuple[gr.Blocks, str]:
    """Serves the page; with `block` until interrupted.

    Args:
        host: address to listen on.
        max_upload: largest file in MB.

    Returns:
        The page, and its address.
    """
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    page = Page(session, max_upload).build()
    _, address, _ = page.launch(
        server_name=host, server_port=port, max_file_size=f"{max_upload}mb", share=False, inbrowser=False,
        quiet=True, footer_links=[], theme=theme, css_paths=[HERE / "page.css"], ssr_mode=False,
        prevent_thread_lock=True, enable_monitoring=False, mcp_server=False, pwa=False,
    )  # fmt: skip
    print(f"v2flow demo: {address} (stop it with Ctrl-C)", flush=True)
    if block:
        page.block_thread()
    return page, address
