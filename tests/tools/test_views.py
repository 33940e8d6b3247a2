"""Evaluation on several views of each video, against loops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.conftest import Run
from tests.tools.test_videos import data as two_classes  # noqa: F401 the fixture
from tests.tools.test_videos import growing, write_video
from tokenmerge.errors import InputError
from tokenmerge.tools.common import DeviceOptions
from tokenmerge.tools.eval.views import ViewMean
from tokenmerge.tools.media import read_frames
from tokenmerge.tools.models import load_model
from tokenmerge.tools.videos import Clip, Views

MODEL = "video_mae:vit_tiny_patch16_224"
KWARGS = ("num_frames=4", "embed_dim=48", "depth=2", "num_heads=3", "patch_size=8")


def test_clips_and_crops_are_those_of_a_loop(tmp_path: Path) -> None:
    """3 crops along the longer side of each of 4 clips, from the first frame to the last."""
    rng = np.random.default_rng(0)
    write_video(tmp_path / "a.mp4", rng.integers(0, 255, (30, 48, 80, 3), dtype=np.uint8))
    read = Clip((4, 3, 32, 32), 3, mean=(0, 0, 0), std=(1, 1, 1), views=Views(3, 4))
    found = read(tmp_path / "a.mp4")
    assert found.shape == (12, 4, 3, 32, 32)
    surplus = 30 - (3 * 3 + 1)
    for number, start in enumerate(round(surplus * i / 3) for i in range(4)):
        places = [start, start + 3, start + 6, start + 9]

        def choose(total: int, places: list[int] = places) -> list[int]:
            return places

        frames = read_frames(tmp_path / "a.mp4", choose)
        whole = torch.from_numpy(frames).permute(0, 3, 1, 2)
        resized = F.interpolate(whole.float(), (32, 53), mode="bilinear", antialias=True, align_corners=False)
        for crop, left in enumerate((0, 10, 21)):
            expected = resized.round().clamp(0, 255)[..., left : left + 32] / 255
            assert (found[3 * number + crop] - expected).abs().max() < 1.5 / 255


def test_one_view_is_the_clip_as_before_and_tall_videos_are_cropped_from_above_to_below(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", growing(20))
    values: dict[str, Any] = {"mean": (0, 0, 0), "std": (1, 1, 1)}
    one = Clip((4, 3, 32, 32), 2, **values)(tmp_path / "a.mp4")
    assert torch.equal(Clip((4, 3, 32, 32), 2, **values, views=Views(1, 1))(tmp_path / "a.mp4"), one)
    three = Clip((4, 3, 32, 32), 2, **values, views=Views(1, 3))(tmp_path / "a.mp4")
    assert torch.equal(three[1] if three.shape[0] == 3 else three, one), "the middle one of three clips"
    picture = np.zeros((12, 96, 32, 3), dtype=np.uint8)
    picture[:, :32], picture[:, 32:64], picture[:, 64:] = 20, 120, 220
    write_video(tmp_path / "tall.mp4", picture)
    crops = Clip((4, 3, 32, 32), 2, **values, views=Views(3, 1))(tmp_path / "tall.mp4")
    assert (crops.mean((1, 2, 3, 4)) * 255 - torch.tensor([20.0, 120.0, 220.0])).abs().max() < 4
    short = Clip((4, 3, 32, 32), 9, **values, views=Views(1, 2))(tmp_path / "a.mp4")
    assert torch.equal(short[0], short[1]), "a video that is shorter than a clip gives the same one again"


@pytest.mark.parametrize("most", [1, 4, 100])
def test_the_mean_of_probabilities_is_that_of_a_loop(most: int) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(6, 5)
    seen: list[int] = []

    def model(x: Tensor) -> Tensor:
        seen.append(len(x))
        logits: Tensor = 9 * linear(x)
        return logits

    views = torch.randn(3, 7, 6)
    with torch.no_grad():
        found = ViewMean(model, most)(views)
        expected = torch.stack(
            [torch.stack([(9 * linear(view)).softmax(0) for view in each]).mean(0) for each in views]
        )
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.exp().float(), expected, rtol=1e-6, atol=1e-6)
    assert sum(seen) == 21
    assert max(seen) == min(most, 21)


def test_several_labels_have_a_probability_each() -> None:
    """Equal views rank files as one of them does, also where float32 would give equal probabilities."""
    logits = torch.tensor([[19.0, -3.0], [18.0, -4.0], [21.0, 0.0]])
    same = ViewMean(lambda x: x, 8, several=True)(logits[:, None].expand(3, 4, 2))
    assert torch.equal(same.argsort(dim=0), logits.argsort(dim=0))
    views = torch.randn(3, 5, 2)
    mean = ViewMean(lambda x: x, 8, several=True)(views).exp()
    torch.testing.assert_close(mean.float(), views.sigmoid().mean(1), rtol=1e-6, atol=1e-6)


def test_far_apart_logits_stay_finite() -> None:
    logits = torch.tensor([[[0.0, -900.0], [0.0, -800.0]]])
    found = ViewMean(lambda x: x, 8)(logits)
    assert bool(found.isfinite().all())


@pytest.mark.parametrize("text", ["3", "3x", "0x3", "x7", "3x7x2", "-1x2", "100x100", "three"])
def test_what_is_no_views(text: str) -> None:
    with pytest.raises(InputError, match="CROPSxCLIPS"):
        Views.parse(text)


def test_the_command_gives_what_a_loop_gives(two_classes: Path, tmp_path: Path, run: Run) -> None:  # noqa: F811
    """Top-1 of 6 videos with 3×2 views, from random weights, at r=0 and r=3."""
    weights = tmp_path / "weights.pth"
    kwargs = dict(word.split("=") for word in KWARGS)
    options = DeviceOptions(
        model=MODEL, img_size=32, num_classes=2, model_kwargs={name: int(value) for name, value in kwargs.items()}
    )
    torch.manual_seed(3)
    model = load_model(options)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    torch.save(model.state_dict(), weights)
    words: tuple[Any, ...] = (
        "eval",
        MODEL,
        "--img-size",
        32,
        "--num-classes",
        2,
        "--model-kwargs",
        *KWARGS,
        "--checkpoint",
        weights,
    )
    words = (*words, "--data", two_classes / "val", "--sampling-rate", 2, "--workers", 0)
    code, out, err = run(*words, "--r", 0, 3, "--views", "3x2", "-b", 8, "--json", "rows.json")
    assert code == 0, err
    assert "3x2 views each averaged, GFLOPs of one view" in " ".join(out.split())
    row = json.loads(Path("rows.json").read_text())[0]
    assert (row["views"], row["images"]) == ("3x2", 6)
    values: dict[str, Any] = {"mean": (0.45,) * 3, "std": (0.225,) * 3}
    read = Clip((4, 3, 32, 32), 2, **values, views=Views(3, 2))
    right = 0
    for label, name in enumerate(("dark", "light")):
        for file in sorted((two_classes / "val" / name).iterdir()):
            with torch.no_grad():
                mean = torch.stack([model(view[None])[0].softmax(0) for view in read(file)]).mean(0)
            right += int(mean.argmax()) == label
    assert row["top1"] == pytest.approx(100 * right / 6)
    code, out, err = run(*words, "--r", 0, "--views", "3y2")
    assert code == 2
    assert "CROPSxCLIPS" in err


def test_views_are_for_videos(run: Run, model_dir: Path, data: Path) -> None:
    code, _, err = run("eval", f"local-dir:{model_dir}", "--data", data, "--r", 0, "--views", "1x2")
    assert code == 2
    assert "--views 1x2 is for videos" in err
