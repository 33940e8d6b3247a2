"""The explorer in a real browser; the live server, with what strangers may send it."""

from __future__ import annotations

import dataclasses
import http.client
import io
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from tests.conftest import Run
from tests.helpers.browser import EVIL, Open
from tests.helpers.pictures import photo, write_evil_model, write_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_evil_model(tmp_path_factory.mktemp("pages") / "model <b>&amp;")


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
    page.wait_for_selector(".panel canvas")
    browser.shows("#status", "one.png")
    assert "× as fast here" in browser.text("#pictures")
    assert "after block 6 of 6" in browser.text("#where"), "it opens merged"
    page.fill("#r", "2")
    page.click("#run")
    browser.shows(".panel select", "r=2")
    page.select_option("#sample", "1")
    browser.shows("#status", "<b>two.png")
    for number, (name, body) in enumerate(
        (
            ("own.png", encoded(80, 70, "PNG")),
            ("one pixel.png", encoded(1, 1, "PNG")),
            ("large.jpg", encoded(5200, 3900, "JPEG")),
        )
    ):
        page.set_input_files("#file", {"name": name, "mimeType": "image/png", "buffer": body})
        browser.shows("#status", name)
        assert page.locator(".panel canvas").count() == 2, number
    evil = EVIL.replace("/", "_") + ".png"
    page.set_input_files("#file", {"name": evil, "mimeType": "image/png", "buffer": encoded(9, 9, "PNG")})
    browser.shows("#status", evil[:20])
    browser.check(live.url)
    before = sum("api/run" in url for url in browser.requests)
    page.evaluate(
        "for (const i of [0, 1, 0, 1, 0]) { at('sample').value = i; at('sample').dispatchEvent(new Event('change')); }"
    )
    browser.shows("#status", "one.png")
    browser.until("!asked.running")
    assert sum("api/run" in url for url in browser.requests) == before + 2, "the first one, and the last one"
    assert page.evaluate("current().name") == "a/one.png"
    page.evaluate("again(); take(new File([new ArrayBuffer(33 * 2 ** 20)], 'large.png'))")
    browser.until("!asked.running")
    page.click("#run")
    browser.until("!asked.running")
    browser.shows("#status", "one.png")
    assert "sample=0" in page.evaluate("state.written")

    page.set_input_files("#file", {"name": "x.png", "mimeType": "image/png", "buffer": b"no picture"})
    page.wait_for_selector("#status.bad")
    assert "no picture that can be read" in browser.text("#status")
    assert len(browser.problems) == 1, "the browser itself notes the status 400"
    page.fill("#r", "x")
    page.select_option("#sample", "0")
    browser.shows("#status", "not understood")


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
