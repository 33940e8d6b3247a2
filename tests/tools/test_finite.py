"""Outputs that are no finite numbers are an error, and never an accuracy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tools.test_train_folder import data as two_classes  # noqa: F401 the fixture
from tests.tools.test_train_folder import words
from tokenmerge.cli import main
from tokenmerge.errors import InputError
from tokenmerge.tools.compare.scoring import score
from tokenmerge.tools.eval.scores import Score
from tokenmerge.tools.settings import parse_setting

Run = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_output_of_one_image(value: float) -> None:
    logits = torch.zeros(4, 3)
    logits[2, 1] = value
    images, labels = torch.zeros(4, 1), torch.zeros(4, dtype=torch.int64)
    found = Score(parse_setting("8"), lambda _: logits, 1.0)
    with pytest.raises(InputError, match=r"outputs at r=8 are .* for 1 of 4 inputs"):
        found.add(images, labels)
    assert found.images == 0
    with pytest.raises(InputError, match="for 1 of 4 inputs"):
        score(lambda _: logits, [(images, labels)], None)


@pytest.mark.parametrize("command", ["eval", pytest.param("compare", marks=pytest.mark.slow)])
def test_commands_end_in_one_sentence(run: Run, model_dir: Path, data: Path, tmp_path: Path, command: str) -> None:
    weights = load_file(model_dir / "model.safetensors")
    weights["head.bias"][1] = float("nan")
    save_file(weights, model_dir / "model.safetensors")
    more: tuple[Any, ...] = ("--json", "rows.json") if command == "eval" else ("--output", "out")
    model = (f"local-dir:{model_dir}", "--pretrained")
    code, out, err = run(command, *model, "--data", data, "--r", 0, 4, "--workers", 0, "--batch-size", 4, *more)
    assert code == 2, out
    assert err.count("tokenmerge: the model's outputs at r=0 are NaN for 4 of 4 inputs") == 1
    assert not (tmp_path / "rows.json").exists()


def test_training_does_not_report_accuracy_of_nan(
    two_classes: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The weights overflow in the evaluation only, as with a moving average of weights that were not finite."""
    from tokenmerge.tools.train import loop

    evaluate = loop.evaluate_settings

    def overflowing(model: Any, *args: Any) -> Any:
        with torch.no_grad():
            next(model.parameters()).fill_(float("nan"))
        return evaluate(model, *args)

    monkeypatch.setattr(loop, "evaluate_settings", overflowing)
    assert main(words(two_classes, tmp_path / "run", "--epochs", 1)) == 2
    said = capsys.readouterr()
    assert "outputs at r=0 are NaN" in said.err
    assert "top-1" not in said.out
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["kind"] == "train" for row in rows)
    assert not (tmp_path / "run" / "model").exists()
