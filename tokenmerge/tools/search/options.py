"""Options of `tokenmerge search`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from tokenmerge.tools.common import DataOptions, DeviceOptions, PageOptions, batch_size
from tokenmerge.tools.options import option


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchOptions(DeviceOptions, DataOptions, PageOptions):
    """Options of `tokenmerge search`; labels of the data are used only for the final check.

    Attributes:
        speedup: target speed-up, measured on this device.
        trials: total number of settings to try, including trials of earlier runs in the same storage.
        random: number of random schedules, with the FLOPs of the constant one, to try as the paper's baseline.
        storage: URL of Optuna's storage, such as sqlite:///search.db; `None` keeps the study in memory.
        study: name of the study in the storage.
        seed: random seed of the sampler and of random schedules.
        calibration: number of images that trials are scored on.
        holdout: number of held-out images that the result is checked on.
        batch_size: images per pass.
        rounds: rounds of timing for each trial.
        output: file to write the best config to.
    """

    speedup: float = option(2.0, "target speed-up, measured on this device", "merging", above=1, most=100, metavar="X")
    trials: int = option(60, "number of settings to try", "merging", least=1, metavar="N")
    random: int = option(
        0, "number of random schedules to try as well, as the paper's baseline", "merging", least=0, rare=True
    )
    storage: str | None = option(
        None, "database of the trials, to resume or share a search: sqlite:///search.db", "merging", metavar="URL"
    )
    study: str = option("tokenmerge", "name of the study in the storage", "merging", rare=True)
    seed: int = option(0, "random seed", "merging", least=0, most=2**32 - 1, metavar="N", rare=True)
    calibration: int = option(256, "images that trials are scored on", "data", least=1, metavar="N")
    holdout: int = option(512, "held-out images that the result is checked on", "data", least=1, metavar="N")
    batch_size: int = batch_size(32)
    rounds: int = option(3, "rounds of timing for each trial", "measuring", least=1, metavar="N")
    output: Path = option(Path("tokenmerge.json"), "file to write the best config to", "output", metavar="FILE")
