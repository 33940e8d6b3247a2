"""Experiments of the paper: which lines are compared on which models."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from tokenmerge.errors import ConfigError, one_of
from tokenmerge.tools.compare.paper.models import MODELS, Model
from tokenmerge.tools.compare.paper.published import FIGURES, Published


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of an experiment.

    Attributes:
        label: label in tables.
        fields: fields of `MergeConfig` other than the schedule.
        r: tokens merged per block of the paper's model.
        inflect: change of r over the blocks, as in `--r 8:-1`.
        speedup: FLOPs reduction instead of `r`.
        published: what a publication states, `None` if nothing was checked.
        trained: whether the line needs weights of its own, trained by its method; see `trained_rows`.
        elsewhere: why the line is never run, for figures of settings that this command does not have.
    """

    label: str
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    r: int | None = None
    inflect: float | None = None
    speedup: float | None = None
    published: Published | None = None
    trained: bool = False
    elsewhere: str = ""

    @property
    def runs(self) -> bool:
        """Whether the line is a setting of the experiment's model."""
        return not self.trained and not self.elsewhere


@dataclasses.dataclass(frozen=True)
class Entry:
    """One model of an experiment with its lines.

    Attributes:
        model: the model.
        lines: what runs on it; the first one is what others are compared with.
        unmerged: published figures for the model without merging, `None` if nothing was checked.
    """

    model: Model
    lines: tuple[Line, ...] = ()
    unmerged: Published | None = None


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One experiment of the paper.

    Attributes:
        name: value of `compare --paper`.
        about: the comparison in words, a fragment for help pages.
        entries: the models with their lines.
        usual: lines for a model that is none of the experiment's.
        blocks: number of blocks for which r of `usual` is meant.
        tokens: number of tokens for which r of `usual` is meant.
        finding: what the paper reports in words.
    """

    name: str
    about: str
    entries: tuple[Entry, ...]
    finding: str = ""

    @property
    def usual(self) -> Entry:
        """The entry whose lines run on a model that is none of the experiment's."""
        return next(entry for entry in self.entries if entry.lines)

    @property
    def trains(self) -> bool:
        """Whether it compares methods that need a training of their own."""
        return any(line.trained for entry in self.entries for line in entry.lines)

    @property
    def draws_pictures(self) -> bool:
        """Whether it draws pictures and measures nothing."""
        return self.name == "pictures"


def _of(name: str, *lines: Line) -> Entry:
    return Entry(MODELS[name], lines, FIGURES.get(name))


def _tome(name: str, r: int) -> Entry:
    return _of(name, Line("tome", r=r, published=FIGURES.get(f"{name} r={r}")))


def _all_at(r: int, *lines: Line) -> tuple[Line, ...]:
    return tuple(dataclasses.replace(line, r=r) for line in lines)


_DESIGN = _all_at(
    8,
    Line("k, cosine, mean, weighted, alternating (default)", published=FIGURES["mae_large r=8"]),
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
)
_MATCHING = _all_at(
    8,
    Line("bipartite matching", published=FIGURES["mae_large r=8"]),
    Line("greedy matching", {"matcher": "greedy"}),
    Line("k-means, 2 iterations", {"matcher": "kmeans", "options": {"iterations": 2}}),
    Line("k-means, 5 iterations", {"matcher": "kmeans", "options": {"iterations": 5}}),
    Line("attention pruning", {"matcher": "attention_prune"}),
    Line("random pruning", {"matcher": "random_prune"}),
)
_SCHEDULES = _all_at(
    8,
    Line("constant", published=FIGURES["mae_large r=8"]),
    Line("decreasing to 0", inflect=-1.0),
    Line("decreasing by half", inflect=-0.5),
    Line("increasing by half", inflect=0.5),
    Line("increasing from 0", inflect=1.0),
)
_PRUNING = (
    *_all_at(
        13,
        Line("tome", published=FIGURES["deit_small r=13"]),
        Line("evit", {"matcher": "evit", "prop_attn": False}),
        Line("attention pruning", {"matcher": "attention_prune"}),
        Line("ats", {"matcher": "ats"}),
        Line("diffrate, half pruned", {"matcher": "diffrate"}),
    ),
    Line("ATS", published=FIGURES["ATS"], elsewhere="this figure is of another setting than ats above"),
    Line("A-ViT, trained", published=FIGURES["A-ViT"], trained=True),
    Line("DynamicViT, trained", published=FIGURES["DynamicViT"], trained=True),
    Line("SPViT, trained", published=FIGURES["SPViT"], trained=True),
    Line("EViT, trained", published=FIGURES["EViT"], trained=True),
    Line("ToMe r=13, trained", published=FIGURES["deit_small_tome r=13"], trained=True),
)

EXPERIMENTS: Mapping[str, Experiment] = {
    one.name: one
    for one in (
        Experiment(
            "imagenet1k",
            "models trained on ImageNet-1k alone, with ToMe and without: MAE ViT-B/L/H, DeiT-Ti/S",
            (
                _of("deit_tiny"),
                _tome("deit_tiny_tome", 13),
                _of("deit_small"),
                _tome("deit_small_tome", 13),
                _of("mae_base_trained"),
                _tome("mae_base_tome", 16),
                _of("mae_large_trained"),
                _tome("mae_large_tome", 8),
                _of("mae_huge_trained"),
                _tome("mae_huge_tome", 7),
            ),
        ),
        Experiment(
            "pruning",
            "ToMe against pruning on DeiT-S, off the shelf and trained",
            (_of("deit_small", *_PRUNING),),
            "of these methods only ToMe makes training faster, too, by about 1.5 times",
        ),
        Experiment(
            "design",
            "design choices on MAE ViT-L, r=8 (table 1)",
            (_of("mae_large", *_DESIGN),),
            "the default won: keys, cosine, mean over heads, weighted mean, alternating partition",
        ),
        Experiment(
            "matching",
            "matching against clustering and pruning on MAE ViT-L, r=8",
            (_of("mae_large", *_MATCHING),),
            "merging beats pruning, matching beats clustering, and bipartite matching is as accurate as greedy matching",
        ),
        Experiment(
            "schedules",
            "a constant r against other schedules of the same total on MAE ViT-L",
            (_of("mae_large", *_SCHEDULES),),
            "a constant r is close to the best of 15,000 random schedules",
        ),
        Experiment(
            "offtheshelf",
            "trained models without more training: AugReg, SWAG, MAE",
            (
                _tome("augreg_small", 13),
                _tome("augreg_base", 13),
                _tome("augreg_large", 7),
                _tome("augreg_large_384", 23),
                _tome("swag_base", 45),
                _tome("swag_large", 40),
                _tome("swag_huge", 40),
                _tome("mae_large", 8),
            ),
        ),
        Experiment(
            "pictures",
            "pictures of the tokens that merge, for images in --data",
            (Entry(MODELS["mae_huge_tome"], (Line("tome", r=7),)),),
            "tokens that end up merged follow parts of objects, in foreground and background",
        ),
        Experiment(
            "video",
            "ViT-L on the videos of Kinetics-400, r=65",
            (
                _of("video_mae_large", Line("tome", r=65, published=FIGURES["video"])),
                _of("videomae_large", Line("tome", r=65)),
            ),
        ),
        Experiment(
            "audio",
            "ViT-B on spectrograms, half of the FLOPs",
            (_of("audiomae_base", Line("tome", speedup=2, published=FIGURES["audio"])),),
        ),
    )
}
"""The experiments by name."""


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
