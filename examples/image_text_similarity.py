"""Similarity of images and texts with transformers' CLIP, with and without merged tokens.

    python examples/image_text_similarity.py                                          # random weights, offline
    python examples/image_text_similarity.py --pretrained openai/clip-vit-base-patch16  # a hub id, or a local folder

Without --images, it uses the two photographs of scikit-learn (a temple and a flower).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import open_clip
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_sample_images
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

import tokenmerge


def load(pretrained: str | None) -> Any:
    """Load the model from a hub id or folder, or create a ViT-B/32 with random weights."""
    if pretrained:
        model: Any = CLIPModel.from_pretrained(pretrained)
    else:
        torch.manual_seed(0)
        model = CLIPModel(CLIPConfig())
    return model.eval()


def prepare(pretrained: str | None, images: list[Image.Image], texts: list[str]) -> dict[str, Tensor]:
    """Return the model inputs; offline, open_clip tokenizes the texts, because it ships CLIP's vocabulary."""
    if pretrained:
        batch: Any = CLIPProcessor.from_pretrained(pretrained)(
            text=texts, images=images, return_tensors="pt", padding=True
        )
        return dict(batch)
    pixels: Any = CLIPImageProcessor()(images, return_tensors="pt")
    return {"pixel_values": pixels["pixel_values"], "input_ids": open_clip.get_tokenizer("ViT-B-32")(texts)}


def main() -> None:
    """Compute the similarities with and without merging, and print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", metavar="ID", help="hub id or folder of a CLIP model (default: random weights)")
    parser.add_argument("--images", type=Path, nargs="*", default=[])
    parser.add_argument("--texts", nargs="+", default=["a temple in China", "a red flower", "a dog"])
    parser.add_argument(
        "--flops",
        type=float,
        default=0.6,
        help="FLOPs of the image tower after merging divided by FLOPs before (%(default)s)",
    )
    args = parser.parse_args()

    if args.images:
        names, images = [p.name for p in args.images], [Image.open(p).convert("RGB") for p in args.images]
    else:
        samples = load_sample_images()
        names, images = (
            [Path(name).name for name in samples.filenames],
            [Image.fromarray(pixels) for pixels in samples.images],
        )
    model = load(args.pretrained)
    inputs = prepare(args.pretrained, images, args.texts)
    scale = model.logit_scale.exp()
    with torch.inference_mode():
        plain = model(**inputs).logits_per_image / scale
        with tokenmerge.patched(model, flops=args.flops) as handle:
            merged = model(**inputs).logits_per_image / scale
            tokens = handle.summary().tokens

    table = Table(title="cosine similarity: all tokens | merged", title_justify="left")
    for column in ("image", *args.texts):
        table.add_column(column)
    for name, before, after in zip(names, plain.tolist(), merged.tolist(), strict=True):
        table.add_row(name, *(f"{b:.3f} | {a:.3f}" for b, a in zip(before, after, strict=True)))
    Console().print(table)
    print(f"tokens after each block of the image tower: {', '.join(map(str, tokens))}")


if __name__ == "__main__":
    main()
