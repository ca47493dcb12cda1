"""Makes docs/drawings/demo.png: the demo's page with one picture, in headless Chromium.

    python tests/demo_screenshot.py CHECKPOINT PICTURE OUT.png [--baseline CHECKPOINT]

Needs the extra `demo`, the packages playwright and Chromium. OpenMoji pictures want their attribution beside it.
"""

import argparse
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright
from test_demo_browser import CHROMIUM, QUIET, done, free_port, upload

from v2flow.demo.app import launch
from v2flow.demo.session import load_session

TOKEN = 27
"""The token that is chosen."""


def main() -> None:
    """Reads the command line and writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("picture")
    parser.add_argument("out", type=Path)
    parser.add_argument("--baseline")
    options = parser.parse_args()
    session = load_session(options.checkpoint, baseline=options.baseline)
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
        page.goto(address)
        page.wait_for_selector("#reconstruct")
        upload(page, options.picture)
        done(page)
        page.click(f".tokens button[data-index='{TOKEN}']")
        page.wait_for_selector("#details table")
        page.screenshot(full_page=True, path=options.out)
        browser.close()
    server.close()


if __name__ == "__main__":
    main()
