"""The explorer's server beside clients that are slow, silent, greedy or hostile."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import io
import json
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.helpers.browser import Open
from tests.helpers.pictures import photo, write_model
from tokenmerge.tools.explore import ExploreOptions
from tokenmerge.tools.explore.app import make_app
from tokenmerge.tools.explore.explorer import Explorer
from tokenmerge.tools.explore.headers import policy_of
from tokenmerge.tools.explore.limits import Limits
from tokenmerge.tools.explore.serving import make_server

pytest.importorskip("uvicorn")

QUICK = Limits(head=1, idle=1, pause=1, whole=3, connections_each=40, connections=60, waiting=4, waiting_each=3)
HALF = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: "
Started = Callable[..., "Server"]


@dataclasses.dataclass
class Server:
    """A running server."""

    port: int
    explorer: Explorer

    def open(self, sent: bytes = b"", source: str = "127.0.0.1") -> socket.socket:
        one = socket.create_connection(("127.0.0.1", self.port), timeout=20, source_address=(source, 0))
        one.sendall(sent)
        return one

    def call(self, path: str = "/", body: bytes | None = None, source: str = "127.0.0.1") -> tuple[int, Any, Any]:
        """One request on a connection of its own; status, headers and the content."""
        line = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20, source_address=(source, 0))
        with contextlib.closing(line):
            line.request("GET" if body is None else "POST", path, body or None, {"X-Requested-With": "tokenmerge"})
            answer = line.getresponse()
            content = answer.read().decode()
        kind = answer.headers.get("content-type", "")
        return answer.status, answer.headers, json.loads(content) if "json" in kind else content


@pytest.fixture(scope="module")
def explorer(tmp_path_factory: pytest.TempPathFactory) -> Explorer:
    """A small model, two samples, one of them damaged, in folders that nobody else should hear of."""
    folder = tmp_path_factory.mktemp("secret place")
    photo(folder / "data" / "a" / "good.png")
    (folder / "data" / "b").mkdir()
    (folder / "data" / "b" / "it's bad.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    model = write_model(folder / "net", img_size=32, patch_size=8, depth=2)
    return Explorer(ExploreOptions(model=model, data=folder / "data"))


@pytest.fixture
def start(explorer: Explorer) -> Iterator[Started]:
    running = []

    def call(limits: Limits = QUICK, of: Any = explorer) -> Server:
        app = make_app(of, ["127.0.0.1"], "2", limits)
        server = make_server(app, limits, port=0)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        until = time.monotonic() + 20
        while not server.started:
            assert time.monotonic() < until
            time.sleep(0.01)
        running.append((server, thread))
        return Server(server.servers[0].sockets[0].getsockname()[1], of)

    yield call
    for server, _ in running:
        server.should_exit = True
    for _, thread in running:
        thread.join(timeout=15)
        assert not thread.is_alive(), "it ends, whoever is still connected"


def closed_after(one: socket.socket) -> tuple[float, bytes]:
    """Seconds until the server closes a connection, and what it sent before."""
    start, found = time.monotonic(), b""
    with contextlib.suppress(ConnectionResetError):
        while part := one.recv(65536):
            found += part
    one.close()
    return time.monotonic() - start, found


def upload(size: int, sent: bytes = b"") -> bytes:
    head = f"POST /api/run?r=2 HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Requested-With: tokenmerge\r\nContent-Length: {size}\r\n\r\n"
    return head.encode() + sent


def test_slow_clients_hold_up_nobody(start: Started) -> None:
    """The usual limits: 60 connections with half a header, and 20 uploads that stalled, beside a picture that is asked for."""
    server = start(Limits())
    slow = [server.open(HALF) for _ in range(60)] + [server.open(upload(10**6, b"x" * 100)) for _ in range(20)]
    begin = time.monotonic()
    assert server.call()[0] == 200
    status, _, found = server.call("/api/run?r=2&sample=0", b"")
    assert status == 200
    assert found["name"] == "a/good.png"
    assert time.monotonic() - begin < 4, "before any of their timeouts"
    for one in slow:
        one.close()


def trickled(one: socket.socket, most: float, pause: float) -> float:
    """Send a byte now and then until the server closes the connection; the seconds that it took, at most `most`."""
    begin = time.monotonic()
    with contextlib.suppress(ConnectionError):
        while time.monotonic() - begin < most:
            one.sendall(b"x")
            time.sleep(pause)
    return time.monotonic() - begin


def test_a_header_has_to_come(start: Started) -> None:
    server = start()
    silent, half, after = server.open(), server.open(HALF), server.open()
    after.sendall(b"GET /nothing HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    assert after.recv(65536).startswith(b"HTTP/1.1 404")
    after.sendall(HALF)  # a second header, of which a byte comes now and then
    assert 0.8 < trickled(after, 5, 0.1) < 3, "bytes that trickle do not extend it"
    for one in (silent, half):
        assert closed_after(one)[1] == b""


def test_an_idle_connection_is_closed(start: Started) -> None:
    server = start()
    one = server.open(b"GET /nothing HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    assert one.recv(65536).startswith(b"HTTP/1.1 404")
    assert 0.5 < closed_after(one)[0] < 3


def test_an_upload_that_stalls_ends_with_a_sentence(start: Started) -> None:
    server = start()
    seconds, found = closed_after(server.open(upload(10**6, b"x" * 1000)))
    assert 0.8 < seconds < 4
    assert found.startswith(b"HTTP/1.1 408")
    assert b"the upload stalled, and nothing came for 1 seconds: send the file again" in found

    assert 2.5 < trickled(server.open(upload(10**6)), 8, 0.2) < 6, "the whole upload has a limit as well"


def test_a_client_that_does_not_read_is_dropped(start: Started, explorer: Explorer) -> None:
    class Wordy(Explorer):
        def __init__(self) -> None:
            self.__dict__.update(explorer.__dict__)

        def run(self, shown: Any, settings: Any) -> dict[str, Any]:
            return {"words": "x" * 30_000_000}

    server = start(of=Wordy())
    deaf = server.open(upload(0).replace(b"?r=2", b"?r=2&sample=0"))
    time.sleep(3)
    seconds, found = closed_after(deaf)
    assert seconds < 3
    assert len(found) < 30_000_000, "the rest was dropped"
    assert server.call()[0] == 200


def test_only_surplus_connections_without_a_request_are_closed(start: Started) -> None:
    server = start(dataclasses.replace(QUICK, head=20, idle=20, pause=20, whole=20))
    slow = [server.open(HALF) for _ in range(45)]
    for one in slow[:5]:
        assert closed_after(one)[0] < 5, "the oldest of the address"
    busy = [server.open(upload(10**6, b"x")) for _ in range(40)]
    time.sleep(0.5)
    seconds, found = closed_after(server.open())
    assert seconds < 5
    assert found.startswith(b"HTTP/1.1 503")
    assert b"retry-after: 5" in found.lower()
    assert server.call(source="127.0.0.2")[0] == 200, "another address"
    for one in (*slow, *busy):
        one.close()


def test_a_busy_model_says_so(start: Started, explorer: Explorer) -> None:
    """Few wait, of one address fewer; the page is there meanwhile, and who has gone is not worked for."""
    going, go, runs = threading.Event(), threading.Event(), []

    class Slow(Explorer):
        def __init__(self) -> None:
            self.__dict__.update(explorer.__dict__)

        def run(self, shown: Any, settings: Any) -> dict[str, Any]:
            runs.append(shown.name)
            going.set()
            assert go.wait(20)
            return {}

    server = start(of=Slow())
    asked = upload(0).replace(b"?r=2", b"?r=2&sample=0")
    lines = [server.open(asked)]
    assert going.wait(10)
    lines += [server.open(asked) for _ in range(2)]
    time.sleep(0.3)
    status, headers, found = server.call("/api/run?r=2&sample=0", b"")
    assert status == 503
    assert headers["Retry-After"] == "5"
    assert found["error"] == "the model is busy, and too many requests wait for it: try again in some seconds"
    other = server.open(asked, "127.0.0.2")
    time.sleep(0.3)
    assert server.call("/api/run?r=2&sample=0", b"", "127.0.0.3")[0] == 503, "four of all addresses"
    begin = time.monotonic()
    assert server.call()[0] == 200
    assert time.monotonic() - begin < 1, "while the model runs"
    lines[1].close()
    time.sleep(0.3)
    go.set()
    for one in (lines[0], lines[2], other):
        assert one.recv(100).startswith(b"HTTP/1.1 200")
        one.close()
    assert len(runs) == 3


def test_uploads_have_one_memory(start: Started) -> None:
    server = start(dataclasses.replace(QUICK, memory=100_000))
    holds = server.open(upload(90_000, b"x" * 80_000))
    time.sleep(0.3)
    status, headers, found = server.call("/api/run?r=2", b"y" * 30_000)
    assert (status, headers["Retry-After"]) == (503, "5")
    assert "too many files" in found["error"]
    holds.close()
    time.sleep(0.3)
    assert server.call("/api/run?r=2", b"y" * 30_000)[0] == 400, "there is room again, and it is no picture"


def test_long_headers_are_refused(start: Started) -> None:
    server = start()
    for text in (b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Long: " + b"x" * 65536, b"GET /?" + b"x" * 65536):
        ending = b"\r\n\r\n" if b"HTTP" in text else b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
        found = closed_after(server.open(text + ending))[1]
        assert found[:12] in (b"HTTP/1.1 431", b"HTTP/1.1 400", b"")
        assert b"Traceback" not in found
    one = server.open(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Long: " + b"x" * 17000 + b"\r\n\r\n")
    assert closed_after(one)[1][:12] in (b"HTTP/1.1 431", b"HTTP/1.1 400")
    huge = b"POST /api/run?r=2 HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Requested-With: tokenmerge\r\nContent-Length: 99999999999\r\n\r\n"
    one = server.open(huge)
    assert one.recv(1000).startswith(b"HTTP/1.1 413"), "at once, from its own words"
    assert closed_after(one)[0] < 4


def test_every_answer_has_its_headers(start: Started) -> None:
    server = start()
    for path, body, status in (
        ("/", None, 200),
        ("/nothing", None, 404),
        ("/api/run", None, 405),
        ("/api/run?r=2&sample=0", b"", 200),
        ("/api/run?r=2", b"nothing", 400),
    ):
        found, headers, text = server.call(path, body)
        assert found == status
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["X-Frame-Options"] == "DENY"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert headers["Cache-Control"] == "no-store"
        assert "server" not in headers
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        if path == "/":
            assert headers["Content-Security-Policy"] == policy_of(text)


def test_the_policy_names_the_scripts() -> None:
    page = (
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; script-src 'unsafe-inline'\">"
        "<script>alert(1)</script><script type='application/json'>{}</script>"
    )
    # openssl: printf 'alert(1)' | openssl dgst -sha256 -binary | base64
    known = "'sha256-bhHHL3z2vDgxUt0W3dWQOrprscmda2Y5pLsLg4GF+pI='"
    assert policy_of(page) == f"default-src 'none'; script-src {known}; frame-ancestors 'none'"
    assert "script-src 'none'" in policy_of("<p>no policy, and nothing that runs")


def test_no_answer_names_a_folder(start: Started, explorer: Explorer) -> None:
    server = start()
    texts = [server.call()[2]]
    for path, body in (
        ("/api/run?r=2&sample=0", b""),
        ("/api/run?r=2&sample=1", b""),
        ("/api/run?r=2&sample=7", b""),
        ("/api/run?r=/etc/passwd.json", b""),
        ("/api/run?r=2&name=/home/me/x.png", b"no picture"),
        ("/api/run?r=99999", b""),
    ):
        texts.append(json.dumps(server.call(path, body)[2]))
    assert '"it\'s bad.png"' not in texts[2]
    assert "b/it's bad.png" in texts[2], "as it is listed"
    for text in texts:
        for part in ("secret place", "/home", "/tmp", "/etc", str(Path.cwd())):
            assert part not in text
    assert "<title>" in texts[0]
    assert explorer.name == "net (vit_tiny_patch16_224)"
    said = explorer.without_paths(f"{Path.home() / 'a b' / 'c.png'}: '/opt/my/x.bin' and 1/2, see http://a.b/c/d")
    assert said == "a b/c.png: 'x.bin' and 1/2, see http://a.b/c/d"


def exif(orientation: bytes, count: int = 1, kind: int = 3) -> bytes:
    """EXIF with an orientation of any type, value and number, and a pointer to nowhere."""
    entries = struct.pack("<HHI", 0x0112, kind, count) + orientation.ljust(4, b"\0")
    entries += struct.pack("<HHII", 0x8769, 4, 1, 0x7FFFFFFF)  # another directory, far behind the end
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + entries + b"\0\0\0\0"


BROKEN = {
    "cut": exif(b"\x06")[:20],
    "nothing": b"Exif\0\0",
    "noise": b"Exif\0\0" + bytes(range(200)),
    "far": b"Exif\0\0II*\0\xff\xff\xff\xff" + bytes(40),
    "circle": b"Exif\0\0II*\0\x08\0\0\0\0\0\x08\0\0\0",
    "many entries": b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + bytes(60),
    "large": exif(b"\xff\xff"),
    "text": exif(b"six", 3, 2),
    "no kind": exif(b"\x06", 1, 99),
    "by zero": exif(b"\x08\0\0\0", 1, 5),
    "two values": exif(b"\x06\0\x03\0", 2),
    "endless": exif(b"\x06", 0x7FFFFFFF),
}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_broken_exif_is_a_sentence_or_the_picture(start: Started, kind: str) -> None:
    server = start()
    for name, tags in BROKEN.items():
        file = io.BytesIO()
        Image.effect_noise((20, 30), 60).convert("RGB").save(file, kind, exif=tags)
        status, _, found = server.call("/api/run?r=2", file.getvalue())
        assert status == 200 or (status == 400 and "the picture cannot be shown" in found["error"]), (name, found)
    if kind == "PNG":  # as older programs write it: hexadecimal text
        raw = b"zTXtRaw profile type exif\0\0" + zlib.compress(b"\nexif\n  9\nxyz!")
        whole = io.BytesIO()
        Image.effect_noise((20, 30), 60).save(whole, kind)
        chunk = struct.pack(">I", len(raw) - 4) + raw + struct.pack(">I", zlib.crc32(raw))
        data = whole.getvalue()
        assert server.call("/api/run?r=2", data[:33] + chunk + data[33:])[0] in (200, 400)


def test_the_page_works_under_its_policy(start: Started, open_page: Open) -> None:
    browser = open_page(f"http://127.0.0.1:{start().port}/")
    page = browser.page
    page.wait_for_selector("canvas", timeout=20_000)
    assert not browser.problems
    page.evaluate(
        "() => { const s = document.createElement('script'); s.text = 'window.hacked = 1'; document.body.append(s); }"
    )
    assert page.evaluate("window.hacked") is None, "a script that the server did not send does not run"
    assert len(browser.problems) == 1
    assert "Content Security Policy" in browser.problems[0]
