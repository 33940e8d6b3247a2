"""Drawing of one input after one block, shared by pictures and films."""

from __future__ import annotations

from torch import Tensor

from tokenmerge.tools.visualize.load import Shown
from tokenmerge.tools.visualize.looks import Look
from tokenmerge.tracing import View, paint
from tokenmerge.tracing.paint import span_of
from tokenmerge.tracing.sheet import enlarged

_WIDTH = 224
"""Small pictures are enlarged to about this many pixels."""


def scale_of(shown: Shown) -> int:
    """Return the integer factor by which a picture is enlarged."""
    return max(1, round(_WIDTH / max(shown.pixels.shape[-2:])))


def painted(shown: Shown, look: Look, block: int, view: View, scale: int = 1) -> Tensor:
    """Return `[3, …, H·scale, W·scale]`: the tokens of an input after a block, with borders of one pixel.

    Of a spectrogram, the part that holds sound is drawn. Block −1 is the input itself.

    The colour scale of sizes is the same for all blocks: it ends at the largest token after the
    last block.
    """
    heard = shown.heard or None
    pixels = enlarged(shown.pixels[..., :heard], scale)
    if block < 0:
        return pixels
    region, last = (enlarged(shown.regions(look.trace, one), scale) for one in (block, None))
    span = span_of(last, look.trace.tokens - look.trace.protected)  # of the whole input, padding included
    return paint(pixels, region[..., :heard], view, span)
