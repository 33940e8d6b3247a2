"""Data sets by their names in timm: shards of webdataset, folders of datasets, and torchvision's, in the commands' functions."""

from __future__ import annotations

import io
import json
import pickle
import re
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import CLASSES
from tokenmerge.errors import InputError
from tokenmerge.tools.compare import CompareOptions
from tokenmerge.tools.compare import run as run_compare
from tokenmerge.tools.datasets import Labelled, LabelledStream, labelled
from tokenmerge.tools.eval import EvalOptions
from tokenmerge.tools.eval import run as run_eval
from tokenmerge.tools.folders import batches


def png(path: Path) -> bytes:
    return path.read_bytes()


def flat(image: Image.Image) -> torch.Tensor:
    """A transform that can be pickled: one picture, 8 × 8."""
    return torch.from_numpy(np.asarray(image.resize((8, 8)))).permute(2, 0, 1).float()


def write_shard(path: Path, samples: Sequence[tuple[str, dict[str, bytes]]]) -> None:
    with tarfile.open(path, "w") as tar:
        for key, parts in samples:
            for suffix, data in parts.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def pictures(data: Path) -> list[tuple[Path, int]]:
    return [(path, label) for label, name in enumerate(CLASSES) for path in sorted((data / name).iterdir())]


@pytest.fixture
def shards(data: Path, tmp_path: Path) -> Path:
    """Twelve images in three shards."""
    pytest.importorskip("webdataset", reason="webdataset is not installed")
    folder = tmp_path / "shards"
    folder.mkdir()
    every = [
        (f"{number:04}", {"png": png(path), "cls": str(label).encode()})
        for number, (path, label) in enumerate(pictures(data))
    ]
    for number in range(3):
        write_shard(folder / f"s-{number:04}.tar", every[number::3])
    info = {"name": "validation", "filenames": [f"s-{n:04}.tar" for n in range(3)], "shard_lengths": [4] * 3}
    (folder / "_info.json").write_text(json.dumps({"splits": {"validation": {**info, "num_samples": 12}}}))
    return folder


@pytest.fixture
def hub_folder(data: Path, tmp_path: Path) -> Path:
    """The same images in a folder of the package datasets, with class names."""
    pytest.importorskip("datasets", reason="datasets is not installed")
    import shutil

    folder = tmp_path / "Hub"
    for name in CLASSES:
        shutil.copytree(data / name, folder / "validation" / name)
    return folder


def found_in(dataset: Any, workers: int, rank: int = 0, processes: int = 1) -> tuple[list[int], list[str]]:
    labels: list[int] = []
    skipped: list[str] = []
    for batch in batches(dataset, 2, workers, rank, processes):
        labels += batch.labels.tolist()
        skipped += batch.skipped
    return labels, skipped


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_are_read_once_by_workers_and_processes(shards: Path, data: Path, workers: int) -> None:
    stream = labelled("wds/any", shards, "validation", flat, 3)
    assert isinstance(stream, LabelledStream)
    assert stream.reader.size == 12
    first = next(iter(stream))[0]
    assert first is not None
    with Image.open(pictures(data)[0][0]) as image:
        assert torch.equal(first, flat(image.convert("RGB")))
    labels, skipped = found_in(stream, workers)
    assert sorted(labels) == [0] * 4 + [1] * 4 + [2] * 4
    assert not skipped
    parts = [found_in(stream, workers, rank, 2)[0] for rank in range(2)]
    assert sorted(parts[0] + parts[1]) == sorted(labels)
    assert all(parts)
    pattern = labelled("wds/any", shards, "s-{0000..0001}.tar", flat, 3)
    assert len(found_in(pattern, 0)[0]) == 8
    assert pattern.reader.size is None


def test_damaged_samples_are_listed_and_nothing_pickled_is_read(shards: Path, data: Path, tmp_path: Path) -> None:
    first_picture = pictures(data)[0][0]
    marker = tmp_path / "marker"

    class Evil:
        def __reduce__(self) -> Any:
            return exec, (f"open({str(marker)!r}, 'w').write('ran')",)

    evil = pickle.dumps(Evil())
    picture = png(first_picture)
    samples = [
        ("a", {"png": picture, "cls": b"1", "pyd": evil, "pickle": evil, "pkl": evil, "pth": evil}),
        ("b", {"png": b"no picture", "cls": b"1"}),
        ("c", {"png": picture, "cls": b"7"}),
        ("d", {"png": picture, "pyd": evil}),
        ("e", {"pyd": evil, "cls": b"1"}),
        ("f", {"png": picture, "cls": evil}),
    ]
    write_shard(shards / "s-0000.tar", samples)
    whole = (shards / "s-0001.tar").read_bytes()
    (shards / "s-0001.tar").write_bytes(whole[: len(whole) // 2 + 300])
    labels, skipped = found_in(labelled("wds/any", shards, "validation", flat, 3), 0)
    assert not marker.exists()
    assert labels[0] == 1
    text = "\n".join(skipped)
    for words in ("s-0000.tar, b: ", "s-0000.tar, c: its label '7' is none of the 3", "s-0000.tar, d: it has no label"):
        assert words in text
    assert "s-0000.tar, e: it holds no jpg, jpeg, png, webp" in text
    assert "s-0000.tar, f: " in text
    assert "s-0001.tar: the rest of it cannot be read" in text
    assert len(labels) >= 5


@pytest.mark.parametrize("name", ["pipe:touch marker", "/etc/passwd", "../outside.tar", "pipe"])
def test_shards_are_files_of_the_folder(shards: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A "pipe:" name, which webdataset would run as a command, a pipe that would never end, or a file elsewhere."""
    import os

    monkeypatch.chdir(shards)
    if name == "pipe":
        os.mkfifo(shards / "pipe")
    (shards.parent / "outside.tar").write_bytes(b"")
    info = {"splits": {"validation": {"filenames": [name], "num_samples": 1}}}
    (shards / "_info.json").write_text(json.dumps(info))
    with pytest.raises(InputError, match=r"shard .*: check"):
        labelled("wds/any", shards, "validation", flat, 3)
    assert not (shards / "marker").exists()


def test_labels_of_json(shards: Path, data: Path) -> None:
    entries = json.loads((shards / "_info.json").read_text())
    entries["splits"]["validation"] |= {"alt_label": "kind", "filenames": ["j.tar"], "num_samples": 2}
    (shards / "_info.json").write_text(json.dumps(entries))
    picture = png(pictures(data)[0][0])
    write_shard(
        shards / "j.tar", [("a", {"png": picture, "json": b'{"kind": 2}'}), ("b", {"png": picture, "json": b"{"})]
    )
    labels, skipped = found_in(labelled("wds/any", shards, "validation", flat, 3), 0)
    assert labels == [2]
    assert "b: it has no label in json (kind)" in skipped[0]


def test_hub_folders_by_index_and_streamed(hub_folder: Path, data: Path, tmp_path: Path) -> None:
    """Labels are matched to the model's outputs by name."""
    (hub_folder / "validation" / "ant" / "0.png").write_bytes(b"no picture")
    by_index = labelled(f"hfds/{hub_folder}", tmp_path / "cache", "validation", flat, 3, ["cat", "ant", "bee"])
    assert isinstance(by_index, Labelled)
    assert len(by_index) == 12
    assert by_index.names == ["cat", "ant", "bee"]
    labels, skipped = found_in(by_index, 2)
    assert labels == [1] * 3 + [2] * 4 + [0] * 4
    assert len(skipped) == 1
    assert skipped[0].startswith("image 0: ")
    image = by_index[1][0]
    assert image is not None
    with Image.open(data / "ant" / "1.png") as picture:
        assert torch.equal(image, flat(picture.convert("RGB")))
    by_index.take([11, 5])
    assert [by_index[i][1] for i in range(2)] == [0, 2]
    for workers in (0, 2):
        stream = labelled(f"hfids/{hub_folder}", tmp_path / "cache", "validation", flat, 3, ["cat", "ant", "bee"])
        assert isinstance(stream, LabelledStream)
        labels, skipped = found_in(stream, workers)
        assert sorted(labels) == [0] * 4 + [1] * 3 + [2] * 4
        assert len(skipped) == 1


def test_scripts_are_never_run(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="datasets is not installed")
    folder, marker = tmp_path / "Mine", tmp_path / "marker"
    folder.mkdir()
    (folder / "Mine.py").write_text(f"open({str(marker)!r}, 'w').write('ran')\n")
    for prefix in ("hfds", "hfids"):
        for name in (folder, folder / "Mine.py"):
            with pytest.raises(InputError, match="cannot be opened"):
                labelled(f"{prefix}/{name}", tmp_path / "cache", "validation", flat, 3)
    assert not marker.exists()


def test_torchvisions(tmp_path: Path) -> None:
    import struct

    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 6), ("t10k", 4)):
        pixels = np.arange(count * 28 * 28, dtype=np.uint8)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, count, 28, 28) + pixels.tobytes())
        labels = np.arange(count, dtype=np.uint8)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + labels.tobytes())
    dataset = labelled("torch/mnist", tmp_path, "validation", flat, 10)
    assert isinstance(dataset, Labelled)
    assert found_in(dataset, 0) == ([0, 1, 2, 3], [])
    assert dataset.names[3] == "3 - three"
    with pytest.raises(InputError, match="cannot be opened"):
        labelled("torch/cifar10", tmp_path, "validation", flat, 10)


def test_missing_packages_and_names_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, package, install in (
        ("hfds/a", "datasets", "'tokenmerge[datasets]'"),
        ("hfids/a", "datasets", "'tokenmerge[datasets]'"),
        ("wds/a", "webdataset", "'tokenmerge[datasets]'"),
        ("tfds/a", "tensorflow_datasets", "tensorflow-datasets"),
    ):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(InputError, match=f"{package} is not installed, .*: pip install {re.escape(install)}$"):
            labelled(name, tmp_path, "validation", flat, 3)
    for name in ("hfd/a", "a", "", "hfds"):
        with pytest.raises(InputError, match="is unknown, but one of hfds/NAME"):
            labelled(name, tmp_path, "validation", flat, 3)


def test_what_does_not_fit(shards: Path, hub_folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(InputError, match="describes no split 'train'"):
        labelled("wds/any", shards, "train", flat, 3)
    with pytest.raises(InputError, match="does not know the names of its classes"):
        labelled("wds/any", shards, "validation", flat, None)
    with pytest.raises(InputError, match="holds 3 classes, but the model has 5 outputs"):
        labelled(f"hfds/{hub_folder}", cache, "validation", flat, 5)
    with pytest.raises(InputError, match="cannot be opened"):
        labelled(f"hfds/{hub_folder}", cache, "no_such_split", flat, 3)
    with pytest.raises(InputError, match=r"is no text file"):
        labelled(f"hfds/{hub_folder}", cache, "validation", flat, 3, class_map=Path("map.pkl"))


def test_eval_and_compare(shards: Path, hub_folder: Path, model_dir: Path, data: Path, tmp_path: Path) -> None:
    """All ways to the same images give the same accuracy."""
    model = f"local-dir:{model_dir}"
    found = []
    for place, name in (
        (data, None),
        (shards, "wds/any"),
        (tmp_path / "cache", f"hfds/{hub_folder}"),
        (tmp_path / "cache", f"hfids/{hub_folder}"),
    ):
        rows = run_eval(EvalOptions(model=model, data=place, dataset=name, workers=0, batch_size=5, r=[0, 4]))
        found.append([(row["top1"], row["top5"], row["images"]) for row in rows])
        if name is None or name.startswith("hfds"):
            continue
        common: dict[str, Any] = {
            "model": model,
            "data": place,
            "dataset": name,
            "methods": ["tome"],
            "r": [4],
            "rounds": 0,
        }
        rows = run_compare(CompareOptions(**common, workers=0, output=tmp_path / "compared"))
        assert rows[1]["top1"] == pytest.approx(found[-1][1][0])
    assert all(one == found[0] for one in found)
    with pytest.raises(InputError, match="is a stream, but 5 images"):
        run_compare(CompareOptions(model=model, data=shards, dataset="wds/any", limit=5, r=[4], output=tmp_path / "c"))


def test_training(hub_folder: Path, shards: Path, model_dir: Path, tmp_path: Path) -> None:
    """By index; streams are refused."""
    from tokenmerge.tools.train import TrainOptions, run

    (hub_folder / "validation").rename(hub_folder / "train")
    common: dict[str, Any] = {
        "model": f"local-dir:{model_dir}",
        "r": 2,
        "batch_size": 4,
        "epochs": 1,
        "warmup_epochs": 0,
    }
    common |= {"workers": 0, "device": "cpu", "val_split": "", "output": tmp_path / "run"}
    with pytest.raises(InputError, match="is a stream, but the order of training"):
        run(TrainOptions(**common, dataset="hfids/" + str(hub_folder), data=tmp_path / "c", num_classes=3))
    run(TrainOptions(**common, dataset=f"hfds/{hub_folder}", data=tmp_path / "cache"))
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["label_names"] == list(CLASSES)
