"""`tokenmerge explore`: serve the interactive page until interrupted."""

from __future__ import annotations

import contextlib
import socket

from tokenmerge.errors import InputError
from tokenmerge.tools.explore.app import make_app
from tokenmerge.tools.explore.explorer import Explorer
from tokenmerge.tools.explore.options import ExploreOptions
from tokenmerge.tools.explore.pictures import settings_of
from tokenmerge.tools.explore.serving import make_server
from tokenmerge.tools.models import warn_if_random
from tokenmerge.tools.packages import needed
from tokenmerge.tools.report import Report, Row

__all__ = ["Explorer", "make_app", "run"]


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
    for package in ("uvicorn", "starlette"):
        needed(package, "explore needs it", "explore")
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
        with contextlib.suppress(KeyboardInterrupt):
            make_server(app).run(sockets=[listening])
    return []
