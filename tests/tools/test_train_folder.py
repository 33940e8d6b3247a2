"""The folder of a run: one run at a time, untouched by refused ones, and whole on a full disk."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.helpers.processes import Command
from tests.helpers.training import KWARGS, MODEL, write_classes
from tokenmerge import files
from tokenmerge.cli import main
from tokenmerge.errors import InputError
from tokenmerge.tools.train import main as train_run
from tokenmerge.tools.train.checkpoints import Checkpoints, damage
from tokenmerge.tools.train.lock import locked
from tokenmerge.tools.train.logbook import Logbook


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes that differ in brightness."""
    return write_classes(tmp_path_factory.mktemp("data with spaces"))


def words(data: Path, output: Path, *more: object) -> list[str]:
    """A run of `tokenmerge train`."""
    common = [
        "train",
        MODEL,
        *KWARGS,
        "--data",
        data,
        "--output",
        output,
        "-b",
        4,
        "--warmup-epochs",
        0,
        "--device",
        "cpu",
    ]
    return [str(word) for word in (*common, *more, *(() if "--workers" in more else ("--workers", 0)))]


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file with its time of change."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def until(condition: Callable[[], bool], process: Command, seconds: float = 60) -> None:
    """Wait for a condition while a process runs."""
    end = time.monotonic() + seconds
    while process.running and not condition() and time.monotonic() < end:
        time.sleep(0.01)


def test_a_second_run_is_refused(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    first = Command(words(data, run, "--epochs", 400, "--recovery-interval", 1), tmp_path / "said")
    until(lambda: any((run / "checkpoints").glob("update-*")), first)
    assert first.running, first.err
    first.send(signal.SIGSTOP)
    time.sleep(0.2)
    before = contents(run)
    try:
        for more in ((), ("--resume", "auto")):
            assert main(words(data, run, "--epochs", 400, *more)) == 2
            said = capsys.readouterr().err
            assert f"{str(run)!r} is in use by another run (process {first.process.pid})" in said
            assert contents(run) == before
    finally:
        first.send(signal.SIGCONT)
    first.send(signal.SIGTERM)
    assert first.wait() == 0, first.err
    assert not (run / ".lock").exists()


@pytest.mark.parametrize("workers", [2, pytest.param(0, marks=pytest.mark.slow)])
def test_a_killed_run_leaves_no_stale_lock(data: Path, tmp_path: Path, workers: int) -> None:
    """Neither do its data loaders, which outlive it for some seconds."""
    run = tmp_path / "run"
    more = ("--epochs", 400, "--recovery-interval", 1, "--workers", workers)
    first = Command(words(data, run, *more), tmp_path / "said")
    until(lambda: any((run / "checkpoints").glob("update-*")), first)
    first.send(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    assert (run / ".lock").exists()
    with locked(run, pytest.fail):
        pass
    assert not (run / ".lock").exists()


def test_the_lock(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    with locked(folder, pytest.fail):
        with (
            pytest.raises(InputError, match=rf"in use by another run \(process {os.getpid()}\)"),
            locked(folder, pytest.fail),
        ):
            pass
        released, release = os.pipe()
        child = os.fork()
        if not child:  # the child of a run holds nothing
            os.close(release)
            os.read(released, 1)  # until the parent closes its end, or ends
            os._exit(0 if _is_free(folder) else 1)
    assert not (tmp_path / "a").exists()
    os.close(release)
    assert os.waitpid(child, 0)[1] == 0
    os.close(released)
    assert not (tmp_path / "a").exists()
    folder.mkdir(parents=True)
    with locked(folder, pytest.fail):
        (folder / "kept").touch()
    assert [path.name for path in folder.iterdir()] == ["kept"]


def _is_free(folder: Path) -> bool:
    """Return whether a child process can take the lock; no exception may leave it into its copy of the tests."""
    try:
        with locked(folder, print):
            return True
    except BaseException:
        return False


@pytest.mark.parametrize("kind", ["pipe", "link", "folder", "file above"])
def test_an_odd_lock_is_one_sentence(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (tmp_path / "other").touch()
    make: dict[str, Callable[[], object]] = {
        "pipe": lambda: os.mkfifo(folder / ".lock"),
        "link": lambda: (folder / ".lock").symlink_to(tmp_path / "other"),
        "folder": lambda: (folder / ".lock").mkdir(),
        "file above": lambda: None,
    }
    make[kind]()
    with (
        pytest.raises(InputError, match="cannot be used"),
        locked(tmp_path / "other" / "run" if kind == "file above" else folder, pytest.fail),
    ):
        pass
    assert (tmp_path / "other").read_bytes() == b""


def test_refused_runs_change_nothing(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main(words(data, run, "--r", 3, "--epochs", 1, "--tensorboard")) == 0
    (run / "checkpoints" / ".writing-update-000000009").mkdir()
    (run / "checkpoints" / ".writing-update-000000009" / "part").touch()
    damaged = tmp_path / "damaged"
    shutil.copytree(next((run / "checkpoints").glob("update-*")), damaged)
    (damaged / "state.json").write_text("{}")
    before = contents(run)
    for more in (
        ("--r", 3, "--epochs", 1, "--tensorboard"),
        ("--r", 5, "--epochs", 1, "--resume", "auto", "--tensorboard"),
        ("--r", 3, "--epochs", 1, "--resume", damaged, "--tensorboard"),
        ("--r", 3, "--epochs", 1, "--resume", tmp_path / "none"),
        ("--r", 3, "--epochs", 1, "--resume", "auto", "--opt", "none"),
    ):
        capsys.readouterr()
        assert main(words(data, run, *more)) == 2
        assert capsys.readouterr().err.count("tokenmerge:") == 1
        assert contents(run) == before, more


@pytest.mark.parametrize("text", ["", "[]", "{}", "[" * 9999])
def test_a_damaged_record_is_no_other_run(
    data: Path, tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether the options are the same cannot be told then, so they are not taken for the same."""
    run = tmp_path / "run"
    assert main(words(data, run, "--epochs", 1, "--val-split", "")) == 0
    (run / "run.json").write_text(text)
    assert main(words(data, run, "--epochs", 1, "--val-split", "", "--resume", "auto")) == 2
    assert "run.json" in capsys.readouterr().err


SIZES = (4, 12, 100, 300, 600, 900, 1200, 1600, 3300)
"""Kilobytes of a disk that is full at the first record, at one checkpoint after the other, and never."""
LONG = ("--epochs", 3, "--model-ema", "--model-ema-decay", 0.8, "--recovery-interval", 2, "--tensorboard", "--r", 3)


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with enough room."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert main(words(data, run, *LONG)) == 0
    return run


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a small file system of a number of kilobytes; the same call changes its size."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size: int) -> Path:
        how = f"remount,size={size}k" if folder.is_mount() else f"size={size}k"
        if subprocess.run(
            ["mount", "-t", "tmpfs", "-o", how, "none", folder], check=False, capture_output=True
        ).returncode:
            pytest.skip("a file system cannot be mounted here, which needs root")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", "-l", folder], check=True)


def occupy(disk: Path, room: int = 0) -> None:
    """Fill a disk, except for some kilobytes."""
    with contextlib.suppress(OSError), open(disk / "occupied", "ab", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    with open(disk / "occupied", "r+b") as file:
        file.truncate(max(0, os.path.getsize(disk / "occupied") - 1024 * room))


def test_a_line_is_appended_whole_or_not(disk: Callable[[int], Path]) -> None:
    folder = disk(64)
    file = folder / "rows"
    files.append(file, "one\n", "the rows")
    occupy(folder)
    with pytest.raises(InputError, match="No space left on device"):
        files.append(file, "x" * 10_000, "the rows")
    assert file.read_text() == "one\n"
    os.mkfifo(file.with_name("pipe"))
    with pytest.raises(InputError, match="is a pipe"):
        files.append(file.with_name("pipe"), "x", "the rows")


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_a_full_disk(
    data: Path, whole: Path, disk: Callable[[int], Path], size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence, what was there is whole, and with more room the run goes on to the same weights."""
    run = disk(size) / "run"
    capsys.readouterr()
    code = main(words(data, run, *LONG))
    said = capsys.readouterr().err
    if size == SIZES[-1]:
        assert code == 0, said
        return
    check_refused(code, said, run)
    disk(65536)
    check_goes_on(data, run, whole)


WRITERS = {
    "run.json": (Logbook, "start", 0),
    "train.log at the start": (Logbook, "start_log", 0),
    "curves": (Logbook, "draw", 0),
    "page": (Logbook, "draw", 60),
    "checkpoint": (Checkpoints, "save", 0),
    "half a checkpoint": (Checkpoints, "save", 300),
    "model": (train_run, "publish", 0),
    "half a model": (train_run, "publish", 40),
    "log": (Logbook, "note", 0),
    "rows": (Logbook, "add", 0),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
def test_a_disk_that_fills_up_at_any_writer(
    data: Path,
    whole: Path,
    disk: Callable[[int], Path],
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Another process takes the room, just before a file is written for the second time."""
    folder = disk(8192)
    run = folder / "run"
    owner, function, room = WRITERS[name]
    original, calls = getattr(owner, function), [0]

    def full(*args: Any, **values: Any) -> Any:
        calls[0] += 1
        if calls[0] >= (1 if "start" in function or function == "publish" else 2):
            if function in ("note", "add"):  # a line of over a page, because smaller ones may fit in the last page
                args = (args[0], "x" * 5000 if function == "note" else {**args[1], "more": "x" * 5000})
            occupy(folder, room)
        return original(*args, **values)

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(owner, function, full)
        code = main(words(data, run, *LONG))
    check_refused(code, capsys.readouterr().err, run)
    (folder / "occupied").unlink()
    check_goes_on(data, run, whole)


@pytest.mark.slow
def test_events_on_a_full_disk(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from torch.utils.tensorboard import SummaryWriter

    def full(self: SummaryWriter) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "flush", full)
    assert main(words(data, tmp_path / "run", *LONG)) == 2
    assert "the events" in capsys.readouterr().err


def check_refused(code: int, said: str, run: Path) -> None:
    """One sentence, and no half-written file."""
    assert code == 2
    assert said.count("tokenmerge: ") == 1
    assert len(said.splitlines()) == 1
    assert "make room" in said
    for checkpoint in (run / "checkpoints").glob("update-*"):
        assert damage(checkpoint) is None
    if (run / "run.json").exists():
        json.loads((run / "run.json").read_text())
    if (run / "metrics.jsonl").exists():
        assert all(json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    if (run / "curves.png").exists():
        with Image.open(run / "curves.png") as picture:
            picture.load()
    if (run / "report.html").exists():
        assert (run / "report.html").read_text().rstrip().endswith("</html>")
    assert not list(run.rglob(".tokenmerge-*"))


def check_goes_on(data: Path, run: Path, whole: Path) -> None:
    """To the weights and rows of the run that had room."""
    assert main(words(data, run, *LONG, "--resume", "auto")) == 0
    found, wanted = (load_file(one / "model" / "model.safetensors") for one in (run, whole))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    texts = [(one / "metrics.jsonl").read_text().splitlines() for one in (run, whole)]
    rows = [[{**json.loads(line), "images_per_second": 0} for line in text] for text in texts]
    assert rows[0] == rows[1]


def test_a_link_in_the_folder_of_a_run_is_not_followed(data: Path, tmp_path: Path, capsys: Any) -> None:
    """A folder that somebody else made could otherwise reach any file of the user."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for name in ("train.log", "run.json", "metrics.jsonl", "model", ".lock"):
        run = tmp_path / name.strip(".").replace(".", "-")
        run.mkdir()
        (run / name).symlink_to(victim)
        assert main(words(data, run, "--epochs", 1)) == 2
        err = capsys.readouterr().err
        assert f"is a link to '{victim}'" in err
        assert len(err.splitlines()) == 1
    assert victim.read_text() == "mine"
    (tmp_path / "log").symlink_to(victim)
    with pytest.raises(InputError, match="is a link to"):
        files.append(tmp_path / "log", "a line", "the log")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "elsewhere")  # the folder itself may be elsewhere
    assert main(words(data, tmp_path / "run", "--epochs", 1)) == 0
