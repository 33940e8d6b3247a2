"""Dense and pooled features with transformers' DINOv2, with and without merged tokens.

    python examples/features.py                                      # random weights, offline
    python examples/features.py --pretrained facebook/dinov2-base    # a hub id, or a local folder

It prints the similarity of the features with and without merging, and writes the merged ones with `--output features.safetensors`:
the class token `[B, C]` and the patch map `[B, C, h, w]`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.nn import functional as F
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

import tokenmerge


def load(pretrained: str | None) -> tuple[Dinov2Model, Any]:
    """Load model and image processor from a hub id or folder, or create a small random model."""
    if pretrained:
        model: Dinov2Model = Dinov2Model.from_pretrained(pretrained)
        return model.eval(), BitImageProcessor.from_pretrained(pretrained)
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=224, patch_size=14)
    side = {"height": 224, "width": 224}
    return Dinov2Model(config).eval(), BitImageProcessor(do_resize=True, size={"shortest_edge": 224}, crop_size=side)


def main() -> None:
    """Extract features, compare them, and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pretrained", metavar="ID", help="hub id or folder of a DINOv2 model (default: random weights)"
    )
    parser.add_argument("--images", type=Path, nargs="*", default=[])
    parser.add_argument(
        "--flops", type=float, default=0.5, help="FLOPs after merging divided by FLOPs before (%(default)s)"
    )
    parser.add_argument("--output", type=Path, help="safetensors file for the merged model's features")
    args = parser.parse_args()

    images = [Image.open(path).convert("RGB") for path in args.images]
    images = images or [Image.fromarray(pixels) for pixels in load_sample_images().images]
    model, processor = load(args.pretrained)
    pixels: Tensor = processor(images, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        plain = model(pixels).last_hidden_state
        with tokenmerge.patched(model, flops=args.flops, trace=True) as handle:
            merged = model(pixels).last_hidden_state  # one token per patch again, with upstream's shape
            maps = handle.trace.to_grid(merged, grid=(pixels.shape[2] // 14, pixels.shape[3] // 14))
            left = int(handle.trace.size().shape[1])
    print(
        f"{plain.shape[1]} tokens, {left} left after the last block; features {tuple(merged.shape)}, maps {tuple(maps.shape)}"
    )
    for name, rows in (("class token", slice(0, 1)), ("patches", slice(1, None))):
        close = F.cosine_similarity(plain[:, rows], merged[:, rows], dim=-1).mean()
        print(f"cosine similarity of plain and merged, {name}: {close:.3f}")
    if args.output is not None:
        save_file({"class_token": merged[:, 0].contiguous(), "patches": maps.contiguous()}, args.output)
        print(f"written: {args.output}")


if __name__ == "__main__":
    main()
