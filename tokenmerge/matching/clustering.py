"""Clustering: k-means, k-medoids (Token Pooling), and agglomerative clustering (ATC, for reference)."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor

from tokenmerge.errors import InputError
from tokenmerge.matching.joining import join
from tokenmerge.matching.registry import needed, register_matcher
from tokenmerge.matching.values import AtLeast
from tokenmerge.ops.basics import ascending_order, descending_order, unit
from tokenmerge.plan import MergePlan


def _units(metric: Tensor) -> Tensor:
    """The metric with every vector divided by its length; what is not finite, as a broken image makes it, is like nothing."""
    return unit(metric).nan_to_num(0.0)


def _plan(nearest: Tensor, closeness: Tensor, clusters: int, protected: int) -> MergePlan:
    """The plan of clusters that may be empty: an empty one gets the token that fits worst where it is.

    Args:
        nearest: `[B, M]` the cluster of each unprotected token.
        closeness: `[B, M]` how well it fits there.
        clusters: how many there must be.
        protected: prefix tokens, which stay.
    """
    batch, count = nearest.shape
    # tokens by cluster, the one that fits best first: that one stands for the cluster
    by_fit = descending_order(closeness)
    order = by_fit.gather(1, ascending_order(nearest.gather(1, by_fit)))
    cluster = nearest.gather(1, order)
    first = torch.ones_like(cluster, dtype=torch.bool)
    first[:, 1:] = cluster[:, 1:] != cluster[:, :-1]
    stands = torch.zeros_like(first).scatter_(1, order, first)
    representative = torch.where(first, order, torch.full_like(order, -1))
    of_cluster = nearest.new_full((batch, clusters), -1).scatter_reduce(1, cluster, representative, "amax")
    rank = torch.where(stands, torch.inf, -closeness)  # those that stand for one stay, then those that fit worst
    staying = descending_order(rank)
    source = staying[:, clusters:]
    joined = of_cluster.gather(1, nearest.gather(1, source))
    return join(source + protected, joined + protected, count + protected)


@register_matcher("kmeans", most="all but one")
def kmeans_matching(
    metric: Tensor, r: int, protected: int = 0, iterations: Annotated[int, AtLeast(0)] = 5
) -> MergePlan:
    """N − r clusters by k-means with cosine similarity, started at evenly spread tokens."""
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
    """N − r clusters by weighted k-medoids, started at the most attended tokens (Token Pooling)."""
    attention = needed(attention, "attention", "kmedoids")
    x, weight = _units(metric[:, protected:]), attention[:, protected:].float().nan_to_num(0.0)
    count = x.shape[1]
    similarity = x @ x.transpose(1, 2)
    medoid = descending_order(weight)[:, : count - r]
    for step in range(iterations + 1):
        to_medoid = similarity.gather(2, medoid.unsqueeze(1).expand(-1, count, -1))
        closeness, nearest = to_medoid.max(dim=2)
        # a medoid is its own, whatever equals it
        own = torch.arange(count - r, device=x.device).expand_as(medoid)
        nearest = nearest.scatter(1, medoid, own)
        closeness = closeness.scatter(1, medoid, 2.0)
        if step == iterations:
            break
        together = nearest.unsqueeze(2) == nearest.unsqueeze(1)
        fit = (similarity * weight.unsqueeze(1)).masked_fill(~together, 0).sum(dim=2)
        best = fit.new_full(medoid.shape, -torch.inf).scatter_reduce(1, nearest, fit, "amax")
        is_best = fit >= best.gather(1, nearest)
        position = torch.where(is_best, torch.arange(count, device=x.device), -1)
        medoid = torch.full_like(medoid, -1).scatter_reduce(1, nearest, position, "amax")
    return _plan(nearest, closeness, count - r, protected)


@register_matcher("agglomerative", most="all but one")
def agglomerative_matching(
    metric: Tensor,
    r: int,
    protected: int = 0,
    linkage: Literal["single", "complete", "average", "weighted"] = "average",
) -> MergePlan:
    """N − r clusters by agglomerative clustering of cosine distances (ATC), in scipy, one image after the other.

    A reference: slow, on the CPU, and not compiled.
    """
    batch, tokens, _ = metric.shape
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
