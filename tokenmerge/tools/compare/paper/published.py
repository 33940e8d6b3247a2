"""Published figures, each with its source. They belong to one model with its weights on ImageNet-1k, see `identity`."""

from __future__ import annotations

import dataclasses

DEVICE = "V100"
"""Device of every published number of images per second."""
PAPER = "Bolya et al. 2023"
UNCHECKED = "no figure checked"
"""Source of a line whose figures are not known."""


@dataclasses.dataclass(frozen=True)
class Published:
    """What a publication states for one line.

    Attributes:
        source: the publication, and where in it if that was checked.
        top1: top-1 accuracy in percent; `None` if no figure was checked.
        gflops: multiply-adds per image in 1e9; `None` if no figure was checked.
        ims: images per second on `DEVICE` in float32; `None` if no figure was checked.
        note: statement in other units.
    """

    source: str
    top1: float | None = None
    gflops: float | None = None
    ims: float | None = None
    note: str = ""

    @property
    def has_figures(self) -> bool:
        """Whether any number is known."""
        return any(one is not None for one in (self.top1, self.gflops, self.ims))


_OFF = f"{PAPER}, off the shelf"
_TRAINED = f"{PAPER}, trained with ToMe"
_WITHOUT = f"{PAPER}, trained without merging"
_LATER = "later reproductions of Bolya et al. 2023, off the shelf"
DESIGN = f"{PAPER}, table 1"

FIGURES = {
    # off the shelf: the unmerged model, and with ToMe
    "augreg_small": Published(_OFF, 81.41, 4.60, 953),
    "augreg_small r=13": Published(_OFF, 79.30, 2.70, 1564),
    "augreg_base": Published(_OFF, 84.57, 17.56, 309),
    "augreg_base r=13": Published(_OFF, 82.60, 10.37, 511),
    "augreg_large": Published(_OFF, 85.82, 61.55, 95),
    "augreg_large r=7": Published(_OFF, 84.26, 34.71, 167),
    "augreg_large_384": Published(_OFF, 86.92, 191.1, 28),
    "augreg_large_384 r=23": Published(_OFF, 86.14, 96.2, 56),
    "swag_base": Published(_OFF, 85.30, 55.5, 85.7),
    "swag_base r=45": Published(_OFF, 84.59, 28.3, 167.7),
    "swag_large": Published(_OFF, 88.06, 362, 12.8),
    "swag_large r=40": Published(_OFF, 87.80, 183, 26.3),
    "swag_huge": Published(_OFF, 88.55, 1017, 4.7),
    "swag_huge r=40": Published(_OFF, 88.25, 513, 9.8),
    "mae_large": Published(DESIGN, 85.96, 61.55, 93),
    "mae_large r=8": Published(DESIGN, 84.22, 30.96, 183),
    # trained on ImageNet-1k alone: without merging, and with it
    "deit_tiny": Published(PAPER, None, 1.25, 2558),
    "deit_tiny_tome r=13": Published(_TRAINED, 71.27, None, 3980),
    "deit_small": Published(PAPER, 79.8, 4.60, 930),
    "deit_small r=13": Published(_LATER, 78.83, 2.70, None),
    "deit_small_tome r=13": Published(_TRAINED, 79.36, 2.70, 1550),
    "mae_base_trained": Published(_WITHOUT, 83.62, 17.56, 309),
    "mae_base_tome r=16": Published(_TRAINED, 81.91, 8.77, 603),
    "mae_large_trained": Published(_WITHOUT, 85.66, 61.55, 93),
    "mae_large_tome r=8": Published(_TRAINED, 85.05, 30.96, 183),
    "mae_huge_trained": Published(_WITHOUT, 86.88, 167.3, 35),
    "mae_huge_tome r=7": Published(_TRAINED, 86.47, 92.8, 63),
    # pruning of DeiT-S by others
    "A-ViT": Published("Yin et al. 2022, as listed by Papers with Code", 78.6, 3.6),
    "DynamicViT": Published("Rao et al. 2021", 79.3, 2.9),
    "SPViT": Published(f"Kong et al. 2022: {UNCHECKED}"),
    "EViT": Published("Liang et al. 2022, keep rate 0.7", 79.5, 3.0),
    "ATS": Published("a later reproduction of Fayyaz et al. 2022", 79.1, 3.4),
    # in other units
    "video": Published(PAPER, note="2.2 times the throughput, and top-1 lower by 0.2 to 0.3 points"),
    "audio": Published(PAPER, note="2 times the throughput, and mAP lower by 0.4, trained with ToMe"),
}
"""Figures by the name of a model, by a model and r, or by a rival."""
