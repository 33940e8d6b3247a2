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
}
