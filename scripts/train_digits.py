"""Train the model that `tokenmerge demo` ships: about twenty minutes on two CPU cores.

    python scripts/train_digits.py

Plain supervised training without merging, on four fifths of scikit-learn's digits, with small random affine
changes; the other fifth is only used to print the accuracy. Weights are stored in float16.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from tokenmerge.tools.demo.digits import WEIGHTS, build_model, load_digits


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate by up to 9°, scale by up to 10 %, shift by up to 5 % of the image; `[B, 1, H, W]`."""
    batch = images.shape[0]

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(batch, generator=generator) * (high - low) + low

    angle, scale = uniform(-0.15, 0.15), uniform(0.9, 1.1)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    theta = torch.stack([cos, -sin, uniform(-0.1, 0.1), sin, cos, uniform(-0.1, 0.1)], dim=1).view(batch, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1  # outside the image is black


def main() -> None:
    """Train, print the test accuracy, write the weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=45)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "tokenmerge/tools/demo" / WEIGHTS)
    args = parser.parse_args()

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    images, labels, test_images, test_labels = load_digits()
    model = build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.05)
    steps = math.ceil(len(images) / args.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.epochs * steps, pct_start=0.1)
    for epoch in range(args.epochs):
        order = torch.randperm(len(images), generator=generator)
        total = 0.0
        for chunk in track(order.split(args.batch_size), description=f"epoch {epoch + 1}/{args.epochs}"):
            loss = F.cross_entropy(model(augment(images[chunk], generator)), labels[chunk], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item() * len(chunk)
        print(f"epoch {epoch + 1}: loss {total / len(images):.4f}", flush=True)

    state = {name: tensor.half() for name, tensor in model.state_dict().items()}
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    model.eval()
    with torch.inference_mode():
        predicted = torch.cat([model(chunk).argmax(1) for chunk in test_images.split(120)])
    correct = int((predicted == test_labels).sum())
    print(f"test accuracy {100 * correct / len(test_labels):.2f} % ({correct} of {len(test_labels)})")
    save_file(state, args.output)
    print(f"wrote {args.output} ({args.output.stat().st_size / 1e6:.2f} MB)")


if __name__ == "__main__":
    main()
