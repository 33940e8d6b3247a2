"""`tokenmerge demo`: measure accuracy and speed for several r on a model and images that ship with the package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokenmerge import files
from tokenmerge.errors import InputError
from tokenmerge.ops.timing import Spread
from tokenmerge.patching import patched
from tokenmerge.tools.demo.digits import as_stored, load_digits, load_model
from tokenmerge.tools.demo.export import export_demo
from tokenmerge.tools.demo.options import DemoOptions
from tokenmerge.tools.eval.scores import Score, add_in_turns, scores
from tokenmerge.tools.report import Report, Row
from tokenmerge.tools.settings import Setting
from tokenmerge.tools.writing import picture_suffixes, save_picture
from tokenmerge.tracing import paint
from tokenmerge.tracing.sheet import contact_sheet, enlarged, to_image

_BATCH = 60
_SHOWN = (0, 5, 10, 15, 20)  # indices of the test images in the picture
_NAME = "vit_digits (shipped)"


def run(options: DemoOptions, report: Report | None = None) -> list[Row]:
    """Print and write one row per setting, save the picture, export model and images if asked, and return the rows.

    Args:
        options: what to show.
        report: receiver of the results; `None` prints them.

    Raises:
        InputError: if scikit-learn is missing, or a file cannot be written.
    """
    report = report or Report(options.json, options.html, writes=True)
    settings, fields, output, export = options.schedules(), options.merging(), options.output, options.export
    try:
        _, _, images, labels = load_digits()
        images = as_stored(images)  # as eval sees the exported files
    except ImportError:
        raise InputError(
            "scikit-learn is not installed, but the demo's digits come with it: pip install 'tokenmerge[demo]'"
        ) from None
    if output.suffix.lower() not in picture_suffixes():
        raise InputError(
            f"the picture {str(output)!r} cannot be written, because pictures of that kind are not known: choose an --output such as "
            "demo.png"
        )
    files.check_writable(output, "--output", "demo.png")
    if not any(setting.is_baseline for setting in settings):
        settings = [Setting(0, {"r": 0}), *settings]  # the baseline of the speed-up
    model = load_model()
    running = scores(model, settings, fields, Score)
    with report.progress() as progress, torch.inference_mode():
        rounds = 2
        task = progress.add_task("evaluating", total=rounds * len(images))
        starts = [start for _ in range(rounds) for start in range(0, len(images), _BATCH)]
        for number, start in enumerate(starts):
            add_in_turns(running, images[start : start + _BATCH], labels[start : start + _BATCH], number)
            progress.advance(task, _BATCH)
    base = next(score for score in running if score.setting.is_baseline)
    rows = [
        {
            **score.row(_NAME, 0, rounds),
            "images": len(images),
            "speedup": Spread.of_ratios(base.times, score.times).p50,
        }
        for score in running
    ]
    _print(report, rows)
    merging = [setting for setting in settings if not setting.is_baseline]
    save_picture(_picture(model, images[list(_SHOWN)], merging, fields), output, "the picture")
    report.say(f"Picture of the merged tokens: {output}")
    if export is not None:
        model_dir, data_dir = export_demo(export)
        report.say(f"Model: {model_dir} (as local-dir:{model_dir}), images: {data_dir}")
    report.write(rows)
    return rows


def _print(report: Report, rows: Sequence[Row]) -> None:
    first = rows[0]
    report.table(
        f"a ViT with 197 tokens, {first['images']} held-out handwritten digits",
        ("r", "accuracy", "img/s", "speed-up", "MFLOPs"),
        (
            (
                str(row["r"]),
                f"{row['top1']:.2f} %",
                f"{row['images_per_second']:.0f}",
                f"{row['speedup']:.2f}x",
                f"{1e3 * row['gflops']:.1f}",
            )
            for row in rows
        ),
    )
    report.say(
        "r = tokens merged away in each of the 6 blocks; the weights are the same in every row. "
        "The model is tiny: expect more of larger ones"
    )


def _picture(model: Any, images: Tensor, settings: Sequence[Setting], fields: dict[str, Any]) -> Any:
    shown = (images + 1) / 2
    columns = [[to_image(image, 2) for image in shown]]
    titles = ["196 patches"]
    for setting in settings:
        with patched(model, setting.config(trace=True, **fields)) as handle, torch.inference_mode():
            model(images)
            trace = handle.trace
        regions = [enlarged(trace.regions(shown.shape[2:], image=number), 2) for number in range(len(shown))]
        columns.append([to_image(paint(enlarged(one, 2), to)) for one, to in zip(shown, regions, strict=True)])
        titles.append(f"{setting.title}: {trace.size().shape[1] - trace.protected}")
    return contact_sheet([list(row) for row in zip(*columns, strict=True)], titles)
