"""GPU step: the `tokenmerge` command on the GPU, as a person runs it, from the demo's model to a tuned and trained one."""

from __future__ import annotations

import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpu_steps import Bench

ROOT = Path(__file__).resolve().parents[1]
MODEL = "local-dir:digits/model"
LINES = (  # {d}: the device and dtype; {m}, {b}: a model of names and a batch size, small in a rehearsal
    "eval MODEL --data digits/val --r 0 8 16 {d}",
    "train MODEL --config laptop --epochs 1 --r 16 --data digits --output run",
    "eval local-dir:run/model --data digits/val {d}",
    "visualize MODEL digits/val/3/0002.png --r 8 --out three.html {d}",
    "export MODEL --r 8 --format pt2 --output three.pt2 {d}",
    "compare MODEL --data digits/val --r 16 --limit 32 --methods evit random {d}",
    "bench {m} --r 0 13 --batch-size {b} --tune --rounds 5 {d}",
    "bench {m} --break-even --batch-size {b} --rounds 3 {d}",
)


def commands(bench: Bench) -> None:
    """Run every command that takes a device on it, and record its exit code, seconds and last line."""
    device = "cpu --dtype float32" if bench.rehearse else "cuda --dtype bfloat16"
    name, batch = ("deit_tiny_patch16_224 --img-size 64", 2) if bench.rehearse else ("vit_base_patch16_224", 64)
    with tempfile.TemporaryDirectory() as folder:
        run(bench, folder, "demo --export digits")
        for line in LINES[:1] if bench.rehearse else LINES:
            run(bench, folder, line.replace("MODEL", MODEL).format(d=f"--device {device}", m=name, b=batch))


def run(bench: Bench, folder: str, line: str) -> None:
    """Run one command line in a folder."""
    entry = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import tokenmerge_command; tokenmerge_command.entry()"
    start = time.perf_counter()
    words = [sys.executable, "-c", entry, *shlex.split(line)]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    printed = done.stdout.strip() + "\n" + done.stderr.strip()
    if done.returncode or not bench.rehearse:
        print("\n".join(f"    {text}" for text in printed.splitlines()[-30:]), flush=True)
    bench.note(
        what="command",
        line=line,
        exit_code=done.returncode,
        seconds=time.perf_counter() - start,
        printed=printed[-2000:],
    )
