"""The paper's experiments: models that exist and have heads, and figures that are the published ones."""

from __future__ import annotations

import pytest

from tokenmerge.patching import model_cost
from tokenmerge.patching.target import find_target
from tokenmerge.tools.common import ModelOptions
from tokenmerge.tools.compare.paper.experiments import EXPERIMENTS
from tokenmerge.tools.compare.paper.models import MODELS
from tokenmerge.tools.compare.paper.published import FIGURES
from tokenmerge.tools.hf import classified_medium
from tokenmerge.tools.inputs import num_classes
from tokenmerge.tools.models import skeleton


@pytest.mark.parametrize("name", MODELS)
def test_each_model_exists_and_has_the_papers_head(name: str) -> None:
    model = MODELS[name]
    values = dict(model.model_kwargs) | ({"num_labels": model.classes} if model.offline else {})
    options = ModelOptions(model=model.offline or model.model, num_classes=model.num_classes, model_kwargs=values)
    built = skeleton(options, model.medium)
    target, cost = find_target(built), model_cost(built)
    assert num_classes(built) == model.classes
    assert (len(target.blocks), cost.tokens) == (model.blocks, model.tokens)
    assert classified_medium(built) == (model.medium if model.offline else None)
    if ":" not in model.model and not model.file:
        import timm

        found = timm.models.get_pretrained_cfg(model.model)
        assert found is not None
        assert found.num_classes == model.classes
    figure = FIGURES.get(name)
    if figure is not None and figure.gflops is not None:
        assert cost.total() / 1e9 == pytest.approx(figure.gflops, rel=0.006)


OFF_THE_SHELF = """
AugReg ViT-S/16 81.41 953 13 79.30 1564
AugReg ViT-B/16 84.57 309 13 82.60 511
AugReg ViT-L/16 85.82 95 7 84.26 167
AugReg ViT-L/16 at 384 86.92 28 23 86.14 56
SWAG ViT-B/16 at 384 85.30 85.7 45 84.59 167.7
SWAG ViT-L/16 at 512 88.06 12.8 40 87.80 26.3
SWAG ViT-H/14 at 518 88.55 4.7 40 88.25 9.8
MAE ViT-L/16 85.96 93 8 84.22 183
"""
"""Model, top-1, images per second, r, and top-1 and images per second with ToMe, as published."""
GFLOPS = {
    "augreg_small": 4.60, "augreg_small r=13": 2.70, "augreg_base": 17.56, "augreg_base r=13": 10.37,
    "augreg_large": 61.55, "augreg_large r=7": 34.71, "augreg_large_384": 191.1, "augreg_large_384 r=23": 96.2,
    "swag_base": 55.5, "swag_base r=45": 28.3, "swag_large": 362, "swag_large r=40": 183, "swag_huge": 1017,
    "swag_huge r=40": 513, "mae_large": 61.55, "mae_large r=8": 30.96, "deit_tiny": 1.25, "deit_small": 4.60,
    "deit_small r=13": 2.70, "deit_small_tome r=13": 2.70, "mae_base_trained": 17.56, "mae_base_tome r=16": 8.77,
    "mae_large_trained": 61.55, "mae_large_tome r=8": 30.96, "mae_huge_trained": 167.3, "mae_huge_tome r=7": 92.8,
    "DynamicViT": 2.9, "ATS": 3.4, "EViT": 3.0, "A-ViT": 3.6,
}  # fmt: skip
TOP1 = {
    "deit_tiny_tome r=13": 71.27, "deit_small": 79.8, "deit_small r=13": 78.83, "deit_small_tome r=13": 79.36,
    "mae_base_trained": 83.62, "mae_base_tome r=16": 81.91, "mae_large_trained": 85.66, "mae_large_tome r=8": 85.05,
    "mae_huge_trained": 86.88, "mae_huge_tome r=7": 86.47, "DynamicViT": 79.3, "ATS": 79.1, "EViT": 79.5, "A-ViT": 78.6,
}  # fmt: skip
IMS = {
    "deit_tiny": 2558, "deit_tiny_tome r=13": 3980, "deit_small": 930, "deit_small_tome r=13": 1550,
    "mae_base_trained": 309, "mae_base_tome r=16": 603, "mae_large_trained": 93, "mae_large_tome r=8": 183,
    "mae_huge_trained": 35, "mae_huge_tome r=7": 63,
}  # fmt: skip


def test_figures_are_the_published_ones() -> None:
    top1, ims = dict(TOP1), {name: float(rate) for name, rate in IMS.items()}
    for entry, line in zip(EXPERIMENTS["offtheshelf"].entries, OFF_THE_SHELF.strip().splitlines(), strict=True):
        *words, base, rate, r, merged, faster = line.split()
        name = entry.model.name
        assert (" ".join(words), int(r)) == (entry.model.title, entry.lines[0].r)
        top1 |= {name: float(base), f"{name} r={r}": float(merged)}
        ims |= {name: float(rate), f"{name} r={r}": float(faster)}
        assert entry.lines[0].published is FIGURES[f"{name} r={r}"]
    for column, expected in (("top1", top1), ("gflops", GFLOPS), ("ims", ims)):
        found = {name: value for name, one in FIGURES.items() if (value := getattr(one, column)) is not None}
        assert found == expected, column
    assert all(one.source for one in FIGURES.values())
    assert not FIGURES["SPViT"].has_figures


def test_every_line_of_the_paper_has_its_place() -> None:
    assert list(EXPERIMENTS) == [
        "imagenet1k", "pruning", "design", "matching", "schedules", "offtheshelf", "pictures", "video", "audio"
    ]  # fmt: skip
    lines = {line.label: line for line in EXPERIMENTS["pruning"].entries[0].lines}
    assert [label for label, line in lines.items() if line.trained] == [
        f"{name}, trained" for name in ("A-ViT", "DynamicViT", "SPViT", "EViT", "ToMe r=13")
    ]
    assert next(label for label, line in lines.items() if line.runs) == "tome"
    for experiment in EXPERIMENTS.values():
        for entry in experiment.entries:
            labels = [line.label for line in entry.lines]
            assert len(set(labels)) == len(labels)
            assert not entry.lines or entry.lines[0].runs, "what others are compared with"
