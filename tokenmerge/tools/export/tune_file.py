"""Choice of the schedule of an exported file, by measuring files in the runtime that will run them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from tokenmerge.ops.timing import take_turns
from tokenmerge.patching import Handle
from tokenmerge.patching.target import find_target, patch_of
from tokenmerge.patching.tuning.measure import ASKED, NONE, confirmed, in_words
from tokenmerge.patching.tuning.schedules import alternatives, check_movable

_ROUNDS = 11


def tune_file(
    model: Any,
    handle: Handle,
    images: Tensor,
    suffix: str,
    write: Callable[[Path], Any],
    load: Callable[[Path], Callable[[Tensor], Any]],
) -> str:
    """Set the schedule whose file is the fastest, or r=0 if no file is at least 2 % faster than one without merging.

    No block gets fewer tokens than was asked for.

    Args:
        model: the patched model.
        handle: its handle; the chosen schedule is in force afterwards.
        images: the batch that the files are run on.
        suffix: ending of a file's name.
        write: function that writes the model as it is now to a file.
        load: function that loads a file and returns a function that runs it.

    Returns:
        What was chosen, as a sentence.
    """
    summary, record = handle.summary(), patch_of(find_target(model).model)
    assert record is not None
    check_movable(record.settings)
    asked, config = summary.r, handle.config
    cost = record.settings.cost.at(summary.tokens[0])
    schedules = {NONE: (0,) * len(asked), ASKED: asked, **alternatives(asked, cost, early=False)}
    with tempfile.TemporaryDirectory(prefix="tokenmerge-") as folder:
        runs = {}
        for number, (name, schedule) in enumerate(schedules.items()):
            path = Path(folder) / f"{number}{suffix}"
            handle.update(r=list(schedule))
            write(path)
            runs[name] = load(path)

        def measure(names: Sequence[str]) -> list[list[float]]:
            calls = [lambda run=runs[name]: run(images) for name in names]
            return take_turns(calls, images.device, 2, _ROUNDS)

        times = dict(zip(runs, measure(list(runs)), strict=True))
        name, gain = confirmed(times, measure)
        runs.clear()
    handle.update(config) if name == ASKED else handle.update(r=list(schedules[name]))
    shape = "x".join(map(str, images.shape))
    return f"tuned for {shape} on this machine: {in_words(name, gain, schedules[name], asked, cost)}"
