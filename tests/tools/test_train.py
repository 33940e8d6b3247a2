"""Training as a person runs it: killed and resumed, on two processes, on damaged files, with numbers that explode."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.helpers import processes
from tests.helpers.processes import Command
from tests.helpers.training import KWARGS, MODEL, write_classes
from tokenmerge.cli import main
from tokenmerge.tools.folders import ShareOfBatches
from tokenmerge.tools.train.data import EpochBatches
from tokenmerge.tools.train.lock import locked
from tokenmerge.tools.train.options import TrainOptions

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes that differ in brightness: 16 images to train on, 6 to validate."""
    return write_classes(tmp_path_factory.mktemp("data"))


@pytest.fixture
def train(capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path) -> Run:
    """Runs `tokenmerge train` on them; exit code, stdout, stderr."""

    def call(*args: object, output: str = "run", data: Path = data) -> tuple[int, str, str]:
        words = [MODEL, *KWARGS, "--data", data, "--output", tmp_path / output, *args]
        words += [] if "--batch-size" in args else ["--batch-size", "4"]
        words += [] if "--warmup-epochs" in args else ["--warmup-epochs", "0"]
        try:
            code = main(["train", *(str(word) for word in words), "--workers", "0", "--device", "cpu"])
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return call


def weights(run: Path) -> dict[str, torch.Tensor]:
    """The trained model's."""
    return load_file(run / "model" / "model.safetensors")


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of weights are equal to the bit."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def rows(run: Path, kind: str) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if row["kind"] == kind]


FULL: tuple[str, ...] = (
    "--r",
    "3",
    "--epochs",
    "3",
    "--lr",
    "0.003",
    "--mixup",
    "0.2",
    "--drop-path",
    "0.2",
    "--drop",
    "0.1",
    "--model-ema",
)
FULL += (
    "--model-ema-decay",
    "0.8",
    "--reprob",
    "0.2",
    "--aa",
    "rand-m3-n2",
    "--clip-grad",
    "1",
    "--layer-decay",
    "0.8",
)


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with all of that on, which nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    words = ["train", MODEL, *KWARGS, "--data", data, "--output", folder, *FULL, "--batch-size", 4, "--device", "cpu"]
    assert main([str(word) for word in (*words, "--warmup-epochs", 0, "--workers", 0)]) == 0
    return folder


def test_learns_and_leaves_a_run_folder(
    train: Run, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Everything in the folder is there and true, and the model is one of timm's that `eval` understands."""
    code, out, _ = train(
        "--r", "3", "--epochs", "6", "--lr", "0.003", "--eval-r", "0", "3", "5", "--json", tmp_path / "rows.json"
    )
    assert code == 0, out
    run = tmp_path / "run"
    about = json.loads((run / "run.json").read_text())
    assert about["args"]["r"] == "3"
    assert json.loads((run / "model" / "tokenmerge.json").read_text())["prop_attn"] is True
    assert about["data"]["images"] == 16
    assert {"torch", "timm", "accelerate", "commit"} <= about.keys()
    losses = [row["loss"] for row in rows(run, "train")]
    assert losses[-1] < 0.6 * losses[0]
    final = [row for row in rows(run, "eval") if row["epoch"] == 6]
    assert [row["r"] for row in final] == [0, 3, 5]
    assert all(row["images"] == 6 and row["top1"] == 100 for row in final)
    assert final[0]["gflops"] > final[1]["gflops"] > final[2]["gflops"]
    assert json.loads((tmp_path / "rows.json").read_text())[1]["top1"] == 100
    with Image.open(run / "curves.png") as picture:
        assert picture.width > 500
    model = timm.create_model(f"local-dir:{run / 'model'}", pretrained=True)
    assert same(model.state_dict(), weights(run))
    assert json.loads((run / "model" / "config.json").read_text())["label_names"] == ["dark", "light"]
    words = ["eval", f"local-dir:{run / 'model'}", "--pretrained", "--data", data / "val", "--r", "3", "--workers", "0"]
    assert main([str(word) for word in words]) == 0
    assert "100.00" in capsys.readouterr().out


def test_the_merging_of_training_is_kept(
    train: Run, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole method, from the folder and from the file alike; the commands use it, and say so."""
    import tokenmerge
    from tokenmerge.tools.common import DeviceOptions
    from tokenmerge.tools.saved import saved_with

    found = tmp_path / "found.json"
    found.write_text('{"r": 3, "combine": "norm", "matcher": "kmeans", "options": {"iterations": 2}}')
    assert train("--r", found, "--epochs", "1", "--prop-attn", "off", "--set", "order=spatial")[0] == 0
    folder = tmp_path / "run" / "model"
    wanted = tokenmerge.MergeConfig(
        r=3, combine="norm", matcher="kmeans", options={"iterations": 2}, prop_attn=False, order="spatial"
    )
    assert saved_with(DeviceOptions(model=f"local-dir:{folder}")) == wanted
    assert saved_with(DeviceOptions(model=MODEL, checkpoint=folder / "model.safetensors")) == wanted
    assert tokenmerge.handle_of(tokenmerge.load(folder)).config == wanted
    words = [
        "eval",
        f"local-dir:{folder}",
        "--data",
        str(data / "val"),
        "--workers",
        "0",
        "--json",
        str(tmp_path / "rows.json"),
    ]
    assert main(words) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert (
        "merging as saved with the model: r=3, prop_attn False, order spatial, matcher kmeans, options {'iterations': 2}, combine norm"
        in out
    )
    assert json.loads((tmp_path / "rows.json").read_text())[0]["r"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("stop", [1, 4, 7])
def test_resumed_is_uninterrupted(
    train: Run, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    """With everything on that draws random numbers, a run that broke off goes on to the same bits."""
    from tokenmerge.tools.train.loop import Loop

    micro = Loop._micro

    def breaks(self: Loop, *args: Any) -> float:
        if self.update == stop:
            raise KeyboardInterrupt
        return micro(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_micro", breaks)
        assert train(*FULL, "--recovery-interval", "1")[0] == 130
    code, out, _ = train(*FULL, "--resume", "auto")
    assert code == 0
    assert f"after update {stop}" in out
    assert same(weights(tmp_path / "run"), weights(whole))
    strip = [{**row, "images_per_second": 0} for row in rows(whole, "train")]
    assert [{**row, "images_per_second": 0} for row in rows(tmp_path / "run", "train")] == strip


@pytest.mark.slow
def test_workers_do_not_change_what_is_learnt(data: Path, whole: Path, tmp_path: Path) -> None:
    common = [MODEL, *KWARGS, "--data", data, *FULL, "--batch-size", "4", "--warmup-epochs", "0", "--device", "cpu"]
    words = ["train", *common, "--output", tmp_path / "run", "--workers", 2]
    assert main([str(word) for word in words]) == 0
    assert same(weights(whole), weights(tmp_path / "run"))


@pytest.mark.slow
def test_accumulation_equals_the_large_batch(train: Run, tmp_path: Path) -> None:
    plain = ("--r", "3", "--epochs", "2", "--lr", "0.001", "--opt", "sgd")
    assert train(*plain, "--batch-size", "8", output="large")[0] == 0
    assert train(*plain, "--batch-size", "4", "--grad-accum-steps", "2", output="small")[0] == 0
    large, small = weights(tmp_path / "large"), weights(tmp_path / "small")
    assert all(torch.allclose(large[name], small[name], atol=1e-6) for name in large)


@pytest.mark.slow
def test_r_over_the_epochs(train: Run, tmp_path: Path) -> None:
    assert train("--r", "4", "--epochs", "4", "--r-warmup-epochs", "2", "--r-milestones", "3=6")[0] == 0
    schedules = {int(row["epoch"] - 0.01): row["schedule"][0] for row in rows(tmp_path / "run", "train")}
    assert schedules == {0: 0, 1: 2, 2: 4, 3: 6}


@pytest.mark.slow
def test_distillation_with_share_one_keeps_the_teacher(train: Run, tmp_path: Path) -> None:
    """At r = 0 the student is its teacher: a loss of pure distillation is 0, and stays 0."""
    quiet = ("--no-aug", "--opt", "sgd", "--weight-decay", "0")
    assert train("--r", "0", "--epochs", "2", "--distill-weight", "1", "--lr", "0.1", *quiet)[0] == 0
    assert all(abs(row["loss"]) < 1e-6 for row in rows(tmp_path / "run", "train"))
    assert train("--r", "6", "--epochs", "1", "--distill-weight", "1", *quiet, output="merged")[0] == 0
    assert rows(tmp_path / "merged", "train")[0]["loss"] > 1e-8


@pytest.mark.slow
def test_a_damaged_checkpoint_falls_back(train: Run, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    newest, before = sorted((tmp_path / "run" / "checkpoints").iterdir(), reverse=True)
    file = next(newest.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    code, out, err = train(*FULL, "--resume", "auto")
    assert code == 0
    assert f"{newest.name}'isdamaged" in "".join(err.split())  # a line may end within the path
    assert str(int(before.name.removeprefix("update-"))) in out
    assert same(weights(tmp_path / "run"), weights(whole))
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        (path / "manifest.json").unlink()
    code, _, err = train(*FULL, "--resume", "auto")
    assert code == 2
    assert "none of the 2 checkpoints is whole" in err


@pytest.mark.slow
def test_a_loss_that_is_no_number_stops(
    train: Run, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It names update, batch and images, and what was good is saved and can be resumed."""
    from tokenmerge.tools.train.objective import Objective

    call, count = Objective.__call__, [0]

    def explodes(self: Objective, *args: Any) -> torch.Tensor:
        count[0] += 1
        return call(self, *args) * (float("nan") if count[0] == 6 else 1.0)

    with monkeypatch.context() as patch:
        patch.setattr(Objective, "__call__", explodes)
        code, _, err = train(*FULL)
    assert code == 2
    assert "the loss became nan at update 5 (epoch 1, batch 1: " in err
    assert ".png" in err
    assert train(*FULL, "--resume", "auto")[0] == 0
    assert same(weights(tmp_path / "run"), weights(whole))


@pytest.mark.slow
def test_a_full_disk_keeps_the_checkpoint_before(train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenmerge.tools.train.packing import write_tensors

    def full(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        if "update-000000008" in str(path):
            raise OSError(28, "No space left on device")
        write_tensors(path, tensors)

    with monkeypatch.context() as patch:
        patch.setattr("tokenmerge.tools.train.state.write_tensors", full)
        code, _, err = train(*FULL)
    assert code == 2
    assert "No space left on device" in err
    assert "update-000000004 is still whole" in err
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["update-000000004"]
    assert train(*FULL, "--resume", "auto")[0] == 0


def test_damaged_images_are_named_and_replaced(train: Run, data: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    (copy / "train" / "dark" / "3.png").write_bytes(b"no image")
    code, _, err = train("--r", "3", "--epochs", "1", data=copy)
    assert code == 0
    assert "dark/3.png: it is no picture that can be read here" in " ".join(err.split())
    for path in (copy / "val").rglob("*.png"):
        path.write_bytes(b"no image")
    code, _, err = train("--r", "3", "--epochs", "1", data=copy, output="blind")
    assert code == 2
    assert "none of the validation images" in err
    for path in (copy / "train").rglob("*.png"):
        path.write_bytes(b"no image")
    code, _, err = train("--r", "3", "--epochs", "1", data=copy, output="none")
    assert code == 2
    assert "no image could be read" in err


@pytest.mark.slow
def test_a_worker_that_dies_loses_no_update(
    data: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The state at that update is saved; without workers the run then ends as if nothing had happened."""
    from tokenmerge.tools.train.data import Augmented

    common = [
        "train",
        MODEL,
        *KWARGS,
        "--data",
        data,
        *FULL,
        "--batch-size",
        "4",
        "--warmup-epochs",
        "0",
        "--device",
        "cpu",
    ]
    get = Augmented.__getitem__

    def dies(self: Augmented, sample: tuple[int, int]) -> Any:
        if self.epoch == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return get(self, sample)

    words = [str(word) for word in (*common, "--output", tmp_path / "run")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Augmented, "__getitem__", dies)
        assert main([*words, "--workers", "1"]) == 2
    assert "a process that decodes files died" in capsys.readouterr().err
    assert main([*words, "--workers", "0", "--resume", "auto"]) == 0
    assert same(weights(tmp_path / "run"), weights(whole))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--epochs", "0"), "0 was given, but a whole number of at least 1"),
        (("--batch-size", "64"), "16 training images are fewer than the 64"),
        (("--batch-size", "5", "--mixup", "1"), "batch_size=5 is odd"),
        (("--train-split", "other"), "has no folder 'other'"),
        (("--warmup-epochs", "300"), "warmup_epochs=300 leaves nothing"),
        (("--r-milestones", "400=8"), "there are 300 epochs"),
        (("--r-milestones", "x"), "'x' was given, but EPOCH=R was expected"),
        (("--aa", "nonsense"), "the augmentation does not work"),
        (("--opt", "nonsense"), "the optimizer 'nonsense' cannot be made"),
        (("--sched", "nonsense"), "'nonsense' was given, but one of cosine"),
        (("--config", "nonsense"), "'nonsense' is neither a file nor a recipe"),
        (("--resume", "nowhere"), "none of the 1 checkpoints is whole"),
        (("--num-classes", "7"), "holds 2 class folders"),
        (("--model-kwargs", "x"), "NAME=VALUE was expected"),
        (("--fsdp",), "but there is one: launch with torchrun"),
        (("--crop-pct", "2"), "2.0 was given, but a number of at least 0.1 and of at most 1"),
    ],
)
def test_bad_input_is_one_sentence(train: Run, tmp_path: Path, args: tuple[str, ...], message: str) -> None:
    code, _, err = train("--r", "3", *args)
    assert code == 2, err
    assert message in " ".join(err.split()), err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_folder_that_holds_a_run_is_not_overwritten(train: Run, tmp_path: Path) -> None:
    assert train("--r", "3", "--epochs", "1")[0] == 0
    before = weights(tmp_path / "run")
    code, _, err = train("--r", "3", "--epochs", "1")
    assert code == 2
    assert "already holds a run: give --resume auto" in err
    code, _, err = train("--r", "5", "--epochs", "1", "--resume", "auto")
    assert code == 2
    assert "had r=3, but r=5 was given" in err
    assert same(before, weights(tmp_path / "run"))


def test_configs(train: Run, tmp_path: Path) -> None:
    """A file's flags count, typed ones win, and a word that is no flag is an error."""
    config = tmp_path / "config.yaml"
    config.write_text("r: 2\nepochs: 2\nlr: 1.0e-3\nmodel_ema: true\nscale: [0.5, 1.0]\neval_r: [0, 2]\n")
    assert train("--config", config, "--epochs", "1")[0] == 0
    about = json.loads((tmp_path / "run" / "run.json").read_text())["args"]
    assert (about["r"], about["epochs"], about["lr"], about["model_ema"]) == ("2", 1, 0.001, True)
    assert about["scale"] == [0.5, 1.0]
    config.write_text("epoch: 2\n")
    code, _, err = train("--config", config, output="other")
    assert code == 2
    assert "sets 'epoch', which is no option of this command: did you mean epochs?" in " ".join(err.split())


def test_every_recipe_is_understood() -> None:
    from tokenmerge.cli import COMMANDS
    from tokenmerge.cli.parsing import parse
    from tokenmerge.tools.train.options import recipes

    names = recipes()
    assert "deit_from_scratch" in names
    for name in names:
        options, _ = parse(COMMANDS["train"], TrainOptions, ["m", "--data", "d", "--output", "o", "-c", name], names)
        assert options.epochs > 0
        assert options.setting.fields


def test_every_image_is_in_one_process() -> None:
    args = TrainOptions(model=MODEL, data=Path(), output=Path(), r=8, batch_size=4, aug_repeats=3)
    one = EpochBatches(100, dataclass_with(args, batch_size=8), 0, 1)
    two = [EpochBatches(100, args, rank, 2) for rank in range(2)]
    for whole, left, right in zip(one, *two, strict=True):
        assert whole == left + right
    shares = [batch for rank in range(3) for batch in ShareOfBatches(10, 4, rank, 3)]
    assert sorted(index for batch in shares for index in batch) == list(range(10))


def dataclass_with(args: TrainOptions, **changes: Any) -> TrainOptions:
    """A copy with other fields."""
    import dataclasses

    return dataclasses.replace(args, **changes)


def command(data: Path, output: Path, *args: str) -> list[str]:
    """The words of `tokenmerge train`, for a process of its own."""
    words = ["train", MODEL, *KWARGS, "--data", str(data), "--output", str(output), *args]
    return [*words, "--workers", "0", "--device", "cpu", "--warmup-epochs", "0"]


LONG = (*FULL, "--batch-size", "4", "--recovery-interval", "1", "--epochs", "12")


@pytest.fixture(scope="module")
def long(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a long run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("long")
    processes.call(command(data, folder / "run", *LONG), folder / "long")
    return folder / "run"


@pytest.mark.slow
def test_killed_at_random_instants(data: Path, long: Path, tmp_path: Path) -> None:
    """SIGKILL three times, anywhere, while writing included; then the bits of the uninterrupted run."""
    generator, kills = torch.Generator().manual_seed(os.getpid()), 0
    run = tmp_path / "run"
    for _ in range(60):
        before = len(list((run / "checkpoints").glob("update-*"))) if run.exists() else 0
        process = Command(command(data, run, *LONG, *(("--resume", "auto") if before else ())), tmp_path / "said")
        if kills < 3:
            _wait_for_progress(run, process)
            time.sleep(float(torch.rand((), generator=generator)) * 0.4)
            if process.running:
                process.send(signal.SIGKILL)
                kills += 1
            process.wait()
            continue
        assert process.wait() == 0, process.err
        break
    assert kills == 3
    assert same(weights(run), weights(long))


def _wait_for_progress(run: Path, process: Command) -> None:
    """Until the run has written something new."""
    folder = run / "checkpoints"
    known = set(folder.iterdir()) if folder.exists() else set()
    while process.running and not (folder.exists() and set(folder.iterdir()) - known):
        time.sleep(0.01)


@pytest.mark.slow
def test_sigterm_saves_and_exits_well(data: Path, long: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = Command(command(data, run, *LONG), tmp_path / "said")
    _wait_for_progress(run, process)
    process.send(signal.SIGTERM)
    assert process.wait() == 0, process.err
    assert "stopped and saved after update" in process.out
    processes.call(command(data, run, *LONG, "--resume", "auto"), tmp_path / "again")
    assert same(weights(run), weights(long))


TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--"]
# "--", because torchrun would take --r for one of its own


PLAIN = ("--r", "3", "--epochs", "3", "--lr", "0.003", "--eval-r", "0", "3", "--clip-grad", "1")


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on one process."""
    folder = tmp_path_factory.mktemp("alone")
    processes.call(command(data, folder / "run", *PLAIN, "--batch-size", "8"), folder / "alone")
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("how", [(), ("--fsdp",), ("--fsdp", "--grad-checkpointing", "--grad-accum-steps", "2")])
def test_two_processes_learn_what_one_does(data: Path, alone: Path, tmp_path: Path, how: tuple[str, ...]) -> None:
    """The same losses and accuracy with the same global batch, every validation image counted once."""
    share = "2" if "--grad-accum-steps" in how else "4"
    words = command(data, tmp_path / "two", *PLAIN, "--batch-size", share, *how)
    if how:
        processes.call_on_two(words, tmp_path / "said")
    else:  # once as a person starts them, without a word about the device
        if not torch.accelerator.is_available():
            del words[words.index("--device") : words.index("--device") + 2]
        done = subprocess.run([*TWO, "tokenmerge", *words], check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    for kind, names in (("train", ("loss", "lr")), ("eval", ("top1", "images"))):
        one, two = rows(alone, kind), rows(tmp_path / "two", kind)
        assert len(one) == len(two) > 0
        for left, right in zip(one, two, strict=True):
            assert all(right[name] == pytest.approx(left[name], rel=1e-4) for name in names)
    first, second = weights(alone), weights(tmp_path / "two")
    assert all(torch.allclose(first[name], second[name], atol=1e-4) for name in first)


@pytest.mark.slow
@pytest.mark.parametrize("how", [("--fsdp",), ("--fsdp", "--opt", "lamb", "--grad-accum-steps", "2"), FULL])
def test_a_run_of_two_processes_goes_on_where_it_was_stopped(data: Path, tmp_path: Path, how: tuple[str, ...]) -> None:
    """No process stores random generators, because every step seeds them."""
    share = "2" if "--grad-accum-steps" in how else "4"
    plain = ("--r", "3", "--epochs", "3", "--batch-size", share, "--recovery-interval", "1", "--checkpoint-hist", "9")
    whole, again = tmp_path / "whole", tmp_path / "again"
    processes.call_on_two(command(data, whole, *plain, *how), tmp_path / "first")
    shutil.copytree(whole, again)
    checkpoints = sorted((again / "checkpoints").glob("update-*"))
    assert len(checkpoints) > 2
    for late in checkpoints[2:]:
        shutil.rmtree(late)
    shutil.rmtree(again / "model")
    said = processes.call_on_two(command(data, again, *plain, *how, "--resume", "auto"), tmp_path / "second")
    assert "going on after update 2" in said
    assert same(weights(whole), weights(again))


SHORT = ("--r", "3", "--epochs", "2", "--batch-size", "4")


@pytest.fixture(scope="module", params=[(), ("--fsdp",)])
def ended(request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The folder of a run on two processes, and how they share the model."""
    folder = tmp_path_factory.mktemp("ended")
    processes.call_on_two(command(data, folder / "run", *SHORT, *request.param), folder / "said")
    return folder / "run", request.param


@pytest.mark.slow
@pytest.mark.parametrize("problem", ["shape", "entry", "lock", "full"])
def test_two_processes_end_together(data: Path, ended: tuple[Path, Any], tmp_path: Path, problem: str) -> None:
    """What only the main process finds out ends the others as well, and none waits for ever."""
    run = tmp_path / "run"
    shutil.copytree(ended[0], run)
    plain = command(data, run, *SHORT, *ended[1])
    newest = max((run / "checkpoints").iterdir())
    with contextlib.ExitStack() as stack:
        if problem == "lock":
            stack.enter_context(locked(run, pytest.fail))
        elif problem == "full":
            shutil.rmtree(newest)
            (run / "checkpoints" / ".writing-update-000000004").write_text("in the way of a folder")
            (run / "checkpoints").rename(tmp_path / "else")
            (run / "checkpoints").write_text("in the way, too")
            plain += ["--resume", str(max((tmp_path / "else").glob("update-*")))]
        else:
            name = {"shape": "model.safetensors", "entry": "state.safetensors"}[problem]
            held = load_file(newest / name)
            first = next(name for name, one in held.items() if one.dim() == 2)
            save_file({**held, first: held[first][:1].clone()}, newest / name)
            manifest = json.loads((newest / "manifest.json").read_text())
            manifest[name] = hashlib.sha256((newest / name).read_bytes()).hexdigest()
            (newest / "manifest.json").write_text(json.dumps(manifest))
        if problem != "full":
            plain += ["--resume", "auto"]
        codes, said = processes.codes_on_two(plain, tmp_path / "second")
    assert codes == [2, 2], said
    assert "Traceback" not in said
    assert {"lock": "in use", "full": "cannot be written"}.get(problem, "does not fit this run") in said


@pytest.mark.slow
def test_evaluation_on_two_processes_counts_every_image_once(data: Path, tmp_path: Path) -> None:
    processes.call(command(data, tmp_path / "run", "--r", "3", "--epochs", "1", "-b", "4"), tmp_path / "said")
    words = ["eval", f"local-dir:{tmp_path / 'run' / 'model'}", "--pretrained", "--data", str(data / "val")]
    words += ["--r", "0", "8", "--workers", "0", "--batch-size", "4"]
    found = []
    for call in (processes.call, processes.call_on_two):
        file = tmp_path / f"{call.__name__}.json"
        call([*words, "--json", str(file)], tmp_path / call.__name__)
        found.append([(row["r"], row["images"], row["top1"], row["skipped"]) for row in json.loads(file.read_text())])
    assert found[0] == found[1]
    assert [row[1] for row in found[0]] == [6, 6]
