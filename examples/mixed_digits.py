"""Make a data set of sounds with two labels each, in the form of AudioSet: two spoken digits that overlap.

    python examples/mixed_digits.py --data RECORDINGS --output DIR

RECORDINGS holds the Free Spoken Digit Dataset (github.com/Jakobovski/free-spoken-digit-dataset, folder `recordings`; CC
BY-SA 4.0, which holds for the clips too): 8 kHz WAV files named `{digit}_{speaker}_{take}.wav`. The script writes clips of 1.5
seconds at the same rate, and their labels:

    DIR/train/clip0001.wav …          DIR/train.csv
    DIR/val/clip4001.wav …            DIR/val.csv
    DIR/class_labels_indices.csv      names of the ten digits

The tables have the form of AudioSet's own: `train.csv` and `val.csv` begin with comments, and each line after them names a clip, its
start and end in seconds, and its labels, as `clip0001, 0.000, 1.500, "two,seven"`.

The two digits of a clip are different; the recordings, and thus the speakers, are chosen at random. Each is made equally loud, then louder or
softer by up to 6 dB. They overlap by at least a third of the shorter one, often wholly. As in the official split, val uses takes 0 to 4 and train
all others. A clip depends on --seed and its own number in its split, not on how many others there are.
"""

from __future__ import annotations

import argparse
import re
import sys
import wave
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

RATE, SECONDS = 8000, 1.5
SAMPLES = round(RATE * SECONDS)
LEVEL = 0.06  # root mean square of a recording before it is made louder or softer
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

Sound = NDArray[np.float64]
Recordings = dict[int, list[Sound]]


class UsageError(Exception):
    """Error that the user can fix, with a message of one sentence."""


def read_wav(path: Path) -> Sound:
    """Read the samples of a mono 16-bit file, and scale them to the common loudness."""
    try:
        with wave.open(str(path)) as file:
            form = (file.getframerate(), file.getnchannels(), file.getsampwidth())
            samples = np.frombuffer(file.readframes(file.getnframes()) if form == (RATE, 1, 2) else b"", dtype="<i2")
    except (wave.Error, EOFError, ValueError):
        raise UsageError(f"{path.name} is no complete WAV file: fetch the Free Spoken Digit Dataset again") from None
    except OSError as error:
        raise UsageError(f"{path.name} cannot be read ({error.strerror}): check --data") from None
    if form != (RATE, 1, 2):
        raise UsageError(f"{path.name} is not 8 kHz mono with 16 bits: --data must hold the Free Spoken Digit Dataset")
    sound = samples.astype(np.float64)
    loudness = float(np.sqrt(np.mean(sound**2))) if len(sound) else 0.0
    return sound * (LEVEL / loudness) if loudness else sound


def load(folder: Path) -> dict[str, Recordings]:
    """Read the recordings of both splits by digit, without the few that are longer than a clip or silent."""
    found: dict[str, Recordings] = {"train": {}, "val": {}}
    for path in track(
        sorted(folder.glob("*.wav")),
        "read",
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    ):
        name = re.fullmatch(r"([0-9])_[^_]+_([0-9]+)\.wav", path.name)
        if name is None:
            continue
        sound = read_wav(path)
        if 0 < len(sound) <= SAMPLES and sound.any():
            found["val" if int(name[2]) < 5 else "train"].setdefault(int(name[1]), []).append(sound)
    for takes, split in (("from 5", "train"), ("0 to 4", "val")):
        if len(found[split]) < 2:
            raise UsageError(
                f"--data '{folder}' has no recordings of two digits named digit_speaker_take.wav with takes {takes}"
            )
    return found


def mix(rng: np.random.Generator, recordings: Recordings) -> tuple[Sound, list[str]]:
    """Return the samples of a clip in [−1, 1] and its two labels in the order of the digits."""
    digits = rng.choice(sorted(recordings), size=2, replace=False)
    first, second = (
        recordings[digit][rng.integers(len(recordings[digit]))] * 10 ** (rng.uniform(-6, 6) / 20) for digit in digits
    )
    overlap = -(-min(len(first), len(second)) // 3)
    start = int(rng.integers(SAMPLES - len(first) + 1))
    earliest = max(0, start + overlap - len(second))
    latest = min(SAMPLES - len(second), start + len(first) - overlap)
    other = int(rng.integers(earliest, latest + 1))
    clip = np.zeros(SAMPLES)
    clip[start : start + len(first)] += first
    clip[other : other + len(second)] += second
    return clip / max(1.0, float(np.abs(clip).max())), [DIGITS[digit] for digit in sorted(digits)]


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
    """Raise `UsageError` for numbers out of range, no folder of recordings, or a folder for the clips that is not empty."""
    for name, value, least in (("train", args.train, 1), ("val", args.val, 1), ("seed", args.seed, 0)):
        if value < least:
            raise UsageError(f"--{name} is {value}, but must be at least {least}")
    if not args.data.is_dir():
        raise UsageError(f"--data '{args.data}' is not a folder: give the folder of the recordings")
    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        raise UsageError(f"--output '{args.output}' is not an empty folder: choose a new one")


def run(args: argparse.Namespace) -> None:
    """Read the recordings, then write all clips and their labels."""
    check(args)
    recordings = load(args.data)
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
        rng = np.random.default_rng([args.seed, int(split == "val"), index])
        samples, rows[split][name] = mix(rng, recordings[split])
        write_wav(args.output / split / f"{name}.wav", samples)
    for split, found in rows.items():
        write_segments(args.output / f"{split}.csv", found)
    classes = [f'{index},{name},"{name.capitalize()}"' for index, name in enumerate(DIGITS)]
    text = "\n".join(["index,mid,display_name", *classes]) + "\n"
    (args.output / "class_labels_indices.csv").write_text(text, encoding="utf-8")
    print(f"{args.train} clips to train on and {args.val} to validate, of two digits each: {args.output}")


def main() -> int:
    """Parse the command line and run; for invalid input, print one sentence and return 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the recordings")
    parser.add_argument("--output", type=Path, required=True, help="folder for the data set, new or empty")
    parser.add_argument("--train", type=int, default=4000, help="clips to train on (%(default)s)")
    parser.add_argument("--val", type=int, default=600, help="clips to validate on (%(default)s)")
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
