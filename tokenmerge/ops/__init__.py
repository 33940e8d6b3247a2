"""The few hot operations: Triton kernels beside their plain torch references, and what chooses between them."""

from tokenmerge.ops.basics import counting, take_rows
from tokenmerge.ops.choice import takes_triton, triton_refusals

__all__ = ["counting", "take_rows", "takes_triton", "triton_refusals"]
