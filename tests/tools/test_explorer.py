"""The explorer's page in a real browser: what it draws, the panel, pinning, zoom, the address, films, sounds, phones."""

from __future__ import annotations

import base64
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tokenmerge
from tests.helpers.browser import EVIL, SIZES, Browser, Open
from tests.helpers.pictures import photo, write_evil_model
from tests.tools.test_hf_classifiers import save
from tests.tools.test_sounds import tone, write_wav
from tests.tools.test_videos import write_video
from tokenmerge.cli import main
from tokenmerge.tools.common import DeviceOptions
from tokenmerge.tools.models import load_model
from tokenmerge.tools.visualize.load import Loader

pytestmark = pytest.mark.slow
FIRST = ".panel:nth-child(2) canvas"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_evil_model(tmp_path_factory.mktemp("explorer") / "model <b>&amp;")


def made(out: Path, *words: Any) -> Path:
    assert main(["visualize", *map(str, words), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def evil(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture whose name would be a script; a file name may hold anything but a slash."""
    return photo(tmp_path_factory.mktemp("photos") / (EVIL.replace("/", "\\") + ".png"))


@pytest.fixture(scope="module")
def page(model: str, evil: Path) -> Path:
    """A page about two pictures with two settings."""
    other = photo(evil.parent / "other.png", seed=1)
    return made(evil.parent / "page.html", model, evil, other, "--pretrained", "--r", "8", "3")


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("film"), np.random.default_rng(0)
    frames = np.repeat(np.repeat(rng.integers(0, 256, (9, 8, 8, 3), dtype=np.uint8), 6, axis=1), 8, axis=2)
    write_video(folder / "film.mp4", frames)
    return made(folder / "film.html", f"hf:{save('videomae', folder / 'model')}", folder / "film.mp4", "--r", "9")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    write_wav(folder / "tone.wav", np.concatenate([tone(300, 0.2), tone(3000, 0.2)]))
    return made(folder / "sound.html", f"hf:{save('ast', folder / 'model')}", folder / "tone.wav", "--r", "2")


def opened(open_page: Open, path: Path, address: str = "", **options: Any) -> Browser:
    browser = open_page(path.as_uri() + address, **options)
    browser.page.wait_for_selector(".panel canvas")
    browser.until("panels.length > 1 && panels[1].canvas.width > 1")
    return browser


def pixels_of(browser: Browser, panel: int = 1) -> Any:
    """What a canvas shows, `[H, W, 3]`; as text, because a list of numbers takes seconds."""
    height, width, text = browser.page.evaluate(
        """i => { const c = panels[i].canvas, bytes = panels[i].context.getImageData(0, 0, c.width, c.height).data;
        let text = ""; for (let k = 0; k < bytes.length; k += 8192) text += String.fromCharCode(...bytes.subarray(k, k + 8192));
        return [c.height, c.width, btoa(text)]; }""",
        panel,
    )
    pixels = np.frombuffer(base64.b64decode(text), np.uint8)
    return pixels.reshape(height, width, 4)[:, :, :3].astype(float)


def centres(pixels: Any, rows: int, columns: int) -> Any:
    """The pixel in the middle of each cell, `[rows·columns, 3]`."""
    height, width, _ = pixels.shape
    y = ((np.arange(rows) + 0.5) * height / rows).astype(int)
    x = ((np.arange(columns) + 0.5) * width / columns).astype(int)
    return pixels[y][:, x].reshape(-1, 3)


def point(browser: Browser, patch: int, panel: int = 1, side: int = 8) -> tuple[float, float]:
    box = browser.page.locator(".panel canvas").nth(panel).bounding_box()
    return box["x"] + box["width"] * (patch % side + 0.5) / side, box["y"] + box["height"] * (
        patch // side + 0.5
    ) / side


def step_to(browser: Browser, step: int) -> None:
    browser.page.locator("#step").fill(str(step))


def names_of(browser: Browser, step: int, look: int = 0) -> list[int]:
    return list(browser.page.evaluate(f"[...namesAt(current(), current().looks[{look}], {step})]"))


def test_the_page_shows_the_source_map(model: str, evil: Path, page: Path, open_page: Open) -> None:
    assert page.stat().st_size < 5e6
    browser = opened(open_page, page)
    assert "after block 6 of 6" in browser.text("#where"), "it opens merged"
    net = load_model(DeviceOptions(model=model, pretrained=True))
    shown = Loader(net)(evil)
    with tokenmerge.patched(net, r=8, trace=True) as handle, torch.no_grad():
        net(shown.batch)
        trace = handle.trace
    levels = (shown.pixels.permute(1, 2, 0).numpy() * 255).round()
    patches = levels.reshape(8, 8, 8, 8, 3).mean(axis=(1, 3)).reshape(64, 3)
    browser.page.uncheck("#borders")
    for step in range(7):
        step_to(browser, step)
        source = trace.source(step - 1)[0, trace.protected :].numpy() if step else np.arange(64)
        wanted = np.stack([patches[source == token].mean(axis=0) for token in source])
        np.testing.assert_allclose(centres(pixels_of(browser), 8, 8), wanted, atol=1)
        browser.page.select_option("#view", "tokens")
        colours = centres(pixels_of(browser), 8, 8)
        same = (colours[:, None] == colours[None]).all(axis=2)
        np.testing.assert_array_equal(same, source[:, None] == source[None], "no two tokens share a colour")
        browser.page.select_option("#view", "picture")
    browser.check(page.as_uri())


def contrast(one: Any, other: Any) -> float:
    """Contrast ratio of two colours (WCAG 2)."""

    def luminance(colour: Any) -> float:
        linear = np.where(colour <= 10.31, colour / 255 / 12.92, ((colour / 255 + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_borders_are_seen_on_every_colour(model: str, tmp_path: Path, open_page: Open) -> None:
    """Every patch of a picture of one colour is a token at the input, so all lines lie in it."""
    levels = (0, 60, 115, 128, 190, 255)
    plain = [tmp_path / f"{level}.png" for level in levels]
    for level, path in zip(levels, plain, strict=True):
        Image.new("RGB", (64, 64), (level, level, level)).save(path)
    browser = opened(open_page, made(tmp_path / "plain.html", model, *plain, "--pretrained", "--r", "1"))
    for level in levels:
        browser.page.select_option("#image", label=f"{level}.png")
        browser.until(f"current().name === '{level}.png'")
        step_to(browser, 0)
        pixels = pixels_of(browser)
        side = pixels.shape[0] / 8
        edge = pixels[round(side * 4.5), round(side * 4) - 2 : round(side * 4) + 2]
        assert max(contrast(one, np.full(3, float(level))) for one in edge) >= 4, level


def test_the_panel_follows_the_pointer_and_is_pinned(page: Path, open_page: Open) -> None:
    browser = opened(open_page, page)
    view = browser.page
    before = pixels_of(browser)
    names = names_of(browser, 6)
    patch = next(i for i, name in enumerate(names) if names.count(name) > 2)
    other = next(i for i, name in enumerate(names) if name != names[patch])
    view.mouse.move(*point(browser, patch))
    panel = browser.text("#token")
    assert f"Token of {names.count(names[patch])} patches" in panel
    assert f"row {patch // 8 + 1}, column {patch % 8 + 1}; r=8, after block 6" in panel
    for member, name in enumerate(names):
        assert (f"({member // 8 + 1}, {member % 8 + 1})" in browser.text("#token .members")) == (name == names[patch])
    assert view.locator(".merges tr").count() == names.count(names[patch]), "a head, and a row for each merge"
    cosines = [float(cell) for cell in view.locator(".merges td:last-child").all_inner_texts()]
    known = view.evaluate("current().looks[0].blocks.flatMap(b => b.similarity ? [...b.similarity] : [])")
    assert all(min(abs(cosine - one) for one in known) < 6e-4 for cosine in cosines)
    blocks = [int(cell) for cell in view.locator(".merges td:first-child").all_inner_texts()]
    assert blocks == sorted(blocks, reverse=True)
    lit = pixels_of(browser)
    assert (lit != before).any()
    assert (pixels_of(browser, 0) != pixels_of(browser, 1)).any()
    view.mouse.move(*point(browser, other, panel=0))
    assert f"row {other // 8 + 1}, column {other % 8 + 1}" in browser.text("#token"), "the photo is pointed at as well"
    view.mouse.move(2, 2)
    assert "No token is chosen" in browser.text("#token")
    assert (pixels_of(browser) == before).all()

    view.mouse.click(*point(browser, patch))
    assert "pinned" in view.locator("#token").get_attribute("class")
    pinned = browser.text("#token")
    view.mouse.move(*point(browser, other))
    view.mouse.move(2, 2)
    assert browser.text("#token") == pinned, "it stays while the pointer moves on"
    step_to(browser, 2)
    assert "after block 2" in browser.text("#token"), "and follows the block"
    view.mouse.click(*point(browser, other))
    assert f"row {other // 8 + 1}, column {other % 8 + 1}" in browser.text("#token"), "another one is pinned instead"
    view.click("#unpin")
    assert "No token is chosen" in browser.text("#token")
    view.mouse.click(*point(browser, patch))
    view.keyboard.press("Escape")
    assert "No token is chosen" in browser.text("#token")
    view.locator(FIRST).focus()
    view.keyboard.press("ArrowDown")
    view.keyboard.press("ArrowDown")
    view.keyboard.press("Enter")
    assert "row 2, column 1" in browser.text("#token")
    assert view.locator("#unpin").count() == 1
    browser.check(page.as_uri())


def test_photo_merged_picture_and_panel_are_above_the_fold(
    page: Path, film: Path, sound: Path, open_page: Open
) -> None:
    for path in (page, film, sound):
        browser = opened(open_page, path)
        boxes = [one.bounding_box() for one in browser.page.locator(".panel canvas, #token").all()]
        assert len(boxes) == 3
        assert all(box["y"] + box["height"] <= 800 for box in boxes), path
        assert boxes[2]["x"] >= boxes[0]["x"] + boxes[0]["width"], "the panel is beside them"
        assert browser.page.locator("h1").inner_text().startswith(("model", "m ")), "a name, not a path"
        assert "/" not in browser.page.title()


def test_keys_views_and_two_settings(page: Path, open_page: Open) -> None:
    browser = opened(open_page, page)
    view, body = browser.page, browser.page.locator("body")
    before = pixels_of(browser)
    body.press("ArrowLeft")
    assert "after block 5" in browser.text("#where")
    body.press("ArrowRight")
    body.press("b")
    assert not view.is_checked("#borders")
    body.press("v")
    assert view.input_value("#view") == "tokens"
    for name in ("photo", "attention", "sizes"):
        view.select_option("#view", name)
        assert (pixels_of(browser) != before).any(), name
    assert "patches" in browser.text("#high")
    body.press("2")
    assert view.locator(".panel canvas").count() == 3
    assert view.locator(".panel select").nth(1).input_value() == "1"
    assert (pixels_of(browser, 1) != pixels_of(browser, 2)).any(), "two settings merge differently"
    view.mouse.move(*point(browser, 9, panel=2))
    assert "r=3" in browser.text("#token")
    step_to(browser, 0)
    view.click("#play")
    browser.shows("#where", "after block 2")
    view.click("#play")
    assert view.locator("#classes tr").count() == 6, "five predictions and a head"
    assert EVIL in browser.text("#classes"), "shown as it is, not run"
    view.select_option("#image", "1")
    assert "other.png" in browser.text(".panel")
    browser.check(page.as_uri())


def test_zoom(page: Path, open_page: Open) -> None:
    browser = opened(open_page, page)
    view = browser.page
    view.mouse.move(*point(browser, 27))
    assert "row 4, column 4" in browser.text("#token")
    view.mouse.wheel(0, -300)
    assert browser.text("#fit") == "1×", "the page scrolls with a plain wheel"
    view.keyboard.down("Control")
    view.mouse.wheel(0, -300)
    view.keyboard.up("Control")
    assert float(browser.text("#fit")[:-1]) > 2
    view.mouse.move(*[one + 1 for one in point(browser, 27)])
    assert "row 4, column 4" in browser.text("#token"), "the patch under the pointer stays there"
    view.mouse.down()
    view.mouse.move(*point(browser, 0), steps=4)
    view.mouse.up()
    assert view.locator("#unpin").count() == 0, "dragging moves the picture and pins nothing"
    seen = view.evaluate("windowOf(current())")
    assert seen["x"] > 0
    assert 8 - seen["w"] >= seen["x"]
    view.click("#fit")
    assert browser.text("#fit") == "1×"
    assert view.evaluate("windowOf(current())") == {
        "x": 0,
        "y": 0,
        "w": 8,
        "h": 8,
        "left": 0,
        "top": 0,
        "wide": 8,
        "high": 8,
    }
    for _ in range(12):
        view.click("#in")
    assert browser.text("#fit") == "16×", "no further"
    browser.check(page.as_uri())


def test_the_address_holds_what_is_shown(page: Path, open_page: Open) -> None:
    browser = opened(open_page, page)
    view = browser.page
    view.select_option("#image", "1")
    browser.until("current().name === 'other.png'")
    step_to(browser, 4)
    view.select_option("#view", "tokens")
    view.check("#two")
    view.uncheck("#borders")
    view.mouse.click(*point(browser, 20))
    view.click("#in")
    view.click("#link")
    browser.shows("#link", "copied")
    address = view.evaluate("location.hash")
    assert view.evaluate("state.written") == address
    panel, shown = browser.text("#token"), [pixels_of(browser, i) for i in range(3)]
    again = opened(open_page, page, address)
    again.until("current().name === 'other.png'")
    assert again.text("#token") == panel
    for i in range(3):
        np.testing.assert_array_equal(pixels_of(again, i), shown[i])
    again.page.evaluate("location.hash = '#i=0&b=2&v=sizes'")
    again.shows("#where", "after block 2")
    assert again.page.input_value("#view") == "sizes"
    assert again.page.locator(".panel canvas").count() == 2
    again.page.click("#link")
    again.shows("#link", "copied")
    assert again.page.evaluate("location.hash") == "#i=0&b=2&s=0&v=sizes", (
        "a link that was pasted is the one that is copied"
    )
    again.page.evaluate(
        "for (const i of [1, 0, 1, 0]) { at('image').value = i; at('image').dispatchEvent(new Event('change')); }"
    )
    again.page.wait_for_timeout(300)
    assert again.page.evaluate("[state.image, at('image').value].join()") == "0,0", "the last choice wins"
    assert "after block 2" in again.text("#where"), "of what was chosen, another input keeps the block"
    again.check(page.as_uri())
    for odd in ("#i=9&b=-1&s=x&v=none&p=1e9&z=0,0,0&f=all", "#%", "#i=constructor&v=%22]&b=1.5&z=NaN,1,1&in=7&p=3"):
        other = opened(open_page, page, odd)
        assert other.page.locator(".panel canvas").count() == 2
        assert "after block 6 of 6" in other.text("#where"), odd
        other.check(page.as_uri())


def test_pictures_are_saved(page: Path, tmp_path: Path, open_page: Open) -> None:
    browser = opened(open_page, page)
    view = browser.page
    view.mouse.click(*point(browser, 20))
    for kind in ("png", "svg"):
        with view.expect_download() as download:
            view.click(f"#{kind}")
        assert download.value.suggested_filename.endswith(f"-r_8-block6.{kind}".replace("r_8", "r=8"))
        download.value.save_as(tmp_path / f"saved.{kind}")
    saved = np.asarray(Image.open(tmp_path / "saved.png").convert("RGB"), dtype=float)
    assert saved.shape[1] == 2 * 900 + 3 * 24
    view.keyboard.press("Escape")
    view.uncheck("#borders")
    wanted = centres(pixels_of(browser), 8, 8)
    with view.expect_download() as download:
        view.click("#png")
    download.value.save_as(tmp_path / "plain.png")
    part = np.asarray(Image.open(tmp_path / "plain.png").convert("RGB"), dtype=float)[24:924, 948:1848]
    np.testing.assert_allclose(centres(part, 8, 8), wanted, atol=1)
    drawing = ET.parse(tmp_path / "saved.svg").getroot()
    texts = [one.text for one in drawing.iter("{http://www.w3.org/2000/svg}text")]
    assert EVIL.replace("/", "\\") + ".png" in texts, "escaped"
    fills = {one.get("fill") for one in drawing.iter("{http://www.w3.org/2000/svg}rect")}
    assert {"#" + "".join(f"{round(c):02x}" for c in colour) for colour in wanted} <= fills
    assert not list(drawing.iter("{http://www.w3.org/2000/svg}script"))
    browser.check(page.as_uri())


def test_films(film: Path, open_page: Open) -> None:
    browser = opened(open_page, film)
    view = browser.page
    assert view.locator("#moments").is_visible()
    assert view.evaluate("frames(current())") == 2
    first = pixels_of(browser, 0)
    assert "frame 1 of 2" in browser.text("#when")
    view.locator("#frame").fill("1")
    assert "frame 2 of 2" in browser.text("#when")
    assert (pixels_of(browser, 0) != first).any()
    view.mouse.click(*point(browser, 5, side=4))
    assert "frame 2, row 2, column 2" in browser.text("#token")
    assert "of 2 frames" in browser.text("#token")
    box = view.locator("#film").bounding_box()
    view.mouse.click(box["x"] + 10, box["y"] + 10)
    assert "frame 1 of 2" in browser.text("#when"), "the strip is a choice of frames"
    view.click("#roll")
    browser.shows("#when", "frame 2 of 2")
    view.click("#roll")
    view.check("#sheet")
    assert "all 2 frames" in browser.text("#when")
    view.mouse.move(2, 2)
    browser.shows("#token", "frame 2, row 2, column 2")  # it is still pinned
    browser.check(film.as_uri())


def test_sounds(sound: Path, open_page: Open) -> None:
    browser = opened(open_page, sound)
    view = browser.page
    image = view.evaluate("({ seconds: current().seconds, grid: current().grid, patches: current().patches })")
    assert 0.38 <= image["seconds"] < 0.5, "cropped to the sound, of 0.4 s; the model takes 0.6"
    assert image["grid"][0] * image["grid"][1] < image["patches"]
    assert "padding" in browser.text("#padding")
    browser.until("at('audio').readyState > 0")
    assert view.evaluate("at('audio').duration") == pytest.approx(0.4, abs=0.03)
    box = view.locator(FIRST).bounding_box()
    view.mouse.click(box["x"] + 48 + (box["width"] - 48) * 0.5, box["y"] + 20)
    assert "kHz" in browser.text("#token")
    assert " s" in browser.text("#token")
    before = pixels_of(browser)
    view.click("#hear")
    browser.until("at('audio').currentTime > 0")
    browser.until("at('audio').paused")
    span = view.evaluate("spansOf(current(), membersOf(namesIn(panels[1]), namesIn(panels[1])[state.patch])).at(-1)")
    assert view.evaluate("at('audio').currentTime") >= min(span["to"], 0.38) - 0.02
    assert (pixels_of(browser) != before).any(), "a line shows where it plays"
    browser.check(sound.as_uri())


def test_phones_touch_themes_and_paper(page: Path, film: Path, sound: Path, open_page: Open) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    phone: dict[str, Any] = {
        "viewport": dict(zip(("width", "height"), SIZES["phone"], strict=True)),
        "has_touch": True,
        "is_mobile": True,
    }
    for path in (page, film, sound):
        browser = opened(open_page, path, color_scheme="dark", **phone)
        assert browser.overflow() <= 0, f"nothing sticks out of {path.name}"
        assert browser.page.evaluate(background) == "rgb(22, 24, 27)"
        canvas = browser.page.locator(FIRST)
        size = canvas.bounding_box()
        canvas.tap(position={"x": size["width"] * 0.4, "y": size["height"] * 0.3})
        assert browser.page.locator("#unpin").count() == 1, "a touch pins"
        assert browser.overflow() <= 0
        browser.check(path.as_uri())
    browser = opened(open_page, page, color_scheme="dark")
    browser.page.click("#theme")
    assert browser.page.evaluate(background) == "rgb(255, 255, 255)"
    browser.page.emulate_media(media="print")
    assert not browser.page.locator(".bar").first.is_visible()
    assert browser.page.locator(".panel canvas").first.is_visible()
    browser.check(page.as_uri())
