"""Make a data set of sounds with several labels each, in the form of AudioSet: up to three synthetic events in two seconds.

    python examples/sound_events.py --output DIR

It writes 16 kHz mono WAV files and their labels:

    DIR/train/clip0001.wav …          DIR/train.csv
    DIR/val/clip0601.wav …            DIR/val.csv
    DIR/class_labels_indices.csv      names of the eight classes

The tables have the form of AudioSet's own: `train.csv` and `val.csv` begin with comments, and each line after them names a clip, its
start and end in seconds, and its labels, as `clip0001, 0.000, 2.000, "chirp_up,bell"`.

A clip has one to three different kinds of events over soft noise. Pitch, length, loudness and onset are random, and events mostly
overlap. A clip depends on --seed and its own number in its split, not on how many others there are.
"""

from __future__ import annotations

import argparse
import sys
import wave
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

RATE, SECONDS = 16000, 2.0
SAMPLES = round(RATE * SECONDS)
FADE = RATE // 200  # 5 ms, so that no event begins or ends with a click

Sound = NDArray[np.float64]
Rng = np.random.Generator


class UsageError(Exception):
    """Error that the user can fix, with a message of one sentence."""


def times(rng: Rng, low: float, high: float) -> Sound:
    """Return the times of the samples of an event whose length is between two numbers of seconds."""
    return np.arange(round(RATE * rng.uniform(low, high))) / RATE


def tone(hertz: Sound) -> Sound:
    """Return a sine of a frequency that varies over time."""
    sine: Sound = np.sin(2 * np.pi * np.cumsum(hertz) / RATE)
    return sine


def chirp_up(rng: Rng) -> Sound:
    """Return a tone that rises by one to two octaves."""
    time = times(rng, 0.4, 1.0)
    return tone(rng.uniform(400, 1500) * 2 ** (rng.uniform(1.0, 2.0) * time / time[-1]))


def chirp_down(rng: Rng) -> Sound:
    """Return a tone that falls by one to two octaves."""
    return chirp_up(rng)[::-1]


def beep(rng: Rng) -> Sound:
    """Return a steady pure tone."""
    return tone(np.full(len(times(rng, 0.3, 0.8)), rng.uniform(600, 3000)))


def siren(rng: Rng) -> Sound:
    """Return a tone with a third and a fifth harmonic that alternates between two pitches."""
    time = times(rng, 0.9, 1.5)
    low, interval, half = rng.uniform(450, 900), rng.uniform(1.25, 1.5), rng.uniform(0.15, 0.25)
    hertz = np.where((time / half).astype(int) % 2, low, low * interval)
    return sum((tone(n * hertz) / level for n, level in ((1, 1), (3, 4), (5, 8))), np.zeros(len(time)))


def bell(rng: Rng) -> Sound:
    """Return partials that are no harmonics and die away, the higher ones faster."""
    time, pitch, decay = times(rng, 0.8, 1.5), rng.uniform(400, 900), rng.uniform(0.25, 0.5)
    partials = [(1.0, 1.0), (2.0, 0.6), (2.76, 0.7), (4.07, 0.4), (5.4, 0.4), (7.2, 0.2)]
    waves = [level * np.sin(2 * np.pi * pitch * f * time) * np.exp(-time * f**0.5 / decay) for f, level in partials]
    return sum(waves, np.zeros(len(time)))


def noise(rng: Rng) -> Sound:
    """Return noise of all frequencies, which fades."""
    time = times(rng, 0.25, 0.7)
    fading: Sound = np.exp(-rng.uniform(0.5, 2.0) * time / time[-1])
    return fading * rng.standard_normal(len(time))


def clicks(rng: Rng) -> Sound:
    """Return short clicks at a steady pace."""
    time, pace, pitch = times(rng, 0.7, 1.3), rng.uniform(7, 14), rng.uniform(1500, 3500)
    since = time % (1 / pace)  # the last click
    return np.sin(2 * np.pi * pitch * since) * np.exp(-since / 0.003)


def hum(rng: Rng) -> Sound:
    """Return a low tone with many harmonics."""
    time, pitch = times(rng, 0.8, 1.5), rng.uniform(90, 180)
    waves = [np.sin(2 * np.pi * n * pitch * time + rng.uniform(0, 2 * np.pi)) / n for n in range(1, 13)]
    return sum(waves, np.zeros(len(time)))


KINDS: dict[str, tuple[str, Callable[[Rng], Sound]]] = {
    "chirp_up": ("Rising chirp", chirp_up),
    "chirp_down": ("Falling chirp", chirp_down),
    "beep": ("Beep", beep),
    "siren": ("Two-tone siren", siren),
    "bell": ("Bell", bell),
    "noise": ("Noise burst", noise),
    "clicks": ("Clicks", clicks),
    "hum": ("Hum", hum),
}


def mix(rng: Rng) -> tuple[Sound, list[str]]:
    """Return the samples of a clip in [−1, 1] and its labels in the order of the classes."""
    clip = rng.standard_normal(SAMPLES) * 10 ** (rng.uniform(-60, -45) / 20)
    chosen = sorted(rng.choice(len(KINDS), size=rng.integers(1, 4), replace=False))
    labels = [list(KINDS)[index] for index in chosen]
    for label in labels:
        event = KINDS[label][1](rng).copy()
        ramp = np.linspace(0, 1, FADE)
        event[:FADE] *= ramp
        event[-FADE:] *= ramp[::-1]
        loudness = 10 ** (rng.uniform(-14, 0) / 20)
        start = rng.integers(SAMPLES - len(event) + 1)
        clip[start : start + len(event)] += 0.5 * loudness * event / np.abs(event).max()
    return clip / max(1.0, float(np.abs(clip).max())), labels


def write_wav(path: Path, samples: Sound) -> None:
    """Write samples in [−1, 1] as a mono file with 16 bits."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((samples * 32767).round().astype("<i2").tobytes())


def write_segments(path: Path, rows: Mapping[str, Sequence[str]]) -> None:
    """Write the labels of clips in the form of AudioSet's segment files."""
    every = [label for labels in rows.values() for label in labels]
    lines = [
        f"# Segments csv created by {Path(__file__).name}",
        f"# num_ytids={len(rows)}, num_segs={len(rows)}, num_unique_labels={len(set(every))}, num_positive_labels={len(every)}",
        "# YTID, start_seconds, end_seconds, positive_labels",
        *(f'{name}, 0.000, {SECONDS:.3f}, "{",".join(labels)}"' for name, labels in rows.items()),
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def check(args: argparse.Namespace) -> None:
    """Raise `UsageError` for numbers out of range and for a folder that is not empty."""
    for name, value, least in (("train", args.train, 1), ("val", args.val, 1), ("seed", args.seed, 0)):
        if value < least:
            raise UsageError(f"--{name} is {value}, but must be at least {least}")
    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        raise UsageError(f"--output '{args.output}' is not an empty folder: choose a new one")


def run(args: argparse.Namespace) -> None:
    """Write all clips, then their labels."""
    check(args)
    for split in ("train", "val"):
        (args.output / split).mkdir(parents=True)
    rows: dict[str, dict[str, list[str]]] = {"train": {}, "val": {}}
    for number in track(
        range(args.train + args.val),
        "clips",
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    ):
        split, index = ("train", number) if number < args.train else ("val", number - args.train)
        name = f"clip{number + 1:04d}"
        samples, rows[split][name] = mix(np.random.default_rng([args.seed, int(split == "val"), index]))
        write_wav(args.output / split / f"{name}.wav", samples)
    for split, found in rows.items():
        write_segments(args.output / f"{split}.csv", found)
    classes = [f'{index},{mid},"{name}"' for index, (mid, (name, _)) in enumerate(KINDS.items())]
    text = "\n".join(["index,mid,display_name", *classes]) + "\n"
    (args.output / "class_labels_indices.csv").write_text(text, encoding="utf-8")
    print(f"{args.train} clips to train on and {args.val} to validate, of {len(KINDS)} kinds of events: {args.output}")


def main() -> int:
    """Parse the command line and run; for invalid input, print one sentence and return 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the data set, new or empty")
    parser.add_argument("--train", type=int, default=600, help="clips to train on (%(default)s)")
    parser.add_argument("--val", type=int, default=200, help="clips to validate on (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        run(args)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        reason = getattr(error, "strerror", None) or error
        print(f"error: --output '{args.output}' cannot be written ({reason}): choose another folder", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
