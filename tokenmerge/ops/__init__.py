"""Performance-critical operations: torch implementations, Triton kernels, and the choice between them."""

from tokenmerge.ops.basics import counting, take_rows
from tokenmerge.ops.choice import takes_triton, triton_refusals

__all__ = ["counting", "take_rows", "takes_triton", "triton_refusals"]
