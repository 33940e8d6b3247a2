"""What a person sees of a run: results stay on the screen and in train.log, and the hint can be pasted."""

from __future__ import annotations

import json
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers import terminal
from tests.tools.test_train_folder import data, words  # noqa: F401 the fixture
from tokenmerge.cli import main
from tokenmerge.tools.media import IMAGES, VIDEOS
from tokenmerge.tools.settings import label_of, parse_setting
from tokenmerge.tools.train.hint import evaluation
from tokenmerge.tools.train.options import TrainOptions
from tokenmerge.tools.train.publish import merging_of_run


def test_the_screen() -> None:
    lines, lost = terminal.screen("one\r\ntwo\r\x1b[2Kthree\r\n\x1b[1A\x1b[1Afour\x1b[0m\r\n", 80)
    assert lines == ["four", "three", ""]
    assert lost == ["two", "one", "fne", "foe"]
    assert terminal.screen("abcdef", 4)[0] == ["abcd", "ef"]


@pytest.mark.parametrize("columns", [80, pytest.param(120, marks=pytest.mark.slow)])
def test_results_stay_on_the_screen(data: Path, tmp_path: Path, columns: int) -> None:  # noqa: F811
    """Loss and top-1 of every epoch, each once, above bars that disappear; then the hint, which runs."""
    output = tmp_path / "run with spaces"
    command = words(data, output, "--epochs", 3, "--r", 3, "--lr", 0.003, "--eval-r", 0, 3)
    seen = terminal.run([sys.executable, "-m", "tokenmerge", *command], columns)
    assert seen.code == 0, seen.lines
    shown = "\n".join(seen.lines)
    for epoch in range(3):
        assert (
            len(re.findall(rf"^epoch {epoch}: loss \d+\.\d+, \d+\.\d images/s, r \[3, 3\]$", shown, re.MULTILINE)) == 1
        )
    assert len(re.findall(r"^  r=0: top-1 [\d.]+, r=3: top-1 [\d.]+$", shown, re.MULTILINE)) == 3
    assert not [line for line in seen.overwritten if re.search("^epoch |top-1|tokenmerge eval|wrote", line)]
    assert "updates" in seen.raw
    assert "━" not in shown
    start = next(i for i, line in enumerate(seen.lines) if line.startswith("tokenmerge eval"))
    hint = "".join(
        line.ljust(columns) for line in seen.lines[start:]
    ).strip()  # as a terminal copies a line that it wrapped
    log = (output / "train.log").read_text().splitlines()
    assert hint == log[-1]
    assert [line for line in log if line.startswith("epoch ")] == re.findall(r"^epoch .*$", shown, re.MULTILINE)
    assert shlex.split(hint)[2:] == [f"local-dir:{output / 'model'}", "--data", str(data / "val")]


def test_the_hint_runs(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    """It gives the accuracy of training, also for a matcher with options."""
    output = tmp_path / "run with spaces"
    more = ("--matcher", "kmeans", "--set", "iterations=2", "metric=x", "--r", "keep=0.7")
    assert main(words(data, output, "--epochs", 2, "--lr", 0.003, *more)) == 0
    out = capsys.readouterr().out
    hint = shlex.split((output / "train.log").read_text().splitlines()[-1])
    assert hint[:2] == ["tokenmerge", "eval"]
    assert main([*hint[1:], "--workers", "0", "--json", str(tmp_path / "rows.json")]) == 0
    top1 = json.loads((tmp_path / "rows.json").read_text())[0]["top1"]
    assert f"top-1 {top1:.2f}" in out.split("epoch 1")[1]


@pytest.mark.slow
def test_results_reach_a_redirected_output(data: Path, tmp_path: Path) -> None:  # noqa: F811
    """A file takes the lines, while the bars stay in the terminal."""
    command = shlex.join([sys.executable, "-m", "tokenmerge", *words(data, tmp_path / "run", "--epochs", 2)])
    seen = terminal.run(["/bin/sh", "-c", f"{command} > {shlex.quote(str(tmp_path / 'out'))}"], 80)
    assert seen.code == 0, seen.lines
    out = (tmp_path / "out").read_text()
    assert out.count("loss") == 2
    assert "tokenmerge eval local-dir:" in out
    assert "\x1b" not in out
    assert "loss" not in "".join(seen.lines)


def test_the_log_goes_on(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    """A run that goes on appends; a new one begins a new log."""
    output = tmp_path / "run"
    assert main(words(data, output, "--epochs", 1)) == 0
    first = (output / "train.log").read_text()
    assert main(words(data, output, "--epochs", 1, "--resume", "auto")) == 0
    log = (output / "train.log").read_text()
    assert log.startswith(first)
    assert "going on after update" in log.removeprefix(first)
    said = "".join(capsys.readouterr().out.split())
    assert all("".join(line.split()) in said for line in log.splitlines())


@pytest.mark.parametrize(
    "text",
    ["0", "8", "8,8,0", "16:-1", "16:0.5", "keep=0.7", "keep=0.3333333333333333", "flops=0.5", "speedup=2.0", "8,"],
)
def test_saved_schedules_are_shown_as_they_are_typed(text: str) -> None:
    config = parse_setting(text).config()
    assert str(label_of(config)) == text


def test_the_hint_names_what_the_model_does_not_keep(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    common = TrainOptions(
        model="m",
        data=tmp_path,
        output=Path("o"),
        r=4,
        val_split="",
        epochs=9,
        warmup_epochs=0,
        r_milestones={"3": 6},
    )
    assert evaluation(["hf:o/model"], common, IMAGES).endswith(f"eval hf:o/model --data {tmp_path}/train")
    assert merging_of_run(common).r == 6
    clips = replace(common, sampling_rate=2, crop_pct=0.9, mean=(0.5, 0.5, 0.25))
    assert evaluation(["hf:o"], clips, VIDEOS).endswith(
        f"{tmp_path}/train --sampling-rate 2 --crop-pct 0.9 --mean 0.5 0.5 0.25"
    )
    named = replace(common, dataset="hfds/x", data=None)
    assert evaluation(["local-dir:o"], named, IMAGES).endswith("eval local-dir:o --dataset hfds/x --split train")
