"""Matchers that cluster: k-means, k-medoids (Token Pooling), and agglomerative clustering (ATC, as a reference)."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor

from tokenmerge.errors import ConfigError, InputError
from tokenmerge.matching.joining import join
from tokenmerge.matching.registry import needed, register_matcher
from tokenmerge.matching.values import AtLeast
from tokenmerge.ops.basics import ascending_order, descending_order, is_exporting, largest_by, unit
from tokenmerge.plan import MergePlan


def _units(metric: Tensor) -> Tensor:
    """Return unit vectors `[B, N, D]` float32; values that are not finite become 0, which has cosine 0 with all tokens."""
    return unit(metric).nan_to_num(0.0)


def _plan(nearest: Tensor, closeness: Tensor, clusters: int, protected: int) -> MergePlan:
    """Return the plan that merges each cluster; every empty cluster gets one of the tokens that fit their own worst.

    Args:
        nearest: cluster of each of the M unprotected tokens, `[B, M]` int64.
        closeness: similarity of each token to its cluster, `[B, M]`, floating.
        clusters: number of clusters, and of unprotected tokens after the merge.
        protected: leading tokens that never merge.
    """
    count = nearest.shape[1]
    # sorted by cluster, then by closeness: the first token of each cluster represents it
    by_fit = descending_order(closeness)
    order = by_fit.gather(1, ascending_order(nearest.gather(1, by_fit)))
    cluster = nearest.gather(1, order)
    first = torch.ones_like(cluster, dtype=torch.bool)
    first[:, 1:] = cluster[:, 1:] != cluster[:, :-1]
    stands = torch.zeros_like(order).scatter_(1, order, first.to(torch.int64)) > 0
    representative = torch.where(first, order, torch.full_like(order, -1))
    of_cluster = largest_by(representative, cluster, clusters, -1)
    rank = (-closeness).masked_fill(stands, torch.inf)  # representatives stay, then the tokens that fit worst
    staying = descending_order(rank)
    source = staying[:, clusters:]
    joined = of_cluster.gather(1, nearest.gather(1, source))
    return join(source + protected, joined + protected, count + protected)


@register_matcher("kmeans", most="all but one")
def kmeans_matching(
    metric: Tensor, r: int, protected: int = 0, iterations: Annotated[int, AtLeast(0)] = 5
) -> MergePlan:
    """Merge tokens into clusters by k-means with cosine similarity, with evenly spaced tokens as initial centres.

    Args:
        metric: `[B, N, D]`, floating.
        r: tokens to merge away; N − r tokens are left, protected ones included.
        protected: leading tokens that never merge.
        iterations: updates of the centres.
    """
    x = _units(metric[:, protected:])
    count = x.shape[1]
    clusters = count - r
    start = torch.arange(clusters, device=x.device) * count // clusters
    centre = x[:, start]
    for _ in range(iterations):
        nearest = (x @ centre.transpose(1, 2)).argmax(dim=2)
        total = torch.zeros_like(centre).scatter_add_(1, nearest.unsqueeze(2).expand_as(x), x)
        filled = total.square().sum(dim=2, keepdim=True) > 0
        centre = torch.where(filled, unit(total), centre)
    closeness, nearest = (x @ centre.transpose(1, 2)).max(dim=2)
    return _plan(nearest, closeness, clusters, protected)


@register_matcher("kmedoids", most="all but one")
def kmedoids_matching(
    metric: Tensor,
    r: int,
    protected: int = 0,
    attention: Tensor | None = None,
    iterations: Annotated[int, AtLeast(0)] = 5,
) -> MergePlan:
    """Merge tokens into clusters by weighted k-medoids, with the most attended tokens as initial medoids (Token Pooling).

    Args:
        metric: `[B, N, D]`, floating.
        r: tokens to merge away; N − r tokens are left, protected ones included.
        protected: leading tokens that never merge.
        attention: attention of the class token to each token, `[B, N]`; it weights the tokens.
        iterations: updates of the medoids.

    Raises:
        InputError: if `attention` is missing.
    """
    attention = needed(attention, "attention", "kmedoids")
    x, weight = _units(metric[:, protected:]), attention[:, protected:].float().nan_to_num(0.0)
    count = x.shape[1]
    similarity = x @ x.transpose(1, 2)
    medoid = descending_order(weight)[:, : count - r]
    for step in range(iterations + 1):
        to_medoid = similarity.gather(2, medoid.unsqueeze(1).expand(-1, count, -1))
        closeness, nearest = to_medoid.max(dim=2)
        # a medoid belongs to its own cluster, even if another medoid is equal to it
        own = torch.arange(count - r, device=x.device).expand_as(medoid)
        nearest = nearest.scatter(1, medoid, own)
        closeness = closeness.scatter(1, medoid, 2.0)
        if step == iterations:
            break
        together = nearest.unsqueeze(2) == nearest.unsqueeze(1)
        fit = (similarity * weight.unsqueeze(1)).masked_fill(~together, 0).sum(dim=2)
        best = largest_by(fit, nearest, count - r, -torch.inf)
        is_best = fit >= best.gather(1, nearest)
        position = torch.arange(count, device=x.device).expand_as(nearest).masked_fill(torch.logical_not(is_best), -1)
        medoid = largest_by(position, nearest, count - r, -1)
    return _plan(nearest, closeness, count - r, protected)


@register_matcher("agglomerative", most="all but one")
def agglomerative_matching(
    metric: Tensor,
    r: int,
    protected: int = 0,
    linkage: Literal["single", "complete", "average", "weighted"] = "average",
) -> MergePlan:
    """Merge tokens into clusters by agglomerative clustering of cosine distances (ATC), in scipy.

    This matcher is a slow reference: it runs on the CPU, one image after the other, and cannot be compiled.

    Args:
        metric: `[B, N, D]`, floating.
        r: tokens to merge away; N − r tokens are left, protected ones included.
        protected: leading tokens that never merge.
        linkage: distance between clusters, as in `scipy.cluster.hierarchy.linkage`.

    Raises:
        InputError: if scipy is not installed.
    """
    batch, tokens, _ = metric.shape
    if is_exporting():
        raise ConfigError(
            "matcher 'agglomerative' runs in scipy, which no exported program can hold: choose another matcher"
        )
    try:
        from scipy.cluster import hierarchy
    except ImportError:
        raise InputError("matcher 'agglomerative' needs scipy, which is not installed: pip install scipy") from None
    x = _units(metric[:, protected:])
    distance = (1 - x @ x.transpose(1, 2)).clamp_min(0).cpu().double().numpy()
    upper = torch.triu_indices(x.shape[1], x.shape[1], offset=1).numpy()
    rows = []
    for between in distance:
        tree = hierarchy.linkage(between[upper[0], upper[1]], method=linkage)
        label = torch.as_tensor(hierarchy.cut_tree(tree, n_clusters=x.shape[1] - r)[:, 0], dtype=torch.int64)
        rows.append(label + protected)
    prefix = torch.arange(protected).expand(batch, -1)
    assign = torch.cat([prefix, torch.stack(rows)], dim=1).to(metric.device)
    return MergePlan.from_assign(assign, tokens - r)
