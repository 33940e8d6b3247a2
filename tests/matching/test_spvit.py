"""SPViT: the selector by a loop over heads, packages by a loop over tokens, and training against an appended package token."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import tokenmerge
from tests.helpers.tiny import images_for, tiny
from tokenmerge import ConfigError, InputError
from tokenmerge.matching import get_entry
from tokenmerge.matching.learned import PREDICTOR
from tokenmerge.matching.spvit import TokenSelector, selected_packing
from tokenmerge.patching.predictors import add_predictors, kind_of, learned_loss, load_predictors, save_predictors


def scores_by_loop(selector: TokenSelector, tokens: Tensor, here: Tensor) -> Tensor:
    """Kong et al. 2022, equations 5 to 10, for one image `[M, C]`: each head and each token on its own."""
    x = selector.norm(tokens)
    each = tokens.shape[1] // selector.heads
    own, image = [], []
    for head in range(selector.heads):
        part = selector.project(x[:, head * each : (head + 1) * each])
        own.append(part[:, : each // 2])
        image.append(part[here, each // 2 :].mean(dim=0))
    rows = []
    for token in range(len(tokens)):
        means = torch.stack([x[token, head * each : (head + 1) * each].mean() for head in range(selector.heads)])
        weights = selector.branch(means)
        heads = [
            selector.classify(torch.cat([own[head][token], image[head]])).softmax(dim=0)
            for head in range(selector.heads)
        ]
        rows.append(sum(w * s for w, s in zip(weights, heads, strict=True)) / weights.sum())
    return torch.stack(rows)


def test_the_selector_scores_each_head_and_weighs_heads() -> None:
    torch.manual_seed(0)
    selector, tokens = TokenSelector(12, 3), torch.randn(2, 7, 12, requires_grad=True)
    size = torch.ones(2, 7)
    size[1, 2:5] = 0
    found = selector(tokens, size)
    for image in range(2):
        torch.testing.assert_close(found[image], scores_by_loop(selector, tokens[image], size[image] > 0))
    torch.testing.assert_close(found.sum(dim=2), torch.ones(2, 7))
    found[0, 3, 0].backward()
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in selector.parameters())
    assert tokens.grad is not None
    assert bool((tokens.grad[0, :, :] != 0).any(dim=1).all()), "the image's mean reaches every token"
    assert selector.bfloat16()(tokens, size).dtype == torch.float32
    for channels, heads in ((10, 4), (12, 0), (9, 3)):
        with pytest.raises(ConfigError, match="halves the channels of each head"):
            TokenSelector(channels, heads)


def test_evaluated_the_least_wanted_become_one_package() -> None:
    torch.manual_seed(1)
    selector, tokens, size = TokenSelector(12, 3).eval(), torch.randn(2, 9, 12), torch.ones(2, 9)
    plan = selected_packing(tokens, 4, 1, tokens=tokens, size=size, predictor=selector)
    merged, sizes = plan.merge(tokens, size)
    keep = selector(tokens[:, 1:], size[:, 1:])[:, :, 0]
    assert merged.shape == (2, 5, 12)
    for image in range(2):
        order = keep[image].argsort()
        going, staying = order[:5], order[5:].sort().values
        weights = keep[image][going]
        package = sum(w * tokens[image, 1 + t] for w, t in zip(weights, going, strict=True)) / weights.sum()
        torch.testing.assert_close(merged[image, -1], package)
        torch.testing.assert_close(merged[image, :-1], torch.cat([tokens[image, :1], tokens[image, 1 + staying]]))
    torch.testing.assert_close(sizes, torch.ones(2, 5)), "a package counts as one token"
    given: dict[str, Any] = {"tokens": tokens, "size": size, "predictor": selector}
    with pytest.raises(ConfigError, match="no trained predictor"):
        selected_packing(tokens, 4, 1, **{**given, "predictor": None})
    with pytest.raises(InputError, match="needs the tokens"):
        selected_packing(tokens, 4, 1, **{**given, "tokens": None})


def attention_by_hand(block: Any, x: Tensor, mask: Tensor) -> Tensor:
    """One block of timm's ViT whose keys count by `mask [B, N]` (DynamicViT, equations 10 and 11)."""
    batch, count, channels = x.shape
    qkv = block.attn.qkv(block.norm1(x)).view(batch, count, 3, 3, -1).permute(2, 0, 3, 1, 4)
    query, key, value = qkv
    weights = (query @ key.transpose(2, 3) * block.attn.scale).exp() * mask[:, None, None]
    out = (weights / weights.sum(dim=3, keepdim=True)) @ value
    x = x + block.attn.proj(out.transpose(1, 2).reshape(batch, count, channels))
    after: Tensor = x + block.mlp(block.norm2(x))
    return after


def test_training_is_that_of_a_package_that_is_appended() -> None:
    """The package takes the row of a dropped token; the paper appends it: outputs and gradients are equal."""
    model = tiny("deit_tiny_patch16_224").train()
    add_predictors(model, [0], "spvit")
    other = copy.deepcopy(model)
    images = images_for(model)
    torch.manual_seed(5)
    with tokenmerge.patched(model, r=[9, 0, 0], matcher="spvit", place="after", trace=True) as handle:
        logits = model(images)
        assert handle.trace.size().shape == (2, 37)
        loss = learned_loss(model, handle.schedule, 36)
    assert loss is not None
    (loss + logits.square().sum()).backward()

    x = other.norm_pre(other._pos_embed(other.patch_embed(images)))
    x = attention_by_hand(other.blocks[0], x, torch.ones(2, 37))
    selector = getattr(other.blocks[0], PREDICTOR)
    score = torch.stack([scores_by_loop(selector, one[1:], torch.ones(36, dtype=torch.bool)) for one in x])
    torch.manual_seed(5)
    stays = F.gumbel_softmax(score.log(), hard=True, dim=2)[:, :, 0]
    packages, masks = [], []
    for image in range(2):
        gone = (stays[image] == 0).nonzero()[:, 0]
        assert len(gone) > 1
        weights = score[image, gone, 0]
        packages.append((weights.unsqueeze(1) * x[image, 1 + gone]).sum(dim=0) / weights.sum())
        row = gone[score[image, gone, 0].argmin()]  # its decision gets no gradient in ours
        masks.append(torch.where(F.one_hot(row, 36).bool(), stays[image].detach(), stays[image]))
    x = torch.cat([x, torch.stack(packages).unsqueeze(1)], dim=1)
    mask = torch.cat([torch.ones(2, 1), torch.stack(masks), torch.ones(2, 1)], dim=1)
    for block in other.blocks[1:]:
        x = attention_by_hand(block, x, mask)
    wanted = other.head(other.fc_norm(other.norm(x)[:, 0]))
    theirs = 2 * ((stays.sum(dim=1) + 1) / 36 - (1 - 9 / 36)).square().mean()
    (theirs + wanted.square().sum()).backward()
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loss, theirs)
    gradients = {name: p.grad for name, p in other.named_parameters()}
    for name, parameter in model.named_parameters():
        found, expected = parameter.grad, gradients[name]
        assert found is not None, name
        assert expected is not None, name
        assert float((found - expected).norm()) <= 1e-3 * float(expected.norm()) + 1e-6, name


def test_selectors_are_saved_with_the_name_of_their_matcher(tmp_path: Path) -> None:
    model, other = tiny("deit_tiny_patch16_224"), tiny("deit_tiny_patch16_224")
    add_predictors(model, [0, 2], "spvit")
    save_predictors(model, tmp_path / "a.safetensors")
    load_predictors(other, tmp_path / "a.safetensors")
    assert kind_of(other) is TokenSelector
    images, outputs = images_for(model), []
    for one in (model, other):
        with (
            tokenmerge.patched(one, r=[9, 0, 9], matcher="spvit", place="after", trace=True) as handle,
            torch.no_grad(),
        ):
            outputs.append(one(images))
            assert torch.equal(handle.trace.size(), torch.ones(2, 19))
    assert torch.equal(*outputs)
    with (
        tokenmerge.patched(other, r=[9, 0, 9], matcher="dynamicvit"),
        pytest.raises(ConfigError, match="which has a predictor of 'spvit': train the model"),
    ):
        other(images)


@pytest.mark.parametrize("combine", ["destination", "norm", "max", "average", "tofu"])
def test_a_package_is_the_same_however_tokens_are_combined(combine: Any) -> None:
    """It is the mean weighted by scores in training and in evaluation, whatever merged tokens would be."""
    model = tiny("deit_tiny_patch16_224")
    add_predictors(model, [0, 1], "spvit")
    images = images_for(model)
    with tokenmerge.patched(model, r=[9, 9, 0], matcher="spvit", place="after") as handle, torch.no_grad():
        wanted = model(images)
        handle.update(combine=combine)
        assert torch.equal(model(images), wanted)


@pytest.mark.parametrize("matcher", ["dynamicvit", "spvit"])
def test_padding_goes_first_and_counts_nothing(matcher: str) -> None:
    """Rows of size 0 are no tokens: neither what is dropped, nor the package, nor the loss depends on them."""
    torch.manual_seed(2)
    model = tiny("deit_tiny_patch16_224")
    add_predictors(model, [0], matcher)
    predictor: Any = getattr(model.blocks[0], PREDICTOR).eval()
    tokens, size = torch.randn(2, 9, 48), torch.ones(2, 9)
    size[:, [3, 6]] = 0
    given: dict[str, Any] = {"size": size, "predictor": predictor}
    found = []
    for noise in (0.0, 5.0):
        x = tokens + noise * (size == 0).unsqueeze(2)
        plan = get_entry(matcher).matcher(x, 3, 1, tokens=x, **given)
        merged, sizes = plan.merge(x, size)
        found.append((merged, sizes))
        assert {3, 6} <= set(plan.source[0].tolist())
        assert bool((sizes > 0).all())
    torch.testing.assert_close(*found)
    predictor.train()
    torch.manual_seed(0)
    get_entry(matcher).matcher(tokens, 3, 1, tokens=tokens, **given)
    all_kept = predictor.take()
    torch.testing.assert_close((all_kept * 6).round(), all_kept * 6), "a fraction of the six tokens that are there"


@pytest.mark.parametrize("matcher", ["dynamicvit", "spvit", "avit"])
def test_a_pass_that_backward_runs_again_is_not_counted_again(matcher: str) -> None:
    model = tiny("deit_tiny_patch16_224").train()
    model.set_grad_checkpointing(True)
    add_predictors(model, range(3), matcher)
    with tokenmerge.patched(model, r=4, matcher=matcher, place="after"):
        logits = model(images_for(model))
        loss = learned_loss(model, (4, 4, 4), 36)
        assert loss is not None
        (loss + logits.square().sum()).backward()
        assert learned_loss(model, (4, 4, 4), 36) is None
    assert all(p.grad is not None for p in model.parameters())
