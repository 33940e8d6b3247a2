"""The paper's video model in the commands, as a person uses it on videos."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import Run
from tests.tools.test_videos import growing, write_video

MODEL = "video_mae:vit_tiny_patch16_224"
SIZES = ("--img-size", 32, "--model-kwargs", "num_frames=4", "patch_size=8", "embed_dim=48", "depth=3", "num_heads=3")
SHARED = Path(os.environ.get("TOKENMERGE_SHARED", "/nowhere"), "data", "videos")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes with one video each: the sample videos, or ours where there are none."""
    root = tmp_path_factory.mktemp("three")
    samples = sorted(SHARED.glob("*.mp4"))
    for split in ("train", "val"):
        for number in range(3):
            place = root / split / f"class{number}" / "a.mp4"
            place.parent.mkdir(parents=True)
            if samples:
                shutil.copy(samples[number], place)
            else:
                noise = np.random.default_rng(number).integers(0, 60, (24, 48, 64, 3), dtype=np.uint8)
                write_video(place, growing(24, bool(number % 2)) + noise)
    return root


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the three videos, with RandAugment and repeated augmentation."""
    from tokenmerge.cli import main

    output = tmp_path_factory.mktemp("run") / "run"
    words: list[Any] = ["train", MODEL, *SIZES, "--data", data, "--output", output, "--epochs", 2]
    words += ["--warmup-epochs", 0, "-b", 3, "--workers", 0, "--device", "cpu", "--r", 4, "--drop-path", 0.1]
    words += ["--aa", "rand-m7-mstd0.5-inc1", "--aug-repeats", 2, "--mean", 0.5, 0.5, 0.5]
    assert main([str(word) for word in words]) == 0
    return output / "model"


def test_evaluated_on_views_with_what_was_saved(trained: Path, data: Path, run: Run) -> None:
    about = json.loads((trained / "config.json").read_text())
    assert about["architecture"] == "video_mae_vit_tiny_patch16_224"
    assert about["pretrained_cfg"]["mean"] == [0.5, 0.5, 0.5]
    assert about["model_args"]["num_frames"] == 4
    words = ("eval", f"local-dir:{trained}", "--data", data / "val", "--views", "3x7", "--r", 0, 4, "--workers", 0)
    code, out, err = run(*words, "--json", "rows.json")
    assert code == 0, err
    rows = json.loads(Path("rows.json").read_text())
    assert [row["images"] for row in rows] == [3, 3]
    assert "videos/s" in out


@pytest.mark.parametrize("suffix", [".png", ".mp4", ".html"])
def test_pictured(trained: Path, data: Path, tmp_path: Path, run: Run, suffix: str) -> None:
    videos = sorted((data / "val").rglob("*.mp4"))
    videos = videos if suffix == ".png" else videos[:1]
    out_file = tmp_path / f"a{suffix}"
    code, out, err = run(
        "visualize", f"local-dir:{trained}", *videos, "--r", 4, "--out", out_file, "--json", "rows.json"
    )
    assert code == 0, err
    assert out_file.stat().st_size > 1000
    assert "within a moment" in " ".join(out.split())
    rows = json.loads(Path("rows.json").read_text())
    assert len(rows) == len(videos)
    for row in rows:
        assert [one["merged"] for one in row["over_time"]] == [4, 4, 4]
        assert all(one["within"] + one["across"] == pytest.approx(1) for one in row["over_time"])


def test_frames_that_a_token_lies_in(trained: Path, data: Path, tmp_path: Path, run: Run, model_dir: Path) -> None:
    video = next((data / "val").rglob("*.mp4"))
    words = ("visualize", f"local-dir:{trained}", video, "--r", 2, 4, "--view", "frames", "--out", tmp_path / "a.png")
    code, _, err = run(*words)
    assert code == 0, err
    plain = run("visualize", f"local-dir:{trained}", video, "--r", 2, 4, "--out", tmp_path / "b.png")
    assert plain[0] == 0
    from PIL import Image

    assert Image.open(tmp_path / "a.png").height > Image.open(tmp_path / "b.png").height, "curves are below the frames"
    code, _, err = run("visualize", f"local-dir:{model_dir}", video, "--view", "frames", "--out", tmp_path / "c.png")
    assert code == 2
    assert "--view frames is for videos" in err


def test_compared(trained: Path, data: Path, tmp_path: Path, run: Run) -> None:
    words = ("compare", f"local-dir:{trained}", "--data", data / "val", "--methods", "within", "across", "--r", 4)
    code, out, err = run(*words, "--rounds", 0, "--workers", 0, "--output", tmp_path / "out")
    assert code == 0, err
    assert "within" in out
    assert "across" in out


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
def test_exported(trained: Path, tmp_path: Path, run: Run, suffix: str) -> None:
    words = ("export", f"local-dir:{trained}", "--format", suffix, "--output", tmp_path / f"a.{suffix}")
    code, out, err = run(*words)
    assert code == 0, err
    assert "verified" in out


def test_inspected_without_values(run: Run) -> None:
    code, out, err = run("inspect", "video_mae:vit_large_patch16_224", "--r", 65)
    assert code == 0, err
    assert "1569" in out
    assert "24 blocks" in out or "supported" in out
