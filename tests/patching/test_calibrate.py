"""Thresholds from data, schedules from DiffRate's files, batches in buckets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tokenmerge
from tests.helpers.tiny import images_for, tiny
from tokenmerge import InputError
from tokenmerge.tools.buckets import detail, in_buckets
from tokenmerge.tools.compare.scoring import score


def merged_per_block(model: Any, images: torch.Tensor) -> list[list[int]]:
    """r of each block for each image, one by one."""
    found = []
    for image in images:
        model(image[None])
        found.append([0 if plan is None else plan.r for plan in tokenmerge.handle_of(model).trace.plans])
    return found


def test_thresholds_keep_the_budget_on_average() -> None:
    model = tiny("deit_tiny_patch16_224")
    images = images_for(model, 24)
    images[::2] *= torch.linspace(0.05, 1, 12)[:, None, None, None]  # some are flatter than others
    config = tokenmerge.calibrate(model, images.split(5), r=5)
    assert config.matcher == "threshold"
    assert len(config.options["thresholds"]) == 3
    assert not tokenmerge.is_patched(model)
    with tokenmerge.patched(model, config, trace=True), torch.no_grad():
        r = torch.tensor(merged_per_block(model, images), dtype=torch.float64)
        assert r[:, 0].mean() == pytest.approx(5, abs=0.3), "the first block sees what calibration saw"
        assert r.mean() == pytest.approx(5, abs=1.0)
        assert r[:, 0].min() < r[:, 0].max(), "one image merges more than another"
        batch = model(images)
        assert batch.shape == (24, 7)
        plan = tokenmerge.handle_of(model).trace.plans[0]
        assert plan is not None
        assert plan.r == round(float(r[:, 0].mean())), "a batch merges their mean"


def test_calibration_survives_json(tmp_path: Path) -> None:
    model = tiny("deit_tiny_patch16_224")
    config = tokenmerge.calibrate(model, [images_for(model)], r=3, combine="norm")
    assert tokenmerge.MergeConfig.from_json(config.to_json()) == config
    assert config.combine == "norm"
    with pytest.raises(InputError, match="not one block merged"):
        tokenmerge.calibrate(model, [], r=3)


def test_diffrates_schedules_are_read(tmp_path: Path) -> None:
    file = tmp_path / "rates.json"
    entry = {"prune_kept_num": "[37, 35, 20]", "merge_kept_num": "[34, 30, 18]"}  # lists as text, as it publishes them
    file.write_text(json.dumps({"ViT-T": {"0.1": entry}}))
    config = tokenmerge.diffrate_schedule(file, "ViT-T", "0.1", tokens=37)
    assert config.options == {"pruned": [0.0, 0.0, 10 / 12]}
    model = tiny("deit_tiny_patch16_224")
    with tokenmerge.patched(model, config, trace=True) as handle, torch.no_grad():
        assert handle.schedule == (3, 4, 12)
        features = model.forward_features(images_for(model))
        assert features.shape[1] == 18
        assert ((handle.trace.source() < 0).sum(dim=1) >= 10).all()
    for bad in ("nope", "{}", json.dumps({"ViT-T": {"0.1": {**entry, "merge_kept_num": "[34, 36, 0]"}}})):
        file.write_text(bad)
        with pytest.raises(InputError, match=r"rates\.json"):
            tokenmerge.diffrate_schedule(file, "ViT-T", "0.1", tokens=37)
    with pytest.raises(InputError, match="cannot be read"):
        tokenmerge.diffrate_schedule(tmp_path / "none.json", "a", "b", 37)


def test_buckets_hold_images_of_like_detail_and_lose_none() -> None:
    images = torch.randn(22, 3, 8, 8) * torch.rand(22, 1, 1, 1)
    batches = [(part, torch.arange(22)[i * 4 : i * 4 + 4]) for i, part in enumerate(images.split(4))]
    found = list(in_buckets(batches, depth=3))
    index = torch.cat([places for _, _, places in found])
    assert torch.equal(index.sort().values, torch.arange(22))
    assert torch.equal(torch.cat([labels for _, labels, _ in found]), index)
    assert torch.equal(torch.cat([part for part, _, _ in found]), images[index])
    first = torch.cat([detail(part) for part, _, _ in found[:3]])
    assert torch.equal(first, first.sort().values)


def test_buckets_do_not_mix_up_scores() -> None:
    model = tiny("deit_tiny_patch16_224")
    images = images_for(model, 10)
    batches = [(part, torch.zeros(len(part), dtype=torch.int64)) for part in images.split(4)]
    plain, said = score(model, batches, None)
    again, _ = score(model, batches, said, buckets=True)
    assert torch.equal(plain.top1, again.top1)
    assert again.divergence.abs().max() < 1e-5
