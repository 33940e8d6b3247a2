"""Golden tensors that lie in the repository: what a clone must give, and what gave it when they were made."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import tokenmerge
from tests.helpers.golden import FOLDER, MATCHINGS, RUNS, build, make

GOLDEN: dict[str, Tensor] = load_file(FOLDER / "golden.safetensors")


@pytest.mark.parametrize("number", range(len(MATCHINGS)))
def test_matchings(number: int) -> None:
    _, r, protected = MATCHINGS[number]
    plan = tokenmerge.bipartite_matching(GOLDEN[f"matching{number}.metric"], r, protected)
    assert torch.equal(plan.assign, GOLDEN[f"matching{number}.assign"])


@torch.no_grad()
@pytest.mark.parametrize("number", range(len(RUNS)))
def test_a_model(number: int) -> None:
    run: dict[str, Any] = RUNS[number]
    state = {name.removeprefix("state."): value for name, value in GOLDEN.items() if name.startswith("state.")}
    model = build(run["global_pool"], state)
    with tokenmerge.patched(model, r=list(run["schedule"]), prop_attn=run["prop_attn"], trace=True) as handle:
        logits = model(GOLDEN["input"])
        assert torch.equal(handle.trace.source(), GOLDEN[f"run{number}.source"])
    torch.testing.assert_close(logits, GOLDEN[f"run{number}.logits"], rtol=0, atol=1e-5)


def test_the_oracle_still_makes_them() -> None:
    assert json.loads((FOLDER / "golden.json").read_text())["runs"] == RUNS
    for name, value in make().items():
        torch.testing.assert_close(value, GOLDEN[name], rtol=0, atol=1e-5)
