"""`tokenmerge compare --paper`: figures are shown only where they belong, and every experiment runs."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import tokenmerge
from tests.conftest import CLASSES, Run
from tests.helpers.tiny import tiny
from tests.tools.test_recipes import parsed
from tests.tools.test_sounds import write_wav
from tests.tools.test_videos import growing, write_video
from tokenmerge.tools.compare.paper import experiments, identity
from tokenmerge.tools.compare.paper.experiments import EXPERIMENTS, Entry, Experiment, Line
from tokenmerge.tools.compare.paper.models import MODELS, Model
from tokenmerge.tools.compare.paper.published import Published
from tokenmerge.tools.compare.trained import METHODS
from tokenmerge.tools.media import IMAGES
from tokenmerge.tools.train.options import recipes

SIZES: dict[str, Any] = {"img_size": 48, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
FIGURE = ("published_top1", "published_gflops", "published_ims", "published_source")


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
    assert rival["note"].startswith("not measured here: its paper's own training")
    assert found["My ViT", "elsewhere"]["note"] == "not measured here: it is another setting"
    absent = found["Absent ViT", "tome"]
    assert (absent["measured"], absent["published_top1"]) == (False, 44.0)
    assert "weights/absent.pth is missing: it is a release" in absent["note"]
    assert "a rival's book" in out
    assert "My ViT: Rival, trained: not measured here" in " ".join(out.split())
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


@pytest.mark.parametrize(
    ("name", "split", "count", "fits"),
    [
        ("hfds/ILSVRC/imagenet-1k", "validation", 50_000, True),
        ("hfids/timm/imagenet-1k-wds", "validation", 50_000, True),
        ("tfds/imagenet2012:5.1.0", "validation", 50_000, True),
        ("hfds/ILSVRC/imagenet-1k", "train", 50_000, False),
        ("hfds/ILSVRC/imagenet-1k", "validation", 49_999, False),
        ("hfds/someone/imagenet-1k-small", "validation", 50_000, False),
    ],
)
def test_data_sets_by_name(name: str, split: str, count: int, fits: bool) -> None:
    images = SimpleNamespace(dataset=SimpleNamespace(medium=IMAGES), skipped=[])
    options = SimpleNamespace(dataset=name, split=split, limit=None, class_map=None, place=f"--dataset {name}")
    assert (identity.other_data(images, options, count) == "") is fits
    assert len(identity.synsets()) == 1000


def test_what_is_ours_does_not_name_the_paper() -> None:
    assert "Bolya" not in tokenmerge.get_method("tome_norm").source
    assert "Bolya" in tokenmerge.get_method("tome").source


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


def test_images_that_disagree_with_one_model_prove_nothing_for_others(
    run: Run, tmp_path: Path, data: Path, paper: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of a model without weights, and of one whose top-1 cannot be checked, get no figures then."""
    monkeypatch.setattr(identity, "_TOLERANCE", 0.01)
    rows, _, _ = rows_of(run, tmp_path, "--data", data)
    nothing_is_published(rows, tmp_path / "compare")
    assert {row["paper_model"] for row in rows} == {"My ViT", "Absent ViT"}


def test_a_figure_without_a_top1_to_check_is_withheld(
    run: Run, tmp_path: Path, data: Path, paper: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = Line("tome", r=4, published=Published("a book", None, 0.01, 5000))
    entry = dataclasses.replace(paper.entries[0], lines=(line,), unmerged=Published("a book", None, 0.02, 3000))
    alone = dataclasses.replace(paper, entries=(entry,))
    monkeypatch.setattr(experiments, "EXPERIMENTS", {"mine": alone})
    rows, out, _ = rows_of(run, tmp_path, "--data", data)
    nothing_is_published(rows, tmp_path / "compare")
    assert "no top-1 of My ViT is published" in " ".join(out.split())


def test_a_figure_is_checked_at_its_own_r() -> None:
    entry = Entry(local(), (Line("tome", r=4, published=Published("a book", 60.0)),))
    rows = [{"method": "unmerged", "setting": "r=0", "top1": 70.0}, {"method": "tome", "setting": "r=8", "top1": 60.0}]
    assert identity.disagreement(entry, rows) is None
    assert identity.disagreement(entry, [*rows, {"method": "tome", "setting": "r=4", "top1": 60.2}]) == ""
    assert "has top-1 62.00" in str(identity.disagreement(entry, [{"method": "tome", "setting": "r=4", "top1": 62.0}]))


@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if model.trained_here])
def test_weights_of_another_training_are_not_the_papers(name: str, tmp_path: Path) -> None:
    """The record of a run must have the recipe's values, its global batch, and ImageNet-1k."""
    model = MODELS[name]
    args = parsed(recipes()[model.recipe]).as_json() | ({} if model.r is None else {"r": model.r})
    processes = model.global_batch // (args["batch_size"] * args["grad_accum_steps"])
    record: dict[str, Any] = {"args": args, "processes": processes, "data": {"images": 1_281_167, "classes": 1000}}
    place = tmp_path / model.file
    place.mkdir(parents=True)
    file = place.parent / "run.json"
    assert "without a record" in identity.other_training(model, tmp_path)
    file.write_text(json.dumps(record))
    assert identity.other_training(model, tmp_path) == ""
    file.write_text(
        json.dumps(
            {
                **record,
                "args": {**args, "workers": 7, "batch_size": args["batch_size"] // 2},
                "processes": 2 * processes,
            }
        )
    )
    assert identity.other_training(model, tmp_path) == "", "the same global batch"
    for change, words in (
        ({"args": {**args, "epochs": 1}}, "another epochs"),
        ({"args": {**args, "r": "5"}}, "another r"),
        ({"processes": 3}, "another global batch"),
        ({"data": {"images": 10_000, "classes": 200}}, "another data"),
        ({"args": None}, "without a record"),
    ):
        file.write_text(json.dumps({**record, **change}))
        assert words in identity.other_training(model, tmp_path)
    assert identity.other_training(MODELS["deit_small"], tmp_path) == ""


@pytest.mark.slow
def test_what_is_trained_here_stands_beside_no_figure(run: Run, tmp_path: Path, data: Path, paper: Experiment) -> None:
    """Its training is another one than the paper's, whose own line stays as not measured."""
    more = ("--train", data, "--train-set", "batch_size=4")
    rows, out, _ = rows_of(run, tmp_path, "mine", "--data", data, *more)
    found = {row["method"]: row for row in rows}
    assert not found["Rival, trained"]["measured"]
    assert found["Rival, trained"]["published_top1"] == 51.0
    for label in METHODS:
        assert found[label]["measured"]
        assert not any(name in found[label] for name in FIGURE)
        assert label in out


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
