"""The explorer as an ASGI application: its page, and one call that runs the model."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from typing import Any

from tokenmerge.errors import InputError, TokenMergeError
from tokenmerge.tools.explore.explorer import Explorer
from tokenmerge.tools.explore.headers import Shield, policy_of
from tokenmerge.tools.explore.limits import Limits
from tokenmerge.tools.explore.pictures import MOST_BYTES, settings_of
from tokenmerge.tools.explore.queue import BusyError, Queue, Upload
from tokenmerge.tools.packages import needed
from tokenmerge.tools.settings import Setting
from tokenmerge.tools.visualize.page import explorer_page

_RETRY = {"Retry-After": "5"}
_CLOSE = {"Connection": "close"}
"""Header for requests whose body did not come, which would be read as the next request."""


class _RefusedError(Exception):
    """Error for an upload that is not read to its end, with the status of the answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def make_app(explorer: Explorer, hosts: list[str], r: str = "8", limits: Limits | None = None) -> Any:
    """Return the ASGI application, which answers only requests to one of `hosts`.

    Args:
        explorer: the model.
        hosts: names in the requests' Host header that are accepted; "*" accepts any.
        r: initial settings of the page.
        limits: the limits; `None` is the usual ones.

    Raises:
        InputError: if Starlette is not installed.
    """
    needed("starlette", "explore needs it", "explore")
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import HTMLResponse, JSONResponse, Response
    from starlette.routing import Route

    limits = limits or Limits()
    queue = Queue(limits)
    text = explorer_page(
        explorer.name,
        {"images": [], "live": True, "samples": explorer.sample_names, "limit": MOST_BYTES},
        r,
        explorer.random,
        explorer.loader.medium,
    )
    policy = {"Content-Security-Policy": policy_of(text)}

    def refusal(message: str, status: int, **headers: str) -> Response:
        return JSONResponse({"error": explorer.without_paths(message)}, status_code=status, headers=headers)

    async def page(request: Request) -> Response:
        return HTMLResponse(text, headers=policy)

    async def answer(request: Request) -> Response:
        settings = settings_of(request.query_params.getlist("r"))
        query = dict(request.query_params)
        with queue.upload() as upload:
            await _receive(request, upload, limits)
            async with queue.turn(request.client.host if request.client else ""):
                if await request.is_disconnected():
                    raise ClientDisconnect
                found = await run_in_threadpool(_found, explorer, settings, upload, query)
        return Response(found, media_type="application/json")

    async def run(request: Request) -> Response:
        # other origins cannot send this header without a CORS preflight, which is refused
        if request.headers.get("x-requested-with") != "tokenmerge":
            return refusal("this is called by the explorer's own page only", 403)
        try:
            return await answer(request)
        except TokenMergeError as error:
            return refusal(str(error), 400)
        except _RefusedError as error:
            return refusal(str(error), error.status, **(_CLOSE if error.status == 408 else {}))
        except BusyError as error:
            return refusal(str(error), 503, **_RETRY)
        except ClientDisconnect:
            return refusal("the page has gone", 400)
        except Exception as error:  # the page shows one sentence; the terminal shows the traceback
            logging.getLogger("uvicorn.error").exception("a picture could not be shown")
            return refusal(f"it went wrong here ({type(error).__name__}): see the terminal", 500)

    app = Starlette(
        routes=[Route("/", page), Route("/api/run", run, methods=["POST"])],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)],
    )
    long = f"the request has more than {limits.header // 1024} KiB of headers: send shorter ones"
    return Shield(app, limits.header, refusal(long, 431, **_CLOSE))


async def _receive(request: Any, upload: Upload, limits: Limits) -> None:
    """Read the body of a request.

    Raises:
        _RefusedError: if it is too large, stalls, or takes too long.
        BusyError: if all uploads together are too large.
    """
    too_large = _RefusedError(413, f"the file is larger than {MOST_BYTES // 2**20} MiB: make it smaller")
    if int(request.headers.get("content-length", 0)) > MOST_BYTES:
        raise too_large
    stream = request.stream()
    try:
        async with asyncio.timeout(limits.whole):
            while True:
                try:
                    async with asyncio.timeout(limits.pause):
                        part = await anext(stream, None)
                except TimeoutError:
                    raise _RefusedError(
                        408, f"the upload stalled, and nothing came for {limits.pause:g} seconds: send the file again"
                    ) from None
                if part is None:
                    return
                if upload.size + len(part) > MOST_BYTES:
                    raise too_large
                upload.add(part)
    except TimeoutError:
        raise _RefusedError(
            408, f"the upload was not whole after {limits.whole:g} seconds: send a smaller file"
        ) from None


def _found(explorer: Explorer, settings: list[Setting], upload: Upload, query: dict[str, str]) -> bytes:
    """Return the answer as JSON, which is made in this thread as well, because it may have megabytes."""
    if upload.size:
        shown = explorer.upload(upload.bytes(), query.get("name", ""))
    else:
        index = query.get("sample", "")
        if not re.fullmatch(r"[0-9]{1,6}", index):
            raise InputError("no file was given: choose a sample, or a file of yours")
        shown = explorer.sample(int(index))
    return json.dumps(explorer.run(shown, settings), allow_nan=False).encode()
