"""The few hot operations: Triton kernels beside their plain torch references, and what chooses between them."""

from tokenmerge.ops.choice import BACKENDS, Backend, takes_triton, triton_refusals
from tokenmerge.ops.counting import counting
from tokenmerge.ops.heads import sum_over_heads
from tokenmerge.ops.ordering import ascending_order, descending_order

__all__ = [
    "BACKENDS",
    "Backend",
    "ascending_order",
    "counting",
    "descending_order",
    "sum_over_heads",
    "takes_triton",
    "triton_refusals",
]
