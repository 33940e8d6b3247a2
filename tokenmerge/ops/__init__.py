"""The hot operations' Triton kernels, and which backend runs them; references are in `matching` and `plan`."""

from tokenmerge.ops.choice import BACKENDS, Backend, takes_triton, triton_refusals

__all__ = ["BACKENDS", "Backend", "takes_triton", "triton_refusals"]
