"""The few hot operations: Triton kernels beside their plain torch references, and what chooses between them."""

from tokenmerge.ops.choice import BACKENDS, Backend, takes_triton, triton_refusals
from tokenmerge.ops.ordering import descending_order

__all__ = ["BACKENDS", "Backend", "descending_order", "takes_triton", "triton_refusals"]
