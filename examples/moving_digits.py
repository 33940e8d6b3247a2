"""Make a data set of videos: a handwritten digit moves up, down, left or right, and the class is its colour.

    pip install "tokenmerge[media,demo]"
    python examples/moving_digits.py --output DIR

It writes `DIR/train/CLASS/N.mp4` and `DIR/val/CLASS/N.mp4`, where CLASS is blue, green, red or yellow; the numbers of videos are
per class. Each shows one of scikit-learn's handwritten digits, enlarged to a third of the frame, that moves steadily over a soft
background for two seconds. Digit, shade, size, place, speed and direction are random and say nothing about the class, and
the digits in train and val are different images. The task is easy on purpose, so that a small model learns it in minutes.

The digit does not turn round: it may leave the frame partly at the start and the end of a video, but most of it is in view in
between, in the middle half. A video depends on --seed and its own number, not on how many others there are.
"""

from __future__ import annotations

import argparse
import colorsys
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import track
from sklearn.datasets import load_digits

SECONDS = 2
COLOURS = {"blue": 0.6, "green": 0.36, "red": 0.98, "yellow": 0.13}  # hues
DIRECTIONS = ((0, 1), (-1, 0), (1, 0), (0, -1))  # x and y; y grows downwards
CODECS = ("libx264", "mpeg4")  # in the order of preference
REACH = 0.44  # how far from the middle of the frame the centre of a digit may be in the middle half of the video, of the side


class UsageError(Exception):
    """Error that the user can fix, with a message of one sentence."""


def colour(hue: float, saturation: float, value: float) -> NDArray[np.float64]:
    """Return RGB in [0, 255]."""
    return 255 * np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value))


def background(rng: np.random.Generator, hue: float, light: bool, size: int) -> NDArray[np.float64]:
    """Return `[size, size, 3]`: nine related colours that blend into each other."""
    low, high = (0.78, 0.97) if light else (0.25, 0.5)
    knots = [colour(hue + rng.uniform(-0.12, 0.12), rng.uniform(0.02, 0.15), rng.uniform(low, high)) for _ in range(9)]
    small = Image.fromarray(np.array(knots).reshape(3, 3, 3).round().astype(np.uint8))
    return np.asarray(small.resize((size, size), Image.Resampling.BICUBIC)).astype(np.float64)


def placed(digit: NDArray[np.float64], x: float, y: float, side: float, size: int) -> NDArray[np.float64]:
    """Return the 8 × 8 digit as `[size, size]`, `side` pixels wide, around (x, y), which need not be whole pixels."""
    padded = np.pad(digit, 2).astype(np.float32)
    step, middle = 8 / side, len(padded) / 2
    place = (step, 0.0, middle - step * x, 0.0, step, middle - step * y)
    image = Image.fromarray(padded).transform((size, size), Image.Transform.AFFINE, place, Image.Resampling.BICUBIC)
    return np.asarray(image).astype(np.float64)


def draw(
    rng: np.random.Generator, digit: NDArray[np.float64], ink_hue: float, frames: int, size: int
) -> Iterator[NDArray[np.uint8]]:
    """Draw the frames `[size, size, 3]` of one video."""
    light, hue = bool(rng.random() < 0.6), rng.random()
    behind = background(rng, hue, light, size)
    ink = colour(ink_hue + rng.uniform(-0.03, 0.03), rng.uniform(0.7, 0.95), rng.uniform(0.6, 0.95))
    direction = np.array(DIRECTIONS[rng.integers(len(DIRECTIONS))])
    side = size * rng.uniform(0.32, 0.39)
    travel = rng.uniform(0.3, 0.5)  # in the whole video, as a part of the frame's side
    middle = rng.uniform(-1, 1, 2) * (REACH - travel / 4)
    for time in np.linspace(-0.5, 0.5, frames):
        x, y = size * (0.5 + middle + time * travel * direction)
        edge = np.clip((placed(digit, x, y, side, size) - 0.18) / 0.35, 0, 1)
        shadow = np.clip(placed(digit, x + 0.02 * size, y + 0.03 * size, side, size), 0, 1)
        shape = (edge**2 * (3 - 2 * edge))[..., None]
        shown = behind * (1 - 0.3 * shadow[..., None]) * (1 - shape) + ink * shape
        yield shown.round().clip(0, 255).astype(np.uint8)


def write_mp4(path: Path, frames: Iterator[NDArray[np.uint8]], rate: int, size: int) -> None:
    """Encode frames `[size, size, 3]` on one thread, so that the file does not depend on the machine's cores."""
    codec = next((name for name in CODECS if name in av.codecs_available), None)
    if codec is None:
        raise UsageError(f"this PyAV has none of the encoders {' and '.join(CODECS)}: install PyAV's wheel from PyPI")
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream: Any = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = size, size, "yuv420p"
        stream.bit_rate = 16 * size * size  # high enough for soft gradients
        stream.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    path.write_bytes(file.getvalue())


def check(args: argparse.Namespace) -> None:
    """Raise `UsageError` for numbers out of range and for a folder that is not empty."""
    for name, value, least in (("train", args.train, 1), ("val", args.val, 1), ("frames", args.frames, 2)):
        if value < least:
            raise UsageError(f"--{name} is {value}, but must be at least {least}")
    if args.size < 32 or args.size % 2:
        raise UsageError(f"--size is {args.size}, but must be an even number of at least 32 pixels")
    if args.seed < 0:
        raise UsageError(f"--seed is {args.seed}, but must not be negative")
    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        raise UsageError(f"--output '{args.output}' is not an empty folder: choose a new one")


def run(args: argparse.Namespace) -> None:
    """Write all videos."""
    check(args)
    images = load_digits().images / 16
    images = images[np.random.default_rng(args.seed).permutation(len(images))]
    parts = {"train": images[: len(images) * 4 // 5], "val": images[len(images) * 4 // 5 :]}
    counts = {"train": args.train, "val": args.val}
    clips = [(split, name, number) for split in parts for name in COLOURS for number in range(counts[split])]
    for split, name, number in track(
        clips, "videos", console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()
    ):
        rng = np.random.default_rng([args.seed, list(parts).index(split), list(COLOURS).index(name), number])
        digit = parts[split][rng.integers(len(parts[split]))]
        path = args.output / split / name / f"{number}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        frames = draw(rng, digit, COLOURS[name], args.frames, args.size)
        write_mp4(path, frames, max(1, round(args.frames / SECONDS)), args.size)
    print(f"{args.train} videos to train on and {args.val} to validate for each of {', '.join(COLOURS)}: {args.output}")


def main() -> int:
    """Parse the command line and run; for invalid input, print one sentence and return 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the videos, new or empty")
    parser.add_argument("--train", type=int, default=60, help="videos to train on, per class (%(default)s)")
    parser.add_argument("--val", type=int, default=20, help="videos to validate on, per class (%(default)s)")
    parser.add_argument("--frames", type=int, default=40, help=f"frames per video, in {SECONDS} seconds (%(default)s)")
    parser.add_argument("--size", type=int, default=96, help="side of a frame in pixels (%(default)s)")
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
