"""Looks at the built site in Chromium: no page may scroll sideways, on a narrow or a wide window, light or dark.

    python scripts/check_site.py [FOLDER]

FOLDER (default: site) is what scripts/build_site.py wrote. Each page is opened in a frame of each width; where it is
wider than its window, the widest elements are named.
"""

import functools
import http.server
import json
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

WIDTHS = (360, 1400)
"""Of the window, in pixels: a phone's and a desktop's."""
SCHEMES = {"light": 1, "dark": 0}
"""Chromium's numbers for the palette that a reader prefers."""
SECONDS = 600
"""For all pages in one palette."""

FRAMES = """<!doctype html><meta charset="utf-8"><body><script>
const pages = PAGES, widths = WIDTHS;
const settled = frame => new Promise(done => setTimeout(() => frame.contentWindow.requestAnimationFrame(
  () => frame.contentWindow.requestAnimationFrame(done)), 50));
(async () => {
  const views = [];
  for (const page of pages) {
    const frame = document.createElement("iframe");
    frame.style.cssText = `border: 0; height: 900px; width: ${widths[0]}px`;
    await new Promise(done => { frame.onload = done; frame.src = page; document.body.append(frame); });
    for (const width of widths) {
      frame.style.width = `${width}px`;
      await settled(frame);
      const shown = frame.contentDocument, root = shown.documentElement;
      const wide = [...shown.body.querySelectorAll("*")].filter(one => one.getBoundingClientRect().right > width + 1);
      const scheme = shown.body.dataset.mdColorScheme || "";
      views.push({page, window: root.clientWidth, content: root.scrollWidth, scheme,
        widest: wide.slice(0, 3).map(one => one.outerHTML.slice(0, 100))});
    }
    frame.remove();
  }
  await fetch("/views", {method: "POST", body: JSON.stringify(views)});
})().catch(error => fetch("/views", {method: "POST", body: JSON.stringify(String(error))}));
</script></body>"""


@dataclass(frozen=True)
class View:
    """A page in a window.

    Attributes:
        page: Its path on the site.
        window: Width of the window, in pixels, without a scroll bar.
        content: Width of what the page holds; more than ``window`` scrolls sideways.
        scheme: The palette that the page chose (``default``, ``slate``), or nothing if it has none.
        widest: The first elements that reach beyond the window.
    """

    page: str
    window: int
    content: int
    scheme: str
    widest: tuple[str, ...]


def views_of(folder: Path, scheme: str) -> list[View]:
    """Every page of a site in a window of each width, but those that lead elsewhere and the one for a missing page.

    The latter names its style by a path from the server's root, where a site with versions has none.

    Raises:
        RuntimeError: if the browser does not say what it saw.
    """
    paths = (path for path in folder.rglob("*.html") if path.name != "404.html")
    paths = (path for path in paths if 'http-equiv="refresh"' not in path.read_text(encoding="utf-8"))
    pages = sorted(path.relative_to(folder).as_posix() for path in paths)
    frames = FRAMES.replace("PAGES", json.dumps([f"/{page}" for page in pages])).replace("WIDTHS", str(list(WIDTHS)))
    answers: list[bytes] = []
    is_answered = threading.Event()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/frames":
                return super().do_GET()
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(frames.encode())

        def do_POST(self) -> None:
            answers.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(204)
            self.end_headers()
            is_answered.set()

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        words = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
        words += [f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}", "--hide-scrollbars"]
        words += ["--window-size=1500,1000", "--remote-debugging-port=0"]  # a port, so that it stays open until ended
        words.append(f"http://127.0.0.1:{server.server_port}/frames")
        browser = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            if not is_answered.wait(SECONDS):
                raise RuntimeError(f"Chromium did not answer within {SECONDS} s")
        finally:
            browser.terminate()
            browser.wait(30)
            server.shutdown()
    views = json.loads(answers[0])
    if isinstance(views, str) or len(views) != len(pages) * len(WIDTHS):
        raise RuntimeError(f"Chromium did not look at all {len(pages)} pages: {views!r:.500}")
    return [View(**view | {"page": view["page"][1:], "widest": tuple(view["widest"])}) for view in views]


def complaints(views: list[View]) -> list[str]:
    """A line for each page that scrolls sideways."""
    return [
        f"{view.page} is {view.content} pixels wide in a window of {view.window}: {', '.join(view.widest) or '?'}"
        for view in views
        if view.content > view.window
    ]


def main() -> int:
    """Looks at every page in both palettes; 1 if one scrolls sideways or has the wrong palette."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "site").absolute()
    lines = []
    for scheme, name in (("light", "default"), ("dark", "slate")):
        views = views_of(folder, scheme)
        lines += [f"{scheme}: {line}" for line in complaints(views)]
        lines += [f"{scheme}: {view.page} has {view.scheme}" for view in views if view.scheme not in ("", name)]
        if not any(view.scheme == name for view in views):
            lines.append(f"{scheme}: no page has the palette {name}")
        print(f"{scheme}: {len(views)} views of pages in windows of {' and '.join(map(str, WIDTHS))} pixels")
    print("\n".join(lines) or "no page scrolls sideways")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main())
