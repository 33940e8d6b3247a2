"""Models of transformers that cannot be patched, and why."""

from __future__ import annotations

_WINDOWS = "its layers attend within windows, whose shape merging would break"
_PYRAMID = "it is hierarchical: its stages shrink the grid by convolution or pooling, which needs every patch in place"
_PACKED = "its images are packed into one sequence without a batch dimension, and tokens of one must not meet another's"
_DIVIDED = "its attention is divided into space and time, which needs every patch in place"

REFUSED: dict[str, str] = {
    **dict.fromkeys(("swin", "swinv2", "swin2sr", "donut", "maskformer", "sam", "sam_hq", "vitdet"), _WINDOWS),
    **dict.fromkeys(("sam2", "sam3", "edgetam", "hiera", "focalnet", "dinat", "levit"), _PYRAMID),
    **dict.fromkeys(("segformer", "pvt", "pvt_v2", "poolformer", "mobilevit", "mobilevitv2", "cvt", "glpn"), _PYRAMID),
    **dict.fromkeys(("swiftformer", "efficientformer", "mgp_str"), _PYRAMID),
    **dict.fromkeys(
        ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "glm4v", "glm4v_moe", "ernie4_5_vl_moe"), _PACKED
    ),
    "timesformer": _DIVIDED + "; use VideoMAE, ViViT or V-JEPA 2",
    "mlcd": "its class token has a learned rotary position, which no coordinate gives",
    "llama4": "its rotary positions are complex numbers of fixed shape",
    "yolos": "its detection tokens stand behind the patches, and only leading tokens can be protected",
    "x_clip": "its layers exchange messages between the frames of a video",
    "imagegpt": "its attention is causal",
    "flava": "its layers return tuples that this version does not know",
}
"""Reasons by module below `transformers.models`."""
