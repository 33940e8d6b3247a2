"""DynamicViT's predictors: the gradient through attention, what is dropped, and training as a person runs it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import tokenmerge
from tests.helpers.tiny import images_for, tiny
from tests.tools.test_train import Run, data, rows, train  # noqa: F401  (fixtures)
from tokenmerge import ConfigError, InputError, PatchError
from tokenmerge.cli import main
from tokenmerge.matching import get_matcher
from tokenmerge.matching.learned import ALMOST_NOTHING, PREDICTOR
from tokenmerge.patching.predictors import (
    add_predictors,
    learned_loss,
    load_predictors,
    predicting,
    remove_predictors,
    save_predictors,
)
from tokenmerge.tools.train.optim import optimizer_of, schedule_of
from tokenmerge.tools.train.options import TrainOptions


def test_a_tiny_size_gives_the_gradient_of_a_masked_softmax() -> None:
    """DynamicViT, equations 10 and 11: `exp(qk) M / Σ exp(qk) M`, whose derivative by M is not 0 where M is."""
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 6, 4, generator=draw, dtype=torch.float64) for _ in range(3))
    stays = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    exact, ours = stays.clone().requires_grad_(), stays.clone().requires_grad_()

    weights = (query @ key.transpose(2, 3) / 2).exp() * exact
    (weights / weights.sum(dim=3, keepdim=True) @ value).square().sum().backward()
    size = ours * (1 - ALMOST_NOTHING) + ALMOST_NOTHING
    F.scaled_dot_product_attention(query, key, value, size.log()[None, None, None]).square().sum().backward()
    assert exact.grad is not None
    assert ours.grad is not None
    assert bool((exact.grad != 0).all())
    torch.testing.assert_close(ours.grad, exact.grad, rtol=1e-4, atol=1e-5)


def test_training_keeps_all_tokens_and_evaluation_drops_the_least_wanted() -> None:
    model = tiny("deit_tiny_patch16_224")
    before = copy.deepcopy(model.state_dict())
    add_predictors(model, [0, 2])
    with tokenmerge.patched(model, r=[9, 0, 9], matcher="dynamicvit", place="after", trace=True) as handle:
        images = images_for(model)
        logits = model.train()(images)
        assert handle.trace.size().shape == (2, 37)
        loss = learned_loss(model, handle.schedule, 36)
        assert loss is not None
        (into,) = torch.autograd.grad(loss, model.patch_embed.proj.weight, retain_graph=True)
        assert bool((into != 0).any()), "a predictor's gradient goes on into the model, as in the paper"
        (loss + logits.sum()).backward()
        assert learned_loss(model, handle.schedule, 36) is None, "each pass counts once"
        gradients = [p.grad for block in predicting(model).values() for p in getattr(block, PREDICTOR).parameters()]
        assert len(gradients) == 20
        assert all(one is not None and bool((one != 0).any()) for one in gradients)
        copy.deepcopy(model)  # takes no part in the graph

        model.eval()
        seen: list[Tensor] = []
        hook = getattr(model.blocks[0], PREDICTOR).register_forward_hook(lambda _, args, out: seen.append(out[:, :, 0]))
        with torch.no_grad():
            model(images)
        hook.remove()
        source = handle.trace.source(0)[:, 1:]
        going = seen[0].argsort(dim=1)[:, :9].sort(dim=1).values
        assert torch.equal((source < 0).nonzero()[:, 1].view(2, 9), going)
        assert handle.trace.size().shape == (2, 37 - 18)
    remove_predictors(model)
    assert model.state_dict().keys() == before.keys()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_gradients_stay_finite_over_many_blocks(dtype: torch.dtype | None) -> None:
    """What one block lets go, the next ones draw again: sizes must not become products of almost nothing."""
    model = tiny("deit_tiny_patch16_224", depth=10)
    add_predictors(model, range(10))
    with tokenmerge.patched(model, r=2, matcher="dynamicvit", place="after") as handle:
        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
                logits = model.train()(images_for(model))
            loss = learned_loss(model, handle.schedule, 36)
            assert loss is not None
            (loss + logits.float().square().sum()).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


def test_the_ratio_loss_leads_to_the_schedule() -> None:
    model = tiny("deit_tiny_patch16_224")
    add_predictors(model, [0, 1])
    handle = tokenmerge.patch(model, r=[12, 12, 0], matcher="dynamicvit", place="after")
    heads = [p for block in predicting(model).values() for p in getattr(block, PREDICTOR).parameters()]
    optimizer = torch.optim.AdamW(heads, lr=5e-3)
    model.train()
    torch.manual_seed(0)
    images = images_for(model, 8)
    for _ in range(60):
        model(images)
        kept = [float(getattr(block, PREDICTOR).kept.detach().mean()) for block in predicting(model).values()]
        loss = learned_loss(model, handle.schedule, 36)
        assert loss is not None
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert kept == pytest.approx([24 / 36, 12 / 36], abs=0.08)


def test_weights_are_kept(tmp_path: Path) -> None:
    model, other = tiny("deit_tiny_patch16_224"), tiny("deit_tiny_patch16_224")
    with pytest.raises(PatchError, match="nothing to save"):
        save_predictors(model, tmp_path / "none.safetensors")
    add_predictors(model, [1])
    with pytest.raises(PatchError, match="block 1 has a predictor already"):
        add_predictors(model, [1])
    with pytest.raises(ConfigError, match="blocks 0 … 2"):
        add_predictors(other, [3])
    save_predictors(model, tmp_path / "heads.safetensors")
    load_predictors(other, tmp_path / "heads.safetensors")
    images = images_for(model)
    outputs = []
    for one in (model, other):
        with tokenmerge.patched(one, r=[0, 9, 0], matcher="dynamicvit"), torch.no_grad():
            outputs.append(one(images))
    assert torch.equal(*outputs)
    for name, text in (
        ("heads.safetensors", "already"),
        ("missing", "No such file"),
        ("odd.safetensors", "predictors"),
    ):
        (tmp_path / "odd.safetensors").write_bytes(b"x")
        with pytest.raises((InputError, PatchError), match=text):
            load_predictors(other, tmp_path / name)


def test_without_a_predictor_it_says_so() -> None:
    model = tiny("deit_tiny_patch16_224")
    with (
        tokenmerge.patched(model, r=4, matcher="dynamicvit"),
        pytest.raises(ConfigError, match="block 0, which has no trained predictor"),
    ):
        model(images_for(model))
    with pytest.raises(ConfigError):
        get_matcher("dynamicvit")(torch.randn(1, 9, 4), 3)
    assert "dynamicvit" not in tokenmerge.method_names()


def test_train_and_evaluate(train: Run, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    settings = ("--matcher", "dynamicvit", "--set", "place=after")
    code, _, err = train("--r", "5,0", "--epochs", "2", *settings, "--distill-weight", "0.5")
    assert code == 0, err
    folder = tmp_path / "run" / "model"
    assert (folder / "tokenmerge" / "predictors.safetensors").is_file()
    import timm

    timm.create_model(f"local-dir:{folder}", pretrained=True)  # which knows nothing of predictors
    code = main(
        ["eval", f"local-dir:{folder}", "--pretrained", "--data", str(data / "val"), "--r", "0", "5,0", "--json", "-"]
    )
    out, err = capsys.readouterr()
    assert code == 0, err
    found = json.loads(out)
    last = rows(tmp_path / "run", "eval")[-1]
    assert found[1]["top1"] == pytest.approx(last["top1"]), "the matcher is the one it was trained with"
    assert found[1]["gflops"] < found[0]["gflops"]
    code, _, err = train("--r", "5,0", "--epochs", "2", *settings, "--r-warmup-epochs", "1", output="other")
    assert code == 2
    assert "predictors" in err


@pytest.mark.parametrize("sched", ["cosine", "none"])
def test_predictors_learn_at_a_rate_of_their_own(sched: str, tmp_path: Path) -> None:
    model = tiny("deit_tiny_patch16_224")
    add_predictors(model, [1])
    given: dict[str, Any] = {"model": "m", "data": tmp_path, "output": tmp_path, "lr": 1e-3, "warmup_epochs": 0}
    args = TrainOptions(**given, sched=sched, layer_decay=0.5, predictor_lr_scale=10.0, epochs=2)
    optimizer = optimizer_of(model, args, 1)
    schedule = schedule_of(optimizer, args, 4)
    if schedule is not None:
        schedule.step_update(4)  # half way along the cosine
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert found.keys() == set(names.values())
    before, inside = found["blocks.1.mlp.fc1.weight"], found[f"blocks.1.{PREDICTOR}.classify.0.weight"]
    assert inside == pytest.approx(10 * before)
    assert found["head.weight"] == pytest.approx(1e-3 if sched == "none" else (1e-3 + 1e-6) / 2, rel=1e-3)
