"""The logger, the summary and the representation of a handle say what was decided, and why."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import timm
import torch

import tokenmerge
from tests.helpers.tiny import tiny


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [record.getMessage() for record in caplog.records if record.name == "tokenmerge"]
    caplog.clear()
    return found


def test_patch_and_update_say_what_they_decided(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tokenmerge")
    handle = tokenmerge.patch(tiny("deit_tiny_patch16_224"), r=2)
    summary = handle.summary()
    said = lines(caplog)
    name = summary.model
    assert said[0] == f"{name}: {summary.blocks} blocks patched, r 2 in each"
    assert f"{name}: proportional attention on: {summary.prop_attn_reason}" in said
    assert f"{name}: attention form {summary.attention}: {summary.attention_reason}" in said
    assert f"{name}: backend {summary.backend}: {summary.backend_reason}" in said
    assert not any("cut" in line for line in said)
    handle.update(r=(2, -1), prop_attn=False, attention="math")
    said = lines(caplog)
    assert said[0].endswith(f"r {', '.join(map(str, handle.schedule))}")
    assert f"{name}: proportional attention off: as the config asks" in said
    assert any(line.startswith(f"{name}: attention form math: ") for line in said)
    handle.remove()
    caplog.set_level(logging.WARNING, "tokenmerge")
    tokenmerge.patch(tiny("deit_tiny_patch16_224"), r=2)
    assert not lines(caplog)


def test_r_that_is_cut_is_said_once_for_each_size(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tokenmerge")
    model = timm.create_model("deit_tiny_patch16_224", depth=3, img_size=96, dynamic_img_size=True).eval()
    handle = tokenmerge.patch(model, r=16)
    assert lines(caplog)[-1].endswith("inputs of 37 tokens, because too few are left to merge: it is 16, 10, 5")
    assert handle.summary().r == (16, 10, 5)
    for _ in range(2):
        model(torch.zeros(1, 3, 96, 96))
        model(torch.zeros(1, 3, 64, 64))
    assert lines(caplog) == ["r was cut for inputs of 17 tokens, because too few are left to merge: it is 8, 4, 2"]
    model(torch.zeros(1, 3, 224, 224))
    assert not lines(caplog), "197 tokens are enough"
    handle.update(r=15)
    model(torch.zeros(1, 3, 64, 64))
    assert [line for line in lines(caplog) if "of 17 tokens" in line], "other settings are another cut"


def test_nothing_is_printed_unless_a_program_asks() -> None:
    code = (
        "import timm, tokenmerge, torch; m = timm.create_model('test_vit').eval();"
        "tokenmerge.patch(m, r=99); m(torch.zeros(1, 3, 160, 160))"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == done.stderr == ""


def test_reasons_for_proportional_attention() -> None:
    usual = tokenmerge.patch(tiny("deit_tiny_patch16_224"), r=2)
    assert usual.summary().prop_attn
    assert "not known to come from MAE" in str(usual.summary())
    model = tiny("deit_tiny_patch16_224")
    model.pretrained_cfg = {**model.pretrained_cfg, "tag": "mae"}
    mae = tokenmerge.patch(model, r=2)
    assert not mae.summary().prop_attn
    assert "come from MAE pretraining" in mae.summary().prop_attn_reason
    mae.update(prop_attn=True)
    assert mae.summary().prop_attn_reason == "as the config asks"
    assert all(len(line) <= 80 for line in str(usual.summary()).splitlines())


def test_a_handle_shows_what_is_not_default() -> None:
    handle = tokenmerge.patch(tiny("deit_tiny_patch16_224"), r=2)
    name = handle.summary().model
    assert repr(handle) == f"<Handle of {name}: r=2>"
    handle.update(matcher="kmeans", options={"iterations": 3}, trace=True)
    assert repr(handle).startswith(f"<Handle of {name}: r=2, matcher='kmeans', options=")
    assert "iterations" in repr(handle)
    assert repr(handle).endswith("trace=True>")
    handle.remove()
    assert repr(handle) == f"<Handle of {name}: removed>"
