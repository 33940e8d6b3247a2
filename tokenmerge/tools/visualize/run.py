"""`tokenmerge visualize`: draw merged tokens as a picture, a film or a page."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from tokenmerge.errors import ConfigError, InputError
from tokenmerge.tools.media import IMAGES, SOUNDS, VIDEOS
from tokenmerge.tools.models import ModelArgs, load_model
from tokenmerge.tools.report import Report, Row
from tokenmerge.tools.settings import Setting
from tokenmerge.tools.trained import as_trained
from tokenmerge.tools.visualize.film import write_film
from tokenmerge.tools.visualize.load import Loader, Shown, mel_bands
from tokenmerge.tools.visualize.looks import Look, merged_copies
from tokenmerge.tools.visualize.page import write_page
from tokenmerge.tools.visualize.panels import painted, scale_of
from tokenmerge.tracing import View
from tokenmerge.tracing.figure import plot_spectrograms, strip
from tokenmerge.tracing.sheet import contact_sheet, to_image

_FRAMES = 8
"""Number of frames of a video in a picture."""
_FILMS = (".mp4", ".gif")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisualizeArgs:
    """Inputs and output of a visualization.

    Attributes:
        inputs: files to show.
        out: file to write; its suffix selects a picture, a film or a page.
        layer: "all", "last", or a number of blocks.
        view: one of `tokenmerge.tracing.VIEWS`.
        sampling_rate: stride between the sampled frames of a video.
    """

    inputs: Sequence[Path]
    out: Path = Path("tokenmerge.png")
    layer: str = "all"
    view: View = "picture"
    sampling_rate: int = 4


def run_visualize(
    args: ModelArgs, wanted: VisualizeArgs, settings: Sequence[Setting], fields: dict[str, Any], report: Report
) -> int:
    """Draw the inputs, print and write one row per input and setting, and return 0.

    Raises:
        InputError: if a file cannot be read or written.
        ConfigError: if there is no such layer.
    """
    suffix = _checked_suffix(wanted.out)
    model = load_model(args)
    loader = Loader(model, wanted.sampling_rate)
    if suffix in _FILMS and loader.medium is not VIDEOS:
        raise InputError(f"{suffix} is a film, but the model takes {loader.medium.name}: choose an --out such as .png")
    if suffix == ".html" and loader.medium is not IMAGES:
        raise InputError(f"pages show images, but the model takes {loader.medium.name}: choose an --out such as .png")
    blocks = _blocks(wanted.layer, model)
    shown = [loader(path) for path in wanted.inputs]
    merged = merged_copies(model, settings, as_trained(args, fields), attention=suffix == ".html")
    if suffix == ".html":
        if wanted.layer != "all" or wanted.view != "picture":
            report.warn("a page shows every layer and view: --layer and --view say nothing to it")
        unmerged = merged_copies(model, [Setting(0, {"r": 0})], {})[0]
        looks = [[one.look(each) for one in (unmerged, *merged)] for each in shown]
        write_page(wanted.out, args.model, shown, looks)
        looks = [of_input[1:] for of_input in looks]
    else:
        looks = [[one.look(each) for one in merged] for each in shown]
        _draw(wanted, suffix, shown, looks, blocks)
    rows = [_row(args.model, each, look) for each, of_input in zip(shown, looks, strict=True) for look in of_input]
    _say(report, rows, wanted.out)
    report.write(rows)
    return 0


def _checked_suffix(out: Path) -> str:
    suffix = out.suffix.lower()
    Image.init()
    writes = {name for name, kind in Image.registered_extensions().items() if kind in Image.SAVE}
    if (suffix not in writes and suffix not in (*_FILMS, ".html")) or out.is_dir():
        raise InputError(
            f"--out {str(out)!r} is no picture, film or page: choose a name such as merged.png or merged.html"
        )
    if not out.resolve().parent.is_dir():
        raise InputError(f"the folder of --out {str(out)!r} does not exist: make it first")
    return suffix


def _blocks(layer: str, model: Any) -> list[int]:
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


def _draw(
    wanted: VisualizeArgs, suffix: str, shown: Sequence[Shown], looks: Sequence[Sequence[Look]], blocks: Sequence[int]
) -> None:
    try:
        if shown[0].medium is SOUNDS:
            _draw_sounds(wanted, shown, looks, blocks)
        elif suffix in _FILMS:
            write_film(wanted.out, shown, looks, blocks[-1], wanted.view)
        else:
            sheet(shown, looks, blocks, wanted.view).save(wanted.out)
    except (OSError, ValueError) as error:
        raise InputError(f"--out {str(wanted.out)!r} cannot be written ({error}): choose another file") from None


def sheet(shown: Sequence[Shown], looks: Sequence[Sequence[Look]], blocks: Sequence[int], view: View) -> Image.Image:
    """Draw one row per input and setting (and per selected frame of a video), and one column per block of `blocks`."""
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
    foot = "dark: one patch, bright: the largest token (logarithmic)" if view == "sizes" else ""
    return contact_sheet(rows, titles, names, foot)


def _caption(shown: Shown, look: Look) -> str:
    left = look.trace.size().shape[1] - look.trace.protected
    text = f"{shown.name}, {look.title}: {look.trace.tokens - look.trace.protected} patches, {left} tokens at the end"
    return text + (f", {look.top[0][0]} {100 * look.top[0][1]:.0f} %" if look.top else "")


def _draw_sounds(
    wanted: VisualizeArgs, shown: Sequence[Shown], looks: Sequence[Sequence[Look]], blocks: Sequence[int]
) -> None:
    parts: list[tuple[str, Tensor]] = []
    for each, of_input in zip(shown, looks, strict=True):
        for look in of_input:
            for block in blocks:
                after = "input" if block < 0 else f"after block {block + 1}"
                parts.append((f"{_caption(each, look)} – {after}", painted(each, look, block, wanted.view)))
    frames, bands = shown[0].pixels.shape[2], shown[0].pixels.shape[1]
    plot_spectrograms(parts, frames / 100, mel_bands(bands)).savefig(wanted.out, dpi=120)


def _row(model: str, shown: Shown, look: Look) -> Row:
    trace = look.trace
    return {
        "model": model,
        "file": shown.name,
        "setting": look.title,
        "patches": trace.tokens - trace.protected,
        "tokens": trace.size().shape[1] - trace.protected,
        "gflops": look.gflops,
        "top": [{"class": name, "probability": share} for name, share in look.top],
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
    report.say(f"wrote {out}")
