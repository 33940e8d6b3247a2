"""The explorer in a real browser; the live server, with what strangers may send it."""

from __future__ import annotations

import dataclasses
import http.client
import io
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
import torch
from PIL import Image

import tokenmerge
from tests.conftest import Run
from tests.helpers.pictures import expected, photo, write_model
from tokenmerge.tools.common import DeviceOptions
from tokenmerge.tools.models import load_model
from tokenmerge.tools.visualize.load import Loader

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = "</script><img src=x onerror=window.hacked=1><script>window.hacked=1</script>"
pytestmark = pytest.mark.slow


@dataclasses.dataclass
class Browser:
    """One page, everything that it complained about, and everything that it asked for."""

    page: Any
    problems: list[str]
    requests: list[str]

    def check(self, *allowed: str) -> None:
        """No console errors, no injected script has run, no request went elsewhere."""
        assert not self.problems
        assert self.page.evaluate("window.hacked") is None
        elsewhere = [url for url in self.requests if not url.startswith(("data:", "blob:", *allowed))]
        assert not elsewhere


Open = Callable[..., Browser]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-background-networking", "--disable-quic"]
        )
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium: Any) -> Iterator[Open]:
    contexts = []

    def call(url: str, **options: Any) -> Browser:
        context = chromium.new_context(**{"viewport": {"width": 1100, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        found = Browser(page, [], [])
        page.on("console", lambda one: found.problems.append(one.text) if one.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: found.problems.append(str(error)))
        page.on("request", lambda request: found.requests.append(request.url))
        page.goto(url)
        return found

    yield call
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small model with registers, whose classes have names that must be escaped."""
    folder = tmp_path_factory.mktemp("pages") / "model <b>&amp;"
    name = write_model(folder, "vit_medium_patch16_reg4_gap_256", img_size=64, patch_size=8)
    config = json.loads((folder / "config.json").read_text())
    config["label_names"] = [f"{EVIL} {i}" for i in range(7)]
    (folder / "config.json").write_text(json.dumps(config))
    return name


def evil_photo(folder: Path) -> Path:
    """A file name may hold anything but a slash."""
    return photo(folder / (EVIL.replace("/", "\\") + ".png"))


def pixels_of(browser: Browser, panel: int = 0) -> Any:
    """What a canvas shows, `[H, W, 3]`."""
    values = browser.page.evaluate(
        """i => { const c = document.querySelectorAll("canvas")[i];
        return [c.height, c.width, [...c.getContext("2d").getImageData(0, 0, c.width, c.height).data]]; }""",
        panel,
    )
    return np.array(values[2], dtype=float).reshape(values[0], values[1], 4)[:, :, :3]


def step_to(browser: Browser, step: int) -> None:
    browser.page.locator("#step").fill(str(step))


def text(browser: Browser, place: str) -> str:
    return str(browser.page.locator(place).inner_text())


def shows(browser: Browser, place: str, words: str) -> None:
    """Wait until it does."""
    from playwright.sync_api import expect

    expect(browser.page.locator(place).first).to_contain_text(words, timeout=60_000)


@pytest.fixture
def written(model: str, tmp_path: Path, run: Run) -> tuple[Path, Path]:
    """A picture, and a page about it with two settings."""
    picture, out = evil_photo(tmp_path), tmp_path / "page.html"
    code, _, err = run("visualize", model, picture, "--pretrained", "--r", "8", "3", "--out", out)
    assert code == 0, err
    return picture, out


def test_the_page_shows_the_source_map(model: str, written: tuple[Path, Path], open_page: Open) -> None:
    picture, out = written
    assert out.stat().st_size < 5e6
    browser = open_page(out.as_uri())
    browser.page.wait_for_selector("canvas")
    net = load_model(DeviceOptions(model=model, pretrained=True))
    shown = Loader(net)(picture)
    with tokenmerge.patched(net, r=8, trace=True) as handle, torch.no_grad():
        net(shown.batch)
        trace = handle.trace
    levels = (shown.pixels.permute(1, 2, 0).numpy() * 255).round()
    for step in range(7):
        step_to(browser, step)
        names = trace.source(step - 1)[0, trace.protected :] if step else torch.arange(64)
        np.testing.assert_allclose(pixels_of(browser), expected(levels, names, (8, 8)), atol=1)
    browser.page.select_option("#view", "photo")
    browser.page.uncheck("#borders")
    np.testing.assert_allclose(pixels_of(browser), levels, atol=1)
    browser.check(out.as_uri())


def test_hover_keyboard_and_side_by_side(written: tuple[Path, Path], open_page: Open) -> None:
    _, out = written
    browser = open_page(out.as_uri())
    page = browser.page
    page.wait_for_selector("canvas")
    assert "after block 6 of 6" in text(browser, "#where")
    before = pixels_of(browser)
    names = page.evaluate("[...data.images[0].looks[0].blocks[5].names]")
    patch = next(i for i, name in enumerate(names) if names.count(name) > 2)
    box = page.locator("canvas").bounding_box()
    page.mouse.move(box["x"] + box["width"] * (patch % 8 + 0.5) / 8, box["y"] + box["height"] * (patch // 8 + 0.5) / 8)
    assert f"row {patch // 8 + 1}, column {patch % 8 + 1}" in text(browser, "#token")
    assert f"size {names.count(names[patch])}:" in text(browser, "#token")
    assert "cosine" in text(browser, "#token")
    lit = pixels_of(browser)
    assert (lit != before).any()
    assert (lit == before).all(axis=2).any(), "the token itself keeps its colours"
    page.mouse.move(2, 2)
    assert (pixels_of(browser) == before).all()

    page.locator("body").press("ArrowLeft")
    assert "after block 5" in text(browser, "#where")
    page.locator("body").press("ArrowRight")
    page.locator("body").press("b")
    assert not page.is_checked("#borders")
    page.locator("body").press("v")
    assert page.input_value("#view") == "photo"
    page.select_option("#view", "attention")
    assert (pixels_of(browser) != before).any()
    page.select_option("#view", "sizes")
    assert "patches" in text(browser, "#high")
    page.locator("body").press("2")
    assert page.locator("canvas").count() == 2
    assert page.locator(".panel select").nth(1).input_value() == "1"
    assert (pixels_of(browser, 0) != pixels_of(browser, 1)).any(), "two settings merge differently"
    page.locator("canvas").nth(1).focus()
    page.locator("canvas").nth(1).press("ArrowDown")
    assert "row 1, column 1, r=3" in text(browser, "#token")
    step_to(browser, 0)
    page.click("#play")
    shows(browser, "#where", "after block 2")
    page.click("#play")
    assert page.locator(".panel table tr").count() == 12, "five predictions and a head for each setting"
    assert EVIL in text(browser, ".panel table >> nth=0"), "shown as it is, not run"
    browser.check(out.as_uri())


def test_dark_light_touch_narrow_and_print(written: tuple[Path, Path], open_page: Open) -> None:
    _, out = written
    background = "getComputedStyle(document.body).backgroundColor"
    dark = open_page(out.as_uri(), color_scheme="dark")
    dark.page.wait_for_selector("canvas")
    assert dark.page.evaluate(background) == "rgb(22, 24, 27)"
    dark.page.click("#theme")
    assert dark.page.evaluate(background) == "rgb(255, 255, 255)"
    dark.check(out.as_uri())

    phone = open_page(out.as_uri(), viewport={"width": 390, "height": 800}, has_touch=True, is_mobile=True)
    phone.page.wait_for_selector("canvas")
    assert phone.page.evaluate("document.documentElement.scrollWidth") <= 390, "nothing sticks out"
    phone.page.locator("canvas").tap(position={"x": 30, "y": 30})
    assert "size" in text(phone, "#token")
    phone.check(out.as_uri())

    phone.page.emulate_media(media="print")
    assert not phone.page.locator(".bar").first.is_visible()
    assert phone.page.locator("canvas").is_visible()


def test_a_large_page_stays_small(tmp_path: Path, run: Run) -> None:
    """24 blocks at 518 pixels; how fast its slider is, benchmarks/explorer.py measures."""
    name = write_model(tmp_path / "model", img_size=518, patch_size=14, depth=24, embed_dim=24, num_heads=2)
    noise = np.random.default_rng(0).integers(0, 256, (518, 518, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "in.png")  # what PNG can do least about
    code, _, err = run("visualize", name, tmp_path / "in.png", "--r", "25", "8", "--out", tmp_path / "out.html")
    assert code == 0, err
    assert (tmp_path / "out.html").stat().st_size < 8e6


@dataclasses.dataclass
class Live:
    """A running server."""

    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def call(self, path: str, body: bytes = b"", method: str = "POST", **headers: str) -> tuple[int, Any]:
        """One request; status, and the JSON or text of the answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        sent = {"X-Requested-With": "tokenmerge", **{name.replace("_", "-"): value for name, value in headers.items()}}
        connection.request(method, path, body or None, {name: value for name, value in sent.items() if value})
        answer = connection.getresponse()
        content = answer.read().decode()
        connection.close()
        try:
            return answer.status, json.loads(content)
        except ValueError:
            return answer.status, content


@pytest.fixture(scope="module")
def live(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    uvicorn = pytest.importorskip("uvicorn")
    from tokenmerge.tools.explore import ExploreOptions
    from tokenmerge.tools.explore.main import Explorer, make_app

    folder = tmp_path_factory.mktemp("samples")
    photo(folder / "a" / "one.png")
    photo(folder / "b" / "<b>two.png", 90, 50, seed=1)
    explorer = Explorer(ExploreOptions(model=model, pretrained=True, data=folder))
    app = make_app(explorer, ["127.0.0.1", "localhost"], "8 3")
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield Live(server.servers[0].sockets[0].getsockname()[1])
    server.should_exit = True
    thread.join(timeout=10)


def encoded(width: int, height: int, kind: str) -> bytes:
    out = io.BytesIO()
    Image.effect_noise((width, height), 60).convert("RGB").save(out, kind)
    return out.getvalue()


def test_live_in_the_browser(live: Live, open_page: Open, tmp_path: Path) -> None:
    browser = open_page(live.url)
    page = browser.page
    page.wait_for_selector("canvas")
    shows(browser, "#status", "one.png")
    assert "times as fast here" in text(browser, ".panel h2")
    page.fill("#r", "2")
    page.click("#run")
    shows(browser, ".panel select", "r=2")
    page.select_option("#sample", "1")
    shows(browser, "#status", "<b>two.png")
    for number, (name, body) in enumerate(
        (
            ("own.png", encoded(80, 70, "PNG")),
            ("one pixel.png", encoded(1, 1, "PNG")),
            ("large.jpg", encoded(5200, 3900, "JPEG")),
        )
    ):
        page.set_input_files("#file", {"name": name, "mimeType": "image/png", "buffer": body})
        shows(browser, "#status", name)
        assert page.locator("canvas").count() == 1, number
    evil = EVIL.replace("/", "_") + ".png"
    page.set_input_files("#file", {"name": evil, "mimeType": "image/png", "buffer": encoded(9, 9, "PNG")})
    shows(browser, "#status", evil[:20])
    browser.check(live.url)

    page.set_input_files("#file", {"name": "x.png", "mimeType": "image/png", "buffer": b"no picture"})
    page.wait_for_selector("#status.bad")
    assert "no picture that can be read" in text(browser, "#status")
    assert len(browser.problems) == 1, "the browser itself notes the status 400"
    page.fill("#r", "x")
    page.select_option("#sample", "0")
    shows(browser, "#status", "not understood")


def test_what_strangers_send(live: Live) -> None:
    good = encoded(20, 20, "PNG")
    status, found = live.call("/api/run?r=3&name=" + quote("../../etc/passwd\x00"), good)
    assert status == 200
    assert found["name"] == "passwd", "shown without its folders; no file is opened by it"
    for path, body, text in (
        ("/api/run?r=3", b"no picture", "no picture that can be read"),
        ("/api/run?r=3", good[:200], "damaged"),
        ("/api/run?r=3", b"", "no file was given"),
        ("/api/run?r=3&sample=2", b"", "no sample 2"),
        ("/api/run?r=3&sample=-1", b"", "no file was given"),
        ("/api/run?r=3&sample=../x", b"", "no file was given"),
        ("/api/run?r=/etc/passwd.json", good, "not taken here"),
        ("/api/run?r=9e9999", good, "not understood"),
        ("/api/run", good, "0 settings"),
        ("/api/run?" + "&".join(f"r={i}" for i in range(9)), good, "9 settings"),
        ("/api/run?r=" + quote(",".join(["1"] * 100)), good, "r"),
    ):
        status, found = live.call(path, body)
        assert status == 400, (path, found)
        assert text in found["error"]
        assert "Traceback" not in found["error"]
    huge = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(huge, "PNG")
    status, found = live.call("/api/run?r=3", huge.getvalue())
    assert status == 400
    assert "million" in found["error"], "a small file that would be large in memory"
    oblong = io.BytesIO()
    Image.new("L", (40_000, 1)).save(oblong, "PNG")
    status, found = live.call("/api/run?r=3", oblong.getvalue())
    assert status == 400
    assert "32 times as long" in found["error"], "its shorter side would be enlarged, the longer one with it"
    turned = io.BytesIO()
    exif = b"Exif\x00\x00II*\x00\xff\xff\xff\xff" + bytes(range(40))
    Image.effect_noise((20, 20), 60).save(turned, "PNG", exif=exif)
    assert live.call("/api/run?r=3", turned.getvalue())[0] in (200, 400), "broken EXIF is a sentence at most"
    assert live.call("/api/run?r=3&sample=" + "1" * 5000)[0] == 400
    assert live.call("/api/run?r=" + "1" * 390 + ":-1", good)[0] == 400
    assert live.call("/api/run?r=3", b"x" * (33 * 2**20))[0] == 413
    assert live.call("/api/run?r=3", good, X_Requested_With="")[0] == 403, "another page's form cannot send the header"
    assert live.call("/", method="GET", Host="evil.example")[0] == 400, "a name that was made to point here"
    assert live.call("/", method="GET", Host="localhost")[0] == 200
    assert live.call("/../../etc/passwd", method="GET")[0] == 404
    assert live.call("/api/run?r=3", method="GET")[0] == 405


def test_the_command_serves(model: str, tmp_path: Path, run: Run) -> None:
    code, _, err = run("explore", model, "--data", tmp_path / "none")
    assert code == 2
    assert "is not a folder" in err
    code, _, err = run("explore", model, "--data", tmp_path)
    assert code == 2
    assert "holds no images" in err
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, _, err = run("explore", model, "--port", taken.getsockname()[1])
    assert code == 2
    assert "choose another --port" in err
    code, _, err = run("explore", model, "--r", "x")
    assert code == 2
    assert "not understood" in err
