"""Makes docs/drawings/demo.png and demo-caption.png: the demo's page with one picture, in headless Chromium.

    python tests/demo_screenshot.py CHECKPOINT PICTURE OUT.png [--baseline CHECKPOINT]
        [--text-to-image CHECKPOINT --caption "a red apple"]

The last line says in JSON how many seconds each picture took: from the page's loading to its being there, from the
choice of a picture to the first frame and to the last one, and from Enter behind a caption to its picture.

Needs the extra `demo`, the packages playwright and Chromium. OpenMoji pictures want their attribution beside it.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from loopback import free_port
from playwright.sync_api import sync_playwright
from test_demo_browser import CHROMIUM, QUIET, done, upload

from v2flow.demo.app import launch
from v2flow.demo.session import load_session

TOKEN = 27
"""The token that is chosen."""


def reconstruct(page: Any, picture: str, out: Path) -> dict[str, float]:
    start = time.monotonic()
    upload(page, picture)
    page.wait_for_selector("#pictures figcaption")
    first = time.monotonic() - start
    done(page)
    seconds = {"first_frame": first, "reconstruction": time.monotonic() - start}
    page.click(f".tokens button[data-index='{TOKEN}']")
    page.wait_for_selector("#details table")
    page.screenshot(full_page=True, path=out)
    return seconds


def draw(page: Any, caption: str, out: Path) -> dict[str, float]:
    page.click("role=tab[name='Caption']")
    page.fill("#caption textarea, #caption input", caption)
    start = time.monotonic()
    page.keyboard.press("Enter")
    done(page, "#draw-status")
    seconds = {"caption": time.monotonic() - start}
    page.screenshot(full_page=True, path=out)
    return seconds


def main() -> None:
    """Reads the command line and writes the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("picture")
    parser.add_argument("out", type=Path)
    parser.add_argument("--baseline")
    parser.add_argument("--text-to-image")
    parser.add_argument("--caption", default="red apple")
    options = parser.parse_args()
    session = load_session(options.checkpoint, baseline=options.baseline, text_to_image=options.text_to_image)
    server, address = launch(session, "127.0.0.1", free_port(), max_upload=10, block=False)
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as profile:
        browser = playwright.chromium.launch_persistent_context(
            profile,
            executable_path=CHROMIUM,
            headless=True,
            args=QUIET,
            viewport={"width": 900, "height": 900},
        )
        page = browser.pages[0]
        page.set_default_timeout(120_000)
        start = time.monotonic()
        page.goto(address)
        page.wait_for_selector("#reconstruct")
        seconds = {"page": time.monotonic() - start}
        seconds |= reconstruct(page, options.picture, options.out)
        if options.text_to_image:
            seconds |= draw(page, options.caption, options.out.with_stem(f"{options.out.stem}-caption"))
        browser.close()
    server.close()
    print(json.dumps({name: round(value, 2) for name, value in seconds.items()}))


if __name__ == "__main__":
    main()
