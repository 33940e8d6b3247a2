"""Trained methods: `compare --paper pruning --train`, the tokens that really ran, and evaluation of what was trained."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tokenmerge
from tests.conftest import Run
from tests.helpers.tiny import images_for, tiny
from tests.matching.test_avit import R, halting_model
from tokenmerge import InputError
from tokenmerge.matching.learned import PREDICTOR
from tokenmerge.patching import model_cost
from tokenmerge.patching.predictors import add_predictors, learned_loss, predicting
from tokenmerge.patching.seen import TokensSeen, flops_of
from tokenmerge.tools.buckets import in_buckets
from tokenmerge.tools.compare.options import CompareOptions
from tokenmerge.tools.compare.trained import METHODS, setting_for, title_of_schedule
from tokenmerge.tools.compare.training import training_options
from tokenmerge.tools.compare.turns import training_speedups
from tokenmerge.tools.settings import parse_setting


@pytest.mark.parametrize(
    ("layers", "between", "before"),
    [(12, (3, 6, 9), (2, 5, 8)), (24, (6, 12, 18), (5, 11, 17)), (4, (1, 2, 3), (0, 1, 2))],
)
def test_schedules_of_the_rivals(layers: int, between: tuple[int, ...], before: tuple[int, ...]) -> None:
    """DynamicViT, SPViT and EViT drop before, or in, the 4th, 7th and 10th of 12 blocks; A-ViT and ToMe in every block."""
    for label, places in (
        ("EViT, trained here", between),
        ("DynamicViT, trained here", before),
        ("SPViT, trained here", before),
    ):
        keep = setting_for(METHODS[label], 13, layers).fields["keep"]
        assert [layer for layer, share in enumerate(keep) if share != 1] == list(places)
        assert {share for share in keep if share != 1} == {0.7}
        named = title_of_schedule(setting_for(METHODS[label], 13, layers))
        assert named == f"keep 0.7 in blocks {', '.join(map(str, places))}"
    for label in ("ToMe, trained here", "A-ViT, trained here"):
        assert setting_for(METHODS[label], 13, layers).fields == {"r": 13}
    assert next(iter(METHODS)).startswith("ToMe"), "what the others are compared with"
    for method in METHODS.values():
        tokenmerge.MergeConfig.create(**setting_for(method, 13, layers).fields, **method.fields)


def test_counts_are_of_the_rows_that_ran() -> None:
    model = halting_model().eval()
    images = images_for(model, 4)
    batches = [images[:2], images[2:]]
    with tokenmerge.patched(model, r=R, matcher="avit", place="after") as handle, torch.no_grad():
        with TokensSeen(model) as seen:
            for image in images:
                model(image[None])
        alone, tokens, each = seen.mean_flops, seen.tokens, seen.each
        together = flops_of(model, batches)
        ordered = flops_of(
            model, (batch for batch, _, _ in in_buckets([(b, torch.zeros(2)) for b in batches], keys=each))
        )
        assert alone <= ordered <= together < handle.summary().flops_before
        assert alone < together, "the images of a batch halt differently"
        with TokensSeen(model) as seen:
            for batch in batches:
                model(batch)
        assert seen.tokens == pytest.approx(tokens), "rows of halted tokens are no tokens"
        assert torch.equal(seen.each, each)
        assert seen.tokens[0] == 37
        assert seen.tokens == sorted(seen.tokens, reverse=True)
    with tokenmerge.patched(model, r=R) as handle, torch.no_grad():
        assert flops_of(model, batches) == handle.summary().flops_after


def test_flops_are_exact_where_all_tokens_halt() -> None:
    model = halting_model().eval()
    for block in predicting(model).values():
        getattr(block, PREDICTOR).shift.fill_(50.0)
    with tokenmerge.patched(model, r=R, matcher="avit", place="after"), torch.no_grad():
        with TokensSeen(model) as seen:
            model(images_for(model))
        cost = model_cost(model)
    assert seen.tokens == [37, 1, 1, 1, 1, 1]
    blocks = [one.total(tokens, tokens) for one, tokens in zip(cost.blocks, (37, 1, 1, 1, 1), strict=True)]
    assert seen.mean_flops == cost.total() - sum(one.total(37, 37) for one in cost.blocks) + sum(blocks)


def test_sorted_batches_keep_the_order_of_the_results() -> None:
    images, labels = torch.arange(6.0).view(6, 1), torch.arange(6)
    batches = [(images[:2], labels[:2]), (images[2:4], labels[2:4]), (images[4:], labels[4:])]
    found = list(in_buckets(batches, depth=2, keys=torch.tensor([3, 1, 0, 2, 9, 8])))
    assert [one.flatten().tolist() for one, _, _ in found] == [[2, 1], [3, 0], [5, 4]]
    assert [one.tolist() for _, _, one in found] == [[2, 1], [3, 0], [5, 4]]


def test_a_training_step_is_timed_with_the_losses_of_its_method(monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = tiny("deit_tiny_patch16_224"), tiny("deit_tiny_patch16_224")
    add_predictors(other, [0], "spvit")
    handle = tokenmerge.patch(other, r=[9, 0, 0], matcher="spvit", place="after")
    asked: list[Any] = []

    def noted(*args: Any) -> Any:
        asked.append(learned_loss(*args))
        return asked[-1]

    monkeypatch.setattr("tokenmerge.tools.train.merging.learned_loss", noted)
    with torch.inference_mode():
        images = images_for(model)
    spreads = training_speedups([(model, None), (other, handle)], images, torch.tensor([0, 1]), 2)
    assert len(spreads) == 2
    assert spreads[0].p50 == 1
    assert len(asked) == 3
    assert all(one is not None and one.requires_grad for one in asked)
    assert not model.training
    assert all(p.grad is None for p in other.parameters())


def test_options_of_the_training(tmp_path: Path) -> None:
    options = CompareOptions(
        model="m", paper="pruning", data=tmp_path, train=tmp_path / "train", train_set={"epochs": "3", "drop-path": 0.1}
    )
    method = METHODS["SPViT, trained here"]
    found = training_options(options, tmp_path / "run", parse_setting("keep=1,0.7,1"), method.fields)
    assert (found.epochs, found.drop_path, found.lr, found.matcher) == (3, 0.1, 3e-5, "spvit")
    assert (found.data, found.train_split, found.val_split) == (tmp_path, "train", "")
    assert found.merging() == {"matcher": "spvit", "place": "after", "prop_attn": True}
    assert found.setting.fields == {"keep": [1, 0.7, 1]}
    for name, words in (("epoch", "did you mean epochs"), ("matcher", "does not set itself")):
        wrong = dataclasses.replace(options, train_set={name: "3"})
        with pytest.raises(InputError, match=words):
            training_options(wrong, tmp_path, parse_setting("8"), {})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--paper", "design", "--train", "d"), "without --paper pruning"),
        (("--paper", "pruning", "--train-set", "epochs=3"), "without --train"),
    ],
)
def test_flags_that_do_not_fit(run: Run, words: tuple[str, ...], message: str) -> None:
    code, _, err = run("compare", "m", "--data", "d", *words)
    assert (code, message in err) == (2, True), err


@pytest.mark.slow
def test_methods_are_trained_measured_and_not_trained_again(
    run: Run, model_dir: Path, data: Path, tmp_path: Path
) -> None:
    words: tuple[object, ...] = (
        "compare",
        f"local-dir:{model_dir}",
        "--paper",
        "pruning",
        "--data",
        data,
        "--train",
        data,
    )
    words = (
        *words,
        "--train-set",
        "batch_size=4",
        "--workers",
        0,
        "--batch-size",
        4,
        "--output",
        "out",
        "--json",
        "rows.json",
    )
    code, out, err = run(*words, "--rounds", 1)
    assert code == 0, err
    rows = {row["method"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert [label for label in rows if "trained" in label] == [*METHODS, "A-ViT, trained here; sorted"]
    for label, row in rows.items():
        assert row["measured"]
        assert not any(name.startswith("published") for name in row), "these are other images"
        if "trained" in label:
            assert row["training_speedup"] > 0
            assert row["speedup"] > 0
            assert row["images_per_second"] > 0
            assert 0 < row["gflops"] <= rows["unmerged"]["gflops"]
            assert row["top1_low"] <= row["top1_difference"] <= row["top1_high"]
    assert "training" in out
    assert max(map(len, out.splitlines())) <= 80
    weights = tmp_path / "out" / "trained" / "avit" / "checkpoints"
    kept = {path.name for path in weights.iterdir()}
    code, out, err = run(*words, "--rounds", 0)
    assert code == 0, err
    assert {path.name for path in weights.iterdir()} == kept
    again = {row["method"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert {label: row["divergence"] for label, row in again.items()} == {
        label: row["divergence"] for label, row in rows.items()
    }
    code, out, err = run("inspect", f"local-dir:{tmp_path / 'out' / 'trained' / 'avit' / 'model'}")
    assert (code, "depends on what is in the images" in " ".join(out.split())) == (0, True)
    weights = model_dir / "model.safetensors"
    weights.write_bytes(weights.read_bytes())  # the same name, written at another time
    code, _, err = run(*words, "--rounds", 0)
    assert (code, "started from other weights" in err) == (2, True), err
    folder = tmp_path / "out" / "trained" / "avit" / "model"
    code, _, err = run(
        "eval", f"local-dir:{folder}", "--data", data, "--workers", 0, "--batch-size", 12, "--json", "eval.json"
    )
    assert code == 0, err
    evaluated = json.loads((tmp_path / "eval.json").read_text())[-1]
    assert evaluated["top1"] == pytest.approx(again["A-ViT, trained here"]["top1"])
    code, _, err = run(
        "compare",
        f"local-dir:{folder}",
        "--data",
        data,
        "--methods",
        "avit",
        "--r",
        9,
        "--rounds",
        0,
        "--workers",
        0,
        "--json",
        "c.json",
    )
    assert code == 0, err
    code, _, err = run("compare", f"local-dir:{folder}", "--data", data, "--methods", "spvit", "--r", 9, "--rounds", 0)
    assert (code, "it was trained for 'avit'" in err) == (2, True), err
    compared = {row["method"]: row for row in json.loads((tmp_path / "c.json").read_text())}
    assert compared["avit"]["top1"] == pytest.approx(evaluated["top1"])
    code, _, err = run("bench", f"local-dir:{folder}", "--num-bench-iter", 1, "--batch-size", 2, "--json", "b.json")
    assert (code, "bench runs on noise" in err) == (0, True), err
    merged = json.loads((tmp_path / "b.json").read_text())[1]
    assert merged["flops_ratio"] == pytest.approx(1, abs=0.2), "as many tokens as ran, and not as the schedule says"
    assert merged["overhead"] is None
    for command, sentence in (
        (("bench", "--break-even"), "use eval or compare"),
        (("export", "--format", "pt2", "--output", "a.pt2"), "static shapes"),
    ):
        code, _, err = run(command[0], f"local-dir:{folder}", *command[1:])
        assert (code, sentence in err, len(err.strip().splitlines())) == (2, True, 1), err
