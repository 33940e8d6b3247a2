"""The parts of the tools that are not seen through the command."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import tokenmerge
from tests.families.test_timm_models import KINDS
from tests.helpers.tiny import images_for, tiny
from tokenmerge.errors import ConfigError
from tokenmerge.ops.timing import Spread, peak_memory, ratio, take_turns
from tokenmerge.tools.settings import parse_setting
from tokenmerge.tools.variants import share_weights, sliced


@pytest.mark.parametrize(
    ("text", "label", "fields"),
    [
        ("0", 0, {"r": 0}),
        ("13", 13, {"r": 13}),
        ("16:-1", "16:-1", {"r": (16, -1.0)}),
        ("8,8,0", "8,8,0", {"r": [8, 8, 0]}),
        ("8,", "8,", {"r": [8]}),
        ("keep=0.9", "keep=0.9", {"keep": 0.9}),
        ("flops=0.5", "flops=0.5", {"flops": 0.5}),
    ],
)
def test_settings(text: str, label: int | str, fields: dict[str, Any]) -> None:
    setting = parse_setting(text)
    assert (setting.label, setting.fields) == (label, fields)
    assert setting.is_baseline is (text == "0")
    assert setting.config(prop_attn=False) == tokenmerge.MergeConfig(**fields, prop_attn=False)


@pytest.mark.parametrize(
    "text", ["", "x", "1.5", "8:", "8:1:2", "keep=", "keep=x", "r=8", "8,x", "-1", "flops=2", "8:3"]
)
def test_settings_that_mean_nothing(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_setting(text)


@pytest.mark.parametrize("name", KINDS)
def test_the_yardstick_slices_and_does_nothing_else(name: str) -> None:
    """Against hooks that cut the tokens of upstream's own modules."""
    model = tiny(name)
    images = images_for(model)
    with torch.no_grad():
        original = model(images)
        uncut: Any = sliced(model, (0, 0, 0))
        assert torch.equal(uncut(images), original)
        cut: Any = sliced(model, (5, 0, 7))
        tokens: Any = cut.forward_features(images)
        assert tokens.shape[1] == model.forward_features(images).shape[1] - 12
        assert torch.equal(model(images), original)  # the copy is another model with the same weights
        # upstream's MLPs map token by token, so slicing after the block gives the same rows
        x = torch.randn(2, 20, 48)
        torch.testing.assert_close(cut.blocks[0](x), model.blocks[0](x)[:, :15])


def test_copies_share_weights_and_nothing_else() -> None:
    model = tiny("vit_tiny_patch16_224")
    copy = share_weights(model)
    pairs = zip(model.parameters(), copy.parameters(), strict=True)
    assert all(a is b for a, b in pairs)
    tokenmerge.patch(copy, r=4)
    assert not tokenmerge.is_patched(model)


def test_every_round_runs_everything_once_in_an_order_of_its_own() -> None:
    calls: list[str] = []
    seconds = take_turns([partial(calls.append, name) for name in "abc"], torch.device("cpu"), 1, 40)
    assert [len(times) for times in seconds] == [40, 40, 40]
    rounds = ["".join(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert {"".join(sorted(one)) for one in rounds} == {"abc"}
    assert len(set(rounds)) == 6  # every order occurs
    assert all(time > 0 for times in seconds for time in times)


def test_ratios_are_taken_within_a_round() -> None:
    """A machine that gets slower round by round changes no ratio."""
    above, below = [2.0, 4.0, 8.0, 16.0], [1.0, 2.0, 4.0, 8.0]
    assert Spread.of_ratios(above, below) == Spread(2.0, 2.0, 2.0)
    assert ratio(above, below, "median") == 2.0
    assert ratio([3.0, 9.0], [2.0, 1.0], "min") == 3.0


def test_peak_memory_is_what_a_pass_holds_at_once() -> None:
    def call() -> torch.Tensor:
        a = torch.ones(1024, 1024)  # 4 MiB
        b = a + 1  # another 4
        del a
        return (b * 2).sum()  # 8 at most at any time

    assert peak_memory(call, torch.device("cpu")) == pytest.approx(8 * 2**20, rel=0.05)


def test_the_exported_demo_is_the_demo(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    pytest.importorskip("sklearn")
    from tokenmerge.tools.demo import DemoOptions
    from tokenmerge.tools.demo import run as run_demo
    from tokenmerge.tools.demo.digits import as_stored, load_digits, load_model
    from tokenmerge.tools.demo.export import export_demo
    from tokenmerge.tools.eval import EvalOptions, run

    model_dir, data_dir = export_demo(tmp_path)
    exported = timm.create_model(f"local-dir:{model_dir}", pretrained=True).eval()
    _, _, images, labels = load_digits()
    with torch.no_grad():
        assert torch.equal(exported(as_stored(images[:8])), load_model()(as_stored(images[:8])))
    files = sorted(data_dir.rglob("*.png"))
    assert len(files) == len(images) == 360
    with Image.open(data_dir / str(int(labels[0])) / "0000.png") as first:
        assert first.size == (56, 56)
    rows = run(EvalOptions(model=f"local-dir:{model_dir}", data=data_dir, r=[0, 16], workers=0))
    shown = run_demo(DemoOptions(r=[0, 16], output=tmp_path / "demo.png"))
    for ours, theirs in zip(shown, rows, strict=True):  # the same images, to the bit, and the same model
        assert (ours["top1"], ours["gflops"]) == (theirs["top1"], theirs["gflops"])
