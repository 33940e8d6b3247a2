"""`tokenmerge compare` and `search` as a person runs them, on a small model and a small folder of images."""

from __future__ import annotations

import csv
import json
import random
import shutil
from pathlib import Path

import pytest
import torch

import tokenmerge
from tests.conftest import Run
from tokenmerge.tools.compare.scoring import Scores
from tokenmerge.tools.pages import Figure, Table, write_report
from tokenmerge.tools.search.space import START, full, random_parameters, shaped
from tokenmerge.tools.statistics import bootstrap

PLUGIN = '''
import tokenmerge
from tokenmerge.matching.joining import join_nearest, lowest

@tokenmerge.register_matcher("first_come")
def first_come(metric, r, protected=0, power=1.0):
    """Merge the first r tokens into the most similar of the others."""
    score = metric.new_zeros(metric.shape[:2])
    similarity = metric.float() @ metric.float().transpose(1, 2)
    return join_nearest(similarity, lowest(score, min(r, (metric.shape[1] - protected) // 2), protected), protected)

tokenmerge.register_method("gentle", combine="norm", source="a test")
'''


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    file = tmp_path / "mine.py"
    file.write_text(PLUGIN)
    return file


def test_compare_writes_everything_and_resumes(
    run: Run, model_dir: Path, data: Path, tmp_path: Path, plugin: Path
) -> None:
    words: tuple[object, ...] = (
        "compare",
        f"local-dir:{model_dir}",
        "--pretrained",
        "--data",
        data,
        "--r",
        4,
        8,
        "--methods",
        "evit",
        "first_come",
    )
    words = (*words, "gentle", "--plugin", plugin, "--workers", 0, "--batch-size", 4, "--rounds", 1, "--output", "out")
    code, out, _ = run(*words, "--json", "rows.json")
    assert code == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["method"] for row in rows] == ["unmerged", *["tome", "evit", "first_come", "gentle"] * 2]
    assert "first_come" in out
    folder = tmp_path / "out"
    assert json.loads((folder / "compare.json").read_text()) == rows
    with (folder / "compare.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    page = (folder / "compare.html").read_text()
    assert page.count("<svg") == 2
    assert "first_come" in page
    for row in rows[1:]:
        assert row["top1_low"] <= row["top1_difference"] <= row["top1_high"]
        assert row["speedup"] > 0
        assert row["overhead"] > 0
        assert row["images_per_second"] > 0
        assert tokenmerge.MergeConfig.from_json(row["config"])
    assert rows[1]["top1_difference"] == rows[1]["divergence_difference"] == 0, "what others are compared with"

    kept = sorted((folder / "scores").iterdir())
    assert len(kept) == 8
    kept[0].write_text("{ damaged")
    before = [file.stat().st_mtime_ns for file in kept]
    code, out, _ = run(*words, "--json", "again.json")
    assert code == 0
    assert "7 of 8 variants were scored before" in out
    assert [file.stat().st_mtime_ns for file in kept][1:] == before[1:]
    again = json.loads((tmp_path / "again.json").read_text())
    assert [row["top1"] for row in again] == [row["top1"] for row in rows]


def test_top1_and_divergence_are_what_they_say(run: Run, model_dir: Path, data: Path, tmp_path: Path) -> None:
    same = ("--pretrained", "--data", data, "--workers", 0, "--batch-size", 4, "--r", 6)
    assert run("eval", f"local-dir:{model_dir}", *same, "--json", "eval.json")[0] == 0
    assert (
        run("compare", f"local-dir:{model_dir}", *same, "--methods", "tome", "--rounds", 0, "--json", "compare.json")[0]
        == 0
    )
    evaluated = json.loads((tmp_path / "eval.json").read_text())[0]
    compared = json.loads((tmp_path / "compare.json").read_text())
    assert compared[1]["top1"] == pytest.approx(evaluated["top1"])
    assert compared[0]["divergence"] == 0 < compared[1]["divergence"]


def test_a_speedup_that_is_out_of_reach_is_named(run: Run, model_dir: Path, data: Path) -> None:
    words = ("compare", f"local-dir:{model_dir}", "--pretrained", "--data", data, "--workers", 0, "--batch-size", 4)
    code, _, err = run(*words, "--methods", "tome", "--rounds", 1, "--speedups", 50)
    assert code == 2
    assert "out of reach" in err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("compare", "deit_tiny_patch16_224", "--data", "nowhere", "--r", "4"), "does not exist"),
        (("compare", "--data", "nowhere", "--r", "4"), "no MODEL"),
        (("compare", "m", "--data", "d"), "nothing says how much to merge"),
        (("compare", "m", "--data", "d", "--r", "4", "--speedups", "2"), "both given"),
        (("compare", "m", "--data", "d", "--paper", "nope"), "known are imagenet1k"),
        (("compare", "m", "--data", "d", "--paper", "pruning", "--methods", "tome"), "exclude each other"),
        (("compare", "m", "--data", "d", "--r", "4", "--plugin", "nope.py"), "failed (FileNotFoundError"),
        (("compare", "m", "--data", "d", "--r", "4", "--plugin", "EXIT"), "failed (SystemExit: 3)"),
        (("bench", "deit_tiny_patch16_224", "--r", "4", "--matcher", "nope"), "is not registered"),
        (("bench", "deit_tiny_patch16_224", "--r", "4", "--set", "iterations=3"), "has no option 'iterations'"),
        (("bench", "deit_tiny_patch16_224", "--r", "4", "--set", "iterations"), "NAME=VALUE"),
        (("bench", "deit_tiny_patch16_224", "--r", "nope.json"), "cannot be read"),
        (("search", "deit_tiny_patch16_224", "--data", "nowhere"), "does not exist"),
    ],
)
def test_bad_input_is_one_sentence(run: Run, tmp_path: Path, args: tuple[str, ...], words: str) -> None:
    (tmp_path / "exit.py").write_text("import sys; sys.exit(3)")
    code, _, err = run(*(str(tmp_path / "exit.py") if word == "EXIT" else word for word in args))
    assert code == 2
    assert words in err
    assert len(err.strip().splitlines()) == 1 or err.startswith("warning")


@pytest.mark.slow
def test_search_finds_writes_and_resumes(run: Run, model_dir: Path, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    words: tuple[object, ...] = (
        "search",
        f"local-dir:{model_dir}",
        "--pretrained",
        "--data",
        data,
        "--workers",
        0,
        "--batch-size",
        4,
    )
    words = (
        *words,
        "--calibration",
        4,
        "--holdout",
        8,
        "--speedup",
        1.01,
        "--rounds",
        1,
        "--storage",
        "sqlite:///s.db",
    )
    code, out, err = run(*words, "--trials", 7, "--output", "best.json", "--json", "rows.json")
    if code == 2:  # a model this small may not get faster on this machine at all
        assert "no setting reached" in err or "out of reach" in err
    else:
        config = tokenmerge.MergeConfig.from_json((tmp_path / "best.json").read_text())
        assert isinstance(config.r, int) or len(config.r or ()) == 3  # constant, or a number for each block
        assert "finalist: a constant r" in out
        assert "found − constant" in out
        assert run("bench", f"local-dir:{model_dir}", "--r", "best.json", "--num-bench-iter", 1)[0] == 0
    _, out, _ = run(*words, "--trials", 8, "--output", "best.json", "--random", 3)
    assert "7 trials were there already" in out
    for more, what in (
        (("--holdout", 7), "another holdout"),
        (("--data", shutil.copytree(data, tmp_path / "other")), "another data"),
        (("--speedup", 1.02, "--calibration", 5), "another speed-up and another calibration"),
    ):
        code, _, err = run(*words, *more, "--trials", 8)
        assert (code, what in err) == (2, True), err
    before = (tmp_path / "s.db").read_bytes()
    code, _, err = run(*words, "--trials", 8, "--output", "s.db")
    assert (code, "storage names this file, too" in err) == (2, True)
    assert (tmp_path / "s.db").read_bytes() == before
    assert "of 3 random schedules of the same FLOPs" in out


def test_shapes_of_schedules() -> None:
    def fraction(schedule: tuple[int, ...]) -> float:
        left, total = 100, 0
        for r in schedule:
            total += left
            left -= r
        return total / (100 * len(schedule))

    for start in START:
        schedule = shaped(full(start, 6), 0.8, 6, 100, 1, fraction)
        assert fraction(schedule) <= 0.8
        assert len(schedule) == 6
    constant = shaped(full({}, 6), 0.8, 6, 100, 1, fraction)
    assert max(constant) - min(constant) == 0
    falling = shaped(full({"inflect": -1.0}, 6), 0.8, 6, 100, 1, fraction)
    assert falling[0] > falling[-1]
    assert shaped(full({"spared": 2}, 6), 0.8, 6, 100, 1, fraction)[:2] == (0, 0)
    last = shaped(full({"last": True}, 6), 0.8, 6, 100, 1, fraction)
    assert last[-1] > last[-2]
    draw = random.Random(0)
    drawn = [shaped(random_parameters(draw, 6), 0.8, 6, 100, 1, fraction) for _ in range(5)]
    assert len(set(drawn)) == 5
    for schedule in drawn:
        assert 0.75 < fraction(schedule) <= 0.8
    nearly = {"shape": "free", **{f"part_{i}": 1e-6 * (i == 3) for i in range(6)}}
    assert [r > 0 for r in shaped(full(nearly, 6), 0.9, 6, 100, 1, fraction)] == [i == 3 for i in range(6)]


def test_intervals_are_paired() -> None:
    torch.manual_seed(0)
    one = (torch.rand(2000) < 0.7).double()
    other = one.clone()
    other[:40] = 1 - other[:40]  # differs in 40 images only
    paired = bootstrap(100 * (other - one))
    assert paired.low <= paired.mean <= paired.high
    assert paired.high - paired.low < 1.5
    assert bootstrap(torch.full((100,), 2.0)).differs
    assert not bootstrap(torch.tensor([-1.0, 1.0] * 50)).differs
    assert str(bootstrap(torch.full((10,), 2.0))) == "+2.00 [+2.00, +2.00]"


def test_scores_survive_only_whole(tmp_path: Path) -> None:
    top1, top5, divergence = (torch.rand(5, dtype=torch.float64) for _ in range(3))
    scores = Scores(top1, top5, divergence, 1.5)
    scores.save(tmp_path / "a.json")
    again = Scores.load(tmp_path / "a.json")
    assert again is not None
    assert torch.equal(again.divergence, scores.divergence)
    assert again.gflops == 1.5
    assert Scores.load(tmp_path / "none.json") is None
    (tmp_path / "a.json").write_text((tmp_path / "a.json").read_text()[:20])
    assert Scores.load(tmp_path / "a.json") is None


def test_nothing_from_outside_becomes_markup(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    table = Table(evil, [evil], [[evil]])
    write_report(tmp_path / "page.html", evil, [evil], [table], [Figure(evil, "<?xml?><svg></svg>")], [{evil: evil}])
    page = (tmp_path / "page.html").read_text()
    assert "<script>alert" not in page
    assert "<img" not in page
    assert page.count("</script>") == 2


def test_the_page_about_methods_of_ones_own(run: Run, model_dir: Path, data: Path, tmp_path: Path) -> None:
    """Its first block is a plugin, and its command runs with it."""
    page = (Path(__file__).parents[2] / "docs" / "extend.md").read_text()
    (tmp_path / "mine.py").write_text(page.partition("```python\n")[2].partition("```")[0])
    lines = page.replace("\\\n", " ").splitlines()
    command = next(line for line in lines if line.startswith("tokenmerge compare"))
    words = (
        command.replace("MODEL", f"local-dir:{model_dir}")
        .replace("DIR", str(data))
        .replace("--r 13", "--r 6")
        .split()[1:]
    )
    code, out, _ = run(*words, "--pretrained", "--workers", 0, "--rounds", 0)
    assert code == 0
    assert "least_at" in out
