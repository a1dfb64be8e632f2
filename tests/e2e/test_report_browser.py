"""The report in a real browser: scripts that came with the answers do not run, ours do, and it fits a
phone."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from rlsc_mcore.commands.report import run_report
from tests.unit.test_report import write_example

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium (apt-get install chromium)")

# A frame of a given width around the report; what it finds there is written into its own document.
FRAME = """<!doctype html><body style="margin:0">
<iframe id="frame" src="report.html" style="width:{width}px;height:900px;border:0"></iframe>
<script>
frame.onload = () => {{
  const page = frame.contentDocument, root = page.documentElement, by = (id) => page.getElementById(id), say = {{}};
  say.title = page.title;
  say.wide = root.scrollWidth - root.clientWidth;
  say.images = page.images.length + page.querySelectorAll("iframe, object, embed").length;
  say.count = by("count").textContent;
  const input = () => new frame.contentWindow.Event("input", {{bubbles: true}});
  const choose = (id, value) => {{ by(id).value = value; by(id).dispatchEvent(input()); }};
  choose("show", "up");
  say.up = by("count").textContent;
  choose("show", "all"); choose("sort", "index");
  say.first = page.querySelector(".question").dataset.index;
  choose("sort", "up");
  say.gained = page.querySelector(".question").dataset.delta;
  choose("search", "13?");
  say.found = by("count").textContent;
  const before = frame.contentWindow.getComputedStyle(page.body).backgroundColor;
  by("theme").click();
  say.theme = root.dataset.theme;
  say.recoloured = frame.contentWindow.getComputedStyle(page.body).backgroundColor !== before;
  page.querySelector("#raw").click();
  say.typed = page.body.classList.contains("as-typed");
  const unnamed = [...page.querySelectorAll("button, input, select")].filter((e) => !e.labels?.length && !e.ariaLabel);
  say.unnamed = unnamed.length;
  const levels = [...page.querySelectorAll("h1, h2, h3, h4, h5")].map((e) => +e.tagName[1]);
  say.headings = levels.filter((level, i) => i && level > levels[i - 1] + 2).length;
  document.body.innerHTML = Object.entries(say).map(([key, value]) => `<p id="${{key}}">${{String(value)}}</p>`).join("");
}};
</script>"""


def browse(arguments: list[str], folder: Path) -> str:
    assert BROWSER is not None
    command = [
        BROWSER,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={folder / 'profile'}",
        *arguments,
    ]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=200).stdout


@pytest.mark.parametrize("width", [1280, 390], ids=["desktop", "phone"])
def test_report_in_a_browser(tmp_path: Path, width: int) -> None:
    run = write_example(tmp_path / "run")
    run_report([str(run), "--output", str(tmp_path / "report.html")])
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.format(width=width), encoding="utf-8")
    options = [
        "--allow-file-access-from-files",
        "--disable-web-security",
        "--virtual-time-budget=20000",
        "--window-size=1400,1000",
    ]
    document = browse([*options, "--dump-dom", frame.as_uri()], tmp_path)
    said = dict(re.findall(r'<p id="(\w+)">(.*?)</p>', document))
    assert said == {
        "title": "run",  # no answer's script has renamed it
        "wide": "0",  # nothing sticks out sideways
        "images": "0",
        "count": "14 of 14 questions",
        "up": "7 of 14 questions",
        "first": "0",
        "gained": "0.5000",
        "found": "1 of 14 questions",
        "theme": "dark",
        "recoloured": "true",
        "typed": "true",
        "unnamed": "0",
        "headings": "0",
    }


@pytest.mark.parametrize("scheme", [0, 1], ids=["dark", "light"])
def test_screenshot_has_the_colours_of_its_scheme(tmp_path: Path, scheme: int) -> None:
    image = pytest.importorskip("matplotlib.image", reason="reading the screenshot needs matplotlib")
    run = write_example(tmp_path / "run")
    run_report([str(run), "--output", str(tmp_path / "report.html")])
    shot = tmp_path / "shot.png"
    options = [
        f"--blink-settings=preferredColorScheme={scheme}",
        "--hide-scrollbars",
        "--window-size=1000,1400",
    ]
    browse([*options, f"--screenshot={shot}", (tmp_path / "report.html").as_uri()], tmp_path)
    pixels = image.imread(shot)[..., :3]
    corner = pixels[600, 5].mean()
    assert (corner < 0.2) if scheme == 0 else (corner > 0.9)
    assert pixels.std() > 0.05  # something is drawn on it
