"""The predictor of DynamicViT and the plans it leads to, by their formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tokenmerge import ConfigError, InputError
from tokenmerge.matching.avit import HaltingGate
from tokenmerge.matching.dynamicvit import TokenPredictor, predicted_pruning
from tokenmerge.matching.learned import ALMOST_NOTHING


def test_a_predictor_by_its_formula() -> None:
    """Half of the channels is a token's own; the other half is the mean over all tokens, by what they count."""
    predictor, tokens = TokenPredictor(8), torch.randn(2, 5, 8)
    size = torch.tensor([[1.0, 1, 0, 1, 1], [0, 0, 0, 0, 0]])
    x = predictor.project(tokens)
    mean = (x[:, :, 4:] * size.unsqueeze(2)).sum(dim=1) / size.sum(dim=1).clamp_min(1).unsqueeze(1)
    both = torch.cat([x[:, :, :4], mean.unsqueeze(1).expand(-1, 5, -1)], dim=2)
    torch.testing.assert_close(predictor(tokens, size), predictor.classify(both).log_softmax(dim=2))
    assert [layer.out_features for layer in predictor.classify if isinstance(layer, torch.nn.Linear)] == [4, 2, 2]
    assert (predictor.channels, predictor.kept) == (8, None)
    assert predictor.bfloat16()(tokens, size).dtype == torch.float32
    with pytest.raises(ConfigError, match="halves"):
        TokenPredictor(6)


def test_evaluated_the_least_wanted_go_and_protected_tokens_never() -> None:
    predictor, tokens, size = TokenPredictor(8).eval(), torch.randn(2, 9, 8), torch.ones(2, 9)
    plan = predicted_pruning(tokens, 7, 1, tokens=tokens, size=size, predictor=predictor)
    order = predictor(tokens[:, 1:], size[:, 1:])[:, :, 0].argsort(dim=1) + 1
    assert torch.equal(plan.source, order[:, :7])
    assert bool((plan.target == -1).all())
    given: dict[str, Any] = {"tokens": tokens, "size": size, "predictor": predictor}
    with pytest.raises(ConfigError, match="no trained predictor"):
        predicted_pruning(tokens, 3, 1, **{**given, "predictor": None})
    with pytest.raises(ConfigError, match="a predictor of 'avit'"):
        predicted_pruning(tokens, 3, 1, **{**given, "predictor": HaltingGate(8)})
    for missing in ("tokens", "size"):
        with pytest.raises(InputError, match="but none was given"):
            predicted_pruning(tokens, 3, 1, **{**given, missing: None})


def test_trained_all_stay_and_gates_say_who_would_go() -> None:
    """A gate is 1 or almost nothing; what went before stays gone, and takes no further factor."""
    predictor, tokens = TokenPredictor(8).train(), torch.randn(2, 40, 8)
    size = torch.ones(2, 40).requires_grad_()
    weighed = size * torch.cat([torch.ones(2, 20), torch.full((2, 20), ALMOST_NOTHING)], dim=1)
    plan = predicted_pruning(tokens, 9, 1, tokens=tokens, size=weighed, predictor=predictor)
    assert plan.r == 0
    assert plan.gate is not None
    assert bool((plan.gate[:, :1] == 1).all())
    assert bool((plan.gate[:, 20:] == 1).all())
    drawn = plan.gate[:, 1:20].detach()
    stays = drawn > 0.5
    assert 0 < int(stays.sum()) < stays.numel()
    torch.testing.assert_close(drawn, torch.where(stays, 1.0, ALMOST_NOTHING))
    assert predictor.kept is not None
    torch.testing.assert_close(predictor.kept, stays.sum(dim=1) / 39)
    plan.gate.sum().backward()
    assert size.grad is None, "sizes of earlier blocks are no matter of this predictor"
    assert all(parameter.grad is not None for parameter in predictor.parameters())
