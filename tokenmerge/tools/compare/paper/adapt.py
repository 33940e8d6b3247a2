"""Schedules of an experiment for a model with another number of blocks or tokens than the paper's."""

from __future__ import annotations

from collections.abc import Sequence

from tokenmerge.errors import ConfigError
from tokenmerge.flops import ModelCost
from tokenmerge.tools.compare.paper.experiments import Entry, Line
from tokenmerge.tools.settings import Setting, parse_setting


def settings_of(
    entry: Entry, given: Sequence[Setting], cost: ModelCost, layers: int
) -> tuple[list[tuple[Line, Setting, str]], str]:
    """Return each line with its schedule and its group, and a sentence if r was changed to fit the model.

    Lines of one group are compared with the first of them. `given`, from `--r`, replaces the paper's r and is used as it is.

    Args:
        entry: lines and the model that their r is meant for.
        given: schedules of the options.
        cost: FLOPs of the model that runs.
        layers: number of its blocks.

    Raises:
        ConfigError: if r changes over the blocks in a line, and a given schedule is no number.
    """
    lines = [line for line in entry.lines if line.runs]
    if given:
        return [(line, _shaped(line, setting), setting.title) for setting in given for line in lines], ""
    share = entry.model.blocks * cost.tokens / (layers * entry.model.tokens)
    found, changed = [], {}
    for line in lines:
        if line.r is None:
            setting = parse_setting(f"speedup={line.speedup:g}")
            found.append((line, setting, setting.title))
            continue
        r = max(1, round(line.r * share))
        if r != line.r:
            changed[line.r] = r
        found.append((line, _shaped(line, parse_setting(str(r))), f"r={r}"))
    said = " and ".join(f"r={old} is r={new}" for old, new in changed.items())
    about = (
        f"the paper's {said} in these {layers} blocks of {cost.tokens} tokens, the same share of the tokens as in its "
        f"{entry.model.blocks} blocks of {entry.model.tokens}"
    )
    return found, about if changed else ""


def _shaped(line: Line, setting: Setting) -> Setting:
    """Return the schedule of a line, which may change over the blocks, from its mean r."""
    if line.inflect is None:
        return setting
    r = setting.fields.get("r")
    if not isinstance(r, int):
        raise ConfigError(
            f"--r {setting.label} was given, but {line.label!r} changes r over the blocks: give a whole number"
        )
    return parse_setting(f"{r}:{line.inflect:g}")
