"""The report pages: figures within what is possible, which follow the theme, and tables that fit."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.conftest import Run
from tokenmerge.tools.pages import Figure, Table, theme, title_of, write_report
from tokenmerge.tools.pages.figures import Axis, lines

pytest.importorskip("matplotlib")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = "</script><img src=x onerror=window.hacked=1><script>window.hacked=1</script>"
SVG = "{http://www.w3.org/2000/svg}"
TOP1 = Axis("top1", "top-1, %", 0, 100, ("low", "high"), span=2)
SPEED = Axis("speed", "speed-up", 0, mark=1)
ROWS: list[dict[str, Any]] = [
    {"method": name, "r": f"r={r}", "speed": 1 + r / 20, "top1": top1, "low": top1 - 2, "high": min(100, top1 + 1)}
    for name, top1 in (("tome", 100.0), ("a method with a long name", 97.5))
    for r in (0, 1, 8, 16)
]


def ticks(svg: str, axis: str) -> list[float]:
    """The numbers along an axis of a drawn figure."""
    root = ElementTree.fromstring(svg)
    group = next(one for one in root.iter(f"{SVG}g") if one.get("id") == f"matplotlib.axis_{'xy'.index(axis) + 1}")
    words = ["".join(one.itertext()).strip() for one in group.iter(f"{SVG}text")]
    return [float(word.replace("−", "-")) for word in words[:-1]]  # the last one is the label


def drawn(rows: Any = ROWS, **options: Any) -> str:
    found = lines(rows, SPEED, TOP1, **{"by": "method", **options})
    assert found is not None
    return found


def test_axes_stay_within_what_is_possible() -> None:
    rows = [{"v": value, "low": value - 1, "high": value + 1} for value in (99.5, 99.9)]
    assert TOP1.limits([{"top1": row["v"], "low": row["low"], "high": row["high"]} for row in rows])[1] == 100
    assert Axis("v", "", 0, 100).limits([{"v": 0.2}, {"v": 0.1}])[0] >= 0
    assert Axis("v", "", 0).limits([{"v": 1.0}, {"v": 40.0}])[0] == 0, "from zero, if that is near"
    low, high = Axis("v", "", 0, mark=1).limits([{"v": 1.3}, {"v": 1.9}])
    assert 0.8 < low < 1 < 1.9 < high < 2.1, "a speed-up is compared with 1"
    low, high = Axis("v", "", 0, 100, span=2).limits([{"v": 50.0}, {"v": 50.0}])
    assert high - low >= 2, "nothing does not fill the axis"
    assert Axis("v", "").limits([{"v": 0.0}])[0] < 0 < Axis("v", "").limits([{"v": 0.0}])[1]
    assert Axis("v", "", mark=0).limits([{"v": -3.0}, {"v": -2.0}])[1] > 0


def test_a_drawn_figure_keeps_them() -> None:
    svg = drawn()
    assert max(ticks(svg, "y")) <= 100
    assert min(ticks(svg, "x")) >= 0
    assert "1.0" in [f"{tick:.1f}" for tick in ticks(svg, "x")]
    beyond = drawn([{**row, "high": row["top1"] + 5, "low": -5.0} for row in ROWS])
    assert max(ticks(beyond, "y")) <= 100
    assert min(ticks(beyond, "y")) >= 0
    root = ElementTree.fromstring(beyond)
    frame = next(one for one in root.iter(f"{SVG}g") if one.get("id") == "patch_2")  # of the axes
    height = [float(y) for _, y in re.findall(r"[ML] (\S+) (\S+)", next(frame.iter(f"{SVG}path")).get("d") or "")]
    bars = [one for one in root.iter(f"{SVG}g") if (one.get("id") or "").startswith("bars-")]
    assert bars
    for bar in bars:
        for path in bar.iter(f"{SVG}path"):
            for _, y in re.findall(r"[ML] (\S+) (\S+)", path.get("d") or ""):
                assert min(height) - 0.5 <= float(y) <= max(height) + 0.5, "no bar leaves the axes"


def test_intervals_are_drawn() -> None:
    with_bars = drawn()
    assert with_bars.count('id="bars-') == 2
    assert 'id="bars-' not in str(lines(ROWS, SPEED, dataclasses.replace(TOP1, ends=None), by="method"))
    assert lines(ROWS[:1], SPEED, TOP1) is None, "a point is no figure"


def test_labels_do_not_overlap() -> None:
    """Three points on one another, two at the edges; a label that finds no place is left out."""
    rows = [
        {"r": f"r={i}", "speed": speed, "top1": 99.0}
        for i, speed in enumerate((1.0, 1.001, 1.002, 1.003, 1.3, 1.31, 2.0))
    ]
    svg = drawn(rows, by=None, names="r")
    root = ElementTree.fromstring(svg)
    frame = next(one for one in root.iter(f"{SVG}g") if one.get("id") == "axes_1")
    places = []
    for group in frame.iter(f"{SVG}g"):
        for words in group.findall(f"{SVG}text"):
            if (text := "".join(words.itertext())).startswith("r="):
                style, where = words.get("style") or "", words.get("transform") or words.get("x") or ""
                x, y = (
                    (float(words.get("x", 0)), float(words.get("y", 0)))
                    if words.get("x")
                    else tuple(map(float, re.findall(r"-?[\d.]+", where)[:2]))
                )
                width = 5.7 * len(text)
                left = x - width / 2 if "middle" in style else x - width if "end" in style else x
                places.append((left, left + width, y - 7, y))
    assert 4 <= len(places) <= 7
    for i, one in enumerate(places):
        for other in places[:i]:
            apart = one[1] <= other[0] or other[1] <= one[0] or one[3] <= other[2] or other[3] <= one[2]
            assert apart, (one, other)


def test_a_figure_follows_the_page_and_stands_alone() -> None:
    svg = drawn()
    page = theme.themed(svg, 'a "caption" <b>', 3)
    assert not re.findall(r"(?<!, )#[0-9a-f]{6}", page), "every colour is a variable"
    names = set(re.findall(r"var\(--(\w+),", page))
    assert {"ink", "grid", "paper", "c0", "c1"} <= names
    for dark in (False, True):
        assert all(f"--{name}:" in theme.variables(dark) for name in names)
    assert 'aria-label="a &quot;caption&quot; &lt;b&gt;"' in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert all(one.startswith("f3-") for one in ids)
    assert len(ids) == len(set(ids))
    assert {one[1:] for one in re.findall(r'href="(#[^"]+)"', page)} <= set(ids)
    # what a download restores
    alone = re.sub(r"var\(--\w+, (#[0-9a-f]{6})\)", r"\1", page)
    ElementTree.fromstring(alone)
    assert "fill: #ffffff" in alone
    assert "var(" not in alone
    assert "<metadata" not in page


class Outline(html.parser.HTMLParser):
    """Headings, ids and addresses of a page, and whether its elements nest."""

    VOID = frozenset({"meta", "link", "br", "img", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag not in self.VOID:
            self._open.append(tag)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(tag)
        self.ids += [given["id"] or ""] if "id" in given else []
        self.addresses += [str(given[name]) for name in ("href", "src") if given.get(name)]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag


@pytest.fixture
def report(tmp_path: Path) -> Path:
    """A page with two figures and a wide table."""
    path = tmp_path / "report.html"
    columns = ["method", "kind", *(f"a heading of several words {i}" for i in range(11)), "note"]
    cells = [[f"method_{i}", "matching", *["99.167"] * 11, "words about this method " * 3] for i in range(5)]
    figures = [Figure("The first one.", drawn()), None, Figure("The second one.", drawn(names="r", by=None))]
    write_report(path, "model (vit)", ["Some words."], [Table("Results", columns, cells)], figures, ROWS)
    return path


def test_the_page_is_whole(report: Path) -> None:
    found = Outline(report.read_text())
    assert found.headings == ["h1", "h2", "h2", "h2"]
    assert len(found.ids) == len(set(found.ids))
    assert all(one.startswith(("#", "data:")) for one in found.addresses), "nothing is loaded"


def test_titles_hold_no_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    assert title_of(f"local-dir:{tmp_path / 'mine'}") == "mine"
    (tmp_path / "mine" / "config.json").write_text('{"architecture": "vit_b"}')
    assert title_of(f"local-dir:{tmp_path / 'mine'}/") == "mine (vit_b)"
    (tmp_path / "mine" / "config.json").write_text('{"architectures": ["ViTModel"], "model_type": "vit"}')
    assert title_of(f"hf:{tmp_path / 'mine'}") == "mine (ViTModel)"
    for odd in ("[]", '{"architectures": [3]}', '{"architectures": {"a": 1}}', "{", '{"architecture": null}'):
        (tmp_path / "mine" / "config.json").write_text(odd)
        assert title_of(f"local-dir:{tmp_path / 'mine'}") == "mine"
    monkeypatch.chdir(tmp_path / "mine")
    assert title_of("local-dir:.") == "mine"
    assert title_of(f"torchvision:vit_b_16:{tmp_path / 'a.safetensors'}") == "torchvision:vit_b_16:a.safetensors"
    for same in (
        "vit_tiny_patch16_224",
        "hf_hub:timm/vit",
        "hf:google/vit",
        "hf:vit",
        "torchvision:vit_b_16:IMAGENET1K_V1",
    ):
        assert title_of(same) == same


def test_columns_of_words_and_numbers() -> None:
    rows = [["a", "matching", "1.25x", "97.2-99.6", "", "the mean keeps the length of its members"]]
    assert Table("", list("abcdef"), rows).kinds == ["text", "text", "", "", "", "text long"]


@pytest.mark.parametrize("command", ["eval", "bench"])
def test_commands_write_them(run: Run, model_dir: Path, data: Path, tmp_path: Path, command: str) -> None:
    words: list[Any] = [command, f"local-dir:{model_dir}", "--r", 0, 2, 4, "--html", "report.html"]
    words += ["--data", data, "-j", 0] if command == "eval" else ["--rounds", 2, "--batch-size", 1]
    code, _, err = run(*words)
    assert code == 0, err
    text = Path("report.html").read_text()
    title = re.search("<title>(.*)</title>", text)
    assert title is not None
    assert title[1].startswith("model (vit_tiny_patch16_224), ")
    assert str(tmp_path) not in title[1]
    assert text.count("<figure>") == 2
    assert 'id="f2-bars-0"' in text
    Outline(text)


Open = Callable[..., Any]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium: Any) -> Iterator[Open]:
    contexts, problems, asked = [], [], []

    def call(path: Path, width: int = 1280, height: int = 800, **options: Any) -> Any:
        context = chromium.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda one: problems.append(one.text) if one.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        asked.remove(path.as_uri())
        return page

    yield call
    assert not problems
    assert not [url for url in asked if not url.startswith(("data:", "blob:"))]
    for context in contexts:
        context.close()


WIDE = "document.documentElement.scrollWidth"


def test_it_fits_every_screen(report: Path, open_page: Open) -> None:
    phone = open_page(report, 390, 844)
    assert phone.evaluate(WIDE) <= 390
    assert phone.evaluate("(e => e.scrollWidth > e.clientWidth)(document.querySelector('.scroll'))")
    left = "document.querySelector('tbody td').getBoundingClientRect().left"
    before = phone.evaluate(left)
    phone.evaluate("document.querySelector('.scroll').scrollLeft = 400")
    assert phone.evaluate(left) == pytest.approx(before, abs=2), "the first column stays"
    boxes = [one.bounding_box() for one in phone.locator("figure").all()]
    assert boxes[0]["y"] + boxes[0]["height"] <= boxes[1]["y"], "one below the other"
    for width in (1280, 1920):
        page = open_page(report, width)
        assert page.evaluate(WIDE) <= width
        assert page.evaluate("(e => e.scrollWidth - e.clientWidth)(document.querySelector('.scroll'))") <= 0, (
            "no column is cut"
        )
        boxes = [one.bounding_box() for one in page.locator("figure").all()]
        assert boxes[0]["y"] == boxes[1]["y"], "beside each other"
        tall = page.locator("tbody tr").first.bounding_box()["height"]
        assert tall < 150


def test_figures_are_light_and_dark(report: Path, open_page: Open) -> None:
    colours = {}
    for scheme in ("light", "dark"):
        page = open_page(report, color_scheme=scheme)
        colours[scheme] = page.evaluate(
            """() => { const of = (place, what) => getComputedStyle(document.querySelector(place))[what];
            return [of("body", "backgroundColor"), of("figure #f1-patch_1 path", "fill"), of("figure text", "fill"),
            of("figure #f1-line-0 path", "stroke")]; }"""
        )
    assert colours["light"] == ["rgb(255, 255, 255)", "rgba(0, 0, 0, 0)", "rgb(28, 30, 33)", "rgb(0, 114, 178)"]
    assert colours["dark"] == ["rgb(22, 24, 27)", "rgba(0, 0, 0, 0)", "rgb(230, 232, 234)", "rgb(75, 166, 232)"]
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.querySelector('figure text')).fill") == "rgb(28, 30, 33)"


def test_reports_sort_download_and_escape(tmp_path: Path, open_page: Open) -> None:
    path = tmp_path / "report.html"
    rows = [["a", "10.5"], [EVIL, "9"], ["c", "−3"]]
    figures = [Figure(EVIL, drawn([{**row, "method": f"{EVIL} {row['method']}"} for row in ROWS])), None]
    write_report(path, EVIL, [EVIL], [Table(EVIL, ["name", EVIL], rows)], figures, [{"name": EVIL, "value": 1.5}])
    page = open_page(path, color_scheme="dark")
    head = page.locator("th button").nth(1)

    def column() -> list[str]:
        return list(page.locator("tbody td:nth-child(2)").all_inner_texts())

    head.click()
    assert column() == ["−3", "9", "10.5"]
    head.click()
    assert column() == ["10.5", "9", "−3"]
    with page.expect_download() as download:
        page.click("#json")
    assert json.loads(Path(download.value.path()).read_text()) == [{"name": EVIL, "value": 1.5}]
    with page.expect_download() as download:
        page.click("#csv")
    assert Path(download.value.path()).read_text().splitlines()[0] == '"name","value"'
    with page.expect_download() as download:
        page.click("figure a")
    alone = Path(download.value.path()).read_text()
    ElementTree.fromstring(alone)
    assert "var(" not in alone
    assert "#0072b2" in alone
    assert "fill: #ffffff" in alone, "white paper, although the page is dark"
    assert page.evaluate("window.hacked") is None
