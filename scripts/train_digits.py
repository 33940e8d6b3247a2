"""Train the model of `tokenmerge demo` with `tokenmerge train` and its recipe, in under ten minutes on two cores.

    python scripts/train_digits.py [--work DIR]

The model is trained on four fifths of scikit-learn's digits; the rest measures accuracy. Weights are stored in float16.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tokenmerge.cli import main as tokenmerge
from tokenmerge.tools.demo.digits import WEIGHTS, build_model, load_digits
from tokenmerge.tools.demo.export import export_images

PACKAGE = Path(__file__).parents[1] / "tokenmerge/tools/demo" / WEIGHTS


def train(work: Path) -> Path:
    """Run the recipe in `work`, and return the trained weights."""
    export_images(work / "data")
    words = ["train", "vit_tiny_patch16_224", "--config", "digits", "--data", str(work / "data")]
    code = tokenmerge([*words, "--output", str(work / "run"), "--resume", "auto"])
    if code:
        sys.exit(code)
    return work / "run" / "model" / "model.safetensors"


def ship(weights: Path, output: Path) -> None:
    """Store the weights for grey images in float16, and print the accuracy of the stored weights."""
    state = load_file(weights)
    kernel = "patch_embed.proj.weight"
    state[kernel] = state[kernel].sum(dim=1, keepdim=True)  # all three channels of a grey image are equal
    state = {name: tensor.half() for name, tensor in state.items()}
    model = build_model().eval()
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    _, _, images, labels = load_digits()
    with torch.inference_mode():
        predicted = torch.cat([model(chunk).argmax(1) for chunk in images.split(120)])
    correct = int((predicted == labels).sum())
    print(f"test accuracy {100 * correct / len(labels):.2f} % ({correct} of {len(labels)})")
    save_file(state, output)
    print(f"wrote {output} ({output.stat().st_size / 1e6:.2f} MB)")


def main() -> None:
    """Train the model and store its weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, help="folder for images and run, which is kept (default: a temporary folder)"
    )
    parser.add_argument("--output", type=Path, default=PACKAGE)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        ship(train(args.work or Path(scratch)), args.output)


if __name__ == "__main__":
    main()
