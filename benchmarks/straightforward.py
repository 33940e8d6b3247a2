"""Token merging written down straightforwardly, and how much faster the library is.

    python benchmarks/straightforward.py [--rounds 15] [--only deit_tiny]

The paper's equations for a plain timm Vision Transformer, step by step in torch: attention that writes its N × N
weights, all similarities, a full sort, gathers on expanded indices. No fused kernel, no compilation: what a careful
reader of the paper writes first. The dense model, this one and the library take turns; ratios are of the minima.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import statistics
from collections.abc import Callable
from typing import Any

import timm
import torch
from overhead import CONFIGURATIONS, append, commit, cpu_name
from torch import Tensor

import tokenmerge
from tokenmerge.tools.bench import interleave
from tokenmerge.tools.report import Report
from tokenmerge.tools.variants import share_weights


def attention(attn: Any, x: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(QKᵀ/√d + log size) V, projected, and K averaged over the heads `[B, N, D]`."""
    batch, tokens, channels = x.shape
    q, k, v = attn.qkv(x).reshape(batch, tokens, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    weights = q * attn.scale @ k.transpose(-2, -1) + size.log()[:, None, None, :]
    mixed = (weights.softmax(dim=-1) @ v).transpose(1, 2).reshape(batch, tokens, channels)
    return attn.proj(mixed), k.mean(dim=1)


def merge(x: Tensor, size: Tensor, metric: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Bipartite soft matching (section 3 of the paper) with one class token, and the size-weighted mean."""
    channels = x.shape[2]
    metric = metric / metric.norm(dim=-1, keepdim=True)
    similarity = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)
    similarity[:, 0] = -torch.inf  # the class token stays alone
    best, partner = similarity.max(dim=-1)
    order = best.argsort(dim=-1, descending=True)
    merged, alone = order[:, :r], order[:, r:].sort(dim=-1).values
    target = partner.gather(1, merged)

    def apply(values: Tensor) -> Tensor:
        def at(index: Tensor) -> Tensor:
            return index.unsqueeze(-1).expand(-1, -1, values.shape[-1])

        a, b = values[:, ::2], values[:, 1::2]
        b = b.scatter_add(1, at(target), a.gather(1, at(merged)))
        return torch.cat([a.gather(1, at(alone)), b], dim=1)

    weighted, sizes = apply(x * size.unsqueeze(-1)), apply(size.unsqueeze(-1))
    assert weighted.shape[2] == channels
    return weighted / sizes, sizes.squeeze(-1)


def straightforward(model: Any, r: int) -> Callable[[Tensor], Tensor]:
    """The forward pass of an unpatched `timm` VisionTransformer with a class token, merging r tokens per block."""

    def forward(images: Tensor) -> Tensor:
        x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
        size = torch.ones(x.shape[:2], device=x.device, dtype=x.dtype)
        for block in model.blocks:
            mixed, metric = attention(block.attn, block.norm1(x), size)
            x = x + mixed
            x, size = merge(x, size, metric, min(r, (x.shape[1] - 1) // 2))
            x = x + block.mlp(block.norm2(x))
        logits: Tensor = model.forward_head(model.norm(x))
        return logits

    return forward


def compare(name: str, size: int, r: int, batch: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of the three, and the ratios."""
    model = timm.create_model(name, img_size=size).eval()
    merged = share_weights(model)
    ratio = tokenmerge.patch(merged, r=r).summary().flops_ratio
    images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    plain = straightforward(model, r)
    with torch.inference_mode():
        torch.testing.assert_close(plain(images), merged(images), rtol=1e-3, atol=1e-3)  # the same computation
    dense, theirs, ours = interleave([model, plain, merged], images, warmup=2, rounds=rounds)
    low, *_, high = statistics.quantiles(ours, n=5, method="inclusive")
    return {
        "model": name,
        "r": r,
        "batch_size": batch,
        "img_size": size,
        "device": "cpu",
        "dtype": "float32",
        "compile": False,
        "channels_last": False,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "statistic": "min",
        "rounds": rounds,
        "ms": 1e3 * min(ours),
        "ms_min": 1e3 * min(ours),
        "ms_p20": 1e3 * low,
        "ms_p80": 1e3 * high,
        "images_per_second": batch / min(ours),
        "speedup": min(dense) / min(ours),
        "flops_ratio": ratio,
        "realised": min(dense) / min(ours) / ratio,
        "over_straightforward": min(theirs) / min(ours),
        "straightforward_speedup": min(dense) / min(theirs),
    }


def main() -> None:
    """Measure, append, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="", help="only models whose name contains this")
    args = parser.parse_args()
    report, table = Report(), []
    common = {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "benchmark": "straightforward",
        "processor": cpu_name(),
        "python": platform.python_version(),
        "timm": timm.__version__,
    }
    for name, size, r, batch in CONFIGURATIONS:
        if args.only not in name:
            continue
        row = compare(name, size, r, batch, args.rounds)
        append([{**common, **row}])
        columns = ("straightforward_speedup", "speedup", "flops_ratio", "over_straightforward")
        table.append([f"{name}@{size}", str(r), str(batch), *(f"{row[column]:.2f}" for column in columns)])
        report.say(" ".join(table[-1]))
    titles = ("model", "r", "batch", "straight-\nforward", "this\nlibrary", "FLOPs\nratio", "library ÷\nstraight.")
    report.table("speed-up over the dense model", titles, table)
    ratios = [float(row[-1]) for row in table]
    report.say(f"over the straightforward one {sum(ratios) / len(ratios):.2f} on average, at least {min(ratios):.2f}")


if __name__ == "__main__":
    main()
