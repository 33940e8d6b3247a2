"""Benchmarks: what is compared computes the same, rows are only appended, figures come from rows, every script runs."""

from __future__ import annotations

import csv
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tokenmerge
from tests.helpers.tiny import images_for, tiny

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import attention
import common
import gpu
import gpu_steps
import ops
import plot
import straightforward

FOLDER = Path(common.__file__).parent


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty results.csv in a folder of its own."""
    path = tmp_path / "benchmarks" / "results.csv"
    path.parent.mkdir()
    (tmp_path / "docs").mkdir()
    for module in (common, plot):
        monkeypatch.setattr(module, "RESULTS", path)
    monkeypatch.setattr(plot, "IMAGES", tmp_path / "docs" / "images")
    return path


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "vit_small_patch16_224"])
@torch.no_grad()
def test_the_straightforward_version_is_the_same_computation(name: str) -> None:
    model = tiny(name)
    images = images_for(model)
    plain = straightforward.straightforward(model, 5)(images)
    with tokenmerge.patched(model, r=5):
        torch.testing.assert_close(plain, model(images), rtol=1e-4, atol=1e-4)


def test_rows_are_only_appended(results: Path) -> None:
    """A row with a new column leaves the older ones as they were, with that column empty."""
    common.append([{"model": "a", "ms": 1.5}, {"model": "b", "ms": 2}])
    common.append([{"model": "c", "tokens": 7}])
    with results.open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [["model", "ms", "tokens"], ["a", "1.5", ""], ["b", "2", ""], ["c", "", "7"]]


def test_a_row_says_what_made_it(results: Path) -> None:
    calls: list[str] = []
    work = {"first": lambda: calls.append("first"), "second": lambda: calls.append("second")}
    rows = common.record("test", work, "cpu", {"tokens": 5}, rounds=3, warmup=1, extra={"second": {"gap": 0.5}})
    assert sorted(calls) == ["first"] * 4 + ["second"] * 4
    written = read(results)
    assert [row["variant"] for row in written] == ["first", "second"]
    assert [row["gap"] for row in written] == ["", "0.5"]
    for row in written:
        assert all(
            row[name] for name in ("date", "commit", "command", "processor", "python", "torch", "timm", "threads")
        )
        assert float(row["ms_p20"]) <= float(row["ms_p50"]) <= float(row["ms_p80"])
        assert (row["benchmark"], row["device"], row["tokens"], row["rounds"]) == ("test", "cpu", "5", "3")
    assert rows["first"]["speedup"] == 1.0


def run(script: str, *options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(FOLDER / script), *options])
    runpy.run_path(str(FOLDER / script), run_name="__main__")


@pytest.mark.slow
def test_every_script_runs(results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As a person runs them, but on small work; and the figures can be drawn from what they wrote."""
    monkeypatch.setattr(common, "CPU_MODELS", (("deit_tiny_patch16_224", 64, 2, 2),))
    monkeypatch.setattr(common, "SMALL_BATCHES", (("deit_tiny_patch16_224", 64, 2, 1, "bfloat16"),))
    run("overhead.py", "--rounds", "2", "--processes", "2", monkeypatch=monkeypatch)
    variants = ("dense", "straightforward", "sliced", "merged")
    run("models.py", "--rounds", "2", "--variants", *variants, monkeypatch=monkeypatch)
    monkeypatch.setitem(attention.SHAPES, "cpu", [(1, 2, 9, 16)])
    attention_work(monkeypatch)
    rows = read(results)
    assert {row["benchmark"] for row in rows} == {"overhead", "models", "attention", "ops"}
    assert {row["variant"] for row in rows if row["benchmark"] == "models"} == set(variants)
    assert all(float(row["gap"]) < 1e-5 for row in rows if row["benchmark"] == "attention" and row["gap"])
    monkeypatch.setattr(sys, "argv", ["plot.py"])
    plot.main()
    assert "plot_scaling: no rows" in capsys.readouterr().out
    assert (plot.IMAGES / "speed.svg").read_text().startswith("<?xml")


def attention_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """`attention.py` and `ops.py` on one small shape each, in this process."""
    monkeypatch.setitem(ops.SIZES, "cpu", {33: 2})
    monkeypatch.setattr(ops, "ceilings", lambda *_: (1e9, 1e9))
    for module in (attention, ops):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", "--rounds", "2"])
        module.main()


def test_figures_come_from_rows_alone(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The latest row of a kind counts, other processors' rows do not, and the same rows give the same file."""
    machine = {
        "processor": "this one",
        "threads": 2,
        "dtype": "float32",
        "torch": "2",
        "date": "",
        "commit": "",
        "command": "",
    }
    shape = {"model": "deit_tiny_patch16_224", "img_size": 224, "r": 13, "batch_size": 16, "flops_ratio": 1.7}

    def row(benchmark: str, variant: str, speedup: float, **more: Any) -> dict[str, Any]:
        times = {"speedup": speedup, "speedup_p20": speedup - 0.1, "speedup_p80": speedup + 0.1}
        return {"benchmark": benchmark, "variant": variant, **machine, **shape, **times, **more}

    common.append([row("models", "merged", 9.0), row("models", "dense", 1.0), row("models", "merged", 1.6)])
    common.append([row("models", "merged", 30.0, processor="another")])
    common.append([row("scaling", "merged", 1.0 + n / 1000, tokens=n, batch_size=1) for n in (197, 577)])
    for variant, unmerged, merged in (("off the shelf", 70.25, 61.5), ("fine-tuned with merging", 72.0, 69.75)):
        common.append([row("finetune", variant, 0, r=r, top1=top1) for r, top1 in ((0, unmerged), (16, merged))])
    monkeypatch.setattr(sys, "argv", ["plot.py", "--processor", "this one"])
    plot.main()
    tuned = (plot.IMAGES / "finetune.svg").read_text()
    assert all(text in tuned for text in ("70.25", "61.50", "72.00", "69.75", "fine-tuned with merging", "r=16"))
    first = [(plot.IMAGES / name).read_text() for name in ("speed.svg", "scaling.svg")]
    assert "deit_tiny@224" in first[0]
    assert "577" in first[1]
    plot.main()
    assert [(plot.IMAGES / name).read_text() for name in ("speed.svg", "scaling.svg")] == first
    common.append([row("models", "merged", 1.8)])
    plot.main()
    assert (plot.IMAGES / "speed.svg").read_text() != first[0]
    assert (plot.IMAGES / "scaling.svg").read_text() == first[1]


def test_the_gpu_command_without_a_gpu(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """It says so and runs nothing; a folder without rows of a GPU adds nothing to the results."""
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main() == 2
    assert "sees no CUDA device" in capsys.readouterr().err
    row = {"step": "ops", "rehearsal": True, "what": "op", "ms": 1.0}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--into-results", str(tmp_path)])
    assert gpu.main() == 2
    assert "holds no rows of a GPU" in " ".join(capsys.readouterr().err.split())  # a long path wraps the line
    assert not results.exists()
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write(json.dumps({**row, "rehearsal": False, "processor": "some GPU"}) + "\n")
    assert gpu.main() == 0
    assert [one["processor"] for one in read(results)] == ["some GPU"]


def test_a_step_that_fails_or_hangs_stops_no_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Each is a process with a limit; how it ended is in the table, and the exit code says that not all went well."""
    ran: list[tuple[str, float]] = []

    def pretend(command: list[str], timeout: float, **_: Any) -> Any:
        ran.append((command[2], timeout))
        if command[2] == "card":
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, 3 if command[2] == "checks" else 0)

    monkeypatch.setattr(subprocess, "run", pretend)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--steps", "card", "checks", "ops"])
    assert gpu.main() == 1
    out = capsys.readouterr().out
    limits = {step: limit for step, (_, limit) in gpu_steps.STEPS.items()}
    assert ran == [(step, limits[step]) for step in ("card", "checks", "ops")]
    assert all(text in out for text in ("time ran out", "exit code 3", "well"))
    assert sum(limits.values()) <= 400  # each may be slow, not all of them
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--rehearse", "--steps", "ops"])
    patience: list[float] = []
    monkeypatch.setattr(gpu, "rehearsed", lambda step, folder, limit: patience.append(limit))
    assert gpu.main() == 1  # on a CPU that others use too: only what hangs is ended
    assert patience == [gpu.PATIENCE * limits["ops"]]
    assert "time ran out" in capsys.readouterr().out
    shape = {"what": "model", "model": "vit", "img_size": 512, "batch_size": 64, "flops_ratio": 2.0}
    times = {("eager", "dense"): 10.0, ("eager", "merged"): 6.0, ("graph", "dense"): 8.0, ("graph", "merged"): 4.0}
    rows = [{**shape, "mode": mode, "variant": variant, "ms": ms} for (mode, variant), ms in times.items()]
    assert gpu.models_table(rows) == [
        ["vit@512", "64", "eager", "10.00", "6.00", "1.67", "1.33", "2.00"],
        ["vit@512", "64", "graph", "8.00", "4.00", "2.00", "2.00", "2.00"],
    ]


@pytest.mark.slow
def test_the_rehearsal_passes_every_step(tmp_path: Path) -> None:
    """As a contributor runs it before a GPU is there; every step leaves rows."""
    environment = {**os.environ, "OUT": str(tmp_path)}
    command = [sys.executable, str(FOLDER / "gpu.py"), "--rehearse"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {row["step"] for row in rows} == set(gpu_steps.STEPS)
    assert all(row["rehearsal"] and row["processor"] for row in rows)


@pytest.mark.slow
def test_two_trees_take_turns(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """This tree against its own commit: two processes, pass by pass, each with its own tokenmerge."""
    if not (FOLDER.parent / ".git").exists():
        pytest.skip("needs the repository's history")
    monkeypatch.setattr(common, "CPU_MODELS", (("deit_tiny_patch16_224", 64, 2, 2),))
    monkeypatch.setattr(common, "SMALL_BATCHES", ())
    run("overhead.py", "--against", "HEAD", "--rounds", "3", "--processes", "1", monkeypatch=monkeypatch)
    assert "mean ratio" in capsys.readouterr().out
    assert [row["variant"] for row in read(results)] == ["over HEAD"]
