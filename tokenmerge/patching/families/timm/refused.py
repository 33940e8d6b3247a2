"""Models of timm that cannot be patched, and why."""

from __future__ import annotations

_WINDOWS = "its blocks attend within windows, whose shape merging would break"
_PYRAMID = "it is hierarchical: its stages shrink the grid by convolution or pooling, which needs every patch in place"

REFUSED: dict[str, str] = {
    **dict.fromkeys(("swin_transformer", "swin_transformer_v2", "swin_transformer_v2_cr"), _WINDOWS),
    **dict.fromkeys(("vision_transformer_sam", "gcvit", "maxxvit", "davit", "twins"), _WINDOWS),
    **dict.fromkeys(
        ("mvitv2", "hiera", "hieradet_sam2", "pvt_v2", "pit", "volo", "levit", "nest", "coat", "visformer", "vitamin",
         "tiny_vit", "efficientformer", "efficientformer_v2", "efficientvit_mit", "efficientvit_msra", "nextvit",
         "mobilevit", "edgenext", "metaformer", "swiftformer", "focalnet"),
        _PYRAMID,
    ),
    "xcit": "it attends across channels, not across tokens, and convolves over the grid of patches",
    "convit": "its positional attention is made for the full grid of patches",
    "crossvit": "two branches of different patch size attend to each other",
    "tnt": "its inner blocks attend within each patch",
    "gemma4_vit": "its rotary positions and its pooler are made for the full grid of patches",
    "mlp_mixer": "it mixes tokens by a matrix of fixed size",
}  # fmt: skip
"""Reasons by module of `timm.models`."""
