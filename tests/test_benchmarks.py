"""Benchmarks: what is compared computes the same, rows are only appended, figures come from rows, every script runs."""

from __future__ import annotations

import csv
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tokenmerge
from tests.tiny import images_for, tiny

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import attention
import common
import gpu
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
    for module in (common, plot, gpu):
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
    run("overhead.py", "--rounds", "2", monkeypatch=monkeypatch)
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


def test_the_gpu_command(results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a GPU it says so; with one it runs existing files, stops at the first failure, and ends with a table."""
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main() == 2
    assert "sees no CUDA device" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "processor", lambda device: "some GPU")
    ran: list[list[str]] = []
    codes = iter([0] * 3 + [1])

    class Done:
        def __init__(self, command: list[str], **_: Any) -> None:
            ran.append(command[1:])
            self.returncode = next(codes)

    monkeypatch.setattr(subprocess, "run", Done)
    assert gpu.main() == 1
    assert len(ran) == 4
    assert all(Path(word).is_file() for command in ran for word in command if word.endswith(".py") and "/" in word[:1])
    times = {"dense": 10.0, "dense compiled": 8.0, "merged": 6.0, "merged compiled": 4.0, "sliced compiled": 3.9}
    shape = {"benchmark": "models", "processor": "some GPU", "model": "vit", "img_size": 512, "batch_size": 64, "r": 40}
    shape |= {"dtype": "bfloat16", "date": "today", "commit": "a", "command": "models.py"}
    common.append([{**shape, "variant": "dense", "ms": 1.0, "commit": "older"}])
    common.append([{**shape, "variant": name, "ms": ms} for name, ms in times.items()])
    codes = iter([0] * 9)
    assert gpu.main() == 0
    out = capsys.readouterr().out
    assert all(text in out for text in ("vit@512", "1.67", "2.00", "1.03"))
