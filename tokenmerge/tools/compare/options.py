"""Options of `tokenmerge compare`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from tokenmerge.errors import InputError
from tokenmerge.tools.common import MODEL_HELP, DataOptions, DeviceOptions, MergeOptions, RowOptions, batch_size
from tokenmerge.tools.compare.paper.experiments import EXPERIMENTS, Experiment, get_experiment
from tokenmerge.tools.options import only_one, option
from tokenmerge.tools.settings import Setting, parse_setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareOptions(DeviceOptions, DataOptions, MergeOptions, RowOptions):
    """Options of `tokenmerge compare`.

    Attributes:
        model: see `ModelOptions`; with `paper` empty for all models of the experiment, the own name of one, or another model.
        methods: names of methods; empty means all except slow references.
        speedups: measured speed-ups to compare at; each method uses the r that reaches them.
        paper: name of an experiment of the paper, instead of methods and settings; without data, published figures are shown.
        weights: folder of the paper's weights that no library downloads.
        train: folder of training images, one subfolder per class; `paper="pruning"` then trains each method from the model's
            weights, and measures it.
        train_set: options of `tokenmerge train` for that, in place of those of the recipe `laptop`.
        random: number of random schedules that `paper="schedules"` compares with a constant r.
        output: folder to write the results to.
        batch_size: images per pass, also for timing.
        limit: number of images to use, evenly spaced in the data; `None` uses all.
        rounds: rounds of timing, in which all variants take turns; 0 skips timing.

    Raises:
        InputError: if options contradict each other.
    """

    model: str = option("", MODEL_HELP, "model", metavar="[MODEL]", positional=True)
    methods: Sequence[str] = option(
        (),
        "methods and matchers to compare (default: all but slow references); tome always runs first",
        "merging",
        metavar="NAME",
    )
    speedups: Sequence[float] = option(
        (), "measured speed-ups to compare at, instead of --r", "merging", least=1, most=100, metavar="X"
    )
    paper: str | None = option(
        None,
        f"experiment of the paper, or without data its figures: {', '.join(EXPERIMENTS)}",
        "merging",
        metavar="NAME",
    )
    random: int = option(
        0,
        "random schedules that --paper schedules compares with a constant r",
        "merging",
        least=0,
        most=1_000_000,
        metavar="N",
        rare=True,
    )
    weights: Path = option(
        Path("weights"),
        "folder of the weights for --paper that no library downloads",
        "model",
        metavar="DIR",
        rare=True,
    )
    train: Path | None = option(
        None,
        "folder of training images for --paper pruning, which then trains its methods on MODEL",
        "data",
        metavar="DIR",
        rare=True,
    )
    train_set: Mapping[str, Any] = option(
        {}, "options of tokenmerge train for --train (default: recipe laptop)", "data", pairs=True, rare=True
    )
    limit: int | None = option(None, "use only N images, evenly spaced in the data", "data", least=1, metavar="N")
    batch_size: int = batch_size(32)
    rounds: int = option(7, "rounds of timing; 0 skips timing", "measuring", least=0, metavar="N")
    output: Path = option(Path("compare"), "folder to write the results to", "output", metavar="DIR")

    EXPLAINED: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "Experiments of the paper (--paper NAME)": {name: one.about for name, one in EXPERIMENTS.items()}
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        only_one("paper", "methods", self.paper is not None and bool(self.methods))
        only_one("paper", "speedups", self.paper is not None and bool(self.speedups))
        only_one("r", "speedups", bool(self.r and self.speedups))
        if self.paper is not None:
            get_experiment(self.paper)  # raises if there is no such experiment
        if self.random and self.paper != "schedules":
            raise InputError("--random was given without --paper schedules, which draws random schedules: give both")
        if self.train is not None and not (self.experiment is not None and self.experiment.trains):
            raise InputError("--train was given without --paper pruning, which trains its methods on it: give both")
        if self.train_set and self.train is None:
            raise InputError("--train-set was given without --train, the folder of training images: give both")
        if not self.model and self.paper is None:
            raise InputError("compare was given no MODEL: name one, or give --paper for the paper's own")

    @functools.cached_property
    def experiment(self) -> Experiment | None:
        """The experiment of the paper, or `None`."""
        return None if self.paper is None else get_experiment(self.paper)

    def needs_data(self) -> bool:
        """Return whether data must be given; without them, an experiment shows published figures."""
        return self.paper is None

    def schedules(self) -> list[Setting]:
        """Return the schedules to compare at; the unmerged model is always measured, so r=0 is not among them."""
        return [setting for text in self.r if not (setting := parse_setting(str(text))).is_baseline]
