"""Measure how many pairs of real keys change when the factors of the similarity products are rounded.

    python benchmarks/near_ties.py --data ../shared/data

It runs the ViT-Ti, DINOv2-S and Whisper encoder of the shared data on real images and speech, takes K of every block, and
computes the edges with factors rounded as tensor cores round them and with exact products and sums in float64, so that only the
rounding of the factors counts. `partners` are A tokens whose best B token differs from float64, per million; `pairs` are merged
pairs of the plan that differ, per million. float32 is what plain PyTorch computes, so its row is the baseline.
"""

from __future__ import annotations

import argparse
import collections
import wave
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tokenmerge
from tokenmerge.tools.report import Report

SCALE = 256.0  # scale of the kernel's unit keys, see ops/match_kernels.py


def cut(x: Tensor, bits: int) -> Tensor:
    """Round float32 to a significand of `bits` bits, ties to even, as tensor cores do."""
    drop = 24 - bits
    raw = x.view(torch.int32)
    raw = (raw + (1 << (drop - 1)) - 1 + ((raw >> drop) & 1)) >> drop << drop
    return raw.view(torch.float32)


def parts(x: Tensor, rounded: Callable[[Tensor], Tensor], count: int) -> list[Tensor]:
    """Split each number into `count` rounded numbers whose sum approximates it."""
    found = []
    for _ in range(count):
        found.append(rounded(x))
        x = x - found[-1]
    return found


def product(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """Sum the products of all parts except the product of the two smallest, as the three-product methods do."""
    pairs = [(0, 0)] if len(a) == 1 else [(1, 0), (0, 1), (0, 0)]
    return torch.stack([a[i].double() @ b[j].double().transpose(1, 2) for i, j in pairs]).sum(dim=0)


METHODS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "bf16": (lambda x: cut(x, 8), 1),
    "fp16": (lambda x: x.half().float(), 1),
    "tf32": (lambda x: cut(x, 11), 1),
    "bf16, three products": (lambda x: cut(x, 8), 2),
    "tf32, three products": (lambda x: cut(x, 11), 2),
    "fp16, three products (the kernel)": (lambda x: x.half().float(), 2),
}


def scores(keys: Tensor, protected: int) -> Iterator[tuple[str, Tensor]]:
    """Return similarities `[B, |A|, |B|]` float64 of keys `[B, N, D]`, exact and by each method."""
    first_a, first_b = protected + protected % 2, protected + 1 - protected % 2
    exact = keys.double()
    exact = exact / exact.norm(dim=2, keepdim=True).clamp_min(1e-12)
    yield "exact", exact[:, first_a::2] @ exact[:, first_b::2].transpose(1, 2)
    unit = keys / torch.linalg.vector_norm(keys, dim=2, keepdim=True).clamp_min(1e-12)
    yield "float32, as plain torch", (unit[:, first_a::2] @ unit[:, first_b::2].transpose(1, 2)).double()
    for name, (rounded, count) in METHODS.items():
        split = parts(unit * SCALE, rounded, count)
        yield name, product([one[:, first_a::2] for one in split], [one[:, first_b::2] for one in split]) / SCALE**2


def edges(score: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Return the partner of each A token `[B, |A|]`, and the sorted pairs of the plan as numbers `[B, r]`."""
    best, partner = score.max(dim=2)
    order = best.argsort(dim=1, descending=True, stable=True)[:, :r]
    return partner, (order * score.shape[2] + partner.gather(1, order)).sort(dim=1).values


def keys_of(data: Path, images: int) -> Iterator[tuple[str, int, Tensor]]:
    """Yield name, number of prefix tokens, and K averaged over heads `[B, N, D]` of every block, without merging."""
    import timm
    import transformers
    from PIL import Image

    def pixels(paths: list[Path], size: int) -> Tensor:
        read = [Image.open(path).convert("RGB").resize((size, size), Image.Resampling.BICUBIC) for path in paths]
        stacked = torch.stack([torch.frombuffer(one.tobytes(), dtype=torch.uint8).view(size, size, 3) for one in read])
        return (stacked.permute(0, 3, 1, 2).float() / 255 - 0.45) / 0.225

    seen: list[Tensor] = []

    @tokenmerge.register_matcher("near_ties")
    def look(metric: Tensor, r: int, protected: int = 0) -> tokenmerge.MergePlan:
        seen.append(metric)
        return tokenmerge.bipartite_matching(metric, r, protected)

    def run(name: str, model: Any, **inputs: Tensor) -> Iterator[tuple[str, int, Tensor]]:
        seen.clear()
        with torch.inference_mode(), tokenmerge.patched(model.eval(), r=8, matcher="near_ties") as handle:
            model(**inputs)
            protected = handle.summary().protected
        yield from ((name, protected, metric) for metric in seen)

    folder = data / "vit_tiny_patch16_224_tinyimagenet"
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    yield from run("ViT-Ti", model, x=pixels(sorted((data / "tiny-imagenet" / "val").glob("*/*"))[:images], 224))
    photos = sorted((data / "photos").glob("*"))[:images]
    dino = transformers.Dinov2Model.from_pretrained(data / "dinov2_small_saliency", dtype=torch.float32)
    yield from run("DINOv2-S", dino, pixel_values=pixels(photos, 518))
    whisper = transformers.WhisperForConditionalGeneration.from_pretrained(
        data / "whisper_tiny_en", dtype=torch.float32
    )
    sound = torch.cat([speech(path) for path in sorted((data / "spoken-digits").glob("*.wav"))[:40]])
    extract = transformers.WhisperFeatureExtractor.from_pretrained(data / "whisper_tiny_en")
    features = extract(sound.numpy(), sampling_rate=16_000, return_tensors="pt").input_features
    yield from run("Whisper tiny", whisper.model.encoder, input_features=features)


def speech(path: Path) -> Tensor:
    """Read a recording of 8 kHz and 16 bits, resampled to 16 kHz, in −1 … 1."""
    with wave.open(str(path)) as file:
        samples = torch.frombuffer(bytearray(file.readframes(file.getnframes())), dtype=torch.int16).float() / 2**15
    doubled = torch.nn.functional.interpolate(samples[None, None], scale_factor=2, mode="linear")
    return doubled[0, 0]


def main() -> None:
    """Count the changed pairs and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--images", type=int, default=16)
    args = parser.parse_args()
    flips: dict[tuple[str, str], list[int]] = collections.defaultdict(lambda: [0, 0, 0, 0])
    for model, protected, metric in keys_of(args.data, args.images):
        found = iter(scores(metric.float(), protected))
        r = metric.shape[1] // 12
        partner, pairs = edges(next(found)[1], r)
        for method, score in found:
            other, chosen = edges(score, r)
            same = sum(len(set(a.tolist()) & set(b.tolist())) for a, b in zip(pairs, chosen, strict=True))
            count = flips[model, method]
            for index, value in enumerate(
                (int((other != partner).sum()), partner.numel(), pairs.numel() - same, pairs.numel())
            ):
                count[index] += value
    lines = [
        [model, method, f"{1e6 * partners / tokens:.1f}", f"{1e6 * changed / merged:.1f}", str(tokens)]
        for (model, method), (partners, tokens, changed, merged) in flips.items()
    ]
    Report().table("flips per million", ("keys of", "factors", "partners", "pairs", "A tokens"), lines)


if __name__ == "__main__":
    main()
