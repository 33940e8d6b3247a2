"""Pictures of the tokens that merge, as in the paper, for files in the folder of the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tokenmerge.errors import InputError
from tokenmerge.files import make_folder
from tokenmerge.patching import model_cost
from tokenmerge.patching.target import find_target
from tokenmerge.tools.compare.pages import write_sheets
from tokenmerge.tools.compare.paper.adapt import settings_of
from tokenmerge.tools.compare.paper.choice import Chosen
from tokenmerge.tools.compare.paper.experiments import Experiment
from tokenmerge.tools.folders import suffixes_of
from tokenmerge.tools.models import RANDOM_WEIGHTS, load_model, warn_if_random
from tokenmerge.tools.pages import title_of
from tokenmerge.tools.reading.walk import Walk, natural_key
from tokenmerge.tools.report import Report, Row
from tokenmerge.tools.saved import apart_from_matching, saved_with
from tokenmerge.tools.settings import Setting
from tokenmerge.tools.visualize import VisualizeOptions
from tokenmerge.tools.visualize.load import Loader
from tokenmerge.tools.visualize.looks import merged_copies
from tokenmerge.tools.visualize.main import blocks_of, draw, row_of
from tokenmerge.tools.visualize.page import write_page

_USUAL = 8
"""Files that are drawn without --limit."""


def draw_pictures(experiment: Experiment, one: Chosen, options: Any, report: Report) -> list[Row]:
    """Draw files of `options.data`, evenly spaced, into a picture and a page, and return one row per file and setting.

    Raises:
        InputError: if weights are missing, or there are no files that the model takes.
    """
    missing = one.entry.model.missing(options.weights) if one.own else ""
    if missing or options.dataset is not None:
        reason = missing or "--dataset was given, but pictures are drawn from files: give --data DIR"
        raise InputError(f"nothing of --paper {experiment.name} could be drawn: {reason}")
    make_folder(options.output, "--output")
    mine, title = one.options, one.entry.model.title if one.own else title_of(options.model)
    model = load_model(mine)
    random = warn_if_random(mine, report.warn)
    loader = Loader(model)
    if loader.note:
        report.warn(loader.note)
    fields = {
        **(one.entry.model.fields if one.own else {}),
        **apart_from_matching(saved_with(mine), options.merging(), report.say),
    }
    cost, layers = model_cost(model), len(find_target(model).blocks)
    lines, adapted = settings_of(one.entry, options.schedules(), cost, layers)
    settings = [setting for _, setting, _ in lines]
    shown = [loader(path) for path in _files(options, loader.medium)]
    merged = merged_copies(model, settings, fields, attention=True)
    plain = merged_copies(model, [Setting(0, {"r": 0})], {})[0]
    looks = [[copy.look(each) for copy in (plain, *merged)] for each in shown]
    page, picture = options.output / "pictures.html", options.output / "pictures.png"
    write_page(page, mine.model, shown, looks, random)
    looks = [of_input[1:] for of_input in looks]
    wanted = VisualizeOptions(model=mine.model, inputs=(), out=picture)
    draw(wanted, ".png", shown, looks, blocks_of("all", model), RANDOM_WEIGHTS if random else "")
    rows: list[Row] = [
        {"paper_model": one.entry.model.title if one.own else "", **row_of(mine.model, each, look), "measured": True}
        for each, of_input in zip(shown, looks, strict=True)
        for look in of_input
    ]
    report.table(
        f"{experiment.name}: {title}",
        ("file", "r", "patches", "left", "GFLOPs"),
        (
            (r["file"], r["setting"].removeprefix("r="), str(r["patches"]), str(r["tokens"]), f"{r['gflops']:.4g}")
            for r in rows
        ),
    )
    for line in (adapted, f"the paper: {experiment.finding}"):
        if line:
            report.say(line)
    write_sheets(options.output, rows)
    report.say(f"wrote {picture} and {page}, and the rows as csv and json beside them")
    report.write(rows)
    return rows


def _files(options: Any, medium: Any) -> list[Path]:
    """Return files of the folder that a model takes, evenly spaced."""
    found = sorted(Walk(options.data, suffixes_of(medium)), key=natural_key)
    if not found:
        raise InputError(
            f"{options.place} holds no {medium.name}, but the model takes them: give a folder with some to --data"
        )
    count = min(options.limit or _USUAL, len(found))
    return [found[place] for place in torch.linspace(0, len(found) - 1, count).round().long().tolist()]
