"""Every row of transformers goes through the same battery, on small random models made from configs."""

from __future__ import annotations

import copy
from operator import attrgetter
from typing import Any

import pytest
import torch

import tokenmerge
from tests.helpers.tower_oracle import key_hooks, tower_oracle, turn
from tests.helpers.towers import BY_NAME, Tower

SCHEDULE = (3, 0, 4)
EVERY = pytest.mark.parametrize("tower", BY_NAME.values(), ids=BY_NAME.keys())


def _first_of_each_kind() -> list[Any]:
    """Every tower; those whose layers are built like the layers of one before them are slow."""
    kinds: set[Any] = set()
    towers = []
    for name, tower in BY_NAME.items():
        kind = (tower.blocks, tower.second, tower.keys, tower.rope, tower.bias)
        towers.append(pytest.param(tower, id=name, marks=[pytest.mark.slow] if kind in kinds else []))
        kinds.add(kind)
    return towers


def _close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


def _expected(tower: Tower, model: Any, feed: dict[str, Any], destination: bool = False) -> Any:
    blocks = list(attrgetter(tower.blocks)(model))
    kind = tower.rope or tower.bias
    with tower_oracle(
        blocks,
        tower.second,
        key_hooks(tower.keys, tower.heads),
        SCHEDULE,
        tower.prefix,
        turn(kind, model, tower.prefix),
        destination,
    ) as wanted:
        out = model(**feed)
    for block in blocks:
        vars(block.attention if hasattr(block, "attention") else block).pop("get_position_ids", None)
    return out, wanted


@EVERY
@torch.no_grad()
def test_upstream_at_r0_and_the_oracle_above(tower: Tower) -> None:
    model, feed = tower.build(), tower.feed(2)
    original = model(**feed).last_hidden_state
    with tokenmerge.patched(model, r=0) as handle:
        assert torch.equal(model(**feed).last_hidden_state, original)
        assert handle.summary().protected == tower.prefix
        assert handle.summary().tokens[0] == original.shape[1]
    with tokenmerge.patched(model, r=list(SCHEDULE), prop_attn=True, trace=True) as handle:
        merged = model(**feed)
        source = handle.trace.source()
        assert handle.output_tokens() == original.shape[1]
    assert torch.equal(model(**feed).last_hidden_state, original)
    expected, wanted = _expected(tower, model, feed)
    assert torch.equal(source, wanted.source)
    _close(merged.last_hidden_state, expected.last_hidden_state)
    if getattr(expected, "pooler_output", None) is not None:
        _close(merged.pooler_output, expected.pooler_output)
    assert (expected.last_hidden_state - original).abs().max() > 1e-3 * original.abs().max()


@pytest.mark.parametrize("name", [name for name, tower in BY_NAME.items() if tower.rope or tower.bias])
@torch.no_grad()
def test_position_of_the_destination(name: str) -> None:
    tower = BY_NAME[name]
    model, feed = tower.build(), tower.feed(2)
    with tokenmerge.patched(model, r=list(SCHEDULE), prop_attn=True, positions="destination") as handle:
        merged = model(**feed).last_hidden_state
        handle.update(positions="mean")
        other = model(**feed).last_hidden_state
    _close(merged, _expected(tower, model, feed, destination=True)[0].last_hidden_state)
    assert not torch.allclose(merged, other, atol=1e-4)


@EVERY
@torch.no_grad()
def test_copies_single_images_and_hidden_states(tower: Tower) -> None:
    model = tower.build()
    one = tower.feed(1)
    plain = model(**one, output_hidden_states=True)
    with tokenmerge.patched(model, r=list(SCHEDULE)):
        twin = copy.deepcopy(model)
        merged = model(**one, output_hidden_states=True)
        assert torch.equal(twin(**one).last_hidden_state, merged.last_hidden_state)
        assert [h.shape for h in merged.hidden_states] == [h.shape for h in plain.hidden_states]
        assert torch.equal(merged.hidden_states[0], plain.hidden_states[0])
    assert tokenmerge.is_patched(twin)
    tokenmerge.unpatch(twin)
    assert torch.equal(twin(**one).last_hidden_state, plain.last_hidden_state)


@EVERY
def test_two_views_with_checkpointing_give_exact_gradients(tower: Tower) -> None:
    """The two views of one step run before either backward; recomputed blocks must see their own sizes."""
    model = tower.build()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.train()
    if tower.rope == "dinov3":
        model.config.pos_embed_rescale = None
    first, second = tower.feed(2), {k: v.flip(-1) if v.is_floating_point() else v for k, v in tower.feed(2).items()}
    first, second = (dict(f) for f in (first, second))

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        views = [model(**feed).last_hidden_state for feed in (first, second)]
        (views[0].square().mean() + views[1].square().mean()).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    with tokenmerge.patched(model, r=list(SCHEDULE)):
        torch.manual_seed(0)
        wanted = gradients()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(0)
        found = gradients()
    assert len(wanted) == len(found)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@EVERY
@torch.no_grad()
def test_bfloat16(tower: Tower) -> None:
    model, feed = tower.build(), tower.feed(2)
    rough_feed = {k: v.bfloat16() if v.is_floating_point() else v for k, v in feed.items()}
    unmerged = model(**feed).last_hidden_state
    with tokenmerge.patched(model, r=list(SCHEDULE)):
        exact = model(**feed).last_hidden_state
    model = model.bfloat16()
    upstream = (model(**rough_feed).last_hidden_state.float() - unmerged).abs().median()
    with tokenmerge.patched(model, r=list(SCHEDULE)):
        rough = model(**rough_feed).last_hidden_state
    assert rough.dtype == torch.bfloat16
    assert rough.isfinite().all()
    # other pairs may be chosen in bfloat16, so only the bulk of the tokens is compared
    # (transformers 5.17 finds the positions of Idefics and SmolVLM in bfloat16, and so is far off unmerged)
    assert (rough.float() - exact).abs().median() < max(0.1 * exact.abs().mean(), 2 * upstream)


@pytest.mark.parametrize("tower", _first_of_each_kind())
@torch.no_grad()
def test_a_compiled_block(tower: Tower) -> None:
    """The last one, which takes sizes and merges: compiling costs seconds, and the blocks are of one class."""
    model, feed = tower.build(), tower.feed(2)
    with tokenmerge.patched(model, r=list(SCHEDULE)):
        wanted = model(**feed).last_hidden_state
        torch._dynamo.reset()
        attrgetter(tower.blocks)(model)[-1].compile(fullgraph=True, backend="aot_eager")
        _close(model(**feed).last_hidden_state, wanted)
        with torch._dynamo.config.patch(error_on_recompile=True):
            model(**feed)
    torch._dynamo.reset()
