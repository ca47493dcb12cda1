"""The page of `v2flow demo` in headless Chromium, driven by Playwright: what a visitor does, sees and gets wrong."""

import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest
from demo_toys import demo_baseline, demo_tokenizer, write_picture, write_text_to_image
from loopback import free_port

from v2flow.demo.filling import Frame
from v2flow.demo.fragments import data_url
from v2flow.demo.session import Session, load_session

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
app = pytest.importorskip("v2flow.demo.app", reason="needs the extra demo")
sync_api = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
if CHROMIUM is None:
    pytest.skip("needs Chromium (apt-get install chromium)", allow_module_level=True)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore::Warning:gradio"),
]
QUIET = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run",
]  # fmt: skip
SECONDS = 30_000
"""Milliseconds that a step of a visitor may take on a busy machine."""
CLEARED = """!document.querySelector('#pictures figure') &&
    ['', 'Choose a picture first.'].includes(document.querySelector('#status').innerText.trim())"""
"""Nothing of the last picture is left; a decode that still waited for its turn may have said that it has none."""
WORD = "{{#if x}}${window.broken = 1}<b>"
"""Real vocabularies hold pieces of templates and markup; here each word begins with them."""


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    pytest.importorskip("transformers", reason="needs the extra t2i")
    folder = tmp_path_factory.mktemp("models")
    demo_tokenizer().save_pretrained(folder / "tokenizer")
    painter = write_text_to_image(folder / "t2i")
    found = load_session(str(folder / "tokenizer"), text_to_image=painter)
    found.baseline = demo_baseline()
    words = found.tokenizer.vocabulary.words
    words[:] = [f"{WORD}{i}" for i in range(len(words))]
    return found


@pytest.fixture(scope="module")
def address(session: Session) -> Iterator[str]:
    page, address = app.launch(session, "127.0.0.1", free_port(), max_upload=1, block=False)
    yield address
    page.close()


@pytest.fixture(scope="module")
def visit(address: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The page, loaded once; `page.asked` are the addresses that it asked for, `page.wrong` its errors."""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("profile"), executable_path=CHROMIUM, headless=True, args=QUIET,
            viewport={"width": 1000, "height": 900}, reduced_motion="reduce",
        )  # fmt: skip
        page = browser.pages[0]
        page.set_default_timeout(SECONDS)
        page.asked, page.wrong = [], []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("pageerror", lambda error: page.wrong.append(str(error)))
        page.goto(address)
        page.wait_for_selector("#reconstruct")
        yield page
        browser.close()


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_picture(tmp_path_factory.mktemp("pictures") / "two.jpg")


def upload(page: Any, path: str) -> None:
    """Chooses a file, in the place of one that is there."""
    clear = page.locator("#upload button[aria-label='Clear']")
    if clear.count():
        clear.click()
        page.wait_for_selector("#upload input[type=file]", state="attached")
        page.wait_for_function(CLEARED)
    page.set_input_files("#upload input[type=file]", path)


def done(page: Any, status: str = "#status") -> None:
    page.wait_for_selector(f"{status}:has-text('Done.')")


def notes(page: Any, pictures: str = "#pictures") -> list[str]:
    return [text.strip() for text in page.locator(f"{pictures} figcaption").all_inner_texts()]


def record(page: Any, pictures: str) -> None:
    """Keeps every caption of a picture that is shown, if only for a moment, in `window.shown`."""
    page.evaluate(
        """(where) => {
            window.shown = [];
            const look = () => document.querySelectorAll(where + ' figcaption').forEach(
                (each) => window.shown.push(each.innerText));
            window.observer?.disconnect();
            window.observer = new MutationObserver(look);
            window.observer.observe(document.body, { childList: true, subtree: true, characterData: true });
        }""",
        pictures,
    )


def set_slider(page: Any, label: str, value: float) -> None:
    page.locator(f"input[aria-label='number input for {label}']").first.fill(str(value))
    page.keyboard.press("Tab")


def last(frames: Iterator[Frame]) -> Frame:
    return list(frames)[-1]


def test_upload_shows_tokens_and_pictures(visit: Any, session: Session, picture: str) -> None:
    record(visit, "#pictures")
    upload(visit, picture)
    done(visit)
    reading = session.read(picture)
    best = {"steps": 8, "temperature": 0.8}
    psnr = session.psnr(reading, last(session.reconstruct(reading, best, pause=0)).picture)
    beside = session.reconstruct_by_baseline(reading)
    assert beside is not None
    original, ours, baseline = notes(visit)
    assert original == "Original\ntwo.jpg, at 16 px"
    assert re.fullmatch(rf"V2Flow, 8 tokens\nPSNR {psnr:.2f} dB, \d+\.\d\d s", ours)
    theirs = session.psnr(reading, beside.picture)
    assert re.fullmatch(rf"VQAutoencoder, 8 tokens\nPSNR {theirs:.2f} dB, \d+\.\d\d s", baseline)
    shown = visit.evaluate("window.shown")
    assert len({text for text in shown if "iteration 1 of 1, t = " in text}) > 2, (
        "the picture did not fill in"
    )
    labels = visit.locator(".tokens button").all_text_contents()
    assert labels == [token.probable[0][0] for token in reading.tokens]


def test_sliders_reach_the_decoder(visit: Any, session: Session, picture: str) -> None:
    record(visit, "#pictures")
    for label, value in (("ODE steps", 2), ("AR iterations", 3), ("Noise", 0.5), ("Guidance", 1.5)):
        set_slider(visit, label, value)
    options = {"steps": 2, "iterations": 3, "temperature": 0.5, "guidance": 1.5}
    reading = session.read(picture)
    psnr = session.psnr(reading, last(session.reconstruct(reading, options, pause=0)).picture)
    visit.wait_for_selector(f"#pictures figure:nth-child(2):has-text('PSNR {psnr:.2f} dB')")
    visit.click("#reconstruct")
    visit.wait_for_function("window.shown.some((text) => text.includes('iteration 3 of 3, t = 0.50'))")
    visit.wait_for_selector(f"#pictures figure:nth-child(2):has-text('PSNR {psnr:.2f} dB')")


def test_a_token_says_its_distribution(visit: Any, session: Session, picture: str) -> None:
    visit.click(".tokens button[data-index='5']")
    visit.wait_for_selector("#details h3:has-text('row 3, column 2')")
    token = session.read(picture).tokens[5]
    text = visit.inner_text("#details")
    assert f"id {token.id}" in text and f"{token.entropy:.2f} nats" in text
    rows = visit.locator("#details table >> nth=0").locator("tbody tr").all_inner_texts()
    word, share = token.probable[0]
    assert len(rows) == 10 and rows[0].split("\t")[:2] == [word, f"{100 * share:#.3g} %"]
    assert visit.locator("#details table").count() == 2
    assert visit.get_attribute(".tokens button[data-index='5']", "aria-pressed") == "true"


def test_words_are_text_and_no_template(visit: Any) -> None:
    assert visit.evaluate("window.broken") is None
    assert visit.locator(".tokens button").first.inner_text().startswith(WORD)


def test_keyboard_alone(visit: Any) -> None:
    visit.focus(".tokens button[tabindex='0']")
    start = int(visit.evaluate("document.activeElement.dataset.index"))
    visit.keyboard.press("ArrowUp")
    visit.keyboard.press("ArrowRight")
    visit.keyboard.press("Enter")
    row, column = divmod(start - 2 + 1 if start >= 2 else start + 1, 2)
    visit.wait_for_selector(f"#details h3:has-text('row {row + 1}, column {column + 1}')")
    visit.focus("#upload button, #upload [tabindex='0']")
    stops = []
    for _ in range(30):
        visit.keyboard.press("Tab")
        stops.append(
            visit.evaluate(
                "(e => e.closest('#reconstruct') ? 'button' : e.closest('.tokens') ? 'tokens' : e.type || e.tagName)"
                "(document.activeElement)"
            )
        )
        if stops[-1] == "tokens":
            break
    assert stops.count("range") == 4 and stops.index("button") > stops.index("range")
    assert stops[-1] == "tokens" and stops.count("tokens") == 1, "the grid is one stop of the tab order"
    visit.keyboard.press("Shift+Tab")
    set_slider(visit, "ODE steps", 1)
    visit.focus("#reconstruct")
    record(visit, "#pictures")
    visit.keyboard.press("Enter")
    visit.wait_for_function("window.shown.some((text) => text.includes('iteration'))")
    done(visit)


def test_broken_file_is_one_line(visit: Any, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture at all")
    upload(visit, str(broken))
    alert = visit.wait_for_selector("#status [role=alert]:has-text('broken.png')")
    text = "broken.png: expected a JPEG, PNG or WebP picture, found: not a JPEG, PNG or WebP picture"
    assert alert.inner_text() == text
    assert visit.locator(".tokens").count() == 0 and notes(visit) == []
    visit.click("#reconstruct")
    visit.wait_for_selector("#status [role=alert]:has-text('Choose a picture first.')")


def test_what_is_cleared_stays_cleared(visit: Any, picture: str) -> None:
    """A picture that is being decoded when its file is taken away does not come back, nor does one that waits."""
    upload(visit, picture)
    done(visit)
    set_slider(visit, "ODE steps", 50)
    visit.wait_for_selector("#status:has-text('Decoding')")
    visit.click("#reconstruct")
    visit.click("#upload button[aria-label='Clear']")
    # The second one waits still, or runs by now, as the first may have ended: a button that runs takes no click.
    told = visit.locator("#status [role=alert]:has-text('Choose a picture first.')")
    for _ in range(60):
        visit.click("#reconstruct")
        visit.wait_for_timeout(500)
        if told.is_visible():
            break
    assert told.is_visible()
    visit.wait_for_timeout(3_000)
    assert visit.locator("#pictures figure").count() == 0


def test_a_last_frame_on_its_way_is_taken_back(session: Session, picture: str) -> None:
    """A page may be cleared after the last frame was made and before its visitor sees it."""
    page, reading = app.Page(session, max_upload=1), session.read(picture)
    frames = page.on_reconstruct(reading, 0, 1, 1, 1.0)
    while "Done." not in next(frames)[0]:
        pass
    page.on_clear(reading)
    assert list(frames) == [("", "")]


def test_too_large_a_file_is_refused(visit: Any, tmp_path: Path) -> None:
    (tmp_path / "large.png").write_bytes(bytes(1_200_000))
    upload(visit, str(tmp_path / "large.png"))
    visit.wait_for_selector("text=/exceeds|too large|maximum/i")
    assert visit.locator("#status [role=alert]:has-text('large.png')").count() == 0


def test_a_caption_becomes_a_picture(visit: Any, session: Session) -> None:
    visit.click("role=tab[name='Caption']")
    visit.fill("#caption textarea, #caption input", "a dog")
    visit.keyboard.press("Enter")
    done(visit, "#draw-status")
    (note,) = notes(visit, "#drawn")
    assert re.fullmatch(r"a dog\n\d+\.\d\d s, seed 0", note)
    expected = last(
        session.draw("a dog", {"temperature": 0.0}, guidance=2.0, temperature=1.0, seed=0, pause=0)
    )
    assert visit.get_attribute("#drawn img", "src") == data_url(expected.picture)
    set_slider(visit, "Guidance of the LLM", 8)
    visit.get_by_label("Seed", exact=True).locator("visible=true").fill("3")
    visit.click("#draw")
    visit.wait_for_selector("#drawn figcaption:has-text('seed 3')")
    drawn = {
        (guidance, seed): data_url(
            last(session.draw("a dog", {"temperature": 0.0}, guidance, 1.0, seed, pause=0)).picture
        )
        for guidance in (2.0, 8.0)
        for seed in (0, 3)
    }
    assert len(set(drawn.values())) == 4, "toys in which a lost guidance or seed would not be seen"
    assert visit.get_attribute("#drawn img", "src") == drawn[8.0, 3]
    visit.fill("#caption textarea, #caption input", "")
    visit.click("#draw")
    visit.wait_for_selector("#draw-status [role=alert]:has-text('caption')")


def test_phone_and_dark(visit: Any, picture: str) -> None:
    visit.set_viewport_size({"width": 360, "height": 740})
    visit.emulate_media(color_scheme="dark")
    visit.reload()
    visit.wait_for_selector("#reconstruct")
    upload(visit, picture)
    done(visit)
    width = visit.evaluate("document.documentElement.scrollWidth")
    assert width <= 360, "the page is wider than the phone"
    light, dark = (
        brightness(visit.evaluate(f"getComputedStyle(document.querySelector('{where}')).{what}"))
        for where, what in ((".tokens button", "color"), ("body", "backgroundColor"))
    )
    assert light > 180 and dark < 60


def brightness(colour: str) -> float:
    numbers = [float(each) for each in re.findall(r"[\d.]+", colour)][:3]
    return sum(numbers) / 3


def test_nothing_is_asked_of_other_hosts(visit: Any) -> None:
    """The last test: after all that the others did."""
    time.sleep(0.5)
    hosts = {urlparse(url).hostname for url in visit.asked if not url.startswith(("data:", "blob:"))}
    assert hosts == {"127.0.0.1"} and len(visit.asked) > 20
    assert visit.wrong == []
