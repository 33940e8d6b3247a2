"""Merging over time: counts against loops over patches, the view and the figure."""

from __future__ import annotations

import math
from typing import Any

import pytest
import timm
import torch

import tokenmerge
from tests.families.test_video_mae import build, clips
from tests.helpers.tiny import images_for, tiny
from tokenmerge.errors import InputError
from tokenmerge.tracing import paint
from tokenmerge.tracing.figure import as_png, plot_moments


def in_loops(trace: Any, block: int) -> tuple[int, int, float]:
    """The merges of a block, those within one moment, and the mean of moments per token, over all clips of the batch."""
    _, height, width = trace.known_grid
    batch, protected = trace.batch, trace.protected
    before = trace.source(block - 1) if block else torch.arange(trace.tokens).expand(batch, -1)
    after, plan = trace.source(block), trace.plans[block]

    def moments(source: Any, token: int) -> set[int]:
        patches = range(protected, len(source))
        return {(patch - protected) // (height * width) for patch in patches if int(source[patch]) == token}

    merges = within = 0
    spans: list[int] = []
    for clip in range(batch):
        for source, target in zip(plan.source[clip], plan.target[clip], strict=True) if plan is not None else ():
            if int(target) < 0:
                continue
            into = int(plan.kept[clip][int(target)])
            both = moments(before[clip], int(source)) | moments(before[clip], into)
            merges += 1
            within += len(both) == 1
        tokens = {int(one) for one in after[clip][protected:] if one >= 0}
        spans += [len(moments(after[clip], token)) for token in tokens]
    return merges, within, sum(spans) / len(spans)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"matcher": "temporal"},
        {"matcher": "temporal", "options": {"pairs": "across"}},
        {"matcher": "random_prune"},
        {"combine": "tofu"},
    ],
)
@torch.no_grad()
def test_counts(fields: dict[str, Any]) -> None:
    model = build()
    handle = tokenmerge.patch(model, r=[9, 0, 14], trace=True, **fields)
    model(clips(model))
    for block, found in enumerate(handle.trace.over_time()):
        merges, within, spanned = in_loops(handle.trace, block)
        assert found.block == block
        assert found.merged == merges / 2
        assert found.spanned == pytest.approx(spanned)
        if merges:
            assert found.within == pytest.approx(within / merges)
            assert found.across == pytest.approx(1 - within / merges)
        else:
            assert math.isnan(found.within)


def test_only_clips_have_moments() -> None:
    model = tiny("vit_tiny_patch16_224")
    handle = tokenmerge.patch(model, r=2, trace=True)
    model(images_for(model))
    with pytest.raises(InputError, match="only clips have moments"):
        handle.trace.over_time()
    with pytest.raises(InputError, match="give a video"):
        paint(torch.rand(3, 4, 4), torch.zeros(4, 4, dtype=torch.int64), "frames")


def test_the_view_of_frames() -> None:
    """Two frames of two pixels: a token of both frames is bright, one of a single frame dark, a dropped one darker."""
    region = torch.tensor([[[0, 1, 2]], [[0, 3, -1]]])
    painted = paint(torch.rand(3, 2, 1, 3), region, "frames")
    flat = painted[:, :, 0]
    assert not torch.equal(flat[:, 0, 0], flat[:, 0, 1])
    assert (flat[:, 1, 2] - 0.12).abs().max() < 1


def test_the_figure() -> None:
    model = timm.create_model("video_mae_vit_tiny_patch16_224", num_frames=4, img_size=64, depth=3).eval()
    series = []
    for r in (2, 4):
        with tokenmerge.patched(model, r=r, trace=True) as handle, torch.no_grad():
            model(torch.randn(1, 4, 3, 64, 64))
            series.append((f"r={r}", handle.trace.over_time()))
    figure = plot_moments(series)
    left, right = figure.axes
    places: list[Any] = [line.get_xdata() for line in left.lines]
    values: list[Any] = [line.get_ydata() for line in right.lines]
    assert [list(one) for one in places] == [[1, 2, 3]] * 2
    assert [list(one) for one in values] == [[one.spanned for one in of] for _, of in series]
    assert as_png(figure).startswith(b"\x89PNG")
