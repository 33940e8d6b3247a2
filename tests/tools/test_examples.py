"""The examples run offline as they are."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip_zero_shot", "image_text_similarity", "features"])
def test_runs_without_network(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--output", "features.safetensors"] if name == "features" else []
    monkeypatch.setattr(sys, "argv", [name, *options])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert {"clip_zero_shot": "flower.jpg", "image_text_similarity": "tokens after each block", "features": "patches"}[
        name
    ] in out
    assert max(map(len, out.splitlines())) <= 100
    if options:
        assert (tmp_path / "features.safetensors").stat().st_size > 10_000
