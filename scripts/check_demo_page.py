"""Opens the page of `optimum-cli regcache demo` in a real browser: chooses an example, compares, reads the predictions.

    pip install playwright && apt-get install chromium
    python scripts/check_demo_page.py --screenshot demo.png

Says that it is skipped, and why, where there is no playwright or no browser.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from importlib import import_module

from optimum_regcache.commands.demo import Demo
from optimum_regcache.commands.demo_page import serve
from optimum_regcache.data import reference

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def check(address: str, browser: str, screenshot: str | None, demo: Demo) -> None:
    """Drive the page.

    Raises:
        SystemExit: it does not show what it should, or asks another machine for something.
    """
    wanted: list[str] = []
    with import_module("playwright.sync_api").sync_playwright() as play:
        opened = play.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = opened.new_page(viewport={"width": 1280, "height": 2100})
        page.on("request", lambda request: wanted.append(request.url))
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(address)
        page.locator("button.thumbnail-item, .thumbnail-lg").nth(2).click()
        best = next(iter(demo.look(demo.example(2), demo.classes).predictions["float"]), "")
        page.get_by_text(best, exact=True).nth(1).wait_for(timeout=60_000)
        page.get_by_label("Classes, one on each line").fill(f"{best}\na blue ring")
        page.get_by_role("button", name="Compare").click()
        page.wait_for_timeout(3000)
        shown = page.inner_text("body")
        if screenshot:
            page.screenshot(path=screenshot, full_page=True)
        opened.close()
    elsewhere = sorted({url for url in wanted if not url.startswith((address, "data:", "blob:"))})
    missing = [text for text in (best, "a blue ring", "cosine to float", "Crossed out") if text not in shown]
    for name, found in (("missing on the page", missing), ("asked of other machines", elsewhere), ("errors", problems)):
        print(f"{name}: {', '.join(found) or 'nothing'}")
    if missing or elsewhere or problems:
        sys.exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description="Check the demo page in a browser.")
    parser.add_argument("--screenshot", help="PNG of the page")
    args = parser.parse_args()
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    try:
        import_module("playwright.sync_api")
    except ImportError:
        return print("skipped: playwright is not installed (pip install playwright)")
    if browser is None:
        return print(f"skipped: no browser found ({', '.join(BROWSERS)})")
    demo = Demo.open(reference.DEFAULT)
    page, address = serve(demo, "127.0.0.1", None, False, wait=False)
    try:
        check(address, browser, args.screenshot, demo)
    finally:
        page.close()


if __name__ == "__main__":
    main()
