"""Everything that a run needs to go on: weights, optimizer, moving average and gradient scaler, as safetensors and JSON.

Random generators are not part of it, because every step seeds them (`data.seed_all`), and the learning rate follows from the
number of updates. What a checkpoint holds is compared with the structure that this run has, before anything is loaded.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenmerge.errors import InputError, shown
from tokenmerge.files import read_json, words_of
from tokenmerge.tools.processes import agree
from tokenmerge.tools.train.options import TrainingError
from tokenmerge.tools.train.packing import equal, outline, pack, packable, read_tensors, unpack, write_tensors
from tokenmerge.tools.train.sharding import ShardedState

WEIGHTS, AVERAGE, TENSORS, TREE = "model.safetensors", "average.safetensors", "state.safetensors", "state.json"
FILES = (WEIGHTS, AVERAGE, TENSORS, TREE)
_STEPS = 12
"""Steps after which every optimizer of timm has made all its entries (Lookahead at step 6, and RAdam has filled its ten)."""


class RunState:
    """State of a run that checkpoints store.

    Args:
        model: the patched model, bare or sharded.
        optimizer: its optimizer, as prepared by Accelerate.
        average: timm's moving average, or `None`.
        scaler: the gradient scaler, or `None`.
        sharded: whether the model is sharded.
    """

    def __init__(self, model: nn.Module, optimizer: Any, average: Any, scaler: Any, sharded: bool) -> None:
        self.model, self.average, self.scaler = model, average, scaler
        self.optimizer = getattr(optimizer, "optimizer", optimizer) if not sharded else optimizer
        self.sharded = ShardedState(model, optimizer) if sharded else None

    def collect(self) -> Callable[[Path], None]:
        """Return a function for the main process that writes the state to a folder; all processes must call `collect`."""
        if self.sharded is not None:
            found = self.sharded.state_dict()
            weights, optimizer = found["model"], _stored(found["optimizer"])
        else:
            weights, optimizer = self.model.state_dict(), _stored(self.optimizer.state_dict())
        average = None if self.average is None else self.average.module.state_dict()
        tree = {"optimizer": optimizer, "scaler": None if self.scaler is None else self.scaler.state_dict()}
        tree["average"] = self._generator()  # `None` without an average

        def write(folder: Path) -> None:
            packed, tensors = pack(tree)
            write_tensors(folder / WEIGHTS, weights)
            if average is not None:
                write_tensors(folder / AVERAGE, average)
            write_tensors(folder / TENSORS, tensors)
            (folder / TREE).write_text(json.dumps(packed, allow_nan=False), encoding="utf-8")

        return write

    def _generator(self) -> dict[str, Tensor | None] | None:
        """Return the state of the random generator with which the moving average rounds bfloat16; `None` without an average."""
        if self.average is None:
            return None
        generator = getattr(self.average, "_sr_generator", None)  # older versions of timm have none
        return {"generator": None if generator is None else generator.get_state()}

    def load(self, folder: Path) -> None:
        """Load the state that `collect` wrote; all processes must call it.

        Raises:
            TrainingError: if the state is damaged, or does not fit this run; the run must then end.
        """
        with agree(TrainingError), _as_training_error(folder):
            weights = read_tensors(folder / WEIGHTS, "the weights")
            average = None if self.average is None else read_tensors(folder / AVERAGE, "the moving average")
            tree = _tree(folder)
            _check(set(tree), {"optimizer", "scaler", "average"}, "the state")
        if self.sharded is not None:
            self._load_sharded(weights, tree["optimizer"], folder)
        else:
            with agree(TrainingError), _as_training_error(folder):
                _check(outline(weights), outline(dict(self.model.state_dict())), "the weights")
                self._load_optimizer(tree["optimizer"])  # before the weights, which it changes
                self.model.load_state_dict(weights)
        with agree(TrainingError), _as_training_error(folder):
            _check(outline(tree["average"]), outline(self._generator()), "the moving average")
            if average is not None:
                _check(outline(average), outline(dict(self.average.module.state_dict())), "the moving average")
                self.average.module.load_state_dict(average)
                if tree["average"]["generator"] is not None:
                    self.average._sr_generator.set_state(tree["average"]["generator"])
            self._load_scaler(tree["scaler"])

    def _load_scaler(self, found: Any) -> None:
        own = None if self.scaler is None else self.scaler.state_dict()
        _check(outline(found), outline(own), "the gradient scaler")
        if own is None:
            return
        fixed = {name for name in own if name not in ("scale", "_growth_tracker")}
        _check({name: found[name] for name in fixed}, {name: own[name] for name in fixed}, "the gradient scaler")
        if own and not (0 < found["scale"] < float("inf") and found["_growth_tracker"] >= 0):
            raise InputError(f"its gradient scaler holds the scale {found['scale']}, but a positive one was expected")
        self.scaler.load_state_dict(found)

    def _load_optimizer(self, found: Any) -> None:
        """Load the optimizer's state, after a comparison with the structure that the optimizer makes by itself."""
        before = _options(self.optimizer)
        forms = [outline(_stored(self.optimizer.state_dict()))]
        for _ in range(_STEPS):
            _idle_step(self.optimizer)
            forms.append(outline(_stored(self.optimizer.state_dict())))
        state = _restored(found, forms, before, self.optimizer.state_dict())
        try:
            self.optimizer.load_state_dict(copy.deepcopy(state))
            _idle_step(self.optimizer)  # numbers that it cannot go on with show now
        except Exception as error:  # every optimizer has its own arithmetic
            raise InputError(f"its optimizer state does not work ({words_of(error)})") from None
        self.optimizer.load_state_dict(state)
        if not equal(_stored(self.optimizer.state_dict()), found):
            raise InputError(f"the optimizer {type(self.optimizer).__name__} did not take its state over exactly")

    def _load_sharded(self, weights: dict[str, Tensor], found: Any, folder: Path) -> None:
        assert self.sharded is not None
        before = _options(self.optimizer)
        fresh = self.sharded.state_dict()  # in the main process only; the others have nothing to compare with
        with agree(TrainingError), _as_training_error(folder):
            if fresh["model"]:
                _check(outline(weights), outline(fresh["model"]), "the weights")
                found = _restored(found, [outline(_stored(fresh["optimizer"]))], before, fresh["optimizer"])
            else:
                found = {**found, "state": {name: one for name, one in found["state"].items() if one is not None}}
        self.sharded.load_state_dict({"model": weights, "optimizer": found})


def _tree(folder: Path) -> dict[str, Any]:
    what = f"the state {shown(str(folder / TREE))}"
    tree = unpack(read_json(folder / TREE, "the state"), read_tensors(folder / TENSORS, "the state"), what)
    if not isinstance(tree, dict):
        raise InputError(f"{what} holds no names: it was changed")
    return tree


def _idle_step(optimizer: Any) -> None:
    """Make a step without gradients, which makes the entries of the optimizer; weights and state are loaded afterwards."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _stored(state: dict[str, Any]) -> dict[str, Any]:
    """Return an optimizer's state dict as it is stored.

    A parameter without an entry, because it received no gradient, is there as `None`, so that a missing entry is an error.
    Options that are no plain values, such as dtypes, are left out: a run that goes on has its own.
    """
    if not state:  # with sharding, a process other than the main one
        return {}
    groups = [{name: value for name, value in group.items() if packable(value)} for group in state["param_groups"]]
    names = [name for group in state["param_groups"] for name in group["params"]]
    return {**state, "param_groups": groups, "state": {name: state["state"].get(name) for name in names}}


def _options(optimizer: Any) -> list[dict[str, Any]]:
    """Return a copy of the options of each group, without its parameters."""
    groups = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    return [copy.deepcopy({name: value for name, value in group.items() if packable(value)}) for group in groups]


def _restored(found: Any, forms: list[Any], before: list[dict[str, Any]], own: dict[str, Any]) -> dict[str, Any]:
    """Return a state dict to load from a stored one.

    Args:
        found: the stored state.
        forms: outlines of states as the optimizer makes them; each part of `found` must be like one of these.
        before: options of each group of an optimizer that made no step; those that steps do not change must be the same.
        own: a state dict of this optimizer after steps.

    Raises:
        InputError: if the stored state does not fit.
    """
    _check(set(found) if isinstance(found, dict) else outline(found), set(own), "the optimizer")
    for name in set(own) - {"state", "param_groups"}:
        _check(outline(found[name]), forms[-1][name], f"{name} of the optimizer")
    if not isinstance(found["state"], dict) or not isinstance(found["param_groups"], list):
        raise InputError("its optimizer holds no state and groups")
    _check(dict.fromkeys(found["state"]), dict.fromkeys(forms[-1]["state"]), "the optimizer")
    for name, entry in found["state"].items():
        if entry is not None and outline(entry) not in [form["state"][name] for form in forms]:
            _check(outline(entry), forms[-1]["state"][name], f"the optimizer's entry {shown(name)}")
    _check(len(found["param_groups"]), len(before), "the number of groups of the optimizer")
    groups = []
    for number, (group, options, mine) in enumerate(
        zip(found["param_groups"], before, own["param_groups"], strict=True)
    ):
        what, kind = f"group {number} of the optimizer", outline(group)
        possible = [form["param_groups"][1][number] for form in forms]
        if kind not in possible:
            _check(kind, possible[-1], what)
        fixed = [name for name in options if name != "lr" and equal(options[name], mine[name])]
        expected = {name: mine[name] for name in (*fixed, "params")}
        _check({name: group[name] for name in expected}, expected, what)
        groups.append({**mine, **group})
    return {**found, "param_groups": groups, "state": {n: one for n, one in found["state"].items() if one is not None}}


def _check(found: Any, expected: Any, what: str) -> None:
    """Raise `InputError` if two structures or sets of values are not equal, and name the first difference."""
    if equal(found, expected) if not isinstance(found, set) else found == expected:
        return
    where, left, right = what, found, expected
    while isinstance(left, dict) and isinstance(right, dict):
        odd = [name for name in right if name not in left] or [name for name in left if name not in right]
        if odd:
            problem = f"lacks {shown(odd[0])}" if odd[0] in right else f"holds {shown(odd[0])}, which this run has not"
            raise InputError(f"{where} {problem}")
        name = next(name for name in right if not equal(left[name], right[name]))
        where, left, right = f"{shown(name)} of {where}", left[name], right[name]
    if isinstance(left, set) and isinstance(right, set):
        odd = sorted(map(str, left ^ right))
        raise InputError(f"{where} holds other parts than this run ({odd[0]})")
    raise InputError(f"{where} is {shown(left)}, but this run has {shown(right)}")


@contextlib.contextmanager
def _as_training_error(folder: Path) -> Iterator[None]:
    try:
        yield
    except (InputError, RuntimeError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise TrainingError(
            f"the checkpoint {shown(str(folder))} does not fit this run ({words_of(error)}): give the options that it was "
            "written with, or another --resume"
        ) from None
