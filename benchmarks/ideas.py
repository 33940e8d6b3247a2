"""Measure ideas for a better preset that are not in the library, as custom matchers and hooks.

    python benchmarks/ideas.py local-dir:MODEL --data TRAIN --photos DIR

Each is compared at half of the FLOPs with token merging with the norm-preserving mean (presets.py has other candidates):

* two-sided edges: a token of either set may merge along its best edge to the other set, unless another token merged into it;
* metric of attention outputs: matching compares the output of the block's attention, or that and the keys;
* correction before LayerNorm: merged tokens are scaled by one factor per block, calibrated on other images, to the mean
  length of tokens without merging.

It prints the KL divergence from the unmerged model and top-1, with paired 95 % intervals. The matchers are slow Python loops
and are not timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from presets import photos_of
from torch import Tensor

import tokenmerge
from tokenmerge import MergePlan
from tokenmerge.matching import get_matcher
from tokenmerge.matching.distances import similarities
from tokenmerge.matching.joining import join
from tokenmerge.ops.basics import unit
from tokenmerge.patching import patch
from tokenmerge.patching.state import carry, state_of
from tokenmerge.tools.compare import CompareOptions
from tokenmerge.tools.compare.data import Images
from tokenmerge.tools.compare.scoring import Scores, score
from tokenmerge.tools.models import load_model
from tokenmerge.tools.report import Report
from tokenmerge.tools.statistics import bootstrap
from tokenmerge.tools.variants import share_weights

_INPUT: dict[int, Tensor] = {}
"""What entered each block of the pass that runs."""


def _two_sides(similarity: Tensor, r: int, protected: int) -> tuple[list[int], list[int]] | None:
    """Return the sources and targets of one image; `None` if fewer than r edges are possible."""
    count = len(similarity)
    side = torch.arange(count) % 2
    closed = side[:, None] == side[None, :]
    closed[:, :protected] = True
    value, partner = similarity.masked_fill(closed, -torch.inf).max(dim=1)
    value[:protected] = -torch.inf
    going: list[int] = []
    joined: list[int] = []
    for token in value.argsort(descending=True).tolist():
        if len(going) == r:
            return going, joined
        to = int(partner[token])
        if value[token] > -torch.inf and token not in joined and to not in going:
            going.append(token)
            joined.append(to)
    return (going, joined) if len(going) == r else None


@tokenmerge.register_matcher("two_sided")
def two_sided(metric: Tensor, r: int, protected: int = 0) -> MergePlan:
    """Match along the best edges of both directions."""
    found = [_two_sides(one, r, protected) for one in similarities(metric, metric)]
    if any(one is None for one in found):  # late blocks may have too few edges
        return get_matcher("bipartite")(metric, r, protected)
    source, to = (torch.tensor([one[i] for one in found if one is not None]) for i in range(2))
    return join(source, to, metric.shape[1])


@tokenmerge.register_matcher("by_attention_output")
def by_attention_output(
    metric: Tensor, r: int, protected: int = 0, tokens: Tensor | None = None, layer: int = 0, keys: bool = False
) -> MergePlan:
    """Match bipartitely by the outputs of attention; with `keys`, by their concatenation with the keys."""
    assert tokens is not None
    added = unit(tokens - _INPUT[layer])
    return get_matcher("bipartite")(torch.cat([unit(metric), added], dim=2) if keys else added, r, protected)


def note_inputs(model: Any) -> None:
    """Record block inputs in `_INPUT` while the context is active."""
    for index, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda _, args, index=index: _INPUT.__setitem__(index, args[0].detach()))


@torch.inference_mode()
def lengths(model: Any, batches: Any) -> list[float]:
    """Return the mean length of patch tokens after each block, of merged tokens only if there are any."""
    total = [[0.0, 0.0] for _ in model.blocks]

    def note(index: int, out: Tensor) -> None:
        state = state_of(out)
        length = out[:, 1:].norm(dim=2)
        weight = torch.ones_like(length) if state is None or state.size is None else (state.size[:, 1:] > 1).float()
        total[index][0] += float((length * weight).sum())
        total[index][1] += float(weight.sum())

    hooks = [b.register_forward_hook(lambda _, a, out, i=i: note(i, out)) for i, b in enumerate(model.blocks)]
    for images, _ in batches:
        model(images)
    for hook in hooks:
        hook.remove()
    return [a / max(b, 1e-9) for a, b in total]


def corrected(model: Any, unmerged: Any, batches: Any) -> list[float]:
    """Scale merged tokens after each block to the unmerged length, and return the factors."""
    wanted, factors = lengths(unmerged, batches), []
    for index, block in enumerate(model.blocks):
        factor = wanted[index] / lengths(model, batches)[index]
        factors.append(factor)

        def scale(_: Any, args: Any, out: Tensor, factor: float = factor) -> Tensor:
            state = state_of(out)
            if state is None or state.size is None:
                return out
            by = torch.where(state.size > 1, factor, 1.0).unsqueeze(2)
            return carry(out * by, like=out)

        block.register_forward_hook(scale)
    return factors


def main() -> None:
    """Measure all ideas and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=800)
    args = parser.parse_args()
    report, loaded = Report(), CompareOptions(model=args.model, pretrained=True, data=args.data, r=[8])
    model = load_model(loaded)
    sets = {
        "training images": list(Images(model, loaded, args.limit)),
        "photos": photos_of(model, args.photos),
    }
    # calibrated on images that are not scored
    others = list(Images(model, loaded, 2 * args.limit + 1))[::7]
    base = {name: score(model, batches, None) for name, batches in sets.items()}
    plain: dict[str, Scores] = {}

    def run(title: str, after: Callable[[Any], Any] = lambda copy: None, **fields: Any) -> None:
        copy = share_weights(model)
        patch(copy, speedup=2, combine="norm", **fields)
        after(copy)
        words = [title]
        for name, batches in sets.items():
            mine = score(copy, batches, base[name][1])[0]
            first = plain.setdefault(name, mine)
            words.append(
                f"{name}: KL {float(mine.divergence.mean()):.3f} ({bootstrap(mine.divergence - first.divergence)})"
            )
            if name != "photos":
                words.append(f"top-1 {100 * float(mine.top1.mean()):.2f} ({bootstrap(100 * (mine.top1 - first.top1))})")
        report.say(", ".join(words))

    run("norm-preserving mean, bipartite")
    run("two-sided edges", matcher="two_sided")
    run("attention output", note_inputs, matcher="by_attention_output")
    run("attention output and keys", note_inputs, matcher="by_attention_output", options={"keys": True})
    run("LayerNorm input", lambda copy: report.say(f"factors {[round(f, 2) for f in corrected(copy, model, others)]}"))


if __name__ == "__main__":
    main()
