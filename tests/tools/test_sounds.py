"""Sounds in class folders: decoded, made into spectrograms, trained on and evaluated as a person does it."""

from __future__ import annotations

import json
import math
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import ASTFeatureExtractor

from tests.conftest import Run
from tokenmerge.tools.media import IMAGES, SAMPLE_RATE, SOUNDS, medium_of, read_sound
from tokenmerge.tools.sounds import MEAN, STD, SoundAugmentation, Spectrogram, prepared

KWARGS = ("img_size=[64,32]", "in_chans=1", "patch_size=8", "embed_dim=32", "depth=2", "num_heads=2")


def write_wav(path: Path, samples: Any, rate: int = SAMPLE_RATE, channels: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())


def tone(hertz: float, seconds: float, rate: int = SAMPLE_RATE) -> Any:
    return 0.5 * np.sin(2 * math.pi * hertz * np.arange(round(seconds * rate)) / rate)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes that differ in pitch: 16 sounds to train on, 6 to validate."""
    root = tmp_path_factory.mktemp("sounds")
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 3)):
        for name, hertz in (("low", 300), ("high", 4000)):
            for number in range(count):
                samples = tone(hertz * rng.uniform(0.9, 1.1), 0.6) + 0.02 * rng.standard_normal(
                    round(0.6 * SAMPLE_RATE)
                )
                write_wav(root / split / name / f"{number}.wav", samples)
    return root


def test_files_of_any_rate_and_number_of_channels(tmp_path: Path) -> None:
    expected = tone(440, 0.5)
    write_wav(tmp_path / "a.wav", expected)
    found = read_sound(tmp_path / "a.wav")
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-4)
    write_wav(tmp_path / "b.wav", np.repeat(tone(440, 0.5, 44100), 2), rate=44100, channels=2)
    found = read_sound(tmp_path / "b.wav")
    assert abs(len(found) - SAMPLE_RATE // 2) < 100
    np.testing.assert_allclose(found[500:7000], expected[500:7000], atol=0.02)


def test_spectrogram_is_that_of_transformers(tmp_path: Path) -> None:
    samples = tone(1000, 0.5).astype(np.float32)
    features = ASTFeatureExtractor(num_mel_bins=128, max_length=1024)
    expected = features(samples, sampling_rate=SAMPLE_RATE, return_tensors="pt")["input_values"]
    found = Spectrogram((1, 1024, 128))(samples)
    assert found.shape == (1, 1024, 128)
    torch.testing.assert_close(found, expected)
    assert (features.mean, features.std) == (MEAN, STD)
    peak = int(found[0, :40].mean(0).argmax())
    assert 35 < peak < 50  # 1 kHz among 128 mel bands up to 8 kHz


def test_augmentation_is_a_function_of_the_generator() -> None:
    samples = tone(1000, 0.6).astype(np.float32)
    plain = Spectrogram((1, 64, 32))(samples)
    changed = Spectrogram((1, 64, 32), SoundAugmentation(roll=True, time_mask=20, frequency_mask=8))
    torch.manual_seed(3)
    first, other = changed(samples), changed(samples)
    torch.manual_seed(3)
    assert torch.equal(first, changed(samples))
    assert not torch.equal(first, other)
    masked = Spectrogram((1, 64, 32), SoundAugmentation(time_mask=20))(samples)
    rows = (masked == 0).all(dim=2)[0]
    assert rows.sum() <= 20
    assert torch.equal(masked[0][~rows], plain[0][~rows])


def test_rolled_sounds_are_as_loud_on_average() -> None:
    """AudioMAE's factor is 0.5 + Beta(10, 10), and the samples are the same ones, shifted."""
    samples, augmentation = tone(1000, 0.1).astype(np.float32), SoundAugmentation(roll=True)
    torch.manual_seed(0)
    factors = []
    for _ in range(500):
        rolled = prepared(samples, SAMPLE_RATE, augmentation)
        factors.append(float(np.abs(rolled).max() / np.abs(samples).max()))
        np.testing.assert_allclose(np.sort(rolled), np.sort(samples) * factors[-1], atol=1e-5)
    assert 0.5 <= min(factors) < 0.8
    assert 1.2 < max(factors) <= 1.5
    assert abs(np.mean(factors) - 1) < 0.02
    assert abs(np.std(factors) - 0.109) < 0.015  # of Beta(10, 10): 1 / sqrt(84)


def test_what_a_folder_holds(data: Path, tmp_path: Path) -> None:
    assert medium_of(data) is SOUNDS
    assert medium_of(tmp_path) is IMAGES
    assert medium_of(tmp_path / "nowhere") is IMAGES


def train(run: Run, data: Path, output: Path, *more: object) -> tuple[int, str, str]:
    size = () if "--model-kwargs" in more else ("--model-kwargs", *KWARGS)
    words: tuple[object, ...] = ("train", "vit_tiny_patch16_224", *size, "--data", data)
    words = (*words, "--output", output, "--workers", "0", "--device", "cpu", "--warmup-epochs", "0", "-b", "8")
    return run(*words, "--r", "4", *more)


def test_trains_on_sounds_and_evaluates_them(data: Path, tmp_path: Path, run: Run) -> None:
    more = ("--epochs", "8", "--lr", "0.003", "--roll", "--timem", "8", "--freqm", "4", "--mixup", "0.5")
    code, out, err = train(run, data, tmp_path / "run", *more)
    assert code == 0, err
    model = f"local-dir:{tmp_path / 'run' / 'model'}"
    words = ("eval", model, "--pretrained", "--data", data / "val", "--r", "0", "4", "--workers", "0")
    code, out, err = run(*words, "--device", "cpu", "--json", tmp_path / "rows.json")
    assert code == 0, err
    assert "6 sounds" in " ".join(out.split())  # the title wraps where the name of the folder is long
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["top1"] for row in rows] == [100.0, 100.0]
    assert rows[1]["gflops"] < rows[0]["gflops"]


def test_damaged_sounds_are_named(data: Path, tmp_path: Path, run: Run) -> None:
    for name in ("low", "high"):
        write_wav(tmp_path / "val" / name / "good.wav", tone(300, 0.6))
    (tmp_path / "val" / "low" / "noise.wav").write_bytes(b"RIFF and then nothing")
    (tmp_path / "val" / "low" / "empty.mp3").write_bytes(b"")
    write_wav(tmp_path / "val" / "high" / "short.wav", tone(300, 0.01))
    model = ("vit_tiny_patch16_224", "--num-classes", "2", "--data", tmp_path / "val", "--r", "4", "--workers", "0")
    code, _, err = run("eval", "vit_tiny_patch16_224", *model[1:])
    assert code == 2
    assert "takes inputs of the shape (3, 224, 224), but eval needs one that classifies one-channel" in " ".join(
        err.split()
    )
    code, _, err = train(run, data, tmp_path / "run", "--epochs", "1", "--lr", "0")
    assert code == 0, err
    folder = f"local-dir:{tmp_path / 'run' / 'model'}"
    code, _, err = run("eval", folder, "--pretrained", "--data", tmp_path / "val", "--r", "4", "--workers", "0")
    assert code == 0, err
    for name in ("noise.wav", "empty.mp3", "short.wav: it has 160 samples, fewer than one window of 25 ms"):
        assert name in " ".join(err.split())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--crop-pct", "0.9"), "--crop-pct is for images"),
        (("--aa", "rand-m9"), "--aa is for images"),
        (
            ("--model-kwargs", "img_size=[64,32]"),
            "the shape (3, 64, 32), but train needs one that classifies one-channel",
        ),
    ],
)
def test_bad_input_is_one_sentence(data: Path, tmp_path: Path, run: Run, more: tuple[str, ...], message: str) -> None:
    code, _, err = train(run, data, tmp_path / "run", *more)
    assert code == 2
    assert message in " ".join(err.split())
