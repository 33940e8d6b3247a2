"""Create small golden tensors, so that a clone without the reference data can compare with some.

    python -m tests.helpers.golden   # rewrites tests/data/golden.safetensors and golden.json

No code of tokenmerge is used: matchings are loops (`naive_matching`), and the model runs with the oracle made of hooks, which
never removes a token.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.helpers.oracle import naive_matching, oracle
from tests.helpers.tiny import randomize

FOLDER = Path(__file__).parents[1] / "data"
MODEL: dict[str, Any] = {
    "img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 5, "mlp_ratio": 2.0,
}  # fmt: skip
RUNS: list[dict[str, Any]] = [
    {"schedule": [0, 0, 0], "prop_attn": True, "global_pool": "token"},
    {"schedule": [3, 3, 3], "prop_attn": True, "global_pool": "token"},
    {"schedule": [3, 3, 3], "prop_attn": False, "global_pool": "token"},
    {"schedule": [6, 0, 2], "prop_attn": True, "global_pool": "token"},
    {"schedule": [4, 2, 1], "prop_attn": True, "global_pool": "avg"},
]
MATCHINGS = [(12, 4, 0), (13, 3, 1), (14, 6, 2), (17, 8, 1), (9, 1, 5)]
"""Tokens, r and protected tokens."""


def build(global_pool: Any, state: dict[str, Tensor] | None = None) -> Any:
    """Return the model of the golden runs, with random weights or those of a file."""
    model = timm.models.vision_transformer.VisionTransformer(**MODEL, global_pool=global_pool, fc_norm=False).eval()
    randomize(model)
    if state is not None:
        model.load_state_dict(state)
    return model


def make() -> dict[str, Tensor]:
    """Return all golden tensors by name."""
    draw = torch.Generator().manual_seed(7)
    tensors: dict[str, Tensor] = {}
    for number, (tokens, r, protected) in enumerate(MATCHINGS):
        metric = torch.randn(2, tokens, 6, generator=draw)
        tensors[f"matching{number}.metric"] = metric
        assign = [naive_matching(image, r, protected) for image in metric]
        tensors[f"matching{number}.assign"] = torch.tensor(assign)
    tensors["input"] = torch.randn(2, 3, 32, 32, generator=draw)
    tensors |= {f"state.{name}": value.clone() for name, value in build("token").state_dict().items()}
    for number, run in enumerate(RUNS):
        model = build(run["global_pool"])
        with torch.no_grad(), oracle(model, tuple(run["schedule"]), 1, run["prop_attn"]) as hooks:
            tensors[f"run{number}.logits"] = model(tensors["input"])
        assert hooks.source is not None
        tensors[f"run{number}.source"] = hooks.source
    return tensors


def main() -> None:
    """Write both files."""
    FOLDER.mkdir(exist_ok=True)
    save_file(make(), FOLDER / "golden.safetensors")
    text = json.dumps({"model": MODEL, "runs": RUNS, "matchings": MATCHINGS}, indent=1)
    (FOLDER / "golden.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
