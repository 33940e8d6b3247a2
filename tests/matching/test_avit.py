"""A-ViT: the gate by its formula, and the whole model against a loop that runs each image alone and really drops tokens."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import tokenmerge
from tests.helpers.tiny import images_for, tiny
from tokenmerge import ConfigError, InputError
from tokenmerge.matching.avit import (
    DISTRIBUTION_WEIGHT,
    PONDER_WEIGHT,
    HaltingGate,
    depth_distribution,
    expected_depth,
    halting,
)
from tokenmerge.matching.learned import PREDICTOR
from tokenmerge.patching.predictors import add_predictors, learned_loss, predicting

R = 4


def halting_model(depth: int = 5, **kwargs: Any) -> Any:
    """Return a small model whose tokens halt at different depths: its channel 0 spreads over the gate's range."""
    torch.manual_seed(3)
    model = tiny("deit_tiny_patch16_224", depth=depth, **kwargs)
    add_predictors(model, range(depth), "avit")
    for block in predicting(model).values():
        gate: Any = getattr(block, PREDICTOR)
        gate.shift.fill_(-1.5)
        gate.scale.fill_(1.5)
    return model


def by_loop(model: Any, image: Tensor) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """A-ViT for one image `[3, H, W]`, token by token (Yin et al. 2022, equations 3 to 11): logits, ponder, mean scores, counts."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(image[None])))
    tokens, layers = x.shape[1], len(model.blocks)
    here, total = list(range(tokens)), [x.new_zeros(())] * tokens
    done = [False] * tokens
    output, ponder, means, counts = x.new_zeros(x.shape[2]), x.new_zeros(()), [], []
    for number, block in enumerate(model.blocks, start=1):
        counts.append(len(here))
        gate = getattr(block, PREDICTOR)
        x = block(x)
        scores = []
        for row, token in enumerate(here):
            if done[token]:  # the class token stays after it has halted
                continue
            score = x.new_ones(()) if number == layers else torch.sigmoid(gate.scale * x[0, row, 0] + gate.shift)
            scores.append(score)
            if number == layers or total[token] + score >= 0.99:
                left_over = 1 - total[token]
                ponder = ponder + number + left_over
                done[token], weight = True, left_over
            else:
                total[token], weight = total[token] + score, score
            if token == 0:
                output = output + weight * x[0, row]
        means.append(sum(scores) / tokens if scores else x.new_zeros(()))
        stays = [row for row, token in enumerate(here) if token == 0 or not done[token]]
        here, x = [here[row] for row in stays], x[:, stays]
    logits = model.head(model.fc_norm(model.norm(output)))
    return logits, ponder / tokens, torch.stack(means), counts


def loss_by_hand(ponder: Tensor, scores: Tensor, depth: float) -> Tensor:
    share = scores.mean(dim=0)
    share = share / share.sum()
    target = depth_distribution(depth, len(share))
    return PONDER_WEIGHT * ponder.mean() + DISTRIBUTION_WEIGHT * F.kl_div(target.log(), share, reduction="sum")


def test_outputs_losses_and_gradients_are_those_of_a_loop() -> None:
    model = halting_model().train()
    other = copy.deepcopy(model)
    images = images_for(model, 3)
    tokens = model.patch_embed.num_patches
    loop = [by_loop(other, image) for image in images]
    counts = [one[3] for one in loop]
    assert len({tuple(one) for one in counts}) == 3, "each image halts in its own way"
    assert any(0 < one[-1] < tokens for one in counts)

    schedule = (R,) * 5
    with tokenmerge.patched(model, r=R, matcher="avit", place="after") as handle:
        logits = model(images)
        loss = learned_loss(model, schedule, tokens)
        assert loss is not None
        assert learned_loss(model, schedule, tokens) is None, "each pass counts once"
        (loss * 50 + logits.square().sum()).backward()
        assert handle.config.matcher == "avit"
    wanted = torch.stack([one[0] for one in loop])
    theirs = loss_by_hand(
        torch.stack([one[1] for one in loop]), torch.stack([one[2] for one in loop]), expected_depth(schedule, tokens)
    )
    (theirs * 50 + wanted.square().sum()).backward()
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss, theirs, rtol=1e-4, atol=1e-6)
    gradients = {name: p.grad for name, p in other.named_parameters()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        expected = gradients[name]
        assert expected is not None, name
        assert float((parameter.grad - expected).norm()) <= 1e-4 * float(expected.norm()) + 1e-5, name


def test_an_image_does_not_depend_on_the_others_of_its_batch() -> None:
    model = halting_model().eval()
    images = images_for(model, 4)
    processed: list[int] = []
    with tokenmerge.patched(model, r=R, matcher="avit", place="after", trace=True) as handle, torch.no_grad():
        hooks = [
            block.register_forward_pre_hook(lambda _, args: processed.append(args[0].shape[1]))
            for block in model.blocks
        ]
        together = model(images)
        handle.update(order="spatial")
        torch.testing.assert_close(model(images), together)
        handle.update(order="partition")
        processed.clear()
        torch.testing.assert_close(model(images), together)
        sizes = handle.trace.size()
        rows = processed[:]
        processed.clear()
        alone = torch.cat([model(image[None]) for image in images])
        for hook in hooks:
            hook.remove()
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    single = [processed[start : start + 5] for start in range(0, 20, 5)]
    assert rows == [max(column) for column in zip(*single, strict=True)], (
        "as many rows as the image with the most tokens"
    )
    assert bool(((sizes == 0) | (sizes == 1)).all())
    assert [int(one) for one in (sizes > 0).sum(dim=1)] == [one[-1] for one in single]


def test_the_gate_by_its_formula_and_its_gradient() -> None:
    gate, tokens = HaltingGate(6, scale=5.0, shift=-10.0, channel=2), torch.randn(2, 3, 6, requires_grad=True)
    score = gate(tokens)
    torch.testing.assert_close(score, 1 / (1 + torch.exp(-(5 * tokens[:, :, 2] - 10))))
    score.sum().backward()
    assert tokens.grad is not None
    torch.testing.assert_close(tokens.grad[:, :, 2], (5 * score * (1 - score)).detach())
    assert int((tokens.grad != 0).sum()) == 6, "one channel alone"
    assert not list(gate.parameters())
    assert set(gate.state_dict()) == {"scale", "shift"}
    with pytest.raises(ConfigError, match="channels 0 … 5"):
        HaltingGate(6, channel=6)


def test_the_target_of_the_distribution_loss() -> None:
    assert expected_depth((0, 0, 0), 10) == 3
    assert expected_depth((5, 5, 0), 10) == pytest.approx(1.5)
    target = depth_distribution(3, 5)
    assert float(target.sum()) == pytest.approx(1)
    assert int(target.argmax()) == 2
    torch.testing.assert_close(target[1], target[3])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"place": "between"}, "place='after'"),
        ({"place": "after", "prop_attn": False}, "prop_attn=True"),
        ({"place": "after", "r": [4, 0, 4, 4, 4]}, "an r above 0 for each block"),
    ],
)
def test_settings_that_it_cannot_run_with_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        tokenmerge.patch(halting_model(), **{"r": R, "matcher": "avit", **fields})


def test_models_and_blocks_that_it_cannot_run_in_are_refused() -> None:
    with pytest.raises(ConfigError, match="reads the class token alone"):
        tokenmerge.patch(halting_model(global_pool="avg"), r=R, matcher="avit", place="after")
    model = tiny("deit_tiny_patch16_224")
    with (
        tokenmerge.patched(model, r=R, matcher="avit", place="after"),
        pytest.raises(
            ConfigError, match="no trained predictor: train the model with `tokenmerge train --matcher avit`"
        ),
    ):
        model(images_for(model))
    tokens, gate = torch.randn(2, 5, 6), HaltingGate(6)
    with pytest.raises(ConfigError, match="adds up a score in every block"):
        halting(tokens, 1, 1, tokens=tokens, size=torch.ones(2, 5), layer=1, layers=2, predictor=gate)
    with pytest.raises(InputError, match="needs the tokens"):
        halting(tokens, 1, 1, size=torch.ones(2, 5), predictor=gate)


def test_a_new_gate_halts_nothing_and_keeps_the_class_token_of_the_last_block() -> None:
    """With the paper's constants an untrained model starts with all tokens; its output is almost the last class token."""
    model = tiny("deit_tiny_patch16_224")
    images = images_for(model)
    before = model(images)
    add_predictors(model, range(3), "avit")
    with tokenmerge.patched(model, r=R, matcher="avit", place="after", trace=True) as handle:
        after = model(images)
        assert handle.trace.size().shape == (2, 37)
    torch.testing.assert_close(after, before, rtol=0, atol=0.1)
    assert not torch.equal(after, before), "the class tokens of the blocks before count a little"
