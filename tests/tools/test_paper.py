"""`tokenmerge compare --paper`: models that exist, figures that are the published ones, and shown only where they belong."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import tokenmerge
from tests.conftest import CLASSES, Run
from tests.helpers.tiny import tiny
from tests.tools.test_sounds import write_wav
from tests.tools.test_videos import growing, write_video
from tokenmerge.patching import model_cost
from tokenmerge.patching.target import find_target
from tokenmerge.tools.common import ModelOptions
from tokenmerge.tools.compare import trained
from tokenmerge.tools.compare.paper import experiments, identity
from tokenmerge.tools.compare.paper.experiments import EXPERIMENTS, Entry, Experiment, Line
from tokenmerge.tools.compare.paper.models import MODELS, Model
from tokenmerge.tools.compare.paper.published import FIGURES, Published
from tokenmerge.tools.hf import classified_medium
from tokenmerge.tools.inputs import num_classes
from tokenmerge.tools.models import skeleton

SIZES: dict[str, Any] = {"img_size": 48, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
FIGURE = ("published_top1", "published_gflops", "published_ims", "published_source")


@pytest.mark.parametrize("name", MODELS)
def test_each_model_exists_and_has_the_papers_head(name: str) -> None:
    model = MODELS[name]
    values = dict(model.model_kwargs) | ({"num_labels": model.classes} if model.offline else {})
    options = ModelOptions(model=model.offline or model.model, num_classes=model.num_classes, model_kwargs=values)
    built = skeleton(options, model.medium)
    target, cost = find_target(built), model_cost(built)
    assert num_classes(built) == model.classes
    assert (len(target.blocks), cost.tokens) == (model.blocks, model.tokens)
    assert classified_medium(built) == (model.medium if model.offline else None)
    if ":" not in model.model and not model.file:
        import timm

        found = timm.models.get_pretrained_cfg(model.model)
        assert found is not None
        assert found.num_classes == model.classes
    figure = FIGURES.get(name)
    if figure is not None and figure.gflops is not None:
        assert cost.total() / 1e9 == pytest.approx(figure.gflops, rel=0.006)


OFF_THE_SHELF = """
AugReg ViT-S/16 81.41 953 13 79.30 1564
AugReg ViT-B/16 84.57 309 13 82.60 511
AugReg ViT-L/16 85.82 95 7 84.26 167
AugReg ViT-L/16 at 384 86.92 28 23 86.14 56
SWAG ViT-B/16 at 384 85.30 85.7 45 84.59 167.7
SWAG ViT-L/16 at 512 88.06 12.8 40 87.80 26.3
SWAG ViT-H/14 at 518 88.55 4.7 40 88.25 9.8
MAE ViT-L/16 85.96 93 8 84.22 183
"""
"""Model, top-1, images per second, r, and top-1 and images per second with ToMe, as published."""
GFLOPS = {
    "augreg_small": 4.60, "augreg_small r=13": 2.70, "augreg_base": 17.56, "augreg_base r=13": 10.37,
    "augreg_large": 61.55, "augreg_large r=7": 34.71, "augreg_large_384": 191.1, "augreg_large_384 r=23": 96.2,
    "swag_base": 55.5, "swag_base r=45": 28.3, "swag_large": 362, "swag_large r=40": 183, "swag_huge": 1017,
    "swag_huge r=40": 513, "mae_large": 61.55, "mae_large r=8": 30.96, "deit_tiny": 1.25, "deit_small": 4.60,
    "deit_small r=13": 2.70, "deit_small_tome r=13": 2.70, "mae_base_trained": 17.56, "mae_base_tome r=16": 8.77,
    "mae_large_trained": 61.55, "mae_large_tome r=8": 30.96, "mae_huge_trained": 167.3, "mae_huge_tome r=7": 92.8,
    "DynamicViT": 2.9, "ATS": 3.4, "EViT": 3.0, "A-ViT": 3.6,
}  # fmt: skip
TOP1 = {
    "deit_tiny_tome r=13": 71.27, "deit_small": 79.8, "deit_small r=13": 78.83, "deit_small_tome r=13": 79.36,
    "mae_base_trained": 83.62, "mae_base_tome r=16": 81.91, "mae_large_trained": 85.66, "mae_large_tome r=8": 85.05,
    "mae_huge_trained": 86.88, "mae_huge_tome r=7": 86.47, "DynamicViT": 79.3, "ATS": 79.1, "EViT": 79.5, "A-ViT": 78.6,
}  # fmt: skip
IMS = {
    "deit_tiny": 2558, "deit_tiny_tome r=13": 3980, "deit_small": 930, "deit_small_tome r=13": 1550,
    "mae_base_trained": 309, "mae_base_tome r=16": 603, "mae_large_trained": 93, "mae_large_tome r=8": 183,
    "mae_huge_trained": 35, "mae_huge_tome r=7": 63,
}  # fmt: skip


def test_figures_are_the_published_ones() -> None:
    top1, ims = dict(TOP1), {name: float(rate) for name, rate in IMS.items()}
    for entry, line in zip(EXPERIMENTS["offtheshelf"].entries, OFF_THE_SHELF.strip().splitlines(), strict=True):
        *words, base, rate, r, merged, faster = line.split()
        name = entry.model.name
        assert (" ".join(words), int(r)) == (entry.model.title, entry.lines[0].r)
        top1 |= {name: float(base), f"{name} r={r}": float(merged)}
        ims |= {name: float(rate), f"{name} r={r}": float(faster)}
        assert entry.lines[0].published is FIGURES[f"{name} r={r}"]
    for column, expected in (("top1", top1), ("gflops", GFLOPS), ("ims", ims)):
        found = {name: value for name, one in FIGURES.items() if (value := getattr(one, column)) is not None}
        assert found == expected, column
    assert all(one.source for one in FIGURES.values())
    assert not FIGURES["SPViT"].has_figures


def test_every_line_of_the_paper_has_its_place() -> None:
    assert list(EXPERIMENTS) == [
        "imagenet1k", "pruning", "design", "matching", "schedules", "offtheshelf", "pictures", "video", "audio"
    ]  # fmt: skip
    lines = {line.label: line for line in EXPERIMENTS["pruning"].entries[0].lines}
    assert [label for label, line in lines.items() if line.trained] == [
        f"{name}, trained" for name in ("A-ViT", "DynamicViT", "SPViT", "EViT", "ToMe r=13")
    ]
    assert next(label for label, line in lines.items() if line.runs) == "tome"
    for experiment in EXPERIMENTS.values():
        for entry in experiment.entries:
            labels = [line.label for line in entry.lines]
            assert len(set(labels)) == len(labels)
            assert not entry.lines or entry.lines[0].runs, "what others are compared with"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_without_data_the_published_table_is_shown(run: Run, tmp_path: Path, name: str) -> None:
    code, out, _ = run("compare", "--paper", name, "--json", "rows.json", "--weights", "mine")
    assert code == 0
    experiment = EXPERIMENTS[name]
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert rows == json.loads((tmp_path / "compare" / "compare.json").read_text())
    assert not any(row["measured"] for row in rows)
    known = [line for entry in experiment.entries for line in entry.lines]
    assert [row["method"] for row in rows if row["method"] != "unmerged"] == [line.label for line in known]
    assert f"--paper {name} --data" in out
    page = (tmp_path / "compare" / "compare.html").read_text()
    for entry in experiment.entries:
        assert entry.model.title in out
        place = f"mine/{entry.model.file}" if entry.model.file else entry.model.model
        assert place in out
        assert place in page
    for row in rows:
        assert row["note"].startswith("not measured here")
        if row["published_note"] or row["published_top1"]:
            assert row["published_source"] in page
            assert row["published_source"] in " ".join(out.split())


def local(classes: int = 3) -> Model:
    """A small model of the paper, so to say, whose weights lie in a file."""
    return Model("mine", "My ViT", "vit_tiny_patch16_224", 3, 37, classes, SIZES, "mine.safetensors", "a test")


@pytest.fixture
def paper(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Experiment:
    """An experiment of a small model whose data are the 12 images of the tests."""
    torch.manual_seed(0)
    (tmp_path / "weights").mkdir()
    model = tiny("vit_tiny_patch16_224", **SIZES, num_classes=3)
    save_file(model.state_dict(), tmp_path / "weights" / "mine.safetensors")
    lines = (
        Line("tome", r=4, published=Published("a book", 33.0, 0.01, 5000)),
        Line("random pruning", {"matcher": "random_prune"}, r=4),
        Line("elsewhere", published=Published("another book", 50.0, 0.02), elsewhere="it is another setting"),
        Line("Rival, trained", published=Published("a rival's book", 51.0, 0.03), trained=True),
    )
    missing = dataclasses.replace(local(), name="absent", title="Absent ViT", file="absent.pth", origin="a release")
    entries = (
        Entry(local(), lines, Published("a book", 33.5, 0.02, 3000)),
        Entry(missing, (Line("tome", r=4, published=Published("a book", 44.0)),), Published("a book", 45.0)),
    )
    made = Experiment("mine", "a test", entries)
    monkeypatch.setattr(experiments, "EXPERIMENTS", {**EXPERIMENTS, "mine": made})
    monkeypatch.setattr(identity, "IMAGES", 12)
    monkeypatch.setattr(identity, "_PER_CLASS", 4)
    monkeypatch.setattr(identity, "_TOLERANCE", 100)
    monkeypatch.setattr(identity, "synsets", lambda: list(CLASSES))
    return made


def rows_of(run: Run, tmp_path: Path, *words: object) -> tuple[list[dict[str, Any]], str, str]:
    common = ("--workers", 0, "--rounds", 0, "--batch-size", 4, "--json", "rows.json")
    code, out, err = run("compare", "--paper", "mine", *words, *common)
    assert code == 0, err
    return json.loads((tmp_path / "rows.json").read_text()), out, err


def nothing_is_published(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """Neither in the rows nor on the page nor in the table."""
    assert not any(name in row for row in rows for name in FIGURE)
    assert not any(row["method"] in ("elsewhere", "Rival, trained") for row in rows)
    page, sheet = (folder / "compare.html").read_text(), (folder / "compare.csv").read_text()
    for text in (page, sheet):
        assert "a book" not in text
        assert "Rival" not in text


def test_the_papers_run_shows_figures_and_what_was_not_measured(
    run: Run, tmp_path: Path, data: Path, paper: Experiment
) -> None:
    rows, out, _ = rows_of(run, tmp_path, "--data", data)
    found = {(row["paper_model"], row["method"]): row for row in rows}
    unmerged, tome = found["My ViT", "unmerged"], found["My ViT", "tome"]
    assert (unmerged["published_top1"], unmerged["published_ims"], unmerged["published_device"]) == (33.5, 3000, "V100")
    assert (tome["published_top1"], tome["published_gflops"], tome["published_source"]) == (33.0, 0.01, "a book")
    assert tome["measured"]
    assert tome["top1_low"] <= tome["top1_difference"] <= tome["top1_high"]
    rival = found["My ViT", "Rival, trained"]
    assert (rival["measured"], rival["published_top1"]) == (False, 51.0)
    assert rival["note"].startswith("not measured here: it is trained by its own method")
    assert found["My ViT", "elsewhere"]["note"] == "not measured here: it is another setting"
    absent = found["Absent ViT", "tome"]
    assert (absent["measured"], absent["published_top1"]) == (False, 44.0)
    assert "weights/absent.pth is missing: it is a release" in absent["note"]
    assert "a rival's book" in out
    assert "not shown" not in out
    page = (tmp_path / "compare" / "compare.html").read_text()
    for text in ("published", "a rival&#39;s book", "not measured here"):
        assert text in page, text
    with (tmp_path / "compare" / "compare.csv").open() as file:
        assert [row["published_top1"] for row in csv.DictReader(file)][:2] == ["33.5", "33.0"]


@pytest.mark.parametrize("other", ["limit", "image", "class", "names", "setting", "model", "damaged", "map"])
def test_any_other_run_shows_no_figure(
    run: Run, tmp_path: Path, data: Path, model_dir: Path, paper: Experiment, other: str
) -> None:
    """Fewer images or classes, other names or settings, another model with the same data."""
    words: tuple[object, ...] = ("mine",)
    if other == "limit":
        words = (*words, "--limit", 11)
    elif other == "image":
        (data / "ant" / "0.png").unlink()
    elif other == "class":
        for number in range(4):
            (data / "cat" / f"{number}.png").rename(data / "bee" / f"c{number}.png")
        (data / "cat").rmdir()
        (tmp_path / "names.txt").write_text("ant\nbee\ncat\n")
        words = (*words, "--class-map", tmp_path / "names.txt")
    elif other == "names":
        (data / "ant").rename(data / "ape")
    elif other == "setting":
        words = (*words, "--set", "metric=x")
    elif other == "model":
        words = (f"local-dir:{model_dir}",)
    elif other == "damaged":
        (data / "ant" / "0.png").write_bytes(b"no picture")
    else:
        (tmp_path / "names.txt").write_text("cat\nbee\nant\n")
        words = (*words, "--class-map", tmp_path / "names.txt")
    rows, out, _ = rows_of(run, tmp_path, *words, "--data", data)
    nothing_is_published(rows, tmp_path / "compare")
    assert "published figures belong to" in out
    assert "are not shown" in " ".join(out.split())
    assert "a book" not in out
    assert "Rival" not in out


def test_figures_are_withheld_if_the_unmerged_model_is_another(
    run: Run, tmp_path: Path, data: Path, paper: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "_TOLERANCE", 0.01)
    rows, out, err = rows_of(run, tmp_path, "mine", "--data", data)
    nothing_is_published(rows, tmp_path / "compare")
    top1 = next(row["top1"] for row in rows if row["method"] == "unmerged")
    assert f"has top-1 {top1:.2f} here, but 33.50 is published" in " ".join(err.split())
    assert "withheld" in out


def test_r_given_takes_figures_away_from_other_settings(
    run: Run, tmp_path: Path, data: Path, paper: Experiment
) -> None:
    rows, _, _ = rows_of(run, tmp_path, "mine", "--data", data, "--r", 4, 6)
    found = {(row["method"], row["setting"]): row for row in rows}
    assert found["tome", "r=4"]["published_top1"] == 33.0
    assert "published_top1" not in found["tome", "r=6"]
    rows, _, _ = rows_of(run, tmp_path, "mine", "--data", data, "--r", 6)
    found = {(row["method"], row["setting"]): row for row in rows}
    assert "published_top1" not in found["tome", "r=6"]
    assert found["tome", "r=4"]["note"] == "not measured here: --r gives another schedule"


def test_trained_lines_can_be_measured(
    run: Run, tmp_path: Path, data: Path, paper: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trained, "_REASON", "nobody trained it")
    rows, out, _ = rows_of(run, tmp_path, "mine", "--data", data)
    assert "not measured here: nobody trained it" in " ".join(out.split())
    assert rows[-2]["method"] != rows[-1]["method"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("absent",), "nothing of --paper mine could be measured: weights/absent.pth is missing"),
        (("--checkpoint", "x.pth"), "--checkpoint was given, but the models of --paper mine has weights of its own"),
        (("mine", "--num-classes", 4), "the model mine of --paper mine has weights of its own"),
        (("--weights", "nowhere"), "nowhere/mine.safetensors is missing: it is a test, and 1 other models failed"),
        (("mine", "--random", 3), "--random was given without --paper schedules"),
        (("mine", "--r", "x"), "is not understood"),
    ],
)
def test_what_cannot_run_is_one_sentence(
    run: Run, data: Path, paper: Experiment, words: tuple[object, ...], message: str
) -> None:
    code, _, err = run("compare", "--paper", "mine", "--data", data, "--workers", 0, *words)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_weights_of_nan_and_wrong_data_are_one_sentence(
    run: Run, tmp_path: Path, data: Path, paper: Experiment
) -> None:
    code, _, err = run("compare", "--paper", "mine", "--data", "nowhere")
    assert (code, "does not exist" in err, len(err.strip().splitlines())) == (2, True, 1)
    file = tmp_path / "weights" / "mine.safetensors"
    model = tiny("vit_tiny_patch16_224", **SIZES, num_classes=3)
    save_file({name: torch.full_like(value, torch.nan) for name, value in model.state_dict().items()}, file)
    code, _, err = run("compare", "--paper", "mine", "--data", data, "--workers", 0, "--rounds", 0)
    assert code == 2
    assert "are NaN" in err
    assert not list((tmp_path / "compare" / "scores").iterdir())


def test_scores_of_other_weights_are_not_reused(run: Run, tmp_path: Path, data: Path, paper: Experiment) -> None:
    before, _, _ = rows_of(run, tmp_path, "mine", "--data", data)
    again, out, _ = rows_of(run, tmp_path, "mine", "--data", data)
    assert "2 of 2 variants were scored before" in " ".join(out.split())
    assert [row.get("divergence") for row in again] == [row.get("divergence") for row in before]
    torch.manual_seed(5)
    model = tiny("vit_tiny_patch16_224", **SIZES, num_classes=3)
    save_file(model.state_dict(), tmp_path / "weights" / "mine.safetensors")
    _, out, _ = rows_of(run, tmp_path, "mine", "--data", data)
    assert "scored before" not in " ".join(out.split())


def test_random_schedules_have_a_rank(run: Run, tmp_path: Path, data: Path, model_dir: Path) -> None:
    words = ("compare", f"local-dir:{model_dir}", "--paper", "schedules", "--data", data, "--workers", 0, "--rounds", 0)
    code, out, _ = run(*words, "--random", 4, "--r", 6, "--json", "rows.json")
    assert code == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    drawn = [row for row in rows if row["method"] == "random schedule"]
    constant = next(row for row in rows if row["method"] == "constant")
    assert len(drawn) == len({row["setting"] for row in drawn}) == 4
    assert {row["group"] for row in rows if row["method"] != "unmerged"} == {"r=6"}, (
        "all are compared with the constant r"
    )
    assert constant["rank_top1"] == 1 + sum(row["top1"] > constant["top1"] for row in drawn)
    assert constant["rank_divergence"] == 1 + sum(row["divergence"] < constant["divergence"] for row in drawn)
    assert constant["ranked"] == 5
    for row in drawn:
        assert row["gflops"] <= constant["gflops"] * 1.0001
        assert row["top1_low"] <= row["top1_difference"] <= row["top1_high"]
    assert f"rank {constant['rank_top1']} of 5 by top-1" in " ".join(out.split())
    code, _, err = run(*words, "--r", "keep=0.9")
    assert (code, "give a whole number" in err) == (2, True)


def test_pictures_are_drawn(run: Run, tmp_path: Path, data: Path, model_dir: Path) -> None:
    words = ("compare", f"local-dir:{model_dir}", "--paper", "pictures", "--data", data, "--output", "out")
    code, out, _ = run(*words, "--limit", 3, "--json", "rows.json")
    assert code == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == 3
    assert "the paper's r=7 is r=" in out
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"pictures.png", "pictures.html", "compare.json"}
    code, _, err = run("compare", "--paper", "pictures", "--data", data)
    assert (code, "weights/mae_vit_huge_tome/model/config.json" in err) == (2, False)
    assert "mae_vit_huge_tome/model is missing: it is made by tokenmerge train vit_huge_patch14_224.mae" in err


def test_videos_and_sounds(run: Run, tmp_path: Path) -> None:
    """In small, on a video model of transformers and a model of spectrograms, both with random weights."""
    for name in ("dark", "light"):
        write_video(tmp_path / "videos" / name / "a.mp4", growing(12, name == "dark"))
        write_wav(tmp_path / "sounds" / name / "a.wav", 0.1 * torch.randn(8000).numpy())
    videos = ["image_size=32", "patch_size=8", "num_frames=4", "hidden_size=32", "num_hidden_layers=2"]
    videos += ["num_attention_heads=2", "intermediate_size=64", "tubelet_size=2", "num_labels=2"]
    sounds = ["img_size=[64,32]", "in_chans=1", "patch_size=8", "embed_dim=32", "depth=6", "num_heads=2"]
    for name, model, kind, values in (
        ("video", "hf:videomae", "videos", videos),
        ("audio", "vit_tiny_patch16_224", "sounds", sounds),
    ):
        classes = ("--num-classes", 2) if name == "audio" else ()
        words = ("compare", model, *classes, "--paper", name, "--data", kind, "--workers", 0, "--rounds", 0)
        words = (*words, "--json", "rows.json", "--model-kwargs", *values)
        code, out, err = run(*words)
        assert code == 0, err
        rows = json.loads((tmp_path / "rows.json").read_text())
        assert [row["method"] for row in rows] == ["unmerged", "tome"]
        nothing_is_published(rows, tmp_path / "compare")
        assert "so they are not shown" in " ".join(out.split())


def test_weights_that_train_wrote(
    run: Run, tmp_path: Path, data: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder of a run lies below --weights, with the merging that it was trained with."""
    folder = tmp_path / "mine" / "run_tome"
    folder.mkdir(parents=True)
    model_dir.rename(folder / "model")
    tokenmerge.MergeConfig(r=5, prop_attn=True).save(folder / "model" / "tokenmerge.json")
    model = Model("mine", "My ViT", "vit_tiny_patch16_224", 3, 37, file="run_tome/model", origin="train {weights}/x")
    made = Experiment("mine", "a test", (Entry(model, (Line("tome", r=4),)),))
    monkeypatch.setattr(experiments, "EXPERIMENTS", {"mine": made})
    rows, out, _ = rows_of(run, tmp_path, "--data", data, "--weights", "mine")
    assert [row["setting"] for row in rows] == ["r=0", "r=4"]
    assert rows[0]["model"] == "local-dir:mine/run_tome/model"
    assert tokenmerge.MergeConfig.from_json(rows[1]["config"]).prop_attn is True
    assert "as saved with the model" in out
    code, _, err = run("compare", "--paper", "mine", "--data", data)
    assert (code, "it is made by train weights/x" in err) == (2, True)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name not in ("pictures", "video", "audio")])
def test_every_experiment_runs_on_any_model(run: Run, model_dir: Path, data: Path, tmp_path: Path, name: str) -> None:
    words = ("compare", f"local-dir:{model_dir}", "--data", data, "--workers", 0, "--rounds", 1, "--batch-size", 4)
    assert run(*words, "--paper", name, "--json", "rows.json")[0] == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    running = [line.label for line in EXPERIMENTS[name].usual.lines if line.runs]
    assert [row["method"] for row in rows] == ["unmerged", *running]
    assert all(row["images_per_second"] > 0 for row in rows)
    nothing_is_published(rows, tmp_path / "compare")
