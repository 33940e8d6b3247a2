"""Outputs on full disks, odd places and closed streams: one sentence, an earlier file stays, nothing is half-written."""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.conftest import Run
from tests.helpers.processes import Command
from tests.helpers.tiny import tiny
from tokenmerge import files
from tokenmerge.errors import InputError
from tokenmerge.patching.predictors import add_predictors, save_predictors
from tokenmerge.tools.demo.export import export_demo
from tokenmerge.tools.eval import EvalOptions
from tokenmerge.tools.inspect import InspectOptions
from tokenmerge.tools.report import Report
from tokenmerge.tools.visualize import VisualizeOptions
from tokenmerge.tools.writing import save_picture

OLD = b"what was there before"


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system of 128 KiB, which root can make."""
    folder = tmp_path_factory.mktemp("disk")
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(folder)]
    try:
        made = subprocess.run(mount, capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"no small file system can be mounted: {error}")
    if made.returncode:
        pytest.skip(f"no small file system can be mounted: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def full(disk: Path) -> Iterator[Path]:
    """A full disk, which holds an earlier file of each name that a test writes."""
    for name in NAMES:
        (disk / name).parent.mkdir(parents=True, exist_ok=True)
        (disk / name).write_bytes(OLD)
    with contextlib.suppress(OSError), (disk / "filling").open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 512)
    yield disk
    (disk / "filling").unlink()


NAMES = (
    "a.json",
    "a.html",
    "a.png",
    "a.gif",
    "a.onnx",
    "a.pt2",
    "a.safetensors",
    "digits/val/0/0000.png",
    "cmp/compare.csv",
)


def unchanged(folder: Path) -> None:
    """Earlier files are whole, and nothing is left beside them."""
    for name in NAMES:
        assert (folder / name).read_bytes() == OLD, name
    assert not list(folder.rglob(".tokenmerge-*"))
    assert not list(folder.rglob("*.part"))


def test_functions_on_a_full_disk(full: Path) -> None:
    model = tiny("vit_tiny_patch16_224", img_size=48, patch_size=8, embed_dim=48, depth=1, num_heads=3)
    add_predictors(model, [0])
    noise = Image.frombytes("RGB", (64, 64), os.urandom(64 * 64 * 3))
    writers: tuple[Callable[[], Any], ...] = (
        lambda: files.write(full / "a.json", "x" * 10_000, "it"),
        lambda: files.write_json(full / "a.json", list(range(10_000)), "it"),
        lambda: save_picture(noise, full / "a.png", "it"),
        lambda: save_picture(noise, full / "a.gif", "it"),
        lambda: save_predictors(model, full / "a.safetensors"),
        lambda: files.write(full / "new.json", "x" * 10_000, "it"),
        lambda: export_demo(full / "digits"),
    )
    for write in writers:
        with pytest.raises(InputError, match=r"cannot be written \(No space left on device\)"):
            write()
    assert not (full / "new.json").exists()
    unchanged(full)


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    for name in ("a", "b", "c"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(2):
            image = Image.frombytes("RGB", (48, 48), os.urandom(48 * 48 * 3))
            image.save(tmp_path / "data" / name / f"{number}.png")
    return tmp_path / "data"


@pytest.mark.parametrize(
    "words",
    [
        ("inspect", "MODEL", "--r", "4", "--json", "a.json"),
        ("inspect", "MODEL", "--r", "4", "--html", "a.html"),
        ("visualize", "MODEL", "PICTURE", "--r", "4", "--out", "a.png"),
        ("visualize", "MODEL", "PICTURE", "--r", "4", "--out", "a.html"),
        pytest.param(("demo", "--r", "0", "8", "--output", "a.png"), marks=pytest.mark.slow),
        pytest.param(("demo", "--r", "0", "8", "--output", "OUT", "--export", "digits"), marks=pytest.mark.slow),
        ("compare", "MODEL", "--data", "DATA", "--r", "4", "--methods", "tome", "--rounds", "0", "--output", "cmp"),
        ("bench", "MODEL", "--r", "4", "--tune", "--tuning", "new.json"),
    ],
    ids=lambda words: f"{words[0]} {Path(words[-1]).name}",
)
def test_commands_on_a_full_disk(words: tuple[str, ...], full: Path, model_dir: Path, digits: Path, run: Run) -> None:
    places = {
        "MODEL": f"local-dir:{model_dir}",
        "PICTURE": digits / "a" / "0.png",
        "DATA": digits,
        "OUT": digits / "out.png",
    }
    here = (*NAMES, "digits", "cmp", "new.json")
    given_words = [places.get(word, full / word if word in here else word) for word in words]
    code, _, err = run(*given_words)
    told = [line for line in err.splitlines() if line.startswith("tokenmerge: ")]
    assert (code, len(told)) == (2, 1), err
    assert "No space left on device" in told[0]
    assert not (full / "new.json").exists()
    unchanged(full)


def command(*words: object, **options: Any) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-W", "ignore", "-m", "tokenmerge", *map(str, words)]
    return subprocess.run(line, stderr=subprocess.PIPE, text=True, timeout=300, check=False, **options)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["onnx", "pt2", "aoti"])
def test_export_on_a_full_disk(kind: str, full: Path, model_dir: Path, tmp_path: Path) -> None:
    """In a process of its own, because torch's writer of files ended the process."""
    file = full / ("a.onnx" if kind == "onnx" else "a.pt2")
    words = ["export", f"local-dir:{model_dir}", "--r", "4", "--format", kind, "--output", str(file)]
    done = Command(words, tmp_path / "said")
    assert done.wait() == 2, done.err
    assert done.err.splitlines()[-1].startswith("tokenmerge: ")
    assert "No space left on device" in done.err
    assert "Traceback" not in done.err
    unchanged(full)


def test_streams_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    uses: tuple[tuple[str, str | None, Callable[[Report], Any]], ...] = (
        ("stdout", None, lambda report: report.say("a line")),
        ("stdout", None, lambda report: report.table("a table", ["a"], [["b"]])),
        ("stdout", "-", lambda report: report.write([{"r": 8}])),
        ("stderr", None, lambda report: report.warn("a line")),
    )
    for name, json_path, use in uses:
        with Path("/dev/full").open("w") as stream, monkeypatch.context() as patch:
            patch.setattr(sys, name, stream)
            with pytest.raises(
                InputError, match=r"standard (output|error) cannot be written \(No space left on device\)"
            ):
                use(Report(json_path))
            with contextlib.suppress(OSError):
                stream.close()


@pytest.mark.slow
def test_standard_output_that_cannot_be_written() -> None:
    words = ("inspect", "vit_tiny_patch16_224", "--r", "4")
    with Path("/dev/full").open("w") as stream:
        for more in ((), ("--json", "-")):
            done = command(*words, *more, stdout=stream)
            assert done.returncode == 2
            last = "tokenmerge: standard output cannot be written (No space left on device): make room, or send it elsewhere"
            assert done.stderr.splitlines()[-1] == last
            assert "Traceback" not in done.stderr


def test_json_to_a_closed_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(InputError, match="standard output, but it is closed"):
        Report("-")


@pytest.mark.slow
def test_json_to_what_is_no_file(tmp_path: Path) -> None:
    words = ("inspect", "vit_tiny_patch16_224", "--r", "4", "--json", "/dev/stdout")
    piped = command(*words, stdout=subprocess.PIPE)
    assert json.loads(piped.stdout[piped.stdout.index("\n[\n") :])
    with (tmp_path / "both.txt").open("w") as stream:
        assert command(*words, stdout=stream).returncode == 0
    text = (tmp_path / "both.txt").read_text()
    assert text.startswith(piped.stdout[:200])
    assert json.loads(text[text.index("\n[\n") :])


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    cases: tuple[tuple[Any, str], ...] = (
        (tmp_path, "Is a directory"),
        (tmp_path / ("x" * 300), "File name too long"),
        (tmp_path / "nowhere" / "a", "No such file"),
        (tmp_path / "pipe", "cannot be written"),  # which nobody reads
        ("/dev/full", "No space left"),
        ("/proc/nothing", "cannot be written"),
        ("a\0b", "null"),
        (None, "cannot be written"),
    )
    for path, words in cases:
        with pytest.raises(InputError, match=words) as raised:
            files.write(path, "text", "the rows")
        assert len(str(raised.value).splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pipe"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(OLD)
    (tmp_path / "a").chmod(0o444)
    tmp_path.chmod(0o555)
    try:
        for name in ("a", "b"):
            with pytest.raises(InputError, match=r"Permission denied|read-only"):
                files.write(tmp_path / name, "text", "the rows")
    finally:
        tmp_path.chmod(0o755)
    with pytest.raises(InputError, match="read-only"):
        files.write(tmp_path / "a", "text", "the rows")
    assert (tmp_path / "a").read_bytes() == OLD


def test_modes_and_links_stay(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(OLD)
    (tmp_path / "a").chmod(0o640)
    (tmp_path / "link").symlink_to("a")
    files.write(tmp_path / "link", "text", "the rows")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "a").read_text() == "text"
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640
    files.write("/dev/null", "text", "the rows")
    assert Path("/dev/null").is_char_device()


def test_a_pipe_with_a_reader_gets_the_bytes(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE) as reader:
        for _ in range(100):  # until it has opened the pipe
            try:
                files.write(tmp_path / "pipe", "text", "the rows")
            except InputError:
                reader.poll()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    reader.wait(0.05)
            else:
                break
        assert reader.communicate()[0] == b"text"


def test_a_failing_or_silent_body_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(OLD)

    def failing() -> None:
        with files.replacing(tmp_path / "a", "it") as beside:
            beside.write_text("half")
            raise KeyError("a")

    def silent() -> None:
        with files.replacing(tmp_path / "a", "it"):
            pass

    with pytest.raises(KeyError):
        failing()
    with pytest.raises(InputError, match="was not written"):
        silent()
    with files.replacing(tmp_path / "b", "it") as beside:
        beside.write_text("named")
        beside.with_name("b.data").write_text("beside")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "a": OLD.decode(), "b": "named", "b.data": "beside"
    }  # fmt: skip


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(rows=st.lists(st.dictionaries(st.text(max_size=5), VALUES, max_size=3), max_size=3))
def test_rows_hold_no_number_that_json_has_not(rows: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "rows.json"
    report = Report(str(path))
    warned: list[str] = []
    report.warn = warned.append  # type: ignore[method-assign, assignment]
    report.write(rows)

    def refused(name: str) -> float:
        raise AssertionError(name)

    found = json.loads(path.read_text(), parse_constant=refused)
    odd = any(word in json.dumps(rows) for word in ("NaN", "Infinity")) and not _finite(rows)
    assert bool(warned) == odd
    if not odd:
        assert found == rows


def _finite(value: Any) -> bool:
    if isinstance(value, dict | list):
        return all(map(_finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


def test_a_warning_names_what_is_not_finite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Report(str(tmp_path / "a.json")).write([{"r": 8, "top1": math.nan, "seconds": [1.0, math.inf]}])
    assert json.loads((tmp_path / "a.json").read_text()) == [{"r": 8, "top1": None, "seconds": [1.0, None]}]
    told = " ".join(capsys.readouterr().err.split())
    assert "row 1, top1 is nan; row 1, seconds[1] is inf: written as null" in told
    with pytest.raises(InputError, match="cannot be written as JSON"):
        files.write_json(tmp_path / "a.json", [math.nan], "the rows")
    assert json.loads((tmp_path / "a.json").read_text())[0]["r"] == 8


def test_pictures_that_a_format_has_not(tmp_path: Path) -> None:
    for picture, name in (
        (Image.new("RGB", (70_000, 1)), "a.jpg"),
        (Image.new("RGBA", (4, 4)), "a.jpg"),
        (Image.new("RGB", (20_000, 1)), "a.webp"),
        (Image.new("RGB", (4, 4)), "a.nothing"),
    ):
        with pytest.raises(InputError, match="cannot be written"):
            save_picture(picture, tmp_path / name, "the picture")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flag", ["--json", "--html"])
def test_names_that_cannot_be_are_refused_before_any_work(flag: str, tmp_path: Path, run: Run) -> None:
    for path in (tmp_path, tmp_path / "nowhere" / "a.json", tmp_path / ("x" * 300), "a\0b"):
        code, out, err = run("inspect", "vit_tiny_patch16_224", "--r", "4", flag, path)
        assert (code, len(err.strip().splitlines())) == (2, 1), err
        assert out == ""


def test_a_film_is_written_whole(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    from tokenmerge.tools.visualize.film import _write_mp4

    frames = [Image.new("RGB", (33, 17), (level, 0, 0)) for level in range(0, 250, 50)]
    _write_mp4(tmp_path / "a.mp4", frames, 8.0)
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert len(list(container.decode(video=0))) == len(frames)


def test_torch_keeps_its_numbers() -> None:
    """Rows may hold tensors by mistake: an error in one sentence, and no traceback."""
    with pytest.raises(InputError, match="cannot be written as JSON"):
        files.to_json([torch.zeros(2)], "the rows")


def test_a_closed_pipe_ends_only_what_has_nothing_else_to_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `tokenmerge train … | head -1`: the model must still be written."""
    places: tuple[dict[str, Any], ...] = ({"writes": True}, {"json_path": "rows.json"}, {"html_path": "page.html"})
    for place in places:
        with _closed_pipe() as stream, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            goes_on = Report(**place)
            for _ in range(3):
                goes_on.say("a line")
            goes_on.table("a table", ["a"], [["b"]])
            assert goes_on.history == ["a line"] * 3
            stream.flush()
    uses: tuple[tuple[str | None, Callable[[Report], Any]], ...] = (
        (None, lambda report: report.say("a line")),
        ("-", lambda report: report.write([{"r": 8}])),
    )
    for json_path, use in uses:
        with _closed_pipe() as stream, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            with pytest.raises(BrokenPipeError):
                use(Report(json_path))


@contextlib.contextmanager
def _closed_pipe() -> Iterator[Any]:
    """A stream into a pipe that nobody reads any more."""
    reading, writing = os.pipe()
    os.close(reading)
    stream = os.fdopen(writing, "w")
    try:
        yield stream
    finally:
        with contextlib.suppress(OSError):
            stream.close()


def test_a_file_that_is_read_is_not_written(model_dir: Path, digits: Path, tmp_path: Path) -> None:
    picture, model, other = digits / "a" / "0.png", f"local-dir:{model_dir}", tmp_path / "other.png"
    other.symlink_to(picture)
    (tmp_path / "rows.json").write_text("[]")
    (tmp_path / "map.txt").write_text("a")
    for make in (
        lambda: VisualizeOptions(model=model, inputs=[picture], out=picture),
        lambda: VisualizeOptions(model=model, inputs=[picture], out=other),
        lambda: InspectOptions(model=model, json=str(model_dir / "config.json")),
        lambda: InspectOptions(model=model, html=str(model_dir / "model.safetensors")),
        lambda: InspectOptions(model=model, json=str(tmp_path / "rows.json"), html=str(tmp_path / "rows.json")),
        lambda: InspectOptions(model=model, json=str(tmp_path / "new"), html=str(tmp_path / "." / "new")),
        lambda: EvalOptions(model=model, data=digits, class_map=tmp_path / "map.txt", json=str(tmp_path / "map.txt")),
    ):
        with pytest.raises(InputError, match=r"names this file, too: choose another name"):
            make()
    InspectOptions(model=model, json=str(model_dir / "tokenmerge.json"), html=str(tmp_path / "rows.html"))
    InspectOptions(model=model, json="/dev/null", html="/dev/null")
    assert EvalOptions(model=model, data=digits, json="-").json == "-"


def test_the_demo_is_exported_to_a_folder_of_its_own(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    export_demo(tmp_path / "digits")
    export_demo(tmp_path / "digits")  # the same files again
    (tmp_path / "digits" / "model" / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"holds 'model/config.json', but an empty folder was expected"):
        export_demo(tmp_path / "digits")
    (tmp_path / "data" / "val" / "dark").mkdir(parents=True)
    (tmp_path / "data" / "val" / "dark" / "0.png").write_bytes(OLD)
    with pytest.raises(InputError, match=r"holds 'val/dark/0.png'"):
        export_demo(tmp_path / "data")
    assert [str(path.relative_to(tmp_path)) for path in (tmp_path / "data").rglob("*") if path.is_file()] == [
        "data/val/dark/0.png"
    ]


def test_the_demo_is_exported_to_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    made = tempfile.mkdtemp
    # as Python 3.12 and newer do it
    monkeypatch.setattr(tempfile, "mkdtemp", lambda *args, **kwargs: os.path.abspath(made(*args, **kwargs)))
    monkeypatch.chdir(tmp_path)
    assert export_demo(Path("digits")) == (Path("digits/model"), Path("digits/val"))
    assert {path.name for path in Path("digits").iterdir()} == {"model", "train", "val"}


@pytest.mark.slow
def test_a_terminal_without_our_letters() -> None:
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for errors in ("", "ascii", "ascii:strict"):
        done = command("help", "settings", stdout=subprocess.PIPE, env={**environment, "PYTHONIOENCODING": errors})
        assert (done.returncode, done.stderr) == (0, "")
        assert "combine" in done.stdout
