"""Errors, threads and updates beside a pass, and what is changed behind the handle's back."""

from __future__ import annotations

import contextlib
import copy
import itertools
import pickle
import threading
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import nn

import tokenmerge
from tests.helpers.kinds import EVERY, blocks_of, input_for, out_of
from tests.helpers.tiny import images_for, tiny
from tests.helpers.towers import BY_NAME
from tokenmerge import ConfigError, MergeConfig, PatchError, TokenMergeError

# --- errors inside, threads ----------------------------------------------------------------------------------


@torch.no_grad()
@EVERY
def test_an_error_inside_one_model_does_not_reach_another(make: Callable[[], Any]) -> None:
    """A module that raises within attention leaves no open tap, no wish and no grid behind."""
    broken, sound = make(), make()
    images = input_for(sound)
    wanted = out_of(sound, images)
    tokenmerge.patch(broken, r=4, trace=True)
    tokenmerge.patch(sound, r=0)
    failed = 0
    for module in list(blocks_of(broken)[1].modules()):
        hook = module.register_forward_hook(lambda *_: 1 / 0)
        with contextlib.suppress(ZeroDivisionError):  # some modules are there and never run
            broken(images)
            failed -= 1
        failed += 1
        hook.remove()
        assert torch.equal(out_of(sound, images), wanted)
    assert failed >= 3
    before = [sorted(vars(module)) for module in make().modules()]
    tokenmerge.unpatch(broken)
    assert [sorted(vars(module)) for module in broken.modules()] == before, "nothing of the passes stays"


def test_patching_in_threads_takes_turns() -> None:
    for _ in range(10):
        model = tiny("vit_tiny_patch16_224")
        handles: list[Any] = []
        errors: list[BaseException] = []
        start = threading.Barrier(4)

        def work(model: Any, handles: Any, errors: Any, start: Any) -> None:
            start.wait()
            try:
                handles.append(tokenmerge.patch(model, r=4))
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(model, handles, errors, start)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(handles) == 1
        assert all(isinstance(caught, PatchError) and "patched already" in str(caught) for caught in errors)
        assert tokenmerge.is_patched(model)
        handles[0].remove()


@torch.no_grad()
def test_passes_end_with_the_settings_they_began_with() -> None:
    """Updates and removals beside running passes: every output is that of one of the settings, or nothing."""
    model = tiny("vit_small_patch16_224", global_pool="avg", depth=6)
    images = images_for(model)
    known = []
    for r in (2, 4):
        with tokenmerge.patched(model, r=r):
            known.append(model(images))
    known.append(model(images))
    handle = tokenmerge.patch(model, r=2)
    stop, strange = threading.Event(), []

    def run() -> None:
        with torch.no_grad():
            while not stop.is_set():
                try:
                    out = model(images)
                except TokenMergeError:
                    continue
                if not any(torch.equal(out, one) for one in known):
                    strange.append(out)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    refused = 0
    for turn in itertools.count():
        handle.update(r=2 + 2 * (turn % 2))
        try:
            handle.remove()
        except PatchError:
            refused += 1
        else:
            handle = tokenmerge.patch(model, r=2)
        if turn > 200:
            break
    stop.set()
    for thread in threads:
        thread.join()
    assert not strange
    assert refused
    handle.remove()  # what ended does not count as running


@torch.no_grad()
def test_a_hook_cannot_remove_the_patch_under_its_own_pass() -> None:
    model = tiny("vit_tiny_patch16_224")
    images = images_for(model)
    handle = tokenmerge.patch(model, r=4)
    wanted = model(images)
    hook = model.blocks[1].register_forward_hook(lambda *_: handle.remove())
    with pytest.raises(PatchError, match="a forward pass of this model is running"):
        model(images)
    hook.remove()
    assert torch.equal(model(images), wanted), "the settings are as they were"
    handle.remove()


@torch.no_grad()
def test_a_pass_that_died_does_not_count_as_running() -> None:
    model = tiny("vit_tiny_patch16_224")
    handle = tokenmerge.patch(model, r=4)
    held: list[Any] = []
    ready, leave = threading.Event(), threading.Event()

    def work() -> None:
        hook = model.blocks[1].register_forward_hook(lambda *_: 1 / 0)
        with torch.no_grad(), pytest.raises(ZeroDivisionError):
            model(images_for(model))
        hook.remove()
        with torch.no_grad():
            held.append(model.forward_features(images_for(model)))
        ready.set()
        leave.wait()

    thread = threading.Thread(target=work)
    thread.start()
    ready.wait()
    handle.remove()
    leave.set()
    thread.join()
    assert held


@torch.no_grad()
@EVERY
def test_blocks_that_come_go_or_are_exchanged_are_noticed(make: Callable[[], Any]) -> None:
    def appended(blocks: Any) -> None:
        blocks.append(copy.deepcopy(fresh[0]))

    def exchanged(blocks: Any) -> None:
        blocks[1] = copy.deepcopy(fresh[1])

    def swapped(blocks: Any) -> None:
        blocks[0], blocks[2] = blocks[2], blocks[0]

    def removed(blocks: Any) -> None:
        del blocks[1]

    for change in (appended, exchanged, swapped, removed):
        model = make()
        fresh = list(blocks_of(make()))
        images = input_for(model)
        handle = tokenmerge.patch(model, r=4, output="auto")
        change(blocks_of(model))
        noticed = pytest.raises(PatchError, match=r"unpatch before (adding|exchanging)")
        with noticed:
            model(images)
        with noticed:
            handle.summary()
        with noticed:
            handle.update(r=3)


@EVERY
def test_the_originals_idiom_is_noticed(make: Callable[[], Any]) -> None:
    model = make()
    images = input_for(model)
    holder = nn.Module()
    holder.inner = model
    tokenmerge.patch(holder if "torchvision" in type(model).__module__ else model, r=4)

    def set_and_run() -> None:
        model.r = 8
        model(images)

    with pytest.raises(PatchError, match=r"r=8 was set on .*handle_of\(model\)\.update\(r="), torch.no_grad():
        set_and_run()


@EVERY
def test_it_is_noticed_on_a_block_too(make: Callable[[], Any]) -> None:
    model = make()
    model(input_for(model))
    handle = tokenmerge.patch(model, r=4)
    with pytest.raises(PatchError, match=r"r=8 was set on patched block 1: .*update\(r=\["):
        blocks_of(model)[1].r = 8
    assert not hasattr(blocks_of(model)[1], "r")
    handle.remove()
    blocks_of(model)[1].r = 8  # upstream's block takes any attribute


@EVERY
@torch.no_grad()
def test_an_r_that_was_there_before_is_ones_own(make: Callable[[], Any]) -> None:
    """The rank of an adapter, for instance."""
    model = make()
    images = input_for(model)
    wanted = out_of(model, images)
    holder: Any = nn.Sequential(model)
    for module in (holder, model, blocks_of(model)[0]):
        module.r = 16
    handle = tokenmerge.patch(holder, r=0)
    assert torch.equal(out_of(model, images), wanted)
    for module in (holder, model, blocks_of(model)[0]):
        assert module.r == 16
        module.r = 8
        assert module.r == 8
    assert torch.equal(out_of(model, images), wanted)
    handle.remove()
    assert [module.r for module in (holder, model, blocks_of(model)[0])] == [8, 8, 8]


@torch.no_grad()
def test_it_is_noticed_on_what_holds_the_model_too() -> None:
    model = BY_NAME["CLIPVisionModel"].build()
    holder: Any = nn.Sequential(model)
    tokenmerge.patch(holder, r=4)
    holder.r = 8
    with pytest.raises(PatchError, match="r=8 was set on Sequential"):
        model(input_for(model))


def test_settings_are_properties_of_a_handle() -> None:
    model = tiny("vit_tiny_patch16_224")
    handle = tokenmerge.patch(model, r=4)
    handle.r = 8
    assert handle.r == handle.config.r == 8
    assert handle.schedule == (8, 8, 8)
    handle.combine = "norm"
    assert handle.combine == "norm"
    with pytest.raises(ConfigError):
        handle.combine = "average of sorts"
    with pytest.raises(AttributeError, match="'ratio' cannot be set on a handle"):
        handle.ratio = 0.5
    with pytest.raises(AttributeError, match="a handle has no 'ratio'"):
        _ = handle.ratio
    with pytest.raises(ConfigError, match="r lists 4 blocks, but the model has 3"):
        handle.update(r=[1, 2, 3, 4])


def test_configs_do_not_change() -> None:
    listed, options = [1, 2, 3], {"thresholds": [0.1, 0.2, 0.3]}
    config: Any = MergeConfig(r=listed, matcher="threshold", options=options)
    listed.append(4)
    options["thresholds"].append(0.4)
    assert config.r == [1, 2, 3]
    assert config.options == {"thresholds": [0.1, 0.2, 0.3]}
    thresholds = config.options["thresholds"]
    for change in (
        lambda: config.r.append(4),
        lambda: config.r.__setitem__(0, 4),
        lambda: config.options.__setitem__("a", 1),
        lambda: config.options.update(a=1),
        thresholds.clear,
        lambda: thresholds.__iadd__([1.0]),
    ):
        with pytest.raises(TypeError, match="a config cannot be changed"):
            change()
    for again in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), MergeConfig.from_json(config.to_json())):
        assert again == config
        with pytest.raises(TypeError):
            cast("Any", again).r.append(4)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"matcher": "threshold", "options": {"thresholds": [0.5, 0.5]}}, "lists 2 blocks, but the model has 3"),
        ({"matcher": "threshold", "options": {"thresholds": [0.5] * 4}}, "lists 4 blocks, but the model has 3"),
        ({"matcher": "threshold", "options": {"thresholds": [float("nan")] * 3}}, "each entry a finite number"),
        ({"matcher": "threshold", "options": {"thresholds": 0.5}}, "must be a list"),
        ({"matcher": "diffrate", "options": {"pruned": [0.5]}}, "lists 1 blocks, but the model has 3"),
        ({"matcher": "diffrate", "options": {"pruned": 2.0}}, "between 0 and 1"),
        ({"matcher": "kmeans", "options": {"iterations": "x"}}, "must be a whole number"),
        ({"matcher": "kmeans", "options": {"iterations": -1}}, "at least 0"),
        ({"matcher": "kmeans", "options": {"iterations": True}}, "must be a whole number"),
        ({"matcher": "agglomerative", "options": {"linkage": "foo"}}, "must be one of single, complete"),
        ({"matcher": "informed", "options": {"size_penalty": 3}}, "must be one of none, harmonic"),
        ({"matcher": "informed", "options": {"token_weight": float("inf")}}, "a finite number"),
        ({"matcher": "strided", "options": {"stride": 0}}, "at least 1"),
        ({"matcher": "pitome", "options": {"margin": None}}, "a finite number"),
        ({"matcher": "random_prune", "options": {"seed": 0.5}}, "must be a whole number"),
        ({"keep": [0.9, 0.9]}, "keep lists 2 blocks, but the model has 3"),
        ({"keep": 0.3}, "keep 0.5 or more"),
    ],
    ids=str,
)
def test_values_that_mean_nothing_are_refused_when_a_model_is_patched(fields: dict[str, Any], words: str) -> None:
    model = tiny("vit_tiny_patch16_224")
    with pytest.raises(ConfigError, match=words):
        tokenmerge.patch(model, **(fields if "keep" in fields else {"r": 2, **fields}))
    assert not tokenmerge.is_patched(model)
