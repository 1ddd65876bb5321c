"""report.html as a browser has it: one file, nothing from elsewhere, no overflow, dark where the reader's screen is."""

import html
import json
import re
import shutil
import subprocess

import pytest

from sppo_jax.report import page
from tests.run_directory import played

BROWSERS = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "chrome",
    "chrome-headless-shell",
)
WIDTHS = (1280, 390)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The text of a report that shows everything that a report can show."""
    run = played(tmp_path_factory.mktemp("report"))
    page.write(run)
    return run.report.read_text()


def test_a_page_shows_everything_that_was_measured(report):
    headings = re.findall(r"<h[23]>(.*?)</h", report)
    assert headings == [
        "Advice", "Results", "What the responses are like", "Responses before and after",
        "Most improved, by the judge", "Most worsened, by the judge", "Other prompts", "What iteration 2 was trained on", "A ring of three",
        "What the judge's matrices hold", "The run",
    ]  # fmt: skip
    assert report.count("<svg") == 11
    assert report.count("of the responses are cut at") == 1
    assert "<li>Iterations 1 to 2, respond: 40% of the responses are cut at" in report
    assert "numbers of the last of them" in report
    shown = re.findall(r'<b class="role [a-z]*">(.*?)</b>', report)
    assert shown[0] == 'best, trained on: win rate 0.583, 2 tokens, <span class="cut">cut</span>'
    assert "<td>right</td><td>0.400</td><td>0.500</td><td>0.600</td>" in report
    assert "P(A beats B) = 0.750" in report


def test_no_line_breaks_inside_a_flag(report):
    """A browser breaks at hyphens, but not in code, whose white space the style keeps together."""
    assert "<code>--sampling.max_new_tokens 128</code>, or" in report
    assert "start in a new <code>--out</code> with" in report
    assert re.search(r"\bcode \{[^}]*white-space: nowrap", report)
    advice = re.search(r'<ul class="advice">(.*?)</ul>', report, re.DOTALL)[1]
    assert "--" not in re.sub("<code>.*?</code>", "", advice)
    assert "<code>--a.b 5e-07</code>, &lt;" in page._with_flags("--a.b 5e-07, <")


def test_a_page_needs_nothing_from_elsewhere(report):
    assert not re.search(r"<(script|link|img|iframe|object|embed|base)\b|@import|\burl\((?!#)", report)
    assert all(link.startswith("#") for link in re.findall(r'(?:href|src)="(.*?)"', report))


def test_pictures_take_their_colours_from_the_page(report):
    pictures = "".join(re.findall(r"<svg.*?</svg>", report, re.DOTALL))
    used = set(re.findall(r"var\(--([\w-]+)\)", report))
    for scheme in re.findall(r":root \{(.*?)\}", report):
        assert used <= set(re.findall(r"--(\w[\w-]*):", scheme)), scheme
    assert "currentColor" in pictures
    assert not re.search("#(000000|ffffff)", pictures)


def test_ids_of_pictures_are_unique(report):
    ids = re.findall(r' id="(.*?)"', report)
    assert len(ids) == len(set(ids))


def test_every_table_scrolls_in_a_box_of_its_own(report):
    assert (
        len(re.findall("<table", report))
        == len(re.findall('<div class="scroll" tabindex="0"><table', report))
        == 3
    )


MEASURE = """<!doctype html><meta charset="utf-8"><body><script>
const page = %s, found = [];
for (const scheme of ["light", "dark"]) for (const width of %s) {
  const frame = document.createElement("iframe");
  frame.style.cssText = `border: 0; width: ${width}px; height: 800px; color-scheme: ${scheme}`;
  frame.srcdoc = page;
  frame.onload = () => {
    const inside = frame.contentDocument, root = inside.documentElement;
    for (const part of inside.querySelectorAll("details")) part.open = true;
    found.push([scheme, width, frame.contentWindow.innerWidth, root.scrollWidth,
                frame.contentWindow.getComputedStyle(inside.body).backgroundColor]);
    document.body.dataset.found = JSON.stringify(found);
  };
  document.body.append(frame);
}
</script>"""


def test_nothing_is_wider_than_the_window_in_light_and_dark(report, tmp_path):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    outer = tmp_path / "measure.html"
    inner = json.dumps(report).replace("</", "<\\/")
    outer.write_text(MEASURE % (inner, list(WIDTHS)), encoding="utf-8")
    words = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom",
    ]
    ended = subprocess.run([browser, *words, outer.as_uri()], capture_output=True, text=True, timeout=120)
    found = re.search(r'data-found="(.*?)"', ended.stdout)
    assert found, ended.stderr
    frames = json.loads(html.unescape(found[1]))
    assert sorted(frame[:3] for frame in frames) == sorted(
        [s, w, w] for s in ("light", "dark") for w in WIDTHS
    )
    assert [frame for frame in frames if frame[3] > frame[2]] == []
    colours = {scheme: colour for scheme, *_, colour in frames}
    assert colours["light"] != colours["dark"]
