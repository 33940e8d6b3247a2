"""Merge settings of training, which are stored with the trained weights, and read again by other commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenmerge.tools.models import ModelArgs

KEY = "tokenmerge"
"""Name of the entry in config.json and in the metadata of safetensors files."""
LEARNED = ("matcher", "place", "metric")
"""Fields that are stored with a model whose matcher is learned, because its predictors work only with these."""


def as_trained(args: ModelArgs, fields: dict[str, Any]) -> dict[str, Any]:
    """Return `fields`, completed by the settings that the weights were trained with.

    Proportional attention is taken from training if it is `"auto"`, and a learned matcher if no matcher is given.
    """
    stored = trained_with(args)
    if fields.get("prop_attn", "auto") == "auto" and isinstance(stored.get("prop_attn"), bool):
        fields = {**fields, "prop_attn": stored["prop_attn"]}
    if "matcher" not in fields and "preset" not in fields and isinstance(stored.get("matcher"), str):
        fields = {**{name: stored[name] for name in LEARNED if name in stored}, **fields}
    return fields


def trained_with(args: ModelArgs) -> dict[str, Any]:
    """Return the settings that `publish` stored with the weights of `args`; empty for other weights."""
    kind, _, place = args.model.partition(":")
    if args.checkpoint is not None:
        return _from_weights(args.checkpoint)
    if not args.pretrained:
        return {}
    if kind == "local-dir":
        return _from_config(Path(place, "config.json"))
    if kind == "hf" and Path(place).is_dir():
        return _from_config(Path(place, "config.json"))
    if kind in ("hf_hub", "hf-hub"):
        try:
            from timm.models._hub import download_from_hf

            return _from_config(Path(download_from_hf(place, "config.json")))
        except Exception:  # loading the weights reports the error
            return {}
    return {}


def _from_config(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get(KEY)
    except (OSError, ValueError, AttributeError):
        return {}
    return found if isinstance(found, dict) else {}


def _from_weights(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    if path.suffix != ".safetensors" or not path.is_file():
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            found = json.loads((file.metadata() or {}).get(KEY, "{}"))
    except (SafetensorError, OSError, ValueError):  # loading the weights reports the error
        return {}
    return found if isinstance(found, dict) else {}
