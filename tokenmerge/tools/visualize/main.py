"""`tokenmerge visualize`: draw merged tokens as a picture, a film or a page."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from tokenmerge import files
from tokenmerge.errors import ConfigError, InputError
from tokenmerge.tools.media import SOUNDS, VIDEOS
from tokenmerge.tools.models import RANDOM_WEIGHTS, load_model, warn_if_random
from tokenmerge.tools.pages import finite
from tokenmerge.tools.report import Report, Row
from tokenmerge.tools.saved import merging_of
from tokenmerge.tools.settings import Setting
from tokenmerge.tools.visualize.film import write_film
from tokenmerge.tools.visualize.load import FRAMES_PER_SECOND, Loader, Shown
from tokenmerge.tools.visualize.looks import Look, merged_copies
from tokenmerge.tools.visualize.options import VisualizeOptions
from tokenmerge.tools.visualize.page import write_page
from tokenmerge.tools.visualize.panels import painted, scale_of
from tokenmerge.tools.writing import drawing, picture_suffixes
from tokenmerge.tracing import View
from tokenmerge.tracing.figure import as_png, plot_moments, plot_spectrograms, strip
from tokenmerge.tracing.sheet import below, contact_sheet, to_image

_FRAMES = 8
"""Number of frames of a video in a picture."""
_FILMS = (".mp4", ".gif")
_SCALES = {
    "sizes": "dark: one patch, bright: the largest token (logarithmic)",
    "frames": "dark: a token of one moment, bright: one that lies in all frames",
}


def run(options: VisualizeOptions, report: Report | None = None) -> list[Row]:
    """Draw the inputs, print and write one row per input and setting, and return the rows.

    Args:
        options: what to draw.
        report: receiver of the results; `None` prints them.

    Raises:
        InputError: if a file cannot be read or written.
        ConfigError: if there is no such layer.
    """
    report = report or Report(options.json, writes=True)
    settings, fields = merging_of(options, report.say, usual=["8"])
    suffix = _checked_suffix(options.out)
    model = load_model(options)
    random = warn_if_random(options, report.warn)
    loader = Loader(model, options.sampling_rate)
    if loader.note:
        report.warn(loader.note)
    if suffix in _FILMS and loader.medium is not VIDEOS:
        raise InputError(f"{suffix} is a film, but the model takes {loader.medium.name}: choose an --out such as .png")
    if options.view == "frames" and loader.medium is not VIDEOS:
        raise InputError(f"--view frames is for videos, but the model takes {loader.medium.name}: choose another view")
    blocks = blocks_of(options.layer, model)
    shown = [loader(path) for path in options.inputs]
    merged = merged_copies(model, settings, fields, attention=suffix == ".html")
    if suffix == ".html":
        if options.layer != "all" or options.view != "picture":
            report.warn("a page shows every layer and view: --layer and --view say nothing to it")
        unmerged = merged_copies(model, [Setting(0, {"r": 0})], {})[0]
        looks = [[one.look(each) for one in (unmerged, *merged)] for each in shown]
        write_page(options.out, options.model, shown, looks, random)
        looks = [of_input[1:] for of_input in looks]
    else:
        looks = [[one.look(each) for one in merged] for each in shown]
        draw(options, suffix, shown, looks, blocks, RANDOM_WEIGHTS if random else "")
    rows = [row_of(options.model, each, look) for each, of_input in zip(shown, looks, strict=True) for look in of_input]
    _say(report, rows, options.out)
    report.write(rows)
    return rows


def _checked_suffix(out: Path) -> str:
    suffix = out.suffix.lower()
    if suffix not in picture_suffixes() and suffix not in (*_FILMS, ".html"):
        raise InputError(
            f"--out {str(out)!r} is no picture, film or page: choose a name such as merged.png or merged.html"
        )
    files.check_writable(out, "--out", "merged.png")
    return suffix


def blocks_of(layer: str, model: Any) -> list[int]:
    """Return the indices of the blocks to show, where −1 is the input."""
    from tokenmerge.patching.target import find_target

    count = len(find_target(model).blocks)
    if layer == "all":
        return [-1, *strip(count)]
    if layer == "last":
        return [count - 1]
    if not layer.isdecimal() or int(layer) > count:
        raise ConfigError(f"--layer {layer!r}, but all, last, or a number of blocks from 0 to {count} was expected")
    return [int(layer) - 1]


def draw(
    options: VisualizeOptions,
    suffix: str,
    shown: Sequence[Shown],
    looks: Sequence[Sequence[Look]],
    blocks: Sequence[int],
    foot: str,
) -> None:
    """Draw the inputs into the picture or film `options.out`, with `foot` below pictures."""
    with drawing(options.out, "--out") as beside:
        if shown[0].medium is SOUNDS:
            _draw_sounds(beside, options, shown, looks, blocks, foot)
        elif suffix in _FILMS:
            write_film(beside, shown, looks, blocks[-1], options.view, foot)
        else:
            sheet(shown, looks, blocks, options.view, foot).save(beside)


def sheet(
    shown: Sequence[Shown], looks: Sequence[Sequence[Look]], blocks: Sequence[int], view: View, foot: str = ""
) -> Image.Image:
    """Draw one row per input and setting (and per selected frame of a video), one column per block, and `foot` below."""
    rows, names = [], []
    for each, of_input in zip(shown, looks, strict=True):
        for look in of_input:
            columns = [painted(each, look, block, view, scale_of(each)) for block in blocks]
            frames = [columns]
            if each.medium is VIDEOS:
                total = columns[0].shape[1]
                chosen = [i * total // min(total, _FRAMES) for i in range(min(total, _FRAMES))]
                frames = [[column[:, frame] for column in columns] for frame in chosen]
            for number, of_frame in enumerate(frames):
                rows.append([to_image(one) for one in of_frame])
                names.append(_caption(each, look) if number == 0 else "")
    titles = ["input" if block < 0 else f"after block {block + 1}" for block in blocks]
    drawn = contact_sheet(rows, titles, names, "; ".join(part for part in (foot, _SCALES.get(view, "")) if part))
    if view != "frames":
        return drawn
    series = [
        (f"{each.name}, {look.title}" if len(shown) > 1 else look.title, look.trace.over_time())
        for each, of_input in zip(shown, looks, strict=True)
        for look in of_input
    ]
    return below(drawn, Image.open(io.BytesIO(as_png(plot_moments(series)))))


def _caption(shown: Shown, look: Look) -> str:
    left = look.trace.size().shape[1] - look.trace.protected
    text = f"{shown.name}, {look.title}: {look.trace.tokens - look.trace.protected} patches, {left} tokens at the end"
    return text + (f", {look.top[0][0]} {100 * look.top[0][1]:.0f} %" if look.top else "")


def _draw_sounds(
    path: Path,
    options: VisualizeOptions,
    shown: Sequence[Shown],
    looks: Sequence[Sequence[Look]],
    blocks: Sequence[int],
    foot: str,
) -> None:
    parts: list[tuple[str, Tensor]] = []
    for each, of_input in zip(shown, looks, strict=True):
        for look in of_input:
            for block in blocks:
                after = "input" if block < 0 else f"after block {block + 1}"
                parts.append((f"{_caption(each, look)} – {after}", painted(each, look, block, options.view)))
    figure = plot_spectrograms(parts, FRAMES_PER_SECOND, shown[0].bands)
    if foot:
        figure.supxlabel(foot, fontsize=8)
    figure.savefig(path, dpi=120)


def row_of(model: str, shown: Shown, look: Look) -> Row:
    """Return the result row of one input at one setting."""
    trace = look.trace
    return {
        "model": model,
        "file": shown.name,
        "setting": look.title,
        "patches": trace.tokens - trace.protected,
        "tokens": trace.size().shape[1] - trace.protected,
        "gflops": look.gflops,
        "top": [{"class": name, "probability": share} for name, share in look.top],
        **(
            {}
            if shown.medium is not VIDEOS
            else {"over_time": [finite(dataclasses.asdict(one)) for one in trace.over_time()]}
        ),
    }


def _best(row: Row) -> str:
    return f"{row['top'][0]['class']} {100 * row['top'][0]['probability']:.0f} %" if row["top"] else "–"


def _say(report: Report, rows: Sequence[Row], out: Path) -> None:
    report.table(
        "merged tokens",
        ("file", "setting", "patches", "left", "GFLOPs", "likeliest"),
        (
            (r["file"], r["setting"], str(r["patches"]), str(r["tokens"]), f"{r['gflops']:.3g}", _best(r)[:24])
            for r in rows
        ),
    )
    for row in rows:
        if "over_time" in row:
            _say_over_time(report, row)
    report.say(f"wrote {out}")


def _say_over_time(report: Report, row: Row) -> None:
    report.table(
        f"{row['file']}, {row['setting']}: merges over time",
        ("block", "merges", "within a moment", "across", "moments per token"),
        (
            (
                str(one["block"] + 1),
                f"{one['merged']:g}",
                *("–" if one[name] is None else f"{100 * one[name]:.0f} %" for name in ("within", "across")),
                "–" if one["spanned"] is None else f"{one['spanned']:.2f}",
            )
            for one in row["over_time"]
        ),
    )
