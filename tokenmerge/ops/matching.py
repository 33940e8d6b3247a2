"""Bipartite matching in Triton kernels: from the keys of all heads to a plan, in two launches (four for long inputs).

1. `unit_keys_kernel` reads K once, sums it over heads and normalises it.
2. `match_kernel` finds the best edge of each A token on tensor cores. The last program of each image to finish ranks the
   edges and writes the plan.
3. With more than about 250 tokens, `rank_kernel` and `select_kernel` rank the edges and write the plan instead, because |A|²
   comparisons would take one program too long.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from tokenmerge.ops.basics import is_plain
from tokenmerge.ops.launch import Launch, divisor, one_program_per, operator, start_all
from tokenmerge.ops.match_kernels import match_kernel, rank_kernel, select_kernel, unit_keys_kernel

LONGEST_RANKED = 128
"""|A| up to which one program ranks the edges of an image; beyond it two more launches are faster (H200, batch 64)."""
_TILE = 128  # A tokens that are ranked or placed together, and (_RIVALS) tokens they are compared with at once
_RIVALS = 32
_IN_FLIGHT = 64  # numbers of K that each thread of `unit_keys_kernel` loads at once
_THREADS = 128

Plan = tuple[Tensor, Tensor, Tensor]


def sides(tokens: int, protected: int) -> tuple[int, int]:
    """Return |A| and |B|, the numbers of tokens in the sets A and B."""
    return (tokens - protected - protected % 2 + 1) // 2, (tokens - protected - 1 + protected % 2 + 1) // 2


def _unit_keys(keys: Tensor, unit: Tensor, arrived: Tensor) -> Launch:
    batch, heads, tokens, dim = keys.shape
    padded = max(16, triton.next_power_of_2(dim))
    rows = max(1, min(16, 16 * _THREADS // padded))
    tiles = one_program_per(tokens, rows)
    step = divisor(*keys.stride()[:3])
    strides = [stride // step for stride in keys.stride()[:3]]
    at_once = max(1, _IN_FLIGHT * _THREADS // (rows * padded))
    constants = {
        "DIM": dim,
        "WIDTH": unit.shape[3],
        "PADDED": padded,
        "STEP": step,
        "HEADS": min(at_once, triton.next_power_of_2(heads)),
        "ROWS": rows,
    }
    arguments = (keys, unit, arrived, *strides, keys.stride(3), tokens, heads, tiles)
    return Launch(unit_keys_kernel, batch * tiles, arguments, constants)


def _match(unit: Tensor, best: Tensor, partner: Tensor, arrived: Tensor, plan: Plan, protected: int, r: int) -> Launch:
    batch, _, tokens, width = unit.shape
    rows = 64 if best.shape[1] > 32 else 16
    tiles = one_program_per(best.shape[1], rows)
    constants = {
        "WIDTH": width,
        "K": next(k for k in (64, 32, 16) if width % k == 0),
        "UNROLLED": width <= 128,
        "PLAN": best.shape[1] <= LONGEST_RANKED,
        "ROWS": rows,
        "COLUMNS": 64,
        "TILE": _TILE,
        "RIVALS": _RIVALS,
        "num_stages": 2,  # more stages are not faster, and exceed the shared memory of small GPUs
    }
    return Launch(
        match_kernel, batch * tiles, (unit, best, partner, arrived, *plan, tokens, tiles, r, protected), constants
    )


def plan_of_edges(best: Tensor, partner: Tensor, plan: Plan, tokens: int, r: int, protected: int) -> list[Launch]:
    """Return the launches that rank edges and write the plan of the r best, for long inputs.

    Args:
        best: similarity of the best edge of each A token `[B, |A|]` float32.
        partner: index into B of that edge's B token `[B, |A|]` int32.
        plan: memory of the plan, see `empty_plan`.
        tokens: N.
        r: tokens to merge away.
        protected: leading tokens that never merge.
    """
    batch, count = best.shape
    rank = torch.empty_like(partner)
    tiles = one_program_per(count, _TILE)
    ranks = {"TILE": _TILE, "RIVALS": _RIVALS}
    return [
        Launch(rank_kernel, batch * tiles, (best, rank, count, tiles), ranks),
        Launch(select_kernel, batch, (best, partner, rank, *plan, tokens, r, protected), {"TILE": _TILE}),
    ]


def empty_plan(keys: Tensor, tokens: int, r: int) -> Plan:
    """Allocate `keep [B, N']`, `source [B, r]` and `target [B, r]`, int64, for N = `tokens`."""
    batch = keys.shape[0]
    keep, source, target = (keys.new_empty(batch, n, dtype=torch.int64) for n in (tokens - r, r, r))
    return keep, source, target


def launches(keys: Tensor, r: int, protected: int) -> tuple[Plan, Tensor, Tensor, list[Launch]]:
    """Return the memory of the plan, of the best edges and of their partners, and the launches that write them."""
    batch, _, tokens, dim = keys.shape
    count_a, _ = sides(tokens, protected)
    unit = keys.new_empty(batch, 2, tokens, -(-dim // 16) * 16, dtype=torch.float16)
    best = keys.new_empty(batch, count_a, dtype=torch.float32)
    partner = keys.new_empty(batch, count_a, dtype=torch.int32)
    arrived = keys.new_empty(batch, dtype=torch.int32)
    plan = empty_plan(keys, tokens, r)
    found = [_unit_keys(keys, unit, arrived), _match(unit, best, partner, arrived, plan, protected, r)]
    if count_a > LONGEST_RANKED:
        found += plan_of_edges(best, partner, plan, tokens, r, protected)
    return plan, best, partner, found


def _run(keys: Tensor, r: int, protected: int) -> Plan:
    plan, _, _, found = launches(keys, r, protected)
    start_all(found)
    return plan


@operator("tokenmerge::match", lambda keys, r, protected: empty_plan(keys, keys.shape[2], r))
def _operator(keys: Tensor, r: int, protected: int) -> tuple[Tensor, Tensor, Tensor]:
    return _run(keys, r, protected)


def match(keys: Tensor, r: int, protected: int) -> Plan:
    """Compute the plan of `bipartite_matching` (cosine, alternating partition) without gradient.

    Args:
        keys: `[B, H, N, D]`, float16, bfloat16 or float32, any strides; averaged over H.
        r: tokens to merge away, from 1 to (N − protected) // 2.
        protected: leading tokens that neither merge nor are merged into.

    Returns:
        `keep [B, N']`, `source [B, r]` and `target [B, r]`, int64: the fields `kept`, `source` and `target` of `MergePlan`.
    """
    keys = keys.detach()
    plan: Plan = _run(keys, r, protected) if is_plain(keys) else _operator(keys, r, protected)
    return plan


def compiled_for(dtype: torch.dtype, heads: int, dim: int) -> list[Any]:
    """Compile the matching kernels for a dtype, H heads of D = `dim` channels and Triton's current target."""
    compiled = []
    for tokens in (197, 4 * LONGEST_RANKED):
        keys = torch.empty(1, tokens, 3, heads, dim, dtype=dtype, device="meta").permute(2, 0, 3, 1, 4)[1]
        compiled += [launch.compile() for launch in launches(keys, 8, 1)[3]]
    return compiled
