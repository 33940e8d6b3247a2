"""Multiply-adds before and after the layers of transformers' towers, and of the classifiers around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from tokenmerge.flops import NO_ENDS, Ends
from tokenmerge.patching.families.linear import attention_pool, linear_weights

_CLASSIFIERS = ("Classification", "WithProjection", "WithTeacher")
"""Endings of transformers' names of models that add a classifier or a projection to one vector of a tower."""


def tower_ends(model: Any, stem: int) -> Ends:
    """Return the multiply-adds of a tower's own embedding and pooling.

    Args:
        model: the tower.
        stem: multiply-adds of the embedding.
    """
    pools = [getattr(model, name, None) for name in ("pooler", "head")]
    ends = Ends(stem)
    for pool in (pool for pool in pools if isinstance(pool, nn.Module)):
        fixed, per_patch = attention_pool(pool)
        ends = ends.plus(Ends(0, fixed, head_per_patch=per_patch))
    return ends


def around(way: list[nn.Module], model: nn.Module) -> Ends:
    """Return the multiply-adds of the classifier around a tower.

    Text towers, decoders and language models are not counted, because their cost depends on the text.

    Args:
        way: the modules around the tower, outermost first; empty if it stands alone.
        model: the tower.
    """
    ends = NO_ENDS
    for module in way:
        name = type(module).__name__
        if not name.startswith("VJEPA2") and name.endswith(_CLASSIFIERS):
            inside = {id(part) for part in model.modules()}
            ends = ends.plus(Ends(0, linear_weights(*_outside(module, inside))))
    special = _SPECIAL.get(type(way[0] if way else model).__name__)
    return ends if special is None else ends.plus(special(way[0] if way else model))


def _outside(module: nn.Module, inside: set[int]) -> list[nn.Module]:
    """Return the children of a module that neither are nor contain the tower."""
    return [child for child in module.children() if not any(id(part) in inside for part in child.modules())]


def _vjepa_predictor(model: Any) -> Ends:
    """Return the multiply-adds of V-JEPA 2's predictor, which a plain call of the tower runs on all patches.

    Context and targets are both as many tokens as there are patches.
    """
    predictor, width = model.predictor, int(model.config.pred_hidden_size)
    each = linear_weights(predictor.layer)
    per_patch = linear_weights(predictor.embeddings, predictor.proj) + 2 * each
    return Ends(0, head_per_patch=per_patch, head_per_pair=len(predictor.layer) * 2 * width * 4)


def _vjepa_classifier(whole: Any) -> Ends:
    """Return the multiply-adds of V-JEPA 2's pooler: self-attention over all tokens, then one query."""
    pooler, width = whole.pooler, int(whole.config.hidden_size)
    fixed, per_key = attention_pool(pooler.cross_attention_layer)
    layers = pooler.self_attention_layers
    return Ends(
        0,
        fixed + linear_weights(whole.classifier),
        head_per_patch=per_key + linear_weights(layers),
        head_per_pair=len(layers) * 2 * width,
    )


_SPECIAL: dict[str, Callable[[Any], Ends]] = {
    "VJEPA2Model": _vjepa_predictor,
    "VJEPA2ForVideoClassification": _vjepa_classifier,
}
