"""The command as a person runs it, on a small model in timm's hub format and a small folder of images."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.conftest import CLASSES, Run


def test_eval_gives_one_row_per_r(run: Run, model_dir: Path, data: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    settings = ("0", "4", "6:-1", "3,0,5", "keep=0.8", "flops=0.6")
    command = (
        "eval",
        f"local-dir:{model_dir}",
        "--pretrained",
        "--data",
        data,
        "-b",
        5,
        "-j",
        0,
        "--json",
        file,
        "--r",
    )
    code, out, err = run(*command, *settings)
    rows = json.loads(file.read_text())
    assert code == 0, err
    assert [row["r"] for row in rows] == [0, 4, *settings[2:]]
    for row in rows:
        assert {
            "model",
            "r",
            "top1",
            "top5",
            "images_per_second",
            "gflops",
            "images",
            "skipped",
            "config",
        } <= row.keys()
        assert (row["images"], row["skipped"], row["top5"]) == (12, 0, 100.0)
        assert row["images_per_second"] > 0
    assert rows[0]["gflops"] > rows[1]["gflops"]
    assert "top-1" in out
    assert "random weights" not in err
    _, again, _ = run(*command[:-2], "-", "--r", *settings)
    assert [row["top1"] for row in json.loads(again)] == [row["top1"] for row in rows]


def test_eval_accuracy_is_the_models(run: Run, model_dir: Path, data: Path) -> None:
    """Against a loop written out by hand with timm's own transform."""
    import timm
    from timm.data.config import resolve_data_config
    from timm.data.transforms_factory import create_transform

    import tokenmerge

    model: Any = timm.create_model(f"local-dir:{model_dir}", pretrained=True).eval()
    transform: Any = create_transform(**resolve_data_config({}, model=model))
    tokenmerge.patch(model, r=4)
    correct = 0
    with torch.no_grad():
        for label, name in enumerate(CLASSES):
            for file in (data / name).iterdir():
                correct += int(model(transform(Image.open(file)).unsqueeze(0)).argmax() == label)
    _, out, _ = run("eval", f"local-dir:{model_dir}", "--pretrained", "--data", data, "--r", 4, "--json", "-")
    assert json.loads(out)[0]["top1"] == pytest.approx(100 * correct / 12)


def test_a_limit_takes_files_evenly(run: Run, model_dir: Path, data: Path) -> None:
    command = ("eval", f"local-dir:{model_dir}", "--data", data, "--r", 4, "--json", "-", "-j", 0)
    assert json.loads(run(*command, "--limit", 5)[1])[0]["images"] == 5
    assert json.loads(run(*command, "--limit", 500)[1])[0]["images"] == 12
    assert "--limit: 0 was given" in run(*command, "--limit", 0)[2]


def test_damaged_images_are_named_counted_and_strict(run: Run, model_dir: Path, data: Path) -> None:
    whole = (data / "bee/1.png").read_bytes()
    (data / "bee/1.png").write_bytes(whole[: len(whole) // 2])
    (data / "cat/text.jpg").write_text("no image")
    (data / "ant/empty.jpeg").touch()
    command = ("eval", f"local-dir:{model_dir}", "--pretrained", "--data", data, "--r", 4, "--json", "-")
    for workers in (0, 2):
        code, out, err = run(*command, "-j", workers)
        row = json.loads(out)[0]
        assert (code, row["images"], row["skipped"]) == (0, 11, 3)
        for name in ("bee/1.png", "cat/text.jpg", "ant/empty.jpeg"):
            assert name in err
    assert run(*command, "--strict")[0] == 1


def test_classes_follow_the_models_names(run: Run, model_dir: Path, data: Path) -> None:
    config = json.loads((model_dir / "config.json").read_text())
    config["label_names"] = ["cat", "bee", "ant"]
    (model_dir / "config.json").write_text(json.dumps(config))
    command = ("eval", f"local-dir:{model_dir}", "--pretrained", "--data", data, "--r", 0, "--json", "-")
    backwards = json.loads(run(*command)[1])[0]["top1"]
    (data / "names.txt").write_text("cat\nbee\nant\n")
    mapped = json.loads(run(*command, "--class-map", data / "names.txt")[1])[0]["top1"]
    assert backwards == mapped
    for text, words in (
        ("cat\nbee\n", "lists 2 classes, but the model has 3"),
        ("cat\nbee\nowl\n", "'ant' are not in the class map"),
    ):
        (data / "names.txt").write_text(text)
        code, _, err = run(*command, "--class-map", data / "names.txt")
        assert code == 2
        assert words in err
    (data / "names.txt").unlink()
    for image in (data / "ant").iterdir():
        image.unlink()
    (data / "ant").rmdir()
    assert json.loads(run(*command)[1])[0]["images"] == 8  # two of three classes: their names say which


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        ("missing", "does not exist, but one folder per class"),
        ("empty", "holds no images"),
        ("flat", "instead of in one folder per class"),
        ("classes", "holds 4 class folders, but the model has 3 outputs"),
        ("unreadable", "none of the 3 images"),
        ("headless", "has no classifier"),
        ("twice", "holds the class 'ant' twice, in train/ant and val/ant"),
    ],
)
def test_data_that_cannot_be_evaluated(
    run: Run, model_dir: Path, data: Path, tmp_path: Path, spoil: str, words: str
) -> None:
    folder = tmp_path / "other"
    if spoil != "missing":
        folder.mkdir()
    if spoil == "flat":
        (folder / "a.png").write_bytes((data / "ant/0.png").read_bytes())
    if spoil == "twice":  # the folder above train/ and val/
        for part in ("train", "val"):
            shutil.copytree(data, folder / part)
    if spoil in ("classes", "unreadable"):
        for name in (*CLASSES, "dog")[: 4 if spoil == "classes" else 3]:
            (folder / name).mkdir()
            (folder / name / "a.png").write_bytes(b"" if spoil == "unreadable" else (data / "ant/0.png").read_bytes())
    options = ("--num-classes", 0) if spoil == "headless" else ("--pretrained",)
    code, _, err = run("eval", f"local-dir:{model_dir}", *options, "--data", folder, "--r", 4)
    assert code == 2
    assert words in err
    err = err.replace("warning: the model has random weights", "").rpartition("tokenmerge: ")[2]
    assert len(err.strip().splitlines()) == 1


def test_checkpoints(run: Run, model_dir: Path, data: Path, tmp_path: Path) -> None:
    command = ("eval", f"local-dir:{model_dir}", "--data", data, "--r", 4, "--json", "-")
    code, out, _ = run(*command, "--checkpoint", model_dir / "model.safetensors")
    assert code == 0
    assert json.loads(out)[0]["top1"] == json.loads(run(*command, "--pretrained")[1])[0]["top1"]
    code, named, err = run(*command)  # a folder that is named is wanted with its weights
    assert json.loads(out)[0]["top1"] == json.loads(named)[0]["top1"]
    assert "random weights" not in err
    assert "random weights" in run("eval", "vit_tiny_patch16_224", "--num-classes", 3, *command[2:])[2]

    whole = (model_dir / "model.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:1000])
    torch.save({"state_dict": {"head.weight": torch.zeros(2, 2)}}, tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("no weights")
    torch.save({"head.bias": 5}, tmp_path / "number.pth")
    for file, words in (
        ("nowhere.pth", "No such file"),
        ("cut.safetensors", "cannot be read"),
        ("text.pth", "cannot be read"),
        ("number.pth", "is no tensor"),
        ("other.pth", "does not fit the model: 43 missing such as"),
    ):
        code, _, err = run(*command, "--checkpoint", tmp_path / file)
        assert (code, len(err.strip().splitlines())) == (2, 1), err
        assert words in err
    (model_dir / "model.safetensors").write_bytes(whole[:1000])
    code, _, err = run(*command, "--pretrained")
    assert code == 2
    assert "cannot be made" in err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("inspect", "vit_tiny_patch16_224", "--r", "-3"), "r=-3 is negative"),
        (("inspect", "vit_tiny_patch16_224", "--r", "x"), "r='x' is not understood"),
        (("inspect", "vit_tiny_patch16_224", "--r", "keep=0.2"), "keep=0.2"),
        (("inspect", "vit_tiny_patch16_224", "--r", "ratio=2"), "is not understood"),
        (("inspect", "vit_tiny_patch16_224", "--r", "1,2,3,4,5,6,7,8,9,10,11,12,13"), "r lists 13 blocks"),
        (("inspect", "vit_tiny_patch16_224", "--matcher", "nope"), "matcher='nope' is not registered"),
        (("inspect", "vit_tinny_patch16_224"), "cannot be made"),
        (("inspect", "some/where"), "cannot be made"),
        (("inspect", "local-dir:nowhere"), "holds no config.json"),
        (("inspect", "vit_tiny_patch16_224", "--json", "no/where.json"), "does not exist"),
        (("bench", "vit_tiny_patch16_224", "--r", "4", "--device", "cuda:7"), "device 'cuda:7' cannot be used here"),
        (("bench", "vit_tiny_patch16_224", "--r", "4", "--device", "meta"), "it holds no values"),
        (("bench", "vit_tiny_patch16_224", "--r", "4", "--batch-size", "0"), "of at least 1 was expected"),
        (("bench", "vit_tiny_patch16_224", "--r", "4", "--batch-size", "1000000000"), "memory ran out"),
        (("bench", "resnet18", "--r", "4"), "ResNet holds no model that tokenmerge supports"),
        (("bench", "vit_tiny_patch16_224"), "--r"),
        (("bench", "vit_tiny_patch16_224", "--r", "4", "--img-size", "8"), "smaller than one patch"),
        (("bench", "vit_tiny_patch16_224", "--r", "4", "--device", "hpu"), "device 'hpu' cannot be used here"),
        (("inspect", "vit_tiny_patch16_224", "--r", ","), "is not understood"),
        (("inspect", "vit_tiny_patch16_224", "--json", "."), "is a folder"),
        (
            ("eval", "vit_tiny_patch16_224", "--r", "4", "--data", ".", "--crop-pct", "nan"),
            "a finite number of at least 0.1",
        ),
        (("eval", "vit_tiny_patch16_224", "--r", "4", "--data", ".", "--std", "0", "0", "0"), "a number above 0"),
        (("eval", "vit_tiny_patch16_224", "--r", "4", "--data", ".", "--interpolation", "foo"), "was expected"),
        (("nope",), "there is no command"),
        (("demo", "--output", "picture.nope"), "cannot be written"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(run: Run, args: tuple[str, ...], words: str) -> None:
    code, _, err = run(*args)
    assert code == 2
    assert words in err
    assert len(err.strip().splitlines()) == 1, err


def test_inspect(run: Run) -> None:
    code, out, _ = run("inspect", "deit_tiny_distilled_patch16_224", "--r", 8, 16)
    assert code == 0
    assert "2 prefix tokens" in out
    code, out, _ = run(
        "inspect", "vit_giant_patch14_reg4_dinov2", "--r", "flops=0.5", "--json", "-"
    )  # a billion parameters
    (row,) = json.loads(out)
    assert row["supported"]
    assert row["prefix_tokens"] == 5
    assert 2 <= row["flops_ratio"] < 2.1
    assert row["gflops"] == pytest.approx(sum(row["gflops_per_block"]), rel=0.02)
    code, out, _ = run("inspect", "swin_tiny_patch4_window7_224")
    assert code == 2
    assert "not supported" in out
    assert not json.loads(run("inspect", "resnet18", "--json", "-")[1])[0]["supported"]


def test_bench(run: Run, model_dir: Path) -> None:
    code, out, _ = run("bench", f"local-dir:{model_dir}", "--r", 0, 4, "6:-1", "-b", 2, "--num-bench-iter", 3)
    assert code == 0
    assert "overhead" in out
    code, out, _ = run(
        "bench",
        f"local-dir:{model_dir}",
        "--r",
        4,
        "-b",
        2,
        "--num-bench-iter",
        2,
        "--statistic",
        "min",
        "--dtype",
        "bfloat16",
        "--json",
        "-",
    )
    rows = json.loads(out)
    assert [row["r"] for row in rows] == [0, 4]
    needed = (
        "model r batch_size device dtype images_per_second speedup flops_ratio realised overhead peak_memory_mb config"
    )
    assert set(needed.split()) <= rows[1].keys()
    base, merged = rows
    assert (base["speedup"], base["flops_ratio"], base["overhead"]) == (1, 1, 1)
    assert merged["speedup"] == pytest.approx(base["ms"] / merged["ms"])
    assert merged["realised"] == pytest.approx(merged["speedup"] / merged["flops_ratio"])
    assert merged["peak_memory_mb"] > 0


def test_it_says_so_when_merging_does_not_pay(run: Run, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With made-up times, because real ones depend on the machine: merged passes as slow as unmerged ones."""
    from tokenmerge.tools.bench import measure as bench

    command = ("bench", f"local-dir:{model_dir}", "--r", 4, "-b", 1, "--num-bench-iter", 2)
    for merged, pays in ((1.0, False), (0.5, True)):
        monkeypatch.setattr(bench, "take_turns", lambda *args, merged=merged: [[1.0, 1.0], [merged] * 2, [0.5, 0.5]])
        _, out, _ = run(*command)
        assert ("Merging does not pay at this shape: r=4" in out) is not pays


@pytest.mark.slow
def test_demo_and_module_entry(tmp_path: Path) -> None:
    """In a process of its own, without the terminal: as somebody tries it first."""
    environment = {**os.environ, "COLUMNS": "80"}
    command = [sys.executable, "-m", "tokenmerge", "demo", "--json", "demo.json", "--output", "demo.png"]
    command += ["--r", "8", "--r", "16"]  # lists add up, and the baseline comes by itself
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    rows = json.loads((tmp_path / "demo.json").read_text())
    assert [row["r"] for row in rows] == [0, 8, 16]
    assert rows[0]["top1"] > 95
    assert rows[1]["top1"] > rows[0]["top1"] - 3
    with Image.open(tmp_path / "demo.png") as picture:
        assert picture.width > 300


PER_CLASS = int(os.environ.get("TOKENMERGE_IMAGES_PER_CLASS", "1"))
REFERENCE = {10: (70.15, 67.45, 63.75), 2: (70.0, 66.0, 62.0), 1: (74.0, 69.0, 66.0)}
"""Top-1 of r = 0, r = 16, and r = 16 without proportional attention, by how many images of each class are taken.

All ten are the reference, which takes five minutes of one core; fewer were evaluated when all ten agreed with it.
"""


@pytest.mark.slow
def test_eval_reproduces_the_reference(run: Run, shared: Path, tmp_path: Path) -> None:
    for folder in (shared / "data/tiny-imagenet/val").iterdir():
        (tmp_path / "val" / folder.name).mkdir(parents=True)
        for image in sorted(folder.iterdir())[:PER_CLASS]:
            (tmp_path / "val" / folder.name / image.name).symlink_to(image)
    model = f"local-dir:{shared}/data/vit_tiny_patch16_224_tinyimagenet"
    command = ("eval", model, "--pretrained", "--data", tmp_path / "val", "--json", "-")
    small = ("--batch-size", 8)  # of which a core's cache holds more: a tenth faster than the default
    rows = json.loads(run(*command, *small, "--r", 0, 16)[1])
    assert [row["top1"] for row in rows] == pytest.approx(REFERENCE[PER_CLASS][:2], abs=0.3 / PER_CLASS)
    assert [row["images"] for row in rows] == [200 * PER_CLASS] * 2
    (row,) = json.loads(run(*command, *small, "--r", 16, "--prop-attn", "off")[1])
    assert row["top1"] == pytest.approx(REFERENCE[PER_CLASS][2], abs=0.3 / PER_CLASS)
