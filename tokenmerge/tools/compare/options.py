"""Options of `tokenmerge compare`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

from tokenmerge.errors import InputError
from tokenmerge.tools.common import MODEL_HELP, DataOptions, DeviceOptions, MergeOptions, RowOptions, batch_size
from tokenmerge.tools.compare.paper import EXPERIMENTS, Experiment, get_experiment
from tokenmerge.tools.options import only_one, option
from tokenmerge.tools.settings import Setting, parse_setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareOptions(DeviceOptions, DataOptions, MergeOptions, RowOptions):
    """Options of `tokenmerge compare`.

    Attributes:
        model: see `ModelOptions`; empty takes the model of `paper`.
        methods: names of methods; empty means all except slow references.
        speedups: measured speed-ups to compare at; each method uses the r that reaches them.
        paper: name of an experiment of the paper, instead of methods and settings.
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
    paper: str | None = option(None, f"experiment of the paper: {', '.join(EXPERIMENTS)}", "merging", metavar="NAME")
    limit: int | None = option(None, "use only N images, evenly spaced in the data", "data", least=1, metavar="N")
    batch_size: int = batch_size(32)
    rounds: int = option(7, "rounds of timing; 0 skips timing", "measuring", least=0, metavar="N")
    output: Path = option(Path("compare"), "folder to write the results to", "output", metavar="DIR")

    def __post_init__(self) -> None:
        super().__post_init__()
        only_one("paper", "methods", self.paper is not None and bool(self.methods))
        only_one("paper", "speedups", self.paper is not None and bool(self.speedups))
        only_one("r", "speedups", bool(self.r and self.speedups))
        if self.paper is not None:
            get_experiment(self.paper)  # raises if there is no such experiment
        if not self.model and self.paper is None:
            raise InputError("compare was given no MODEL: name one, or give --paper for the paper's own")

    @functools.cached_property
    def experiment(self) -> Experiment | None:
        """The experiment of the paper, or `None`."""
        return None if self.paper is None else get_experiment(self.paper)

    def schedules(self) -> list[Setting]:
        """Return the schedules to compare at; the unmerged model is always measured, so r=0 is not among them."""
        texts = self.r or (self.experiment.settings if self.experiment is not None else ())
        return [setting for text in texts if not (setting := parse_setting(str(text))).is_baseline]
