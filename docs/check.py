"""Whether a built site holds together: ``python docs/check.py build/docs``.

Every link inside it leads to a page, and to a place on it, that is there; and no page loads anything from elsewhere.
With ``--look FOLDER`` every page is also opened in Chromium, wide and narrow, light and dark: it should load without an
error, show all of its pictures whole, and not scroll sideways. The folder gets a picture of each. (That needs ``pip
install playwright`` and a Chromium, in the path or by ``playwright install chromium``.)
"""

import argparse
import shutil
import sys
import threading
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

#: Attributes by which a page loads something (an ``a`` only leads there).
_LOADS = {"img": "src", "script": "src", "link": "href", "iframe": "src", "source": "src"}


class Page(HTMLParser):
    """What a page has and what it refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.places: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.places.update(value for name in ("id", "name") if (value := attributes.get(name)))
        if tag == "a" and attributes.get("href"):
            self.links.append(str(attributes["href"]))
        elif attributes.get(_LOADS.get(tag, "")):
            self.loads.append(str(attributes[_LOADS[tag]]))


def pages_of(site: Path) -> list[Path]:
    return [path for path in sorted(site.rglob("*.html")) if "_static" not in path.parts]  # where a theme has templates


def broken(site: Path) -> Iterator[str]:
    """Tell of every reference inside a site that leads nowhere, and of what is loaded from elsewhere."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in pages_of(site)}
    if not pages:
        yield f"{site} has no pages"
    for path, page in pages.items():
        here = path.relative_to(site)
        for link in page.links + page.loads:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                if link in page.loads and parts.scheme != "data":
                    yield f"{here} loads {link} from elsewhere"
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path.resolve()
            if not target.is_file():
                yield f"{here}: {link} is not there"
            elif parts.fragment and target.suffix == ".html":
                there = pages.get(site / target.relative_to(site.resolve()))
                if there is None or unquote(parts.fragment) not in there.places:
                    yield f"{here}: {link} has no such place"


_CUT_OFF = """[...document.querySelectorAll("article img, article svg")].some(
    each => each.getBoundingClientRect().right > document.documentElement.clientWidth)"""


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None: ...


def faults(site: Path, folder: Path, only: str) -> Iterator[str]:
    """Open every page in a browser, and tell what is wrong with it."""
    from playwright.sync_api import sync_playwright

    folder.mkdir(parents=True, exist_ok=True)
    paths = [path.relative_to(site).as_posix() for path in pages_of(site) if only in str(path)]
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for width in (1280, 400):
            for scheme in ("light", "dark"):
                view = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
                view.emulate_media(reduced_motion="reduce")
                for path, fault in _seen(view, f"http://127.0.0.1:{server.server_port}/", paths, scheme):
                    if fault is None:
                        name = path.removesuffix(".html").replace("/", "-")
                        view.screenshot(path=folder / f"{name}-{width}-{scheme}.png", full_page=True)
                    else:
                        yield f"{path} ({width}, {scheme}): {fault}"
                view.close()
        browser.close()
    server.shutdown()


def _seen(view: Any, root: str, paths: list[str], scheme: str) -> Iterator[tuple[str, str | None]]:
    """Go through the pages; of each, tell its faults and then None."""
    found: list[str] = []
    view.on("console", lambda message: message.type == "error" and found.append(message.text))
    view.on("pageerror", lambda error: found.append(str(error)))
    view.on("request", lambda request: request.url.startswith((root, "data:")) or found.append(f"loads {request.url}"))
    for path in paths:
        found.clear()
        view.goto(root + path, wait_until="load")
        if view.evaluate("document.documentElement.dataset.theme") != scheme:
            found.append(f"it is not {scheme}")
        if view.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth"):
            found.append("it scrolls sideways")
        if view.evaluate(_CUT_OFF):
            found.append("a picture is cut off")
        found += view.evaluate("[...document.images].filter(each => !each.naturalWidth).map(each => `no ${each.src}`)")
        yield from ((path, fault) for fault in found)
        yield path, None


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("site", type=Path)
    parser.add_argument("--look", type=Path, metavar="FOLDER")
    parser.add_argument("--only", default="", metavar="TEXT", help="open the pages whose paths contain it")
    options = parser.parse_args()
    wrong = list(broken(options.site))
    if options.look is not None:
        wrong += faults(options.site, options.look, options.only)
    for each in wrong:
        print(each, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
