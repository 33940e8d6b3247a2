"""Experiments of the paper: their settings and published results.

Published numbers come from the paper's tables (ImageNet-1k, V100); `None` where they are not recorded here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from tokenmerge.errors import ConfigError, one_of


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of an experiment.

    Attributes:
        label: label in tables.
        fields: fields of `MergeConfig`.
        published: top-1 accuracy in the paper, in percent.
    """

    label: str
    fields: Mapping[str, Any]
    published: float | None = None


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One table of the paper.

    Attributes:
        name: value of `compare --paper`.
        about: description.
        model: the paper's model, as a MODEL argument.
        settings: schedules, as in `--r`.
        lines: the variants to compare; the first is the paper's choice.
    """

    name: str
    about: str
    model: str
    settings: tuple[str, ...]
    lines: tuple[Line, ...]


_TOME = Line("k, cosine, mean, weighted, alternating (default)", {}, 84.22)
_MAE_L = "vit_large_patch16_224.mae"

EXPERIMENTS: Mapping[str, Experiment] = {
    one.name: one
    for one in (
        Experiment(
            "ablation",
            "design choices (table 1 of the paper)",
            _MAE_L,
            ("8",),
            (
                _TOME,
                Line("metric x_pre", {"metric": "x_pre"}),
                Line("metric x", {"metric": "x"}),
                Line("metric q", {"metric": "q"}),
                Line("metric v", {"metric": "v"}),
                Line("distance euclidean", {"distance": "euclidean"}),
                Line("distance dot", {"distance": "dot"}),
                Line("distance softmax", {"distance": "softmax"}),
                Line("heads concat", {"heads": "concat"}),
                Line("combine keep one", {"combine": "destination"}),
                Line("combine max", {"combine": "max"}),
                Line("combine average", {"combine": "average"}),
                Line("partition sequential", {"partition": "sequential"}),
                Line("partition random", {"partition": "random"}),
                Line("prop. attention off", {"prop_attn": False}),
                Line("prop. attention on", {"prop_attn": True}),
                Line("place before attention (x_pre)", {"place": "before", "metric": "x_pre"}),
                Line("place after MLP", {"place": "after"}),
            ),
        ),
        Experiment(
            "matching",
            "matching against clustering and pruning (table 2)",
            _MAE_L,
            ("8",),
            (
                Line("bipartite matching", {}, 84.22),
                Line("greedy matching", {"matcher": "greedy"}),
                Line("k-means, 2 iterations", {"matcher": "kmeans", "options": {"iterations": 2}}),
                Line("k-means, 5 iterations", {"matcher": "kmeans", "options": {"iterations": 5}}),
                Line("attention pruning", {"matcher": "attention_prune"}),
                Line("random pruning", {"matcher": "random_prune"}),
            ),
        ),
        Experiment(
            "schedules",
            "constant against other schedules of the same total (figure 2)",
            _MAE_L,
            ("8", "8:-1", "8:-0.5", "8:0.5", "8:1"),
            (Line("tome", {}, None),),
        ),
        *(
            Experiment(name, f"off the shelf: {about}", model, (r,), (Line("tome", {}, published),))
            for name, about, model, r, published in (
                (
                    "table1",
                    "AugReg ViT-B/16 (unmerged 84.57)",
                    "vit_base_patch16_224.augreg_in21k_ft_in1k",
                    "13",
                    82.60,
                ),
                (
                    "augreg_s",
                    "AugReg ViT-S/16 (unmerged 81.41)",
                    "vit_small_patch16_224.augreg_in21k_ft_in1k",
                    "13",
                    79.30,
                ),
                (
                    "augreg_l",
                    "AugReg ViT-L/16 (unmerged 85.82)",
                    "vit_large_patch16_224.augreg_in21k_ft_in1k",
                    "7",
                    84.26,
                ),
                (
                    "augreg_l384",
                    "ViT-L/16 at 384 (unmerged 86.92)",
                    "vit_large_patch16_384.augreg_in21k_ft_in1k",
                    "23",
                    86.14,
                ),
                (
                    "swag_b",
                    "SWAG ViT-B/16 at 384 (unmerged 85.30)",
                    "torchvision:vit_b_16:IMAGENET1K_SWAG_E2E_V1",
                    "45",
                    84.59,
                ),
                (
                    "swag_l",
                    "SWAG ViT-L/16 at 512 (unmerged 88.06)",
                    "torchvision:vit_l_16:IMAGENET1K_SWAG_E2E_V1",
                    "40",
                    87.80,
                ),
                (
                    "swag_h",
                    "SWAG ViT-H/14 at 518 (unmerged 88.55)",
                    "torchvision:vit_h_14:IMAGENET1K_SWAG_E2E_V1",
                    "40",
                    88.25,
                ),
                ("video", "VideoMAE-L on Kinetics-400", "hf:MCG-NJU/videomae-large-finetuned-kinetics", "65", None),
                (
                    "audio",
                    "AudioMAE ViT-B, sounds with one label (the paper: trained, mAP)",
                    "vit_base_patch16_1024_128.audiomae_as2m_ft_as20k",
                    "speedup=2",
                    None,
                ),
            )
        ),
        Experiment(
            "table2",
            "pruning rivals at equal r on DeiT-S",
            "deit_small_patch16_224.fb_in1k",
            ("13",),
            (
                Line("tome", {}, 78.83),
                Line("evit", {"matcher": "evit", "prop_attn": False}),
                Line("attention pruning", {"matcher": "attention_prune"}),
                Line("ats", {"matcher": "ats"}),
                Line("diffrate, half pruned", {"matcher": "diffrate"}),
            ),
        ),
    )
}


def get_experiment(name: str) -> Experiment:
    """Return the experiment of a name.

    Raises:
        ConfigError: if there is no such experiment.
    """
    if name not in EXPERIMENTS:
        raise ConfigError(
            f"--paper {name!r:.60} is not known; known are {', '.join(EXPERIMENTS)}: {one_of(name, EXPERIMENTS)}"
        )
    return EXPERIMENTS[name]
