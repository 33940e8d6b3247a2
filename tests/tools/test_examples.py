"""The examples run offline as they are."""

from __future__ import annotations

import colorsys
import csv
import runpy
import sys
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tokenmerge.tools.media import VIDEOS, frame_rate, medium_of, pyav, read_sound

EXAMPLES = Path(__file__).parents[2] / "examples"

Example = Callable[..., tuple[int, str]]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Example:
    """Runs an example; exit code and stderr."""

    def call(name: str, *options: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, options)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return int(stop.value.code or 0), capsys.readouterr().err

    return call


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def segments_of(path: Path) -> dict[str, list[str]]:
    """The labels of an AudioSet table, read as people read AudioSet's own."""
    lines = path.read_text().splitlines()
    assert lines[2] == "# YTID, start_seconds, end_seconds, positive_labels"
    rows = csv.reader((line for line in lines if not line.startswith("#")), skipinitialspace=True)
    return {name: labels.split(",") for name, _, _, labels in rows}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip_zero_shot", "image_text_similarity", "features"])
def test_runs_without_network(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--output", "features.safetensors"] if name == "features" else []
    monkeypatch.setattr(sys, "argv", [name, *options])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert {"clip_zero_shot": "flower.jpg", "image_text_similarity": "tokens after each block", "features": "patches"}[
        name
    ] in out
    assert max(map(len, out.splitlines())) <= 100
    if options:
        assert (tmp_path / "features.safetensors").stat().st_size > 10_000


def decoded(path: Path) -> Any:
    """Frames of a video, `[T, H, W, 3]`."""
    with pyav().open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]).astype(float)


def test_videos_of_moving_digits(example: Example, tmp_path: Path) -> None:
    small = ("--frames", 20, "--size", 64)
    assert example("moving_digits", "--output", tmp_path / "a", "--train", 2, "--val", 1, *small)[0] == 0
    found = files_of(tmp_path / "a")
    names = {f"{split}/{n}.mp4" for n, split in ((0, "train"), (1, "train"), (0, "val"))}
    inks = {"blue": 0.6, "green": 0.36, "red": 0.98, "yellow": 0.13}
    assert set(found) == {f"{split}/{ink}/{n}" for ink in inks for split, n in (name.split("/") for name in names)}
    assert medium_of(tmp_path / "a" / "train") is VIDEOS
    for name in found:
        film = decoded(tmp_path / "a" / name)
        assert film.shape == (20, 64, 64, 3)
        middle = film[6:14]  # the digit is in view, and what changes is where it comes and where it goes
        still = np.median(film, axis=0)
        places = [np.argwhere(np.abs(frame - still).max(2) > 60).mean(0) for frame in (middle[0], middle[-1])]
        steps = np.abs(places[1] - places[0])
        assert steps.max() > 3, name
        assert steps.max() > 0.8 * np.linalg.norm(steps), name
        ink = middle[0][np.abs(middle[0] - still).max(2) > 80].mean(0) / 255
        hue = colorsys.rgb_to_hsv(*map(float, ink))[0]
        nearest = min(inks, key=lambda one: min(abs(hue - inks[one] + turn) for turn in (-1, 0, 1)))
        assert nearest == name.split("/")[1]
    assert frame_rate(tmp_path / "a" / "val" / "red" / "0.mp4") == pytest.approx(10)
    assert example("moving_digits", "--output", tmp_path / "b", "--train", 1, "--val", 1, *small)[0] == 0
    again = files_of(tmp_path / "b")
    assert len(again) == 8
    assert again.items() <= found.items()  # the others do not depend on how many there are
    assert example("moving_digits", "--output", tmp_path / "c", "--train", 1, "--val", 1, "--seed", 1, *small)[0] == 0
    assert not again.items() & files_of(tmp_path / "c").items()


def test_sounds_of_several_events(example: Example, tmp_path: Path) -> None:
    for name, options in {"a": ("--train", 40), "b": ("--train", 12), "c": ("--train", 12, "--seed", 1)}.items():
        assert example("sound_events", "--output", tmp_path / name, "--val", 8, *options)[0] == 0
    found = files_of(tmp_path / "a")
    train, val = (segments_of(tmp_path / "a" / f"{split}.csv") for split in ("train", "val"))
    assert set(found) == {
        *("train.csv", "val.csv", "class_labels_indices.csv"),
        *(f"train/{name}.wav" for name in train),
        *(f"val/{name}.wav" for name in val),
    }
    assert (len(train), len(val)) == (40, 8)
    assert not train.keys() & val.keys()
    with open(tmp_path / "a" / "class_labels_indices.csv") as file:
        classes = list(csv.DictReader(file))
    assert [row["index"] for row in classes] == [str(index) for index in range(8)]
    assert classes[0] == {"index": "0", "mid": "chirp_up", "display_name": "Rising chirp"}
    assert {label for labels in train.values() for label in labels} == {row["mid"] for row in classes}
    assert {len(set(labels)) for labels in train.values()} == {1, 2, 3}
    sounds = {name: read_sound(tmp_path / "a" / "train" / f"{name}.wav") for name in train}
    assert {(sound.shape, sound.dtype.name) for sound in sounds.values()} == {((32000,), "float32")}
    assert min(np.abs(sound).max() for sound in sounds.values()) > 0.05
    for split in ("train", "val"):
        fewer, more = (files_of(tmp_path / name / split) for name in ("b", "a"))
        assert list(map(fewer.get, sorted(fewer))) == list(map(more.get, sorted(more)))[: len(fewer)]
    assert files_of(tmp_path / "b")["train.csv"] != files_of(tmp_path / "c")["train.csv"]
    assert example("sound_events", "--output", tmp_path / "d", "--val", 8, "--train", 12)[0] == 0
    assert files_of(tmp_path / "d") == files_of(tmp_path / "b")


def write_recordings(folder: Path) -> None:
    """Recordings of three digits, which are tones of (digit + 1) kHz, or 100 Hz higher in the takes for validation."""
    folder.mkdir()
    for digit in range(3):
        for take in (0, 4, 5, 17):
            hertz = 1000 * (digit + 1) + 100 * (take < 5)
            samples = 3000 * np.sin(2 * np.pi * hertz * np.arange(3000 + 100 * take) / 8000)
            with wave.open(str(folder / f"{digit}_ann_{take}.wav"), "wb") as file:
                file.setparams((1, 2, 8000, 0, "NONE", ""))
                file.writeframes(samples.astype("<i2").tobytes())


def test_sounds_of_two_digits(example: Example, tmp_path: Path) -> None:
    write_recordings(tmp_path / "recordings")
    for name, options in {"a": (), "b": (), "c": ("--seed", 1)}.items():
        words = ("--data", tmp_path / "recordings", "--output", tmp_path / name, "--train", 9, "--val", 5, *options)
        assert example("mixed_digits", *words)[0] == 0
    found = files_of(tmp_path / "a")
    assert found == files_of(tmp_path / "b")
    assert found["train.csv"] != files_of(tmp_path / "c")["train.csv"]
    assert len(found["class_labels_indices.csv"].splitlines()) == 11
    names = ["zero", "one", "two"]
    for split, count, more in (("train", 9, 0), ("val", 5, 100)):
        labels = segments_of(tmp_path / "a" / f"{split}.csv")
        assert len(labels) == count
        assert {path.stem for path in (tmp_path / "a" / split).iterdir()} == set(labels)
        for clip, both in labels.items():
            with wave.open(str(tmp_path / "a" / split / f"{clip}.wav")) as file:
                assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (8000, 1, 2)
                samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
            assert len(samples) == 12000
            spectrum = np.abs(np.fft.rfft(samples))
            heard = {hertz for hertz in range(1000, 4000, 100) if spectrum[round(hertz * 1.5)] > 0.2 * spectrum.max()}
            assert heard == {1000 * (names.index(label) + 1) + more for label in both}
            assert len(heard) == 2
            parts = np.abs(samples).reshape(-1, 40).max(1) > 0  # they overlap: no silence between them
            assert parts[parts.argmax() : len(parts) - parts[::-1].argmax()].all()


@pytest.mark.parametrize("name", ["moving_digits", "sound_events", "mixed_digits"])
def test_data_sets_refuse_bad_input_in_one_sentence(example: Example, tmp_path: Path, name: str) -> None:
    write_recordings(tmp_path / "recordings")
    words: list[object] = ["--data", tmp_path / "recordings"] if name == "mixed_digits" else []
    words += ["--train", 1, "--val", 1]
    (tmp_path / "file").write_text("mine")
    cases: list[tuple[list[object], str]] = [
        (["--output", tmp_path], "not an empty folder"),
        (["--output", tmp_path / "file"], "not an empty folder"),
        (["--output", tmp_path / "file" / "below"], "cannot be written"),
        (["--output", tmp_path / "new", "--val", 0], "--val is 0"),
        (["--output", tmp_path / "new", "--seed", -1], "--seed is -1"),
    ]
    if name == "moving_digits":
        cases += [
            (["--output", tmp_path / "new", "--size", 97], "even"),
            (["--output", tmp_path / "new", "--frames", 1], "2"),
        ]
    if name == "mixed_digits":
        (tmp_path / "damaged").mkdir()
        (tmp_path / "damaged" / "0_ann_0.wav").write_bytes(b"RIFF and then nothing")
        cases += [
            (["--output", tmp_path / "new", "--data", tmp_path / "none"], "is not a folder"),
            (["--output", tmp_path / "new", "--data", tmp_path / "damaged"], "0_ann_0.wav is no complete WAV file"),
            (["--output", tmp_path / "new", "--data", EXAMPLES], "has no recordings of two digits"),
        ]
    for options, reason in cases:
        code, err = example(name, *words, *options)
        assert code == 2, options
        assert err.startswith("error: "), options
        assert len(err.splitlines()) == 1, err
        assert reason in err
    assert not (tmp_path / "new").exists()
    assert (tmp_path / "file").read_text() == "mine"
