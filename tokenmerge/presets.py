"""Sets of config fields under a name: `patch(model, speedup=2, preset="accurate")`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # the paper's choices, which are the defaults
    "paper": {
        "matcher": "bipartite",
        "metric": "k",
        "heads": "mean",
        "distance": "cosine",
        "partition": "alternating",
        "combine": "mean",
        "place": "between",
    },
    # chosen by how little it moves predictions, on training images and photos, and confirmed on others (docs/compare.md): what is
    # compared is half keys and half the tokens themselves, weighted by class attention; merged tokens keep their length
    "accurate": {
        "matcher": "informed",
        "options": {"attention_power": 0.5, "token_weight": 0.5},
        "partition": "checkerboard",
        "combine": "norm",
    },
}
