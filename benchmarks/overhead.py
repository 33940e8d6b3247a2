"""What merging costs beyond dropping tokens, on the five models of the README's table.

    python benchmarks/overhead.py [--rounds 7] [--processes 5] [--only deit_tiny]
    python benchmarks/overhead.py --against COMMIT   # the merged models, now over then

Appends one row per model to benchmarks/results.csv and prints the table. Each model runs in turns with its
unmerged version and with the same number of tokens simply sliced off; ratios are medians over paired rounds.
Where a process happens to lie in memory moves the ratios of small models by some five percent for as long as it lives,
whatever the number of rounds; so each model is measured in several processes, and the process of median overhead counts.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import CPU_MODELS, append, where

from tokenmerge.tools.bench import BenchArgs, measure
from tokenmerge.tools.models import ModelArgs
from tokenmerge.tools.report import Report
from tokenmerge.tools.settings import parse_setting

HERE = Path(__file__).resolve().parent
VIDEO = ("hf:videomae-large", None, 65, 1)  # 1,568 tokens; slow, so only with --video


def one_process(model: ModelArgs, bench: BenchArgs, r: int) -> list[dict[str, Any]]:
    """The rows of one measurement."""
    return measure(model, bench, [parse_setting(str(r))], {}, Report())


def in_processes(count: int, model: ModelArgs, bench: BenchArgs, r: int) -> tuple[list[dict[str, Any]], list[float]]:
    """The rows of the process whose overhead is the median of `count` processes, one after the other; all overheads."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:
        runs = [pool.submit(one_process, model, bench, r).result() for _ in range(count)]
    overheads = [float(run[-1]["overhead"]) for run in runs]
    return runs[overheads.index(statistics.median_low(overheads))], sorted(overheads)


class Turn:
    """A process of `turns.py` that runs the tokenmerge of one tree."""

    def __init__(self, tree: Path, job: tuple[str, int, int, int]) -> None:
        command = [sys.executable, str(HERE / "turns.py"), *(str(word) for word in job)]
        environment = {**os.environ, "PYTHONPATH": str(tree)}
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        found = self._answer()
        if not Path(found).is_relative_to(tree):
            raise SystemExit(f"{found} was imported, but the tokenmerge of {tree} was expected")

    def _answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        if not line:
            raise SystemExit(f"a process of {HERE / 'turns.py'} ended before it answered")
        return line

    def seconds(self) -> float:
        """Those of one pass."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        return float(self._answer())

    def end(self) -> None:
        """Let it go."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def one_pair(now: Path, then: Path, job: tuple[str, int, int, int], rounds: int, now_first: bool) -> float:
    """Median over rounds of the time of this tree's merged model over the other's; both processes live as long.

    Which of them starts first is a matter of where they lie in memory: a tree over itself gave 1.03 and 1.01 when it was always
    the same one.
    """
    started = {tree: Turn(tree, job) for tree in ((now, then) if now_first else (then, now))}
    pair = [started[now], started[then]]
    ratios = []
    for turn in range(rounds + 2):
        order = pair if turn % 2 else pair[::-1]
        seconds = {id(one): one.seconds() for one in order}
        if turn >= 2:
            ratios.append(seconds[id(pair[0])] / seconds[id(pair[1])])
    for one in pair:
        one.end()
    return statistics.median(ratios)


def against(commit: str, args: argparse.Namespace, report: Report) -> None:
    """Merged models of this tree over those of a commit, in a worktree of its own: processes take turns, pass by pass."""
    root = HERE.parent
    table = []
    with tempfile.TemporaryDirectory() as folder:
        then = Path(folder).resolve() / "then"
        subprocess.run(["git", "worktree", "add", "--detach", "--quiet", str(then), commit], cwd=root, check=True)
        try:
            for job in CPU_MODELS:
                if args.only in job[0]:
                    pairs = [one_pair(root, then, job, args.rounds, bool(turn % 2)) for turn in range(args.processes)]
                    table.append((f"{job[0]}@{job[1]}", str(job[2]), str(job[3]), statistics.median(pairs)))
                    report.say(
                        f"{table[-1][0]} {table[-1][-1]:.3f} of " + " ".join(f"{one:.3f}" for one in sorted(pairs))
                    )
                    row = {
                        "model": job[0],
                        "img_size": job[1],
                        "r": job[2],
                        "batch_size": job[3],
                        "variant": f"over {commit}",
                    }
                    append([{**where("against", "cpu"), **row, "rounds": args.rounds, "overhead": table[-1][-1]}])
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(then)], cwd=root, check=True)
    if not table:
        raise SystemExit(f"no model's name contains {args.only!r}")
    cells = [[*row[:3], f"{row[3]:.3f}"] for row in table]
    report.table(f"merged, now over {commit}", ("model", "r", "batch", "time ratio"), cells)
    report.say(f"mean ratio {statistics.mean(row[3] for row in table):.3f}, at most {max(row[3] for row in table):.3f}")


def main() -> None:
    """Measure, append, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--only", default="", help="only models whose name contains this")
    parser.add_argument("--video", action="store_true", help="VideoMAE-L instead")
    parser.add_argument(
        "--statistic", default="median", choices=("median", "min"), help="of paired rounds, or of each side"
    )
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--against", metavar="COMMIT", help="compare with the merged models of a commit instead")
    args = parser.parse_args()
    report = Report()
    if args.against:
        against(args.against, args, report)
        return
    common = where("overhead", args.device)
    table = []
    for name, size, r, batch in (VIDEO,) if args.video else CPU_MODELS:
        if args.only not in name:
            continue
        model = ModelArgs(model=name, img_size=size, device=args.device, dtype=args.dtype)
        bench = BenchArgs(
            batch_size=batch, warmup=2, rounds=args.rounds, statistic=args.statistic, compile=args.compile
        )
        rows, overheads = in_processes(args.processes, model, bench, r)
        append([{**common, **row} for row in rows])
        merged = rows[-1]
        columns = ("speedup", "flops_ratio", "realised", "overhead")
        table.append(
            [f"{name}@{size}" if size else name, str(r), str(batch), *(f"{merged[column]:.2f}" for column in columns)]
        )
        report.say(" ".join(table[-1]) + " of " + " ".join(f"{one:.3f}" for one in overheads))
    if not table:
        raise SystemExit(f"no model's name contains {args.only!r}")
    average = sum(float(row[-1]) for row in table) / len(table)
    report.table("overhead", ("model", "r", "batch", "speed-up", "FLOPs/", "realised", "overhead"), table)
    report.say(f"overhead on average {average:.3f}, at most {max(float(row[-1]) for row in table):.2f}")


if __name__ == "__main__":
    main()
