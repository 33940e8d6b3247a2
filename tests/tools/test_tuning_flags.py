"""`--tune`, `--tune-schedule` and `--tuning` of bench, eval and export."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tokenmerge import Tuning
from tokenmerge.ops.timing import Spread
from tokenmerge.patching.tuning import measure, run
from tokenmerge.tools.export import tune_file
from tokenmerge.tools.tuning import tune

Run = Callable[..., tuple[int, str, str]]
SMALL = ("deit_tiny_patch16_224", "--img-size", "64", "--batch-size", "2")
BENCH = ("bench", *SMALL, "--num-bench-iter", "2", "--num-warm-iter", "0")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """One round, and no form of attention that takes seconds in Triton's interpreter."""
    own = run.Wishes.check

    def check(self: Any) -> None:
        object.__setattr__(self, "rounds", 1)
        if self.load is None:
            object.__setattr__(self, "forms", ["mask"])
            object.__setattr__(self, "backends", ["torch"])
        own(self)

    monkeypatch.setattr(run.Wishes, "check", check)


def decide(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let a schedule be chosen without measuring."""
    monkeypatch.setattr(run, "confirmed", lambda times, again: (name, Spread(1.0, 1.1, 1.2)))


def test_a_record_is_written_once_and_used_afterwards(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decide(monkeypatch, "every 2nd block, late")
    code, out, err = run(*BENCH, "--r", "1", "--tune-schedule", "--tuning", "tuning.json", "--json", "rows.json")
    assert code == 0, err
    assert "written to tuning.json" in " ".join(out.split())
    saved = Tuning.load(tmp_path / "tuning.json")
    row = json.loads((tmp_path / "rows.json").read_text())[1]
    assert row["schedule"] == list(saved.chosen["r"])
    assert row["tuned"] == saved.words
    before = (tmp_path / "tuning.json").read_bytes()
    decide(monkeypatch, "no merging")  # not asked again
    code, out, err = run(*BENCH, "--r", "1", "--tuning", "tuning.json", "--json", "rows.json")
    assert code == 0, err
    assert "from tuning.json" in " ".join(out.split())
    assert json.loads((tmp_path / "rows.json").read_text())[1]["schedule"] == row["schedule"]
    assert (tmp_path / "tuning.json").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--r", "1", "2", "--tuning", "x.json"), "holds one tuning, but 2 settings"),
        (("--r", "1", "--tune", "--compile"), "leave one of them out"),
        (("--break-even", "--tune-schedule"), "give --tune alone"),
        (("--r", "1", "--tuning", "broken.json"), "a record of a tuning was expected"),
        (("--r", "1", "--tune", "--tuning", "nowhere/x.json"), "does not exist"),
    ],
)
def test_flags_that_do_not_fit(words: Sequence[str], said: str, run: Run, tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{}")
    code, _, err = run(*BENCH, *words)
    assert code == 2
    assert said in " ".join(err.split())


def test_a_record_for_another_setting_is_refused(run: Run) -> None:
    assert run(*BENCH, "--r", "1", "--tune", "--tuning", "tuning.json")[0] == 0
    code, _, err = run(*BENCH, "--r", "2", "--tuning", "tuning.json")
    assert code == 2
    assert "is for config {'r': 1}, but {'r': 2} was found" in " ".join(err.split())


def test_break_even_tunes_each_setting(run: Run) -> None:
    code, out, err = run(*BENCH, "--break-even", "--r", "1", "2", "--tune")
    assert code == 0, err
    words = " ".join(out.split())
    assert "batch 1, r=1: tuned for inputs [1, 3, 64, 64]" in words
    assert "batch 2, r=2: tuned for inputs [2, 3, 64, 64]" in words


def test_eval_tunes_on_its_first_batch(
    run: Run, model_dir: Path, data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    decide(monkeypatch, "no merging")
    words = ("eval", f"local-dir:{model_dir}", "--pretrained", "--data", data, "--batch-size", "4", "--workers", "0")
    code, out, err = run(*words, "--r", "0", "4", "--tune-schedule", "--json", "rows.json")
    assert code == 0, err
    assert "r=4: tuned for inputs [4, 3, 48, 48]" in " ".join(out.split())
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert rows[0]["tuned"] is None
    assert "no merging" in rows[1]["tuned"]
    assert rows[1]["gflops"] == rows[0]["gflops"]
    assert rows[1]["top1"] == rows[0]["top1"]


def test_every_process_of_an_evaluation_must_do_the_same() -> None:
    from tokenmerge.errors import InputError
    from tokenmerge.tools.common import TuneOptions
    from tokenmerge.tools.eval.main import _tune

    several: Any = type("Several", (), {"count": 2, "is_main": True})
    with pytest.raises(InputError, match="2 processes were started"):
        _tune([], None, TuneOptions(tune=True), several, None)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("chosen", ["as asked", "no merging", "every 2nd block, late"])
def test_export_keeps_the_fastest_file(
    chosen: str, run: Run, model_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tune_file, "confirmed", lambda times, again: (chosen, Spread(1.0, 1.1, 1.2)))
    words = (
        "export",
        f"local-dir:{model_dir}",
        "--r",
        "4",
        "--format",
        "pt2",
        "--output",
        "model.pt2",
        "--batch-size",
        "1",
    )
    code, out, err = run(*words, "--tune-schedule", "--json", "rows.json")
    assert code == 0, err
    row = json.loads((tmp_path / "rows.json").read_text())[0]
    wanted = {"as asked": 4, "no merging": [0, 0, 0], "every 2nd block, late": [0, 8, 4]}[chosen]
    assert row["config"]["r"] == wanted
    assert "verified" in out
    assert f"merging {chosen}" in " ".join(out.split()) or chosen == "no merging"
    assert run(*words[:2], "--r", "0", *words[4:], "--tune-schedule")[0] == 2


def test_export_moves_no_schedule_that_belongs_to_its_blocks(run: Run, model_dir: Path) -> None:
    words = ("export", f"local-dir:{model_dir}", "--r", "4", "--format", "pt2", "--batch-size", "1", "--tune-schedule")
    code, _, err = run(*words, "--matcher", "diffrate", "--set", "pruned=[0.1,0.2,0.3]")
    assert code == 2
    assert "cannot be moved" in " ".join(err.split())


def test_nothing_is_tuned_unless_it_is_asked_for() -> None:
    from tokenmerge.tools.common import TuneOptions

    assert tune(None, None, None, TuneOptions(), "", print) is None  # type: ignore[arg-type]
    assert measure.GAIN == 1.02
