"""The models of a run: the experiment's own, one of them, or another model in their place."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from tokenmerge.errors import InputError
from tokenmerge.tools.compare.paper.experiments import Entry, Experiment

_OTHERS = ("checkpoint", "num_classes", "img_size", "model_kwargs")
"""Options that make another model of one with weights of its own."""


@dataclasses.dataclass(frozen=True)
class Chosen:
    """One model of a run.

    Attributes:
        entry: its lines, with the model that they are meant for.
        own: whether it is the experiment's own model with its weights.
        options: options of the command for this model.
    """

    entry: Entry
    own: bool
    options: Any


def chosen(experiment: Experiment, options: Any) -> list[Chosen]:
    """Return the models of a run: all of the experiment, the one that MODEL names, or MODEL in place of them.

    Raises:
        InputError: if options were given that contradict the weights of the experiment's own models.
    """
    entries = experiment.entries
    odd = next((name for name in _OTHERS if getattr(options, name)), None)
    named = [entry for entry in entries if entry.model.name == options.model]
    if odd is None:
        named = named or [e for e in entries if e.model.model == options.model and not e.model.file]
    elif not options.model or named:
        which = f"the model {options.model} of" if named else "the models of"
        raise InputError(
            f"--{odd.replace('_', '-')} was given, but {which} --paper {experiment.name} has weights of its own: leave it out, or "
            "give MODEL as a name of its library"
        )
    if options.model and not named:
        return [Chosen(experiment.usual, False, options)]
    return [Chosen(entry, True, entry.model.options(options)) for entry in (named or entries)]


def has_data(options: Any) -> bool:
    """Return whether data to measure on were given."""
    return options.data is not None or options.dataset is not None


def check_folder(options: Any) -> None:
    """Raise `InputError` if the folder of the data does not exist, before any model is loaded for it."""
    if options.dataset is None and not os.path.isdir(options.data):
        raise InputError(
            f"the data folder {str(options.data)!r} does not exist, but one folder per class was expected there: check --data"
        )
