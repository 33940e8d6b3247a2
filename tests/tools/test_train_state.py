"""What a checkpoint holds: exact to the bit, never executed, and compared with the run before it is loaded."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.optim import create_optimizer_v2, list_optimizers
from timm.utils import ModelEmaV3
from torch import nn

from tests.helpers.training import KWARGS, MODEL
from tokenmerge.cli import main
from tokenmerge.errors import InputError
from tokenmerge.tools.train.checkpoints import Checkpoints, damage
from tokenmerge.tools.train.options import TrainingError
from tokenmerge.tools.train.packing import equal, pack, read_tensors, unpack, write_tensors
from tokenmerge.tools.train.state import RunState

DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.complex64,
)


def through_files(value: Any, folder: Path) -> Any:
    """Pack, write, read and unpack."""
    tree, tensors = pack(value)
    write_tensors(folder / "a.safetensors", tensors)
    (folder / "a.json").write_text(json.dumps(tree, allow_nan=False))
    return unpack(json.loads((folder / "a.json").read_text()), read_tensors(folder / "a.safetensors", "a"), "the tree")


def tensors() -> st.SearchStrategy[torch.Tensor]:
    """Of every dtype, empty, of no dimension, transposed, and views of a larger one."""

    def make(dtype: torch.dtype, shape: list[int], how: str, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        found = (torch.randn([2, *shape], generator=generator) * 1e3).to(dtype)
        if found.is_floating_point() and found.numel():
            found.view(-1)[0] = float("nan")
        view = found[1]
        return {"view": view, "own": view.clone(), "turned": view.transpose(0, -1) if view.dim() else view}[how]

    shapes = st.lists(st.integers(0, 3), max_size=3)
    return st.builds(
        make, st.sampled_from(DTYPES), shapes, st.sampled_from(["view", "own", "turned"]), st.integers(0, 9)
    )


PLAIN = st.none() | st.booleans() | st.text() | st.integers(-(2**63), 2**63 - 1) | st.floats()
KEYS = st.text() | st.integers(-(2**63), 2**63 - 1) | st.booleans() | st.tuples(st.integers(0, 9), st.text())
VALUES = st.recursive(
    PLAIN | tensors(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3) | st.lists(inner).map(tuple),
    max_leaves=12,
)


@given(VALUES)
def test_packing_is_exact(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    assert equal(through_files(value, tmp_path_factory.mktemp("packed")), value)


def test_packing_keeps_what_json_would_lose(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    value = {
        1: (1, 1.0, True),
        "1": [float("inf"), -0.0, float("nan")],
        "a": shared,
        "b": shared,
        "c": shared[::2],
        (): {},
    }
    found = through_files(value, tmp_path)
    assert equal(found, value)
    assert found["a"] is found["b"]
    assert list(map(type, found[1])) == [int, float, bool]
    assert math.copysign(1, found["1"][1]) == -1
    assert not equal(found, {**value, "c": shared[1::2]})
    assert not equal(1, True)


@pytest.mark.parametrize("value", [print, {1, 2}, object(), 2**64, torch.eye(2).to_sparse(), torch.Size([2])])
def test_what_cannot_be_packed_is_an_error(value: Any) -> None:
    with pytest.raises(InputError, match="the state holds"):
        pack({"a": value})


@pytest.mark.parametrize(
    "tree",
    [
        {"pickle": "x"},
        {},
        {"dict": {}},
        {"dict": [[1]]},
        {"dict": [[[], 1]]},
        {"dict": [[{"dict": []}, 1]]},
        {"tuple": 1},
        {"float": "zz"},
        {"float": "00"},
        {"float": 1},
        {"tensor": "other"},
        {"tensor": 1},
        {"complex": "0"},
        {"tensor": "0", "dict": []},
        float("nan"),
        10**30,
        1,
        json.loads("[" * 90 + "]" * 90),
    ],
)
def test_a_changed_tree_is_an_error(tree: Any) -> None:
    with pytest.raises(InputError, match="the tree"):
        unpack(tree, {"0": torch.zeros(3)}, "the tree")


class Net(nn.Module):
    """Matrices, vectors, a convolution and a parameter that receives no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 2), nn.LayerNorm(4), nn.Linear(4, 5)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.norm(self.conv(images).mean((2, 3))))
        return logits


def state_of(name: str, average: bool = True) -> RunState:
    """The state of a new run with an optimizer."""
    torch.manual_seed(0)
    model = Net()
    optimizer = create_optimizer_v2(model, opt=name, lr=0.01, weight_decay=0.05, momentum=0.9)
    return RunState(model, optimizer, ModelEmaV3(model, 0.8) if average else None, None, False)


def test_groups_that_steps_change_are_no_options(tmp_path: Path) -> None:
    """RAdam of older versions of timm keeps ten rows of a table in its groups, which it fills step by step."""

    class Counting(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                group["rows"][group["step"] % 10] = [group["step"], 1.5]
                group["step"] += 1
            super().step(closure)

    def state() -> RunState:
        groups = [{"params": Net().parameters(), "step": 0, "rows": [[None, None]] * 10}]
        return RunState(Net(), Counting(groups, lr=0.1, momentum=0.9), None, None, False)

    for count in (0, 3, 14):
        before, after = state(), state()
        for _ in range(count):
            before.optimizer.step()
        before.collect()(tmp_path)
        after.load(tmp_path)
        assert equal(after.optimizer.state_dict(), before.optimizer.state_dict())


def steps(state: RunState, first: int, last: int) -> None:
    """Updates that depend on their number only, because each seeds the generators, as in the loop."""
    for number in range(first, last):
        torch.manual_seed(number)  # some optimizers draw random numbers, too
        state.model(torch.randn(4, 3, 4, 4)).square().mean().backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
        if state.average is not None:
            state.average.update(state.model, step=number + 1)


ODD = (
    "adamw",
    "sgd",
    "lion",
    "lamb",
    "adafactor",
    "muon",
    "adan",
    "lookahead_adamw",
    "adafactorbv",
    "nadamlegacy",
)


def check_resumed(name: str, folder: Path) -> None:
    """Equal to the bit after a checkpoint at update 7."""
    whole, broken, again = (state_of(name) for _ in range(3))
    try:
        steps(state_of(name), 0, 1)
    except (RuntimeError, AttributeError) as error:  # needs a GPU, second derivatives, or another version of torch
        pytest.skip(f"{name} does not run here ({error})")
    steps(whole, 0, 14)
    steps(broken, 0, 7)
    broken.collect()(folder)
    again.load(folder)
    steps(again, 7, 14)
    assert equal(dict(again.model.state_dict()), dict(whole.model.state_dict()))
    assert equal(dict(again.average.module.state_dict()), dict(whole.average.module.state_dict()))
    assert equal(again.optimizer.state_dict()["state"], whole.optimizer.state_dict()["state"])


@pytest.mark.parametrize("name", ODD)
def test_a_resumed_run_is_the_uninterrupted_one(name: str, tmp_path: Path) -> None:
    check_resumed(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [name for name in map(str, list_optimizers()) if not name.startswith(("bnb", "fused")) and name not in ODD],
)
def test_every_optimizer_of_timm_resumes(name: str, tmp_path: Path) -> None:
    check_resumed(name, tmp_path)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], Any]) -> None:
    """Change the state of a checkpoint, as its creator might."""
    held = load_file(folder / "state.safetensors")
    value = unpack(json.loads((folder / "state.json").read_text()), held, "the tree")
    change(load_file(folder / "model.safetensors"), value)
    tree, tensors = pack(value)
    save_file({name: one.contiguous().clone() for name, one in tensors.items()}, folder / "state.safetensors")
    (folder / "state.json").write_text(json.dumps(tree))


def entry(value: dict[str, Any]) -> dict[str, Any]:
    """The state of the convolution."""
    found: dict[str, Any] = next(
        one for one in value["optimizer"]["state"].values() if one and one["exp_avg"].dim() == 4
    )
    return found


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda value: entry(value).pop("exp_avg"), "lacks 'exp_avg'"),
        (lambda value: entry(value).update(extra=torch.zeros(1)), "holds 'extra', which this run has not"),
        (lambda value: entry(value).update(exp_avg=torch.zeros(1)), "float32[1]"),
        (lambda value: entry(value).update(exp_avg=entry(value)["exp_avg"].double()), "float64[4, 3, 2, 2]"),
        (lambda value: entry(value).update(exp_avg="x"), "is 'str'"),
        (lambda value: value["optimizer"]["state"].pop(2), "lacks 2"),
        (lambda value: value["optimizer"]["state"].update({99: None}), "holds 99"),
        (lambda value: value["optimizer"].update(state=[]), "holds no state"),
        (lambda value: value["optimizer"].update(more=1), "other parts"),
        (lambda value: value["optimizer"]["param_groups"].pop(), "number of groups"),
        (lambda value: value["optimizer"]["param_groups"][0].update(weight_decay=9.0), "'weight_decay' of group 0"),
        (lambda value: value["optimizer"]["param_groups"][0].update(lr="x"), "'lr' of group 0"),
        (lambda value: value["optimizer"]["param_groups"][0].update(params=[0, 0]), "'params' of group 0"),
        (lambda value: value["optimizer"]["param_groups"][0].pop("betas"), "lacks 'betas'"),
        (lambda value: value.update(scaler={"scale": 1.0}), "the gradient scaler"),
        (lambda value: value.update(average=None), "the moving average"),
        (lambda value: value.pop("average"), "other parts"),
        (lambda value: value.update(optimizer=3), "the optimizer"),
    ],
)
def test_a_state_that_does_not_fit_is_one_sentence(tmp_path: Path, change: Any, said: str) -> None:
    state = state_of("adamw")
    steps(state, 0, 3)
    state.collect()(tmp_path)
    rewrite(tmp_path, lambda _, value: change(value))
    with pytest.raises(TrainingError, match=r"does not fit this run") as error:
        state_of("adamw").load(tmp_path)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_numbers_that_the_optimizer_cannot_go_on_with(tmp_path: Path) -> None:
    """A count of −1 steps would divide by zero in the next one."""
    state = state_of("adamp")
    steps(state, 0, 3)
    state.collect()(tmp_path)
    rewrite(tmp_path, lambda _, value: [one.update(step=-1) for one in value["optimizer"]["state"].values() if one])
    with pytest.raises(TrainingError, match="does not work"):
        state_of("adamp").load(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "average.safetensors"])
@pytest.mark.parametrize("how", ["missing", "shape", "dtype", "more", "text"])
def test_weights_that_do_not_fit_are_one_sentence(tmp_path: Path, name: str, how: str) -> None:
    state = state_of("adamw")
    state.collect()(tmp_path)
    held = load_file(tmp_path / name)
    weight = held.pop("head.weight")
    if how != "missing":
        held["head.weight"] = {"shape": weight[:1].clone(), "dtype": weight.half()}.get(how, weight)
    if how == "more":
        held["more"] = weight.clone()
    save_file(held, tmp_path / name)
    if how == "text":
        (tmp_path / name).write_text("text")
    with pytest.raises(TrainingError, match="does not fit this run"):
        state_of("adamw").load(tmp_path)


def test_a_run_without_average_takes_none(tmp_path: Path) -> None:
    state_of("adamw").collect()(tmp_path)
    with pytest.raises(TrainingError, match="the moving average"):
        state_of("adamw", average=False).load(tmp_path)


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def seal(folder: Path, names: list[str] | None = None) -> None:
    """Write a manifest with right hashes."""
    names = names or [path.name for path in folder.iterdir() if path.name != "manifest.json"]
    digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    (folder / "manifest.json").write_text(json.dumps(digests))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """The words of a run with a moving average, and a checkpoint of it."""
    root = tmp_path_factory.mktemp("crafted")
    for place in ("train/a", "train/b", "val/a", "val/b"):
        (root / "data" / place).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (32, 32), (50 * number, 9, 9)).save(root / "data" / place / f"{number}.png")
    words = ["train", MODEL, *KWARGS, "--data", str(root / "data"), "-b", "4", "--epochs", "1", "--warmup-epochs", "0"]
    words += ["--device", "cpu", "--workers", "0", "--model-ema"]
    assert main([*words, "--output", str(root / "run")]) == 0
    return words, next((root / "run" / "checkpoints").iterdir())


PICKLES = ("custom_checkpoint_0.pkl", "random_states_0.pkl", "optimizer.bin", "scaler.pt", "scheduler.bin", "model.bin")


@pytest.mark.parametrize("how", ["old format", "beside", "instead"])
def test_no_pickle_is_executed(
    trained: tuple[list[str], Path], tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words, checkpoint = trained
    folder, marker = tmp_path / "update-000000002", tmp_path / "executed"
    shutil.copytree(checkpoint, folder)
    evil = pickle.dumps(Evil(marker))
    if how == "old format":
        for path in folder.glob("state.*"):
            path.unlink()
    for name in PICKLES if how != "instead" else ("state.safetensors", "average.safetensors"):
        (folder / name).write_bytes(evil)
    own = [path.name for path in checkpoint.iterdir() if path.name != "manifest.json"]
    seal(folder, own if how == "beside" else None)
    code = main([*words, "--output", str(tmp_path / "run"), "--resume", str(folder)])
    said = " ".join(capsys.readouterr().err.split())
    assert not marker.exists()
    assert code == (0 if how == "beside" else 2), said
    assert {"old format": "as pickles, which are not loaded", "beside": "", "instead": "does not fit"}[how] in said
    assert "Traceback" not in said


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b", "", ".", "nul\0l", "state.safetensors/"])
def test_names_do_not_leave_the_folder(trained: tuple[list[str], Path], tmp_path: Path, name: str) -> None:
    folder = tmp_path / "update-000000002"
    shutil.copytree(trained[1], folder)
    (tmp_path / "secret").write_text("x")
    known = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**known, name: "0" * 64}))
    assert "is no part of a checkpoint" in str(damage(folder))


@pytest.mark.parametrize(
    "name", ["manifest.json", "state.json", "state.safetensors", "progress.json", "model.safetensors"]
)
@pytest.mark.parametrize("kind", ["fifo", "loop", "device", "folder", "missing", "deep", "list"])
def test_odd_files_are_one_sentence(trained: tuple[list[str], Path], tmp_path: Path, name: str, kind: str) -> None:
    """They neither hang nor crash."""
    folder = tmp_path / "update-000000002"
    shutil.copytree(trained[1], folder)
    path = folder / name
    path.unlink()
    make: dict[str, Callable[[], object]] = {
        "fifo": lambda: os.mkfifo(path),
        "loop": lambda: path.symlink_to(path),
        "device": lambda: path.symlink_to("/dev/zero"),
        "folder": path.mkdir,
        "missing": lambda: None,
        "deep": lambda: path.write_text("[" * 100_000),
        "list": lambda: path.write_text("[1]"),
    }
    make[kind]()
    said: list[str] = []
    with pytest.raises(TrainingError, match="none of the 1 checkpoints is whole"):
        Checkpoints(tmp_path, 1, said.append).latest("auto")
    assert len(said) == 1
    assert "\n" not in said[0]


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"update": -1, "processes": 1}', '{"update": true, "processes": 1}', "[" * 9999]
)
@pytest.mark.parametrize("name", ["progress.json", "state.json"])
def test_crafted_json_with_a_right_hash(
    trained: tuple[list[str], Path], tmp_path: Path, text: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words, checkpoint = trained
    folder = tmp_path / "update-000000002"
    shutil.copytree(checkpoint, folder)
    (folder / name).write_text(text)
    seal(folder)
    assert main([*words, "--output", str(tmp_path / "run"), "--resume", str(folder)]) == 2
    assert capsys.readouterr().err.count("tokenmerge:") == 1


def test_other_folders_are_no_checkpoints(tmp_path: Path) -> None:
    """And they are not removed with the old ones."""
    for name in ("update-000000002", "update-000000010", "update-1000000000", "update-mine", "update-5"):
        (tmp_path / name).mkdir()
    found = Checkpoints(tmp_path, 1, print).all()
    assert [path.name for path in found] == ["update-1000000000", "update-000000010", "update-000000002"]
