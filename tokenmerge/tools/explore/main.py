"""Server of the interactive page, with one API call that runs the model."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
import socket
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tokenmerge.errors import InputError, TokenMergeError
from tokenmerge.ops.timing import Spread, take_turns
from tokenmerge.tools.explore.options import ExploreOptions
from tokenmerge.tools.explore.pictures import MOST_BYTES, open_picture, open_sample, plain_name, samples_in, settings_of
from tokenmerge.tools.media import IMAGES
from tokenmerge.tools.models import load_model, random_weights, warn_if_random
from tokenmerge.tools.pages import printable
from tokenmerge.tools.report import Report, Row
from tokenmerge.tools.saved import kept_of, saved_with, say_used
from tokenmerge.tools.settings import Setting, label_of
from tokenmerge.tools.visualize.load import Loader, Shown
from tokenmerge.tools.visualize.looks import Merged, merged_copies
from tokenmerge.tools.visualize.page import explorer_page, image_data

_ROUNDS = 3
_USUAL = ("8", "16")
"""Initial schedules of models that were saved without one."""
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class Explorer:
    """A model that runs on samples and uploaded pictures.

    Args:
        options: model, merging and folder of sample pictures.

    Raises:
        InputError: if the folder holds no files of the medium that the model takes.
    """

    def __init__(self, options: ExploreOptions) -> None:
        data = options.data
        self.name = options.model
        self.model = load_model(options)
        self.random = random_weights(options)
        self.loader = Loader(self.model)
        self.remarks: list[str] = []
        self.texts, self.fields = _merging(options, self.remarks.append)
        self.samples, self.left_out = ([], []) if data is None else samples_in(data, self.loader.medium)
        self.sample_names = [] if data is None else [printable(str(path.relative_to(data))) for path in self.samples]
        self.unmerged = merged_copies(self.model, [Setting(0, {"r": 0})], {})[0]
        self.lock = threading.Lock()
        """Lock held from decoding to the answer, so that at most one decoded picture is in memory."""

    def sample(self, index: int) -> Shown:
        """Load a sample picture.

        Raises:
            InputError: if there is no such sample, or it cannot be read.
        """
        if not 0 <= index < len(self.samples):
            raise InputError(
                f"there is no sample {index}, but {len(self.samples)} of them: choose one, or a picture of yours"
            )
        if self.loader.medium is not IMAGES:
            return dataclasses.replace(self.loader(self.samples[index]), name=self.sample_names[index])
        return self.loader.image(open_sample(self.samples[index]), self.sample_names[index])

    def upload(self, data: bytes, name: str) -> Shown:
        """Decode and preprocess an uploaded picture, sound or video.

        Raises:
            InputError: if it is of another medium than the model takes, or cannot be decoded.
        """
        medium = self.loader.medium
        if medium is IMAGES:
            return self.loader.image(open_picture(data), plain_name(name))
        suffix = Path(plain_name(name)).suffix.lower()
        if suffix not in (medium.suffixes or ()):
            raise InputError(
                f"{plain_name(name)!r} is none of the {medium.name} that the model takes: give one of them"
            )
        with tempfile.TemporaryDirectory() as folder:  # FFmpeg reads files
            file = Path(folder, f"upload{suffix}")
            file.write_bytes(data)
            return dataclasses.replace(self.loader(file), name=plain_name(name))

    def run(self, shown: Shown, settings: list[Setting]) -> dict[str, Any]:
        """Run all settings on a picture, and return the data for the page.

        Raises:
            TokenMergeError: if the model does not support a setting.
        """
        merged = merged_copies(self.model, settings, self.fields, attention=True)
        looks = [one.look(shown) for one in (self.unmerged, *merged)]
        return image_data(shown, looks, self._speeds(shown, merged))

    @torch.inference_mode()
    def _speeds(self, shown: Shown, merged: list[Merged]) -> list[float | None]:
        for one in merged:
            one.handle.update(trace=False)  # tracing would distort the timing
        calls: list[Any] = [lambda one=one: one(shown.batch) for one in (self.model, *(m.model for m in merged))]
        times = take_turns(calls, shown.batch.device, 1, _ROUNDS)
        return [Spread.of_ratios(times[0], mine).p50 for mine in times[1:]]


def _merging(options: ExploreOptions, say: Callable[[str], Any]) -> tuple[list[str], dict[str, Any]]:
    """Return the initial schedules as text, and the other fields of `MergeConfig`: as given, otherwise as saved with the model."""
    saved = saved_with(options)
    given = options.merging(saved)
    if saved is None:
        return options.texts or list(_USUAL), given
    texts = options.texts or ([str(label_of(saved))] if saved.scheduled else list(_USUAL))
    kept = kept_of(saved, given)
    say_used(saved, {*kept, *(saved.changed("schedule") if not options.texts else ())}, say)
    return texts, {**kept, **given}


def make_app(explorer: Explorer, hosts: list[str], r: str = "8") -> Any:
    """Return the ASGI application, which answers only requests to one of `hosts`.

    Raises:
        InputError: if Starlette is not installed.
    """
    try:
        from starlette.applications import Starlette
        from starlette.concurrency import run_in_threadpool
        from starlette.middleware import Middleware
        from starlette.middleware.trustedhost import TrustedHostMiddleware
        from starlette.requests import ClientDisconnect, Request
        from starlette.responses import HTMLResponse, JSONResponse, Response
        from starlette.routing import Route
    except ImportError:
        raise InputError(
            "Starlette is not installed, but explore needs it: pip install 'tokenmerge[explore]'"
        ) from None

    def answer(found: dict[str, Any], status: int = 200) -> Response:
        return JSONResponse(found, status_code=status, headers=_HEADERS)

    async def page(request: Request) -> Response:
        text = explorer_page(
            explorer.name,
            {"images": [], "live": True, "samples": explorer.sample_names, "limit": MOST_BYTES},
            r,
            explorer.random,
            explorer.loader.medium,
        )
        return HTMLResponse(text, headers=_HEADERS)

    async def run(request: Request) -> Response:
        # other origins cannot send this header without a CORS preflight, which is refused
        if request.headers.get("x-requested-with") != "tokenmerge":
            return answer({"error": "this is called by the explorer's own page only"}, 403)
        try:
            settings = settings_of(request.query_params.getlist("r"))
            data = await _limited(request)
            if data is None:
                return answer({"error": f"the file is larger than {MOST_BYTES // 2**20} MiB: make it smaller"}, 413)
            return answer(await run_in_threadpool(_found, explorer, settings, data, request.query_params))
        except TokenMergeError as error:
            return answer({"error": str(error)}, 400)
        except ClientDisconnect:
            return answer({"error": "the page has gone"}, 400)
        except Exception as error:  # the page shows one sentence; the terminal shows the traceback
            logging.getLogger("uvicorn.error").exception("a picture could not be shown")
            return answer({"error": f"it went wrong here ({type(error).__name__}): see the terminal"}, 500)

    return Starlette(
        routes=[Route("/", page), Route("/api/run", run, methods=["POST"])],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)],
    )


async def _limited(request: Any) -> bytes | None:
    """Return the body of a request; `None` as soon as it exceeds the limit."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > MOST_BYTES:
            return None
        parts.append(part)
    return b"".join(parts)


def _found(explorer: Explorer, settings: list[Setting], data: bytes, query: Any) -> dict[str, Any]:
    with explorer.lock:
        if data:
            return explorer.run(explorer.upload(data, query.get("name", "")), settings)
        index = query.get("sample", "")
        if not re.fullmatch(r"[0-9]{1,6}", index):
            raise InputError("no file was given: choose a sample, or a file of yours")
        return explorer.run(explorer.sample(int(index)), settings)


def run(options: ExploreOptions, report: Report | None = None) -> list[Row]:
    """Serve the page until interrupted; there are no rows to return.

    Args:
        options: what to serve, and where.
        report: receiver of messages; `None` prints them.

    Raises:
        InputError: if uvicorn is missing, or the port is taken.
    """
    report = report or Report()
    host, port = options.host, options.port
    try:
        import uvicorn
    except ImportError:
        raise InputError("uvicorn is not installed, but explore needs it: pip install 'tokenmerge[explore]'") from None
    if options.texts:
        settings_of(options.texts)
    everywhere = host in ("0.0.0.0", "::")
    app_hosts = ["*"] if everywhere else ["127.0.0.1", "localhost", "[::1]", host]
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise InputError(
            f"--host {host} --port {port} cannot be used ({getattr(error, 'strerror', None) or error}): choose another --port, or 0 for a free one"
        ) from None
    with contextlib.closing(listening):
        explorer = Explorer(options)
        for remark in explorer.remarks:
            report.say(remark)
        if explorer.left_out:
            report.warn(f"{len(explorer.left_out)} files or folders were left out, the first is {explorer.left_out[0]}")
        warn_if_random(options, report.warn)
        if explorer.loader.note:
            report.warn(explorer.loader.note)
        app = make_app(explorer, app_hosts, " ".join(explorer.texts))
        shown = f"[{host}]" if ":" in host else host
        report.say(f"http://{shown}:{listening.getsockname()[1]}/ (Ctrl+C ends it)")
        if host not in ("127.0.0.1", "localhost", "::1"):
            report.warn(f"everybody who reaches {host} can run the model: there is no password")
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", limit_concurrency=32))
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[listening])
    return []
