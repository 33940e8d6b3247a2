"""What travels with the tokens: moved, detached, carried, and told to readers that cannot do without."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import tokenmerge
from tests.helpers.tiny import images_for, tiny
from tokenmerge import InputError, MergePlan, PatchError
from tokenmerge.patching.state import (
    Step,
    TokenState,
    attach,
    carried_state,
    needed_state,
    plans_needed,
    state_after_hooks,
    state_of,
    token_sizes,
    weighted_mean,
)

FIRST = MergePlan.from_assign(torch.tensor([[0, 1, 0, 2, 3, 3], [2, 1, 0, 2, 1, 3]]))
SECOND = MergePlan.from_assign(torch.tensor([[0, 1, 1, 2], [1, 0, 2, 0]]))
SIZE = torch.tensor([[2.0, 1.0, 1.0, 2.0], [1.0, 2.0, 2.0, 1.0]])


@pytest.fixture
def state() -> TokenState:
    """Of two merges, one after the other, with a block between them that did nothing."""
    model = tiny("vit_tiny_patch16_224", depth=1)
    with tokenmerge.patched(model, r=2), torch.no_grad():
        found = state_of(model.forward_features(images_for(model)))
    assert found is not None
    run = dataclasses.replace(found.run, batch=2, tokens=6, first_size=None)
    steps = (Step(FIRST, SIZE), Step(None, SIZE), Step(SECOND))
    return TokenState(run, SECOND.merge(torch.zeros(2, 4, 1), SIZE)[1], steps)


def test_plans_of_all_blocks(state: TokenState) -> None:
    """Where each token comes from, which it became, and back."""
    assert state.plans == (FIRST, SECOND)
    assert not state.drops
    whole = FIRST.compose(SECOND)
    source, anchor = state.source(), state.anchor()
    assert source is not None
    assert anchor is not None
    assert source.tolist() == whole.assign.tolist()
    assert anchor.tolist() == [[FIRST.kept[i, j].item() for j in SECOND.kept[i]] for i in range(2)]
    x, full = torch.randn(2, 3, 4), torch.randn(2, 6, 4)
    assert torch.equal(state.unmerge(x), whole.unmerge(x))
    assert torch.equal(state.one_of_equals(state.unmerge(x)), x)
    torch.testing.assert_close(state.merge_again(full), whole.merge(full)[0])
    padded = torch.tensor([[1.0, 1, 1, 0, 1, 0]] * 2)
    weighed = dataclasses.replace(state, run=dataclasses.replace(state.run, first_size=padded))
    torch.testing.assert_close(weighed.merge_again(full), whole.merge(full, padded)[0])


def test_without_plans_nothing_changes_place(state: TokenState) -> None:
    none = dataclasses.replace(state, steps=(Step(None),))
    x = torch.randn(2, 6, 4)
    assert (none.plans, none.source(), none.anchor(), none.drops) == ((), None, None, False)
    assert none.unmerge(x) is x
    assert none.one_of_equals(x) is x
    assert none.merge_again(x) is x


def test_a_plan_that_drops_is_known_among_others(state: TokenState) -> None:
    dropping = MergePlan.from_assign(torch.tensor([[0, 1, -1, 2]] * 2))
    some = dataclasses.replace(state, steps=(Step(FIRST), Step(dropping)))
    assert some.drops
    back = some.unmerge(torch.ones(2, 3, 4))
    assert back[0, :, 0].tolist() == [1.0, 1.0, 1.0, 0.0, 1.0, 1.0]


def test_everything_moves_to_another_device(state: TokenState) -> None:
    more = dataclasses.replace(
        state,
        positions=torch.zeros(2, 3, 2),
        rollout=torch.zeros(2, 3, 6),
        run=dataclasses.replace(state.run, first_size=torch.ones(2, 6)),
    )
    moved = more.to(torch.device("meta"))
    tensors = [moved.size, moved.positions, moved.rollout, moved.run.first_size]
    tensors += [part for plan in moved.plans for part in (plan.kept, plan.source, plan.target)]
    tensors += [moved.steps[0].size, moved.steps[1].size]
    assert [tensor.device.type for tensor in tensors if tensor is not None] == ["meta"] * 12
    assert (moved.run.schedule, moved.run.grid, moved.shared) == (more.run.schedule, more.run.grid, False)
    assert moved.run.settings is more.run.settings
    assert isinstance(moved.steps, tuple)


def test_what_is_kept_after_a_pass_holds_no_graph_and_no_activations(state: TokenState) -> None:
    gate = torch.rand(2, 3, requires_grad=True)
    learned = SIZE.clone().requires_grad_() * 1
    gated = dataclasses.replace(SECOND, gate=gate)
    attended = torch.ones(2, 3)
    more = dataclasses.replace(
        state,
        size=learned,
        steps=(Step(FIRST, SIZE), Step(gated, learned, attention=attended), Step(None)),
        positions=gate,
        merged=gate,
        log_size=gate,
        rollout=attended,
    )
    kept = more.detached()
    assert (kept.positions, kept.merged, kept.log_size) == (None, None, None)
    assert kept.size is not None
    assert not kept.size.requires_grad
    assert torch.equal(kept.size, learned)
    assert [step.plan is None for step in kept.steps] == [False, False, True]
    assert kept.plans[1].gate is None
    assert torch.equal(kept.plans[1].assign, SECOND.assign)
    assert kept.steps[0].size is SIZE
    assert kept.steps[1].size is not None
    assert not kept.steps[1].size.requires_grad
    assert kept.steps[1].attention is attended
    assert kept.rollout is attended


def test_the_same_tokens_after_hooks(state: TokenState) -> None:
    """The same memory seen the same way, or what was only moved or cast; whatever else is new."""
    x = torch.randn(2, 4, 4)
    for same in (x, x.view(2, 4, 4), x.double(), x.to("meta"), x.to(torch.bfloat16)):
        assert state_after_hooks(same, x, state) is state
    assert state_after_hooks(x, None, state) is state
    for other in (x.clone(), x.transpose(1, 2), x[:, :3], x + 0, x.flip(0)):
        assert state_after_hooks(other, x, state) is None
    memory = torch.randn(80)
    assert state_after_hooks(memory[8:40].view(2, 4, 4), memory[:32].view(2, 4, 4), state) is None


def test_states_that_readers_need(state: TokenState) -> None:
    x = attach(torch.zeros(2, 3, 4), state)
    assert needed_state(x, "a reader") is state
    assert carried_state(x, "sizes", "a model gave") is state
    assert plans_needed(state, "a reader") is state
    with pytest.raises(PatchError, match="a reader received"):
        needed_state(x + 0, "a reader")
    for wrong in (x + 0, "a" * 99, None):
        with pytest.raises(InputError, match="carry no sizes"):
            carried_state(wrong, "sizes", "a model gave")


def test_plans_are_missed_only_where_tokens_merged(state: TokenState) -> None:
    without = dataclasses.replace(state, steps=())
    with pytest.raises(PatchError, match="without the plans"):
        plans_needed(without, "a reader")
    unmerged = dataclasses.replace(without, size=torch.ones(2, 6))  # padding has sizes too
    assert plans_needed(unmerged, "a reader") is unmerged
    fresh = dataclasses.replace(without, size=None)
    assert plans_needed(fresh, "a reader") is fresh


def test_sizes_that_are_told(state: TokenState) -> None:
    assert token_sizes(attach(torch.zeros(2, 3, 4), state)) is state.size
    unmerged = dataclasses.replace(state, merged=torch.zeros(2, 3, 4))
    assert token_sizes(attach(torch.zeros(2, 6, 4), unmerged)).tolist() == [[1.0] * 6] * 2
    fresh = dataclasses.replace(state, size=None)
    away = token_sizes(attach(torch.zeros(2, 6, 4, device="meta"), fresh))
    assert (away.device.type, away.shape, away.dtype) == ("meta", (2, 6), torch.float32)


def test_carrying_on(state: TokenState) -> None:
    """What is known of tokens goes along with new ones; where they are unmerged, the merged ones are made anew."""
    like = attach(torch.zeros(2, 3, 4), state)
    new = torch.randn(2, 3, 7)
    assert tokenmerge.carry(new, like=like) is new
    assert state_of(new) is state
    bare = torch.zeros(2, 3, 7)
    assert state_of(tokenmerge.carry(bare, like=torch.zeros(2, 3, 4))) is None
    full = torch.randn(2, 6, 5)
    spread = attach(torch.zeros(2, 6, 4), dataclasses.replace(state, merged=torch.zeros(2, 3, 4)))
    found = state_of(tokenmerge.carry(full, like=spread))
    assert found is not None
    assert found.merged is not None
    torch.testing.assert_close(found.merged, FIRST.compose(SECOND).merge(full)[0])
    flat = attach(torch.zeros(2, 3), state)
    assert state_of(tokenmerge.carry(torch.zeros(2, 3), like=flat)) is state
    unfit: list[Any] = [torch.zeros(2), torch.zeros(()), "tokens", torch.zeros(2, 4, 4), torch.zeros(1, 3, 4)]
    for wrong in unfit:
        with pytest.raises(InputError):
            tokenmerge.carry(wrong, like=like)
    with pytest.raises(InputError):
        tokenmerge.carry(torch.zeros(2, 3), like=torch.zeros(2))


def test_means_of_nothing_but_padding_are_0() -> None:
    """And a mean of little more than nothing is not blown up: a size below 1 is none of patches."""
    x = torch.randn(2, 3, 4)
    assert not weighted_mean(x, torch.zeros(2, 3)).any()
    half = torch.tensor([[0.25, 0.25, 0.0]] * 2)
    torch.testing.assert_close(weighted_mean(x, half), x[:, :2].sum(dim=1) / 4)


def test_a_file_of_features_carries_nothing(state: TokenState, tmp_path: Any) -> None:
    x: Tensor = attach(torch.randn(2, 3, 4), state)
    torch.save(x, tmp_path / "features.pt")
    assert state_of(torch.load(tmp_path / "features.pt", weights_only=True)) is None
