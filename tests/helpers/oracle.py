"""The oracle of all families: token merging made of forward hooks on the unpatched upstream model.

It never removes a token. All N0 tokens remain, and tokens of one group have equal values. Therefore
* attention over equal tokens is proportional attention, without a bias;
* the mean over the N0 tokens of a group is the mean weighted by size, without sizes;
* average, maximum and attention pooling over N0 tokens are the weighted versions.
The matching is written as loops. No code of tokenmerge is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def naive_matching(metric: Tensor, r: int, protected: int) -> list[int]:
    """Match one image `[N, D]` as in the paper, in loops, and return the new position of each token."""
    tokens = metric.shape[0]
    unit = metric.float() / metric.float().norm(dim=1, keepdim=True).clamp_min(1e-12)
    a = [i for i in range(0, tokens, 2) if i >= protected]
    b = [i for i in range(1, tokens, 2) if i >= protected]
    r = min(r, max(0, (tokens - protected) // 2))
    edges = []
    for i in a if r else []:
        scores = [float(unit[i] @ unit[j]) for j in b]
        best = max(range(len(b)), key=lambda k: (scores[k], -k))
        edges.append((scores[best], i, b[best]))
    edges.sort(key=lambda edge: (-edge[0], edge[1]))
    merged = {i: j for _, i, j in edges[:r]}
    order = list(range(protected)) + [i for i in a if i not in merged] + b
    if not r:
        order = list(range(tokens))
    place = {token: position for position, token in enumerate(order)}
    return [place[merged.get(token, token)] for token in range(tokens)]


def group_mean(x: Tensor, source: Tensor) -> Tensor:
    """Replace every token of x `[B, N0, C]` by the mean over its group, given by source `[B, N0]`."""
    same = (source.unsqueeze(2) == source.unsqueeze(1)).to(x.dtype)
    return same @ x / same.sum(dim=2, keepdim=True)


class Oracle:
    """Hooks on an unpatched timm ViT; `source [B, N0]` is the group of each original token."""

    def __init__(self, model: Any, schedule: tuple[int, ...], protected: int, prop_attn: bool) -> None:
        self.schedule, self.protected, self.prop_attn = schedule, protected, prop_attn
        self.source: Tensor | None = None
        self.keys: list[Tensor] = []
        self.handles: list[Any] = []
        for index, block in enumerate(model.blocks):
            self._attach(block, index)
        pool = getattr(model, "attn_pool", None)
        if pool is not None and not prop_attn and "Latent" in type(pool).__name__:
            self.handles.append(pool.register_forward_pre_hook(self._mask_pool, with_kwargs=True))

    def _attach(self, block: nn.Module, index: int) -> None:
        kind = type(block).__name__
        self.handles.append(block.register_forward_pre_hook(self._mask, with_kwargs=True))
        for name, module in block.named_modules():
            if name.endswith("k_norm"):
                swap = kind == "ParallelScalingBlock"  # its K is [B, N, H, D]
                note = lambda m, a, k, swap=swap: self.keys.append(k.transpose(1, 2) if swap else k)  # noqa: E731
                self.handles.append(module.register_forward_hook(note))
        merge = lambda module, args: (self._merge(args[0], index),)  # noqa: E731
        regroup = lambda module, args: (group_mean(args[0], self._source()),)  # noqa: E731
        children: Any = block
        if kind == "Block":
            self.handles.append(children.norm2.register_forward_pre_hook(merge))
        elif kind == "ResPostBlock":
            self.handles.append(children.mlp.register_forward_pre_hook(merge))
        elif kind == "ParallelThingsBlock":
            for number, ffn in enumerate(children.ffns):
                self.handles.append(ffn.register_forward_pre_hook(regroup if number else merge))
        else:  # attention and MLP in parallel: tokens merge after both
            self.handles.append(block.register_forward_hook(lambda m, a, out: self._merge(out, index)))
            return
        self.handles.append(block.register_forward_hook(lambda m, a, out: group_mean(out, self._source())))

    def _source(self) -> Tensor:
        assert self.source is not None
        return self.source

    def _sizes(self) -> Tensor:
        """Return `[B, N0]`: the size of each token's group."""
        return torch.stack([(row.unsqueeze(0) == row.unsqueeze(1)).sum(1) for row in self._source()]).float()

    def _mask(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        x = args[0]
        if self.source is None:
            self.source = torch.arange(x.shape[1]).expand(x.shape[0], -1).clone()
        self.keys.clear()
        if not self.prop_attn:  # a group of equal tokens must weigh as much as one token
            kwargs = {**kwargs, "attn_mask": -self._sizes().log()[:, None, None, :].to(x.dtype)}
        return args, kwargs

    def _mask_pool(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        sizes = self._sizes()[:, -args[0].shape[1] :]
        return args, {**kwargs, "attn_mask": -sizes.log()[:, None, None, :].to(args[0].dtype)}

    def _merge(self, x: Tensor, index: int) -> Tensor:
        keys = torch.cat(self.keys, dim=1)  # several attention modules count as more heads
        metric, source = keys.mean(dim=1), self._source()
        new = []
        for image in range(x.shape[0]):
            groups = int(source[image].max()) + 1
            first = [int((source[image] == group).nonzero()[0]) for group in range(groups)]
            place = torch.tensor(naive_matching(metric[image, first], self.schedule[index], self.protected))
            new.append(place[source[image]])
        self.source = torch.stack(new)
        return group_mean(x, self.source)


@contextmanager
def oracle(model: Any, schedule: tuple[int, ...], protected: int, prop_attn: bool = True) -> Iterator[Oracle]:
    """Add the oracle's hooks to a model, for one forward pass per use."""
    hooks = Oracle(model, schedule, protected, prop_attn)
    try:
        yield hooks
    finally:
        for handle in hooks.handles:
            handle.remove()
