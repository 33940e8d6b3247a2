"""Signals end commands in one line, at any moment, and never twice."""

from __future__ import annotations

import gc
import io
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.progress import Task, TextColumn
from rich.text import Text
from torch.utils.data import DataLoader, Dataset, IterableDataset

from tests.helpers.processes import Command, as_in_a_shell
from tests.tools.test_train_folder import data, until, words  # noqa: F401 the fixture
from tokenmerge.cli import main
from tokenmerge.tools import signals
from tokenmerge.tools.eval.data import guarded
from tokenmerge.tools.folders import batches as in_batches
from tokenmerge.tools.report import Bars, Report
from tokenmerge.tools.signals import Signalled, check, deferred, ending, handled, in_worker, on_sigterm

ALL = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Those of a program that a shell starts, also where these tests run under nohup or in the background of a script."""
    before = {number: signal.getsignal(number) for number in ALL}
    as_in_a_shell()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", ALL)
def test_a_signal_is_raised_and_handlers_come_back(number: signal.Signals) -> None:
    before = [signal.getsignal(one) for one in ALL]
    with pytest.raises(Signalled) as error, handled(), handled():
        signal.raise_signal(number)
    assert isinstance(error.value, KeyboardInterrupt)
    assert ending(error.value)[1] == 128 + number
    assert [signal.getsignal(one) for one in ALL] == before
    check()


def test_words() -> None:
    assert ending(KeyboardInterrupt()) == ("interrupted", 130)
    assert ending(Signalled(signal.SIGTERM)) == ("terminated", 143)
    assert ending(Signalled(signal.SIGHUP))[1] == 129


def test_a_dropped_signal_is_raised_again(capsys: pytest.CaptureFixture[str]) -> None:
    """A destructor drops it, without a traceback; a loop that checks, or the end of the command, raises it."""

    class Dropping:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    reached = []

    def loop(checks: bool) -> None:
        with handled():
            Dropping()
            reached.append(1 if checks else 3)
            if checks:
                check()
                reached.append(2)

    for checks in (True, False):
        with pytest.raises(Signalled):
            loop(checks)
    assert reached == [1, 3]
    assert capsys.readouterr().err == ""


def test_a_signal_waits_for_the_end_of_what_must_be_whole() -> None:
    done = []

    def body() -> None:
        with handled(), deferred():
            with deferred():
                signal.raise_signal(signal.SIGTERM)
                done.append(1)
            done.append(2)

    with pytest.raises(Signalled):
        body()
    assert done == [1, 2]
    with handled(), deferred():
        pass


def test_loaders_start_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's iterator complains in its destructor if it was broken off while it started its workers."""

    class Init:
        def __get__(self, loader: object, kind: type) -> None:
            if sys._getframe(1).f_code.co_qualname == "_MultiProcessingDataLoaderIter.__init__":
                signal.raise_signal(signal.SIGINT)

        def __set__(self, loader: object, value: object) -> None:
            pass

    class Loader(DataLoader[int]):
        worker_init_fn = Init()

    dropped: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: dropped.append(unraisable.exc_value))

    def body() -> None:
        with handled():
            list(guarded(Loader(Slow(), num_workers=1)))

    with pytest.raises(Signalled):
        body()
    gc.collect()
    assert dropped == []


def test_bars_are_drawn_whole() -> None:
    """A signal in the middle of drawing would make rich keep all later lines."""
    file = io.StringIO()
    report = Report()
    report.out = report.err = Console(file=file, force_terminal=True, width=80)

    class Column(TextColumn):
        def render(self, task: Task) -> Text:
            if task.completed == 1:
                signal.raise_signal(signal.SIGINT)
            return super().render(task)

    def body() -> None:
        with handled(), Bars(Column("x"), console=report.err, auto_refresh=False) as bars:
            bars.update(bars.add_task("x"), completed=1, refresh=True)

    with pytest.raises(Signalled):
        body()
    report.say("and this is printed")
    assert "and this is printed" in file.getvalue()


def test_ignored_signals_stay_ignored() -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with handled():
            signal.raise_signal(signal.SIGHUP)
            check()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_threads_leave_signals_alone() -> None:
    found = []

    def call() -> None:
        with handled(), on_sigterm(lambda: None):
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGINT)]


def test_forked_processes_leave_signals_to_their_parent() -> None:
    with handled():
        child = os.fork()
        if not child:
            try:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGHUP)
                check()
                signal.raise_signal(signal.SIGTERM)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143


class Slow(Dataset[int]):
    """Names the process that loads."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> int:
        time.sleep(0.02)
        return os.getpid()


@pytest.mark.parametrize("number", ALL)
def test_workers_outlive_signals_of_the_group(number: signal.Signals) -> None:
    """But not their parent's SIGTERM, with which PyTorch ends those that hang."""
    batches: Iterator[torch.Tensor] = iter(DataLoader(Slow(), num_workers=1, batch_size=1, worker_init_fn=in_worker))
    worker = int(next(batches))
    assert worker != os.getpid()
    sender = subprocess.run([sys.executable, "-c", f"import os; os.kill({worker}, {int(number)})"], check=True)
    assert sender.returncode == 0
    assert len([int(batch) for batch in batches]) == 39
    batches = iter(DataLoader(Slow(), num_workers=1, batch_size=1, worker_init_fn=in_worker))
    process = batches._workers[0]  # type: ignore[attr-defined]
    next(batches)
    process.terminate()
    process.join(5)
    assert process.exitcode == 0


class Shared(Dataset[str]):
    """Names the socket at which the process that loads hands out memory."""

    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int) -> str:
        time.sleep(0.05)
        shared: Any = DupFd(0)
        return str(shared._id[0])


def failing(_: int) -> None:
    """Leave the thread that hands out memory to fail in a way of its own."""
    in_worker(0)
    sys.excepthook(ValueError, ValueError("an error of another kind"), None)


@pytest.mark.parametrize(
    ("start", "expected"),
    [(in_worker, []), (None, ["ConnectionResetError", "BrokenPipeError"]), (failing, ["another kind"])],
)
def test_a_main_process_that_hangs_up_is_no_error(
    start: Callable[[int], None] | None, expected: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    """As when Ctrl-C reaches it while it fetches a batch; the worker says nothing, and goes on."""
    batches = iter(DataLoader(Shared(), num_workers=1, batch_size=None, worker_init_fn=start))
    address = next(batches)
    for _ in range(5):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(address)
    assert len(list(batches)) == 8
    err = capfd.readouterr().err
    assert any(word in err for word in expected) if expected else err == ""


class SlowStream(IterableDataset[tuple[torch.Tensor, int, str]]):
    """Yields the process that loads as a picture."""

    def share(self, rank: int, processes: int) -> None:
        pass

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int, str]]:
        for _ in range(20):
            time.sleep(0.02)
            yield torch.tensor(os.getpid()), 0, ""


def test_workers_of_streams_outlive_ctrl_c() -> None:
    loaded = iter(in_batches(SlowStream(), 1, 1))
    worker = int(next(loaded).images)
    assert worker != os.getpid()
    os.kill(worker, signal.SIGINT)
    assert len([batch for batch in loaded if int(batch.images) == worker]) == 19


def at_random(command: Command, ready: object, number: int, spread: float, generator: random.Random) -> tuple[int, str]:
    """Send a signal at a random moment after something is there; the exit code and standard error."""
    until(lambda: Path(str(ready)).exists(), command)
    time.sleep(generator.random() * spread)
    assert command.running, command.err
    command.send(number)
    return command.wait(30), command.err


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_interrupted_at_any_moment(data: Path, tmp_path: Path, workers: int) -> None:  # noqa: F811
    """Ten times; one line, code 130, and no lock left."""
    generator = random.Random(os.getpid())
    for number in range(10):
        run = tmp_path / str(number)
        more = ("--epochs", 9000, "--workers", workers, "--model-ema")
        command = Command(words(data, run, *more), tmp_path / "said")
        code, said = at_random(command, run / "run.json", signal.SIGINT, 3, generator)
        assert (code, said) == (130, "tokenmerge: interrupted\n"), number
        assert not (run / ".lock").exists()


@pytest.mark.slow
def test_terminated_with_the_whole_group(data: Path, tmp_path: Path) -> None:  # noqa: F811
    """As `timeout` and job schedulers do: the data loaders must not die of it. Once as a person starts it."""
    generator = random.Random(os.getpid())
    for number in range(4):
        run = tmp_path / str(number)
        line = words(data, run, "--epochs", 9000, "--workers", 2)
        said = [tmp_path / f"said.{name}" for name in ("out", "err")]
        wait: Callable[[float], int]
        if number:
            command = Command(line, tmp_path / "said", group=True)
            pid, wait = command.process.pid, command.wait
        else:
            with said[0].open("w") as out, said[1].open("w") as err:
                process = subprocess.Popen(
                    [sys.executable, "-m", "tokenmerge", *line], start_new_session=True, stdout=out, stderr=err
                )
            pid, wait = process.pid, process.wait
        end = time.monotonic() + 60
        while not any((run / "checkpoints").glob("update-*")) and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(generator.random())
        os.killpg(pid, signal.SIGTERM)
        assert (wait(60), said[1].read_text()) == (0, "")
        assert "stopped and saved after update" in said[0].read_text()


DRIVER = """
import sys
from pathlib import Path
from typing import Any
from tokenmerge.tools import signals
from tokenmerge.tools.train import TrainOptions, run

arguments = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
args = TrainOptions(
    model="vit_tiny_patch16_224", model_kwargs=arguments, data=Path(sys.argv[1]), output=Path(sys.argv[2]), r=3, batch_size=4,
    warmup_epochs=0, device="cpu", epochs=9000, workers=1,
)
try:
    with signals.handled():
        run(args)
except KeyboardInterrupt as error:
    word, code = signals.ending(error)
    print(f"tokenmerge: {word}", file=sys.stderr)
    sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_closed_terminal_and_an_early_sigterm(data: Path, tmp_path: Path, number: signal.Signals) -> None:  # noqa: F811
    """SIGTERM before the first update has nothing to save; later it saves."""
    said = {
        signal.SIGHUP: (129, "tokenmerge: ended, because its terminal was closed\n"),
        signal.SIGTERM: (143, "tokenmerge: terminated\n"),
    }
    for moment in ("early", "late"):
        run = tmp_path / moment
        process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(data), str(run)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        end, ready = time.monotonic() + 60, run / (".lock" if moment == "early" else "metrics.jsonl")
        while (
            not (ready.exists() and (moment == "early" or any((run / "checkpoints").glob("update-*"))))
            and time.monotonic() < end
        ):
            time.sleep(0.001)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        if moment == "late" and number == signal.SIGTERM:
            assert (process.returncode, err) == (0, "")
            assert "stopped and saved" in out
        else:
            assert (process.returncode, err) == said[number]


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A model that was trained for an epoch."""
    run = tmp_path_factory.mktemp("trained") / "run"
    assert main(words(data, run, "--epochs", 1)) == 0
    return run / "model"


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.0, 0.7, 1.9, 3.1])
def test_search_is_interrupted_in_one_line(data: Path, trained: Path, tmp_path: Path, seconds: float) -> None:  # noqa: F811
    """Optuna says nothing, and the study goes on."""
    import optuna

    storage = tmp_path / "search.db"
    search = [
        "search",
        f"local-dir:{trained}",
        "--data",
        str(data / "train"),
        "--storage",
        f"sqlite:///{storage}",
    ]
    search += ["--trials", "500", "--batch-size", "4", "--workers", "0", "--output", str(tmp_path / "best.json")]
    command = Command(search, tmp_path / "said")
    optuna.logging.set_verbosity(optuna.logging.ERROR)

    def trials() -> int:
        try:
            study = optuna.load_study(study_name="tokenmerge", storage=f"sqlite:///{storage}")
        except Exception:  # not there yet, in any of its parts
            return 0
        return sum(trial.values is not None for trial in study.trials)

    until(lambda: trials() > 0, command)
    time.sleep(seconds)
    command.send(signal.SIGINT)
    assert command.wait(60) == 130, command.err
    lines = [line for line in command.err.splitlines() if not line.startswith("warning:")]
    assert lines[-1] == "tokenmerge: interrupted"
    assert "Traceback" not in command.err
    assert "Trial" not in command.err
    assert "KeyboardInterrupt" not in command.err


def test_the_record_is_per_process() -> None:
    assert signals._Record.owner is None
    assert signals._Record.arrived is None


def handles(process: subprocess.Popen[str], number: int) -> bool:
    """Whether a process has a handler for a signal."""
    status = Path(f"/proc/{process.pid}/status").read_text("utf-8")
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux shows which signals a process handles")
@pytest.mark.parametrize("number", ALL)
def test_while_the_package_is_imported(number: signal.Signals) -> None:
    """The command's entry handles signals before the import of torch, which takes seconds."""
    script = Path(sys.executable).with_name("tokenmerge")
    for seconds in (0, 0.3, 0.8):
        process = subprocess.Popen(
            [script, "bench", "vit_base_patch16_224", "--r", "8"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=as_in_a_shell,
        )
        end = time.monotonic() + 60
        while not handles(process, signal.SIGHUP) and time.monotonic() < end:  # the last that it handles
            time.sleep(0.005)
        time.sleep(seconds)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 128 + number, err
        assert len(err.splitlines()) == 1
        assert err.startswith("tokenmerge: ")
