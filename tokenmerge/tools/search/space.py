"""Search space: schedules, block by block, and config fields that improved results in other experiments."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tokenmerge.schedule import Schedule, max_merges

Fraction = Callable[[Schedule], float]

START: Sequence[Mapping[str, Any]] = (  # initial trials; other parameters have the paper's values
    {"inflect": 0.0},
    {"inflect": 0.0, "combine": "norm"},
    {"inflect": -0.5},
    {"inflect": 0.0, "last": True},
    {"inflect": 0.0, "combine": "norm", "matcher": "informed", "attention_power": 0.5, "attention_from": 4},
    {"inflect": 0.0, "combine": "norm", "matcher": "informed", "attention_power": 0.5, "token_weight": 0.5},
)
_USUAL: Mapping[str, Any] = {
    "factor": 1.0,
    "shape": "linear",
    "inflect": 0.0,
    "spared": 0,
    "last": False,
    "combine": "mean",
    "order": "partition",
    "matcher": "bipartite",
    "partition": "alternating",
}
_INFORMED: Mapping[str, Any] = {
    "attention_power": 0.0,
    "attention_from": 0,
    "token_weight": 0.0,
    "size_penalty": "none",
}


def full(parameters: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """Return an initial trial completed by default parameters, for a model of `layers` blocks."""
    more = _INFORMED if parameters.get("matcher") == "informed" else {}
    found = {**_USUAL, **more, **parameters}
    if found["shape"] != "linear":
        del found["inflect"], found["spared"]
    if "attention_from" in found:
        found["attention_from"] = min(found["attention_from"], layers - 1)
    return found


def suggest(trial: Any, layers: int, attention: bool) -> dict[str, Any]:
    """Return the parameters that Optuna suggests for one trial.

    Args:
        trial: the trial of Optuna.
        layers: number of blocks.
        attention: whether matchers can read the class token's attention.
    """
    found = {
        "factor": trial.suggest_float("factor", 0.85, 1.2),  # relative to the FLOPs reduction of a constant r
        "shape": trial.suggest_categorical("shape", ["linear", "free"]),
        "last": trial.suggest_categorical("last", [False, True]),
        "combine": trial.suggest_categorical("combine", ["mean", "norm"]),
        "order": trial.suggest_categorical("order", ["partition", "spatial"]),
        "matcher": trial.suggest_categorical("matcher", ["bipartite", "informed"] if attention else ["bipartite"]),
        "partition": trial.suggest_categorical("partition", ["alternating", "checkerboard"]),
    }
    if found["shape"] == "linear":
        found |= {
            "inflect": trial.suggest_float("inflect", -1.0, 1.0),
            "spared": trial.suggest_int("spared", 0, max(0, min(3, layers // 4))),
        }
    else:  # a weight per block, relative to the largest
        found |= {f"part_{i}": trial.suggest_float(f"part_{i}", 0.0, 1.0) for i in range(layers)}
    if found["matcher"] == "informed":
        found |= {
            "attention_power": trial.suggest_float("attention_power", 0.0, 1.0),
            "attention_from": trial.suggest_int("attention_from", 0, layers - 1),
            "token_weight": trial.suggest_float("token_weight", 0.0, 0.8),
            "size_penalty": trial.suggest_categorical("size_penalty", ["none", "sqrt_source", "sqrt_harmonic"]),
        }
    return found


def config_fields(
    parameters: Mapping[str, Any], wanted: float, layers: int, tokens: int, protected: int, fraction: Fraction
) -> dict[str, Any]:
    """Return the fields of `MergeConfig` that parameters describe.

    Args:
        parameters: parameters from `suggest` or `full`.
        wanted: factor of FLOPs reduction at `factor` 1.
        layers: number of blocks.
        tokens: tokens that enter the first block.
        protected: number of protected tokens among them.
        fraction: function from a schedule to its FLOPs divided by those of the unmerged model.
    """
    schedule = shaped(parameters, 1 / (wanted * parameters["factor"]), layers, tokens, protected, fraction)
    fields: dict[str, Any] = {"r": list(schedule)}
    fields |= {name: parameters[name] for name in ("combine", "order", "matcher", "partition")}
    if parameters["matcher"] == "informed":
        names = ("attention_power", "attention_from", "token_weight", "size_penalty")
        fields["options"] = {name: parameters[name] for name in names}
    return fields


def random_parameters(draw: random.Random, layers: int) -> dict[str, Any]:
    """Return a random schedule with the paper's settings otherwise, as in the paper's figure 2 (15,000 schedules)."""
    return full({"shape": "free", **{f"part_{i}": draw.random() for i in range(layers)}}, layers)


def shaped(
    parameters: Mapping[str, Any], target: float, layers: int, tokens: int, protected: int, fraction: Fraction
) -> Schedule:
    """Return the smallest schedule of a shape whose FLOPs are at most `target` of the unmerged model's.

    The shape "linear" merges nothing in the first `spared` blocks and then changes linearly by `inflect` (−1 decreases to 0, 1
    increases from 0); "free" has a weight per block. With `last`, the last block merges as many tokens as possible, which
    costs nothing if the head reads only the class token.
    """
    parts = _parts(parameters, layers)

    def schedule(mean: float) -> Schedule:
        left, cut = tokens, []
        for i, part in enumerate(parts):
            most = max_merges(left, protected)
            r = most if parameters["last"] and i == layers - 1 else min(max(round(mean * part), 0), most)
            cut.append(r)
            left -= r
        return tuple(cut)

    low, high = 0.0, float(tokens) / max(min((part for part in parts if part > 0), default=1.0), 1e-3)
    for _ in range(32):
        middle = (low + high) / 2
        if fraction(schedule(middle)) <= target:
            high = middle
        else:
            low = middle
    return schedule(high)


def _parts(parameters: Mapping[str, Any], layers: int) -> list[float]:
    """Return the relative number of merges of each block."""
    if parameters["shape"] == "free":
        free = [parameters[f"part_{i}"] for i in range(layers)]
        return [part / max(max(free), 1e-12) for part in free]
    spared, active = parameters["spared"], layers - parameters["spared"]
    low = 1 - parameters["inflect"]
    shares = [i / (active - 1) if active > 1 else 0.5 for i in range(active)]
    return [0.0] * spared + [low + (2 - 2 * low) * share for share in shares]
