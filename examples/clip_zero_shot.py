"""Zero-shot classification with open_clip, with and without merged tokens.

    python examples/clip_zero_shot.py                                  # random weights, offline
    python examples/clip_zero_shot.py --pretrained openai              # weights from the hub
    python examples/clip_zero_shot.py --pretrained weights.pt --images a.jpg b.jpg --labels "a cat" "a dog"

Without --images, it uses the two photographs of scikit-learn (a temple and a flower).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import open_clip
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.nn import functional as F

import tokenmerge


def photographs(paths: list[Path]) -> tuple[list[str], list[Image.Image]]:
    """Return the names and images that were given, or the two photographs of scikit-learn."""
    if paths:
        return [path.name for path in paths], [Image.open(path).convert("RGB") for path in paths]
    samples = load_sample_images()
    return [Path(name).name for name in samples.filenames], [Image.fromarray(pixels) for pixels in samples.images]


def probabilities(model: open_clip.CLIP, pixels: Tensor, words: Tensor) -> Tensor:
    """Return `[images, labels]`: the softmax of the scaled cosine similarities."""
    seen = F.normalize(model.encode_image(pixels), dim=-1)
    chances: Tensor = (model.logit_scale.exp() * seen @ words.T).softmax(dim=-1)
    return chances


def main() -> None:
    """Classify with and without merging, and print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-16", help="open_clip architecture (%(default)s)")
    parser.add_argument(
        "--pretrained", metavar="TAG", help="tag of open_clip's weights, or a file (default: random weights)"
    )
    parser.add_argument("--images", type=Path, nargs="*", default=[])
    parser.add_argument("--labels", nargs="+", default=["a temple", "a flower", "a dog"])
    parser.add_argument("--r", type=int, default=12, help="tokens merged per block (%(default)s)")
    args = parser.parse_args()

    torch.manual_seed(0)
    model, _, preprocess = open_clip.create_model_and_transforms(args.model, pretrained=args.pretrained)
    model = model.eval()
    names, images = photographs(args.images)
    pixels = torch.stack([preprocess(image) for image in images])
    tokens = open_clip.get_tokenizer(args.model)([f"a photo of {label}" for label in args.labels])
    with torch.inference_mode():
        words = F.normalize(model.encode_text(tokens), dim=-1)
        plain = probabilities(model, pixels, words)
        with tokenmerge.patched(
            model, r=args.r
        ) as handle:  # patches the image tower only; the text tower does not change
            merged = probabilities(model, pixels, words)
            ratio = handle.summary().flops_ratio

    table = Table(title=f"{args.model}, {args.pretrained or 'random weights'}: r=0 | r={args.r}", title_justify="left")
    for column in ("image", *args.labels):
        table.add_column(column)
    for name, before, after in zip(names, plain.tolist(), merged.tolist(), strict=True):
        table.add_row(name, *(f"{100 * b:.1f} % | {100 * a:.1f} %" for b, a in zip(before, after, strict=True)))
    Console().print(table)
    print(f"{ratio:.2f}x fewer FLOPs in the image tower")


if __name__ == "__main__":
    main()
