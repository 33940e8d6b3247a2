"""Videos in class folders: decoded, cut into clips, trained on and evaluated as a person does it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import VideoMAEForVideoClassification

import tokenmerge
from tests.conftest import Run
from tokenmerge.tools.media import VIDEOS, medium_of, read_frames
from tokenmerge.tools.videos import Clip, ClipAugmentation

SIZES = ("image_size=32", "patch_size=8", "num_frames=4", "hidden_size=32", "num_hidden_layers=2")
KWARGS = (*SIZES, "num_attention_heads=2", "intermediate_size=64", "tubelet_size=2")


def write_video(path: Path, frames: Any) -> None:
    """Frames `[T, H, W, 3]`, uint8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("mpeg4", rate=10)
        stream.height, stream.width, stream.pix_fmt, stream.bit_rate = (
            frames.shape[1],
            frames.shape[2],
            "yuv420p",
            2_000_000,
        )
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def growing(count: int, dark: bool = True, side: int = 48) -> Any:
    """Each frame a little lighter than the one before, in the darker or the lighter half."""
    levels = np.linspace(0, 100, count) + (0 if dark else 130)
    return np.broadcast_to(levels[:, None, None, None], (count, side, side + 16, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes that differ in brightness: 16 videos to train on, 6 to validate."""
    root = tmp_path_factory.mktemp("videos")
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 3)):
        for name in ("dark", "light"):
            for number in range(count):
                frames = growing(12, name == "dark") + rng.integers(0, 20, (12, 48, 64, 3), dtype=np.uint8)
                write_video(root / split / name / f"{number}.mp4", frames)
    return root


def test_frames_are_the_ones_that_were_asked_for(tmp_path: Path) -> None:
    frames = growing(20)
    write_video(tmp_path / "a.mp4", frames)
    asked: list[int] = []

    def choose(total: int) -> list[int]:
        asked.append(total)
        return [3, 3, 10, 19]

    found = read_frames(tmp_path / "a.mp4", choose)
    assert asked == [20]
    assert found.shape == (4, 48, 64, 3)
    assert np.abs(found.astype(int) - frames[[3, 3, 10, 19]]).max() < 8


def test_clips(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", growing(20))
    clip = Clip((4, 3, 32, 32), 2, mean=(0, 0, 0), std=(1, 1, 1))(tmp_path / "a.mp4")
    assert clip.shape == (4, 3, 32, 32)
    levels = clip.mean((1, 2, 3)) * 255
    expected = torch.linspace(0, 100, 20)[[6, 8, 10, 12]]  # 7 frames in the middle of 20
    assert (levels - expected).abs().max() < 6
    even = Clip((4, 3, 32, 32), 9, mean=(0, 0, 0), std=(1, 1, 1))
    short = even(tmp_path / "a.mp4").mean((1, 2, 3)) * 255
    assert even.stride == 5, "by which a page knows the times of the frames"
    assert (short - torch.linspace(0, 100, 20)[[0, 5, 10, 15]]).abs().max() < 6
    varied = Clip((4, 3, 32, 32), 2, ClipAugmentation(reprob=0.5))
    torch.manual_seed(1)
    first, other = varied(tmp_path / "a.mp4"), varied(tmp_path / "a.mp4")
    torch.manual_seed(1)
    assert torch.equal(first, varied(tmp_path / "a.mp4"))
    assert not torch.equal(first, other)


def test_automatic_augmentation_is_alike_for_all_frames(tmp_path: Path) -> None:
    """Frames that are equal stay equal, clips differ, and the generator decides."""
    rng = np.random.default_rng(0)
    still = np.broadcast_to(
        rng.integers(0, 255, (1, 8, 8, 3), dtype=np.uint8).repeat(6, 1).repeat(6, 2), (20, 48, 48, 3)
    )
    write_video(tmp_path / "a.mp4", still)
    whole: dict[str, Any] = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "hflip": 0.0}
    plain = Clip((4, 3, 48, 48), 1, ClipAugmentation(**whole))
    varied = Clip((4, 3, 48, 48), 1, ClipAugmentation(**whole, policy="rand-m9-n3-p1-inc1"))
    clips = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        clips.append(varied(tmp_path / "a.mp4"))
    assert torch.equal(clips[0], clips[2])
    assert not torch.equal(clips[0], clips[1])
    for clip in clips[:2]:
        assert (clip - plain(tmp_path / "a.mp4")).abs().mean() > 0.05
        assert (clip - clip[:1]).abs().mean() < 0.05  # the frames differ by compression only


def test_stochastic_depth_of_videomae() -> None:
    """At a rate of 1, training skips the last layer, and no layer in evaluation; the config stays upstream's."""
    from tokenmerge.tools.common import DeviceOptions
    from tokenmerge.tools.models import load_model

    kwargs: dict[str, Any] = {name: int(value) for name, value in (word.split("=") for word in KWARGS)}
    options = DeviceOptions(model="hf:videomae", num_classes=2, model_kwargs={**kwargs, "drop_path_rate": 1.0})
    model = load_model(options, head="videos")
    assert not hasattr(model.config, "drop_path_rate")
    clips = torch.randn(2, 4, 3, 32, 32)
    tokenmerge.patch(model, r=3)
    trained, evaluated = model.train()(clips).logits, model.eval()(clips).logits
    assert not torch.allclose(trained, evaluated)
    for name in ("attention.output", "output"):  # both branches of the last layer add nothing
        linear = model.get_submodule(f"videomae.encoder.layer.1.{name}.dense")
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    torch.testing.assert_close(model(clips).logits, trained)


def train(run: Run, data: Path, output: Path, *more: object) -> tuple[int, str, str]:
    words: tuple[object, ...] = ("train", "hf:videomae", "--model-kwargs", *KWARGS, "--data", data)
    words = (*words, "--output", output, "--workers", "0", "--device", "cpu", "--warmup-epochs", "0", "-b", "8")
    return run(*words, "--sampling-rate", "2", "--r", "3", *more)


def test_trains_on_videos_and_evaluates_them(data: Path, tmp_path: Path, run: Run) -> None:
    assert medium_of(data) is VIDEOS
    more = (
        "--epochs",
        "6",
        "--lr",
        "0.003",
        "--mixup",
        "0.4",
        "--cutmix",
        "0.4",
        "--layer-decay",
        "0.9",
        "--model-ema",
        "--aa",
        "rand-m3-mstd0.5",
        "--drop-path",
        "0.1",
    )
    code, out, err = train(run, data, tmp_path / "run", *more, "--model-ema-decay", "0.5", "--grad-checkpointing")
    assert code == 0, err
    assert f"eval hf:{tmp_path / 'run' / 'model'}" in out.replace("\n", "")
    words = ("eval", f"hf:{tmp_path / 'run' / 'model'}", "--pretrained", "--data", data / "val", "--r", "0", "3")
    code, out, err = run(*words, "--workers", "0", "--sampling-rate", "2", "--json", tmp_path / "rows.json")
    assert code == 0, err
    assert "6 videos" in " ".join(out.split())
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["top1"] for row in rows] == [100.0, 100.0]
    assert rows[1]["gflops"] < rows[0]["gflops"]
    # and the library that it belongs to reads it
    model = VideoMAEForVideoClassification.from_pretrained(tmp_path / "run" / "model")
    assert model.config.id2label == {0: "dark", 1: "light"}
    assert not tokenmerge.is_patched(model)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(
    data: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ("--epochs", "2", "--layer-decay", "0.8", "--recovery-interval", "1")
    assert train(run, data, tmp_path / "whole", *more)[0] == 0
    from tokenmerge.tools.train.loop import Loop

    def stops(self: Any) -> bool:
        return bool(self.update == 3)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_stop_everywhere", stops)
        assert train(run, data, tmp_path / "run", *more)[0] == 0
    assert not (tmp_path / "run" / "model").exists()
    assert train(run, data, tmp_path / "run", *more, "--resume", "auto")[0] == 0
    left, right = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_the_layers_of_its_learning_rates(data: Path) -> None:
    """Layer decay sees embeddings, blocks and head, as for timm's models."""
    from tokenmerge.tools.common import DeviceOptions
    from tokenmerge.tools.models import load_model
    from tokenmerge.tools.train.optim import optimizer_of
    from tokenmerge.tools.train.options import TrainOptions

    values = dict(word.split("=") for word in KWARGS)
    kwargs = {name: int(value) for name, value in values.items()}
    model = load_model(DeviceOptions(model="hf:videomae", num_classes=2, model_kwargs=kwargs), head="videos")
    tokenmerge.patch(model, r=3)
    args = TrainOptions(model="m", data=data, output=data, r=3, layer_decay=0.5, lr=1.0, opt="sgd", epochs=9)
    optimizer = optimizer_of(model, args, 1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    scale = {names[id(p)]: group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert scale["classifier.weight"] == 1.0
    assert scale["videomae.encoder.layer.1.attention.attention.query.weight"] == 0.5
    assert scale["videomae.encoder.layer.0.attention.attention.query.weight"] == 0.25
    assert scale["videomae.embeddings.patch_embeddings.projection.weight"] == 0.125
    assert not hasattr(model, "group_matcher")


def test_damaged_videos_are_named(data: Path, tmp_path: Path, run: Run) -> None:
    for name in ("dark", "light"):
        write_video(tmp_path / "val" / name / "good.mp4", growing(12))
    (tmp_path / "val" / "dark" / "noise.mp4").write_bytes(b"not a video")
    whole = (data / "val" / "light" / "0.mp4").read_bytes()
    (tmp_path / "val" / "light" / "half.mp4").write_bytes(whole[: len(whole) // 2])
    assert train(run, data, tmp_path / "run", "--epochs", "1", "--lr", "0")[0] == 0
    model = f"hf:{tmp_path / 'run' / 'model'}"
    words = ("eval", model, "--pretrained", "--data", tmp_path / "val", "--r", "3", "--workers", "0")
    code, _, err = run(*words)
    assert code == 0, err
    assert "noise.mp4" in " ".join(err.split())
    assert "half.mp4" in " ".join(err.split())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--timem", "9"), "--timem is for sounds"),
        (("--aa", "nonsense"), "--aa 'nonsense' was given, which timm does not know"),
        (("--interpolation", "bicubic", "--aa", "rand-m9"), "--interpolation is for images"),
        (("--drop-path", "0.1", "--opt", "sgd", "--opt-betas", "0.9", "0.9"), "the optimizer 'sgd' has no betas"),
    ],
)
def test_bad_input_is_one_sentence(data: Path, tmp_path: Path, run: Run, more: tuple[str, ...], message: str) -> None:
    code, _, err = train(run, data, tmp_path / "run", *more)
    assert code == 2
    assert message in " ".join(err.split())


def test_a_model_of_images_does_not_take_videos(data: Path, run: Run) -> None:
    code, _, err = run("eval", "vit_tiny_patch16_224", "--data", data / "val", "--r", "3", "--workers", "0")
    assert code == 2
    assert "needs one that classifies videos: choose one such as hf:videomae" in " ".join(err.split())
