"""Files with several labels: their CSV, mAP against scikit-learn, training and evaluation as a person does them."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score
from timm.loss import BinaryCrossEntropy
from torch import Tensor

import tokenmerge
from tests.conftest import Run
from tests.tools.test_sounds import KWARGS, tone, write_wav
from tokenmerge.errors import InputError
from tokenmerge.tools.eval.precision import Precision, mean_average_precision
from tokenmerge.tools.eval.scores import add_in_turns
from tokenmerge.tools.folders import batches
from tokenmerge.tools.labels import LabelledFiles, Line, read_labels
from tokenmerge.tools.media import SOUNDS
from tokenmerge.tools.processes import Processes
from tokenmerge.tools.reading.documents import read_class_map
from tokenmerge.tools.settings import parse_setting
from tokenmerge.tools.train.data import EpochBatches, weights_of
from tokenmerge.tools.train.objective import Objective, SeveralLabels
from tokenmerge.tools.train.options import TrainOptions

PITCHES = {"low": 300.0, "middle": 1000.0, "high": 3000.0}
AUDIOSET = """# Segments csv created Sun Mar  5 10:54:31 2017
# num_ytids=2, num_segs=2, num_unique_labels=3, num_positive_labels=3
# YTID, start_seconds, end_seconds, positive_labels
-0RWZT-miFs, 420.000, 430.000, "/m/03v3yw,/m/0k4j"
0o2zYYF_9aM, 30.000, 40.000, "/m/07pjwq1"
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sounds of one or two tones: 24 to train on, 12 to validate."""
    root = tmp_path_factory.mktemp("several")
    rng = np.random.default_rng(0)
    names = list(PITCHES)
    for split, count in (("train", 24), ("val", 12)):
        lines = ["# YTID, start_seconds, end_seconds, positive_labels"]
        for number in range(count):
            chosen = [names[number % 3], *([names[(number + 1) % 3]] if number % 2 else [])]
            samples = sum(tone(PITCHES[name] * rng.uniform(0.9, 1.1), 0.4) for name in chosen) / len(chosen)
            write_wav(root / split / f"{split}{number}.wav", samples)
            lines.append(f'{split}{number}, 0.000, 0.400, "{",".join(chosen)}"')
        (root / f"{split}.csv").write_text("\n".join(lines) + "\n")
    (root / "classes.csv").write_text('index,mid,display_name\n0,high,High\n1,low,Low\n2,middle,"Middle, or so"\n')
    return root


# --- the file of labels ---------------------------------------------------------------------------------------


def test_a_file_in_the_form_of_audioset(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(AUDIOSET)
    assert read_labels(tmp_path / "a.csv") == [
        Line("-0RWZT-miFs", ("/m/03v3yw", "/m/0k4j"), 10.0),
        Line("0o2zYYF_9aM", ("/m/07pjwq1",), 10.0),
    ]
    (tmp_path / "b.csv").write_text('fname,labels\na.wav,"x,y"\nb.wav,\n')
    assert read_labels(tmp_path / "b.csv") == [Line("a.wav", ("x", "y")), Line("b.wav", ())]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no lines"),
        ("# nothing\n", "has no lines"),
        ("a, 0, 1\n", "line 1 .* has 3 columns"),
        ('a, 0, ten, "x"\n', "line 1 .* has '0' and 'ten' as start and end"),
        ('a, 5, 5, "x"\n', "starts at 5 and ends at 5"),
        ('a, 0, nan, "x"\n', "starts at 0 and ends at nan"),
        ('a, 0, 1, "x"\n\na, 1, 2, "y"\n', "line 3 .* names 'a' again, after line 1"),
        (', 0, 1, "x"\n', "line 1"),
        ('a, 0, 1, "x\x07"\n', "has the label"),
        ('a, "x' + "y" * 300 + '"\n', "has the label"),
        ('a, "x"\nb, "y\nc, z\n', "line 2 .* is no CSV"),
        ('a, "x"\nb, "y', "line 2 .* is no CSV"),
    ],
)
def test_what_is_no_file_of_labels(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(InputError, match=words):
        read_labels(tmp_path / "a.csv")


def test_the_list_of_classes_of_audioset(tmp_path: Path, data: Path) -> None:
    assert read_class_map(data / "classes.csv", "the class map") == {"high": 0, "low": 1, "middle": 2}
    (tmp_path / "a.csv").write_text("index,mid,display_name\n0,a,A\n2,b,B\n")
    with pytest.raises(InputError, match="in line 3, but 1,MID,DISPLAY_NAME was expected"):
        read_class_map(tmp_path / "a.csv", "the class map")


def opened(root: Path, labels: Path, classes: int | None = None, names: Any = None) -> LabelledFiles:
    return LabelledFiles(root, labels, torch.as_tensor, classes, names, medium=SOUNDS)


def test_files_and_targets(data: Path, tmp_path: Path) -> None:
    found = opened(data / "val", data / "val.csv")
    assert found.names == ["high", "low", "middle"]
    assert len(found) == 12
    assert not found.left_out
    sound, target, problem = found[1]
    assert not problem
    assert sound is not None
    assert target.tolist() == [1.0, 0.0, 1.0]
    batch = next(iter(batches(found, 5, 0)))
    assert batch.labels.shape == (5, 3)
    assert batch.labels.dtype == torch.float32
    assert opened(data, data / "val.csv").names == found.names, "files may lie in subfolders"
    # a line whose file is not there is left out, and said; a download's Y before the name is known
    (tmp_path / "Yval1.wav").write_bytes((data / "val" / "val1.wav").read_bytes())
    part = opened(tmp_path, data / "val.csv")
    assert [path.name for path, _ in part.samples] == ["Yval1.wav"]
    assert len(part.left_out) == 11
    assert "val0: the file of labels names it, but it is not there" in part.left_out


@pytest.mark.parametrize(
    ("line", "given", "words"),
    [
        ('val1, 0, 0.4, "hgih"', {"names": ["high", "low"]}, r"the label 'hgih', which is none of .*nearest is 'high'"),
        ('val1, 0, 0.4, "high"', {"classes": 4}, "has 1 labels, but the model has 4 outputs and does not know"),
        ('nothing, 0, 1, "high"', {}, "none of the 1 files in"),
        ('val1, "high"\nval1.wav, "low"', {}, r"names val1\.wav twice, as 'val1' and 'val1\.wav'"),
        ('val1, ""', {"names": ["high", "low"]}, "no file in .* has a label"),
    ],
)
def test_labels_that_do_not_fit(data: Path, tmp_path: Path, line: str, given: dict[str, Any], words: str) -> None:
    (tmp_path / "a.csv").write_text(line + "\n")
    with pytest.raises(InputError, match=words):
        opened(data / "val", tmp_path / "a.csv", **given)


def test_a_sound_that_is_longer_than_its_segment_is_no_sample(data: Path, tmp_path: Path) -> None:
    write_wav(tmp_path / "long.wav", tone(500, 3.0))
    (tmp_path / "a.csv").write_text('long, 10.0, 11.0, "high"\n')
    sound, _, problem = opened(tmp_path, tmp_path / "a.csv")[0]
    assert sound is None
    assert "it lasts 3.0 s, but its line is about 1.0 s" in problem


def test_two_files_of_one_name(data: Path, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_wav(tmp_path / folder / "x.wav", tone(500, 0.3))
    (tmp_path / "a.csv").write_text('x, "high"\n')
    with pytest.raises(InputError, match=r"'x' names a/x\.wav and b/x\.wav"):
        opened(tmp_path, tmp_path / "a.csv")


# --- mAP ------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), files=st.integers(1, 40), classes=st.integers(1, 6), levels=st.integers(1, 30))
def test_map_is_that_of_scikit_learn(seed: int, files: int, classes: int, levels: int) -> None:
    """Random outputs, with ties where there are few levels; classes without a positive file are left out."""
    rng = np.random.default_rng(seed)
    targets = (rng.random((files, classes)) < 0.3).astype(float)
    outputs = rng.integers(0, levels, (files, classes)) / 7
    known = [place for place in range(classes) if targets[:, place].any()]
    if not known:
        with pytest.raises(InputError, match="no file has a label"):
            mean_average_precision(targets, outputs)
        return
    expected = average_precision_score(targets[:, known], outputs[:, known], average="macro")
    assert mean_average_precision(targets, outputs) == pytest.approx(expected, abs=1e-12)
    counts = rng.integers(0, 3, files)
    again = np.repeat(np.arange(files), counts)
    if targets[again].any():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert mean_average_precision(targets, outputs, counts) == pytest.approx(
                mean_average_precision(targets[again], outputs[again]), abs=1e-12
            )


def scored(outputs: list[Tensor], targets: Tensor, parts: list[slice]) -> list[Precision]:
    """The settings 0 and 4, with the given outputs on batches of files."""
    at: list[slice] = [slice(0)]

    def model(given: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: given[at[0]]

    found = [Precision(parse_setting(name), model(given), 1.0) for name, given in zip(("0", "4"), outputs, strict=True)]
    for number, part in enumerate(parts):
        at[0] = part
        add_in_turns(found, targets[part], targets[part], number)
    return found


def test_rows_and_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    targets = (torch.rand(60, 4, generator=generator) < 0.4).float()
    outputs = [targets + torch.randn(60, 4, generator=generator), targets + torch.randn(60, 4, generator=generator)]
    base, merged = scored(outputs, targets, [slice(0, 25), slice(25, 60)])
    first, second = base.row("m", 0), merged.row("m", 2)
    for row, own in ((first, outputs[0]), (second, outputs[1])):
        assert row["map"] == pytest.approx(100 * average_precision_score(targets.numpy(), own.numpy()))
        assert row["map_low"] < row["map"] < row["map_high"]
        assert row["images"] == 60
        assert row["classes"] == 4
    assert first["map_difference"] is None
    assert second["map_difference"] == pytest.approx(second["map"] - first["map"])
    assert second["map_difference_low"] < second["map_difference"] < second["map_difference_high"]
    same = scored([outputs[0], outputs[0]], targets, [slice(0, 60)])[1].row("m", 0)
    assert (same["map_difference"], same["map_difference_low"], same["map_difference_high"]) == (0, 0, 0)
    one = scored(outputs, targets, [slice(0, 1)])[1].row("m", 0)
    assert (one["map_low"], one["map_high"]) == (0, 100), "one file says nothing"
    # two processes, each with a part of the files, which come in another order
    halves = [scored(outputs, targets, [part])[1] for part in (slice(25, 60), slice(0, 25))]
    every = {
        name: [one for half in halves for one in getattr(half, name)] for name in ("targets", "outputs", "unmerged")
    }
    counts = iter([[1.0, 2.0], [25, 35], every["targets"], every["outputs"], every["unmerged"]])
    monkeypatch.setattr(Processes, "gather", lambda self, values: next(counts))
    halves[0].join(Processes(0, 2, "cpu"))
    joined = halves[0].row("m", 2)
    assert {k: v for k, v in joined.items() if "map" in k} == {k: v for k, v in second.items() if "map" in k}


# --- training -------------------------------------------------------------------------------------------------


def args(data: Path, **more: Any) -> TrainOptions:
    given = {"model": "m", "data": data, "output": "o", "train_labels": "train.csv", "val_labels": "val.csv", **more}
    return TrainOptions(**{"batch_size": 4, "warmup_epochs": 0, "epochs": 1, **given})


def test_the_loss_is_binary_cross_entropy(data: Path) -> None:
    logits, targets = torch.randn(4, 3), torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 0, 0], [0, 1, 1]])
    expected = torch.nn.BCEWithLogitsLoss()(logits, targets)
    objective = Objective(args(data, smoothing=0), 3, None)
    found = objective(lambda x: logits, torch.zeros(4, 1, 8, 8), targets)  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected)
    # smoothing is timm's: of one label it gives the same
    one = torch.eye(3)[torch.tensor([0, 1, 2, 1])]
    theirs = BinaryCrossEntropy(smoothing=0.1)(logits, one.argmax(1))
    torch.testing.assert_close(SeveralLabels(0.1)(logits, one), theirs)


def test_mixup_mixes_the_labels_as_the_inputs(data: Path) -> None:
    np.random.seed(0)
    inputs = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 8, 8)
    targets = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])
    objective = Objective(args(data, mixup=10.0, smoothing=0.0), 3, None)
    seen: list[Tensor] = []
    objective.criterion = lambda logits, wanted: seen.append(wanted) or logits.sum()  # type: ignore[assignment,func-returns-value]

    def model(x: Tensor) -> Tensor:
        seen.append(x.mean((1, 2, 3)))
        return torch.zeros(4, 3)

    objective(model, inputs, targets)  # type: ignore[arg-type]
    mixed, wanted = seen
    share = 1 - float(mixed[0]) / 3  # 0 is mixed with 3
    assert 0 < share < 1
    torch.testing.assert_close(wanted, share * targets + (1 - share) * targets.flip(0))


def test_files_of_rare_labels_are_drawn_more_often(data: Path, tmp_path: Path) -> None:
    lines = [f'train{number}, "{"rare,common" if number == 0 else "common"}"' for number in range(24)]
    (tmp_path / "a.csv").write_text("\n".join(lines) + "\n")
    files = opened(data / "train", tmp_path / "a.csv")
    weights = weights_of(files)
    assert weights.tolist() == pytest.approx([1 + 1 / 24, *[1 / 24] * 23])
    options = args(data, weighted_sampling=True, epoch_size=2000, batch_size=8)
    order = EpochBatches(24, options, 0, 1, weights)
    drawn = order.samples()
    assert len(drawn) == 2000
    assert len(order) == 250
    share = sum(index == 0 for index, _ in drawn) / 2000
    assert share == pytest.approx((1 + 1 / 24) / 2, abs=0.04)
    assert len(set(drawn)) == 2000, "a file that is drawn again is augmented otherwise"
    assert drawn == order.samples()
    order.epoch = 1
    assert drawn != order.samples()
    with pytest.raises(InputError, match="--epoch-size 2000 was given for 24 training files"):
        EpochBatches(24, args(data, epoch_size=2000), 0, 1)
    assert len(EpochBatches(24, args(data, epoch_size=8), 0, 1).samples()) == 8


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"val_labels": None}, "--train-labels was given without --val-labels"),
        ({"train_labels": None}, "--val-labels was given without --train-labels"),
        ({"dataset": "hfds/x"}, "train-labels and --dataset were both given"),
        ({"val_split": ""}, "--val-labels was given with --val-split ''"),
        ({"distill_weight": 0.5}, "compares distributions over classes"),
    ],
)
def test_options_that_contradict(data: Path, more: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        args(data, **more)


def test_trained_evaluated_and_loaded(data: Path, tmp_path: Path, run: Run) -> None:
    words: tuple[Any, ...] = ("train", "vit_tiny_patch16_224", "--model-kwargs", *KWARGS, "--data", data)
    words = (*words, "--train-labels", "train.csv", "--val-labels", "val.csv", "--class-map", "classes.csv")
    words = (*words, "--output", tmp_path / "run", "-b", 8, "--workers", 0, "--device", "cpu", "--warmup-epochs", 0)
    more = ("--lr", 0.003, "--mixup", 0.3, "--timem", 4, "--freqm", 4, "--weighted-sampling", "--smoothing", 0)
    code, out, err = run(*words, *more, "--epochs", 6, "--r", 4, "--eval-r", 0, 4)
    assert code == 0, err
    assert "r=0: mAP" in out
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = [row for row in rows if row["kind"] == "eval"]
    assert len(found) == 12
    assert found[-1]["map"] > 70
    assert "top1" not in found[-1]
    assert "mAP" in (tmp_path / "run" / "report.html").read_text()
    line = next(line for line in out.splitlines() if line.startswith("tokenmerge eval"))
    assert f"--labels {data / 'val.csv'}" in line
    code, out, err = run(*line.split()[1:], "--r", 0, 4, "--json", "rows.json", "--html", "page.html", "--workers", 0)
    assert code == 0, err
    assert "mAP over 3 classes" in " ".join(out.split())
    rows = json.loads(Path("rows.json").read_text())
    assert [row["map"] for row in rows] == pytest.approx([one["map"] for one in found[-2:]], abs=0.01)
    assert rows[1]["map_difference_low"] <= rows[1]["map_difference"] <= rows[1]["map_difference_high"]
    assert "mAP" in Path("page.html").read_text()
    model: Any = tokenmerge.load(tmp_path / "run" / "model")
    assert model.pretrained_cfg["label_names"] == ["high", "low", "middle"]
    # several labels are likely at once, which is what pictures say
    sound = data / "val" / "val1.wav"
    saved = f"local-dir:{tmp_path / 'run' / 'model'}"
    code, out, err = run("visualize", saved, sound, "--r", 4, "--out", tmp_path / "a.png", "--json", "shown.json")
    assert code == 0, err
    top = json.loads(Path("shown.json").read_text())[0]["top"]
    assert [one["class"] for one in top[:2]] in (["high", "middle"], ["middle", "high"])
    with torch.no_grad():
        assert sum(one["probability"] for one in top) != pytest.approx(1, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "kwargs"),
    [
        (
            "hf:audio-spectrogram-transformer",
            ("hidden_size=32", "num_hidden_layers=2", "num_attention_heads=2", "intermediate_size=64", "max_length=64"),
        ),
        (
            "hf:whisper",
            (
                "d_model=32",
                "encoder_layers=2",
                "encoder_attention_heads=2",
                "encoder_ffn_dim=64",
                "max_source_positions=50",
            ),
        ),
    ],
)
def test_classifiers_of_transformers(data: Path, tmp_path: Path, run: Run, kind: str, kwargs: tuple[str, ...]) -> None:
    words: tuple[Any, ...] = ("train", kind, "--model-kwargs", *kwargs, "--data", data, "--output", tmp_path / "run")
    words = (*words, "--train-labels", "train.csv", "--val-labels", "val.csv", "-b", 8, "--workers", 0)
    code, out, err = run(*words, "--device", "cpu", "--warmup-epochs", 0, "--epochs", 1, "--r", 4)
    assert code == 0, err
    assert "mAP" in out
    about = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert about["problem_type"] == "multi_label_classification"
    assert about["id2label"] == {"0": "high", "1": "low", "2": "middle"}
    code, out, err = run(
        "eval", f"hf:{tmp_path / 'run' / 'model'}", "--data", data / "val", "--labels", data / "val.csv", "--workers", 0
    )
    assert code == 0, err


def small(data: Path, output: Path) -> tuple[Any, ...]:
    words = ("train", "vit_tiny_patch16_224", "--model-kwargs", *KWARGS, "--data", data, "--output", output, "-b", 8)
    return (*words, "--workers", 0, "--device", "cpu", "--warmup-epochs", 0, "--epochs", 1, "--r", 0)


def test_errors_of_the_command(data: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = ("--train-labels", "train.csv", "--val-labels", "val.csv")
    code, _, err = run(*small(data, tmp_path / "a"))
    assert code == 2
    assert "give class folders, or --train-labels FILE" in err
    code, _, err = run(*small(data, tmp_path / "b"), *labels, "--num-classes", 5)
    assert code == 2
    assert "or --num-classes 3" in err
    (tmp_path / "map.txt").write_text("high\nlow\nmidle\n")
    code, _, err = run(*small(data, tmp_path / "c"), *labels, "--class-map", tmp_path / "map.txt")
    assert code == 2
    assert "1 labels of" in err
    assert "'middle'" in err
    # scikit-learn is asked for before anything is trained
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    code, _, err = run(*small(data, tmp_path / "d"), *labels)
    assert code == 2
    assert "pip install 'tokenmerge[media]'" in err
    assert not (tmp_path / "d" / "checkpoints").exists()


def test_classes_keep_their_outputs_when_a_saved_model_is_trained_again(data: Path, tmp_path: Path, run: Run) -> None:
    """Its names say which output is which class; and what it says of its labels follows the data."""
    names = ("--train-labels", "train.csv", "--val-labels", "val.csv")
    (tmp_path / "map.txt").write_text("middle\nhigh\nlow\n")
    code, _, err = run(*small(data, tmp_path / "a"), *names, "--class-map", tmp_path / "map.txt")
    assert code == 0, err
    saved = f"local-dir:{tmp_path / 'a' / 'model'}"
    again: tuple[Any, ...] = (
        "train",
        saved,
        "--data",
        data,
        *names,
        "--output",
        tmp_path / "b",
        "-b",
        8,
        "--workers",
        0,
        "--lr",
        0,
    )
    code, out, err = run(*again, "--device", "cpu", "--warmup-epochs", 0, "--epochs", 1)
    assert code == 0, err
    found = [json.loads((tmp_path / run_of / "model" / "config.json").read_text()) for run_of in ("a", "b")]
    assert [one.get("label_names") or one["pretrained_cfg"]["label_names"] for one in found] == [
        ["middle", "high", "low"]
    ] * 2
    rows = [json.loads((tmp_path / one / "metrics.jsonl").read_text().splitlines()[-1]) for one in ("a", "b")]
    assert rows[0]["map"] == pytest.approx(rows[1]["map"], abs=1e-6)
    folders = tmp_path / "folders"
    for split in ("train", "val"):
        for number, name in enumerate(("high", "low", "middle")):
            for copy in range(8):
                write_wav(folders / split / name / f"{copy}.wav", tone(300.0 * (number + 1), 0.4))
    code, out, err = run("eval", saved, "--data", folders / "val", "--r", 0, "--workers", 0)
    assert code == 0, err
    assert "--labels was not given" in " ".join((out + err).split())
    again = ("train", saved, "--data", folders, "--output", tmp_path / "c", "-b", 8, "--workers", 0, "--lr", 0)
    code, _, err = run(*again, "--device", "cpu", "--warmup-epochs", 0, "--epochs", 1)
    assert code == 0, err
    about = json.loads((tmp_path / "c" / "model" / "config.json").read_text())
    assert not about["pretrained_cfg"].get("notes")
