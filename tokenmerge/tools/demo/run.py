"""`tokenmerge demo`: measure accuracy and speed for several r on a model and images that ship with the package."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tokenmerge.errors import InputError
from tokenmerge.patching import patched
from tokenmerge.tools.demo.digits import load_digits, load_model
from tokenmerge.tools.demo.export import export_demo
from tokenmerge.tools.evaluate import add_in_turns, scores
from tokenmerge.tools.report import Report, Row
from tokenmerge.tools.settings import Setting
from tokenmerge.tracing import paint
from tokenmerge.tracing.sheet import contact_sheet, enlarged, to_image

_BATCH = 60
_SHOWN = (0, 5, 10, 15, 20)  # indices of the test images in the picture
_NAME = "vit_digits (shipped)"


def run_demo(
    settings: Sequence[Setting], fields: dict[str, Any], output: Path, export: Path | None, report: Report
) -> int:
    """Print and write one row per setting, save the picture, export model and images to `export` if given, return 0.

    Raises:
        InputError: if scikit-learn is missing, or a file cannot be written.
    """
    try:
        _, _, images, labels = load_digits()
    except ImportError:
        raise InputError(
            "scikit-learn is not installed, but the demo's digits come with it: pip install 'tokenmerge[demo]'"
        ) from None
    if (
        output.suffix.lower() not in Image.registered_extensions()
        or output.is_dir()
        or not output.resolve().parent.is_dir()
    ):
        raise InputError(
            f"the picture {str(output)!r} cannot be written: choose an --output such as demo.png in a folder that exists"
        )
    if not any(setting.is_baseline for setting in settings):
        settings = [Setting(0, {"r": 0}), *settings]  # the baseline of the speed-up
    model = load_model()
    running = scores(model, settings, fields)
    with report.progress() as progress, torch.inference_mode():
        rounds = 2
        task = progress.add_task("evaluating", total=rounds * len(images))
        starts = [start for _ in range(rounds) for start in range(0, len(images), _BATCH)]
        for number, start in enumerate(starts):
            add_in_turns(running, images[start : start + _BATCH], labels[start : start + _BATCH], number)
            progress.advance(task, _BATCH)
    rows = [{**score.row(_NAME, 0), "images": len(images)} for score in running]
    _print(report, rows)
    merging = [setting for setting in settings if not setting.is_baseline]
    _save(_picture(model, images[list(_SHOWN)], merging, fields), output)
    report.say(f"Picture of the merged tokens: {output}")
    if export is not None:
        model_dir, data_dir = export_demo(export)
        report.say(f"Model: {model_dir} (as local-dir:{model_dir}), images: {data_dir}")
    report.write(rows)
    return 0


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
                f"{row['images_per_second'] / first['images_per_second']:.2f}x",
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


def _save(picture: Any, output: Path) -> None:
    try:
        picture.save(output)
    except (OSError, ValueError) as error:
        raise InputError(
            f"the picture {str(output)!r} cannot be written ({error}): choose another --output, such as demo.png"
        ) from None
