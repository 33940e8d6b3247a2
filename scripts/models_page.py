"""Write docs/models.md from the model families of the library and the models of the tests, or check it.

    python scripts/models_page.py [--check]

Every timm name is built as in the tests, and patched; the transformers models are those of the tests.
"""

from __future__ import annotations

import argparse
import collections
import importlib
import sys
from pathlib import Path
from typing import Any

import open_clip
import timm
import torchvision
import transformers

import tokenmerge
from tests.helpers import flat
from tests.helpers.tiny import tiny
from tests.helpers.towers import TOWERS as TESTED
from tokenmerge.models.video_mae import NAMES
from tokenmerge.patching.families.timm.refused import REFUSED as TIMM_REFUSED
from tokenmerge.patching.families.transformers.models import TOWERS
from tokenmerge.patching.families.transformers.refused import REFUSED as HF_REFUSED
from tokenmerge.patching.target import find_target

PAGE = Path(__file__).parents[1] / "docs" / "models.md"

HEAD = """# Models

Written by `python scripts/models_page.py` from the library's rows and the models that the tests run; do not edit.
Tested with timm {timm}, transformers {transformers}, torchvision {torchvision} and open_clip {open_clip}; the oldest versions that
the fast tests of models pass with are torch 2.11, timm 1.0.26, transformers 5.17, torchvision 0.26 and open_clip 3.3 (`make test-oldest`).

```python
import tokenmerge, torch
from transformers import Dinov2Config, Dinov2ForImageClassification

config = Dinov2Config(num_hidden_layers=2, hidden_size=96, num_attention_heads=3)
model = Dinov2ForImageClassification(config).eval()
handle = tokenmerge.patch(model, r=16)  # finds the tower inside, and patches only it
# unmerged tokens leave the tower, so the head averages what it should
print(handle.output_tokens())  # 257
model(torch.randn(1, 3, 224, 224)).logits
```

What every row passes: r = 0 is upstream to the bit; r > 0 equals an oracle made of hooks alone to 1e-5, positions and
relative biases recomputed from the map; undone to the bit; deep copies; gradients of two checkpointed views; compiled
blocks; single images; bfloat16.

**Output.** Where heads are not told of sizes (everywhere but timm's `vision_transformer` and `deit`, and
torchvision), unmerged tokens leave the last block: heads, decoders and language models then read what they would read
without merging, in upstream's shapes. `output="merged"` hands on the merged ones where that can be right. The tables
say it of the model alone: "full only" marks models whose own head or pooler would misread merged tokens, so that they
are refused. Modules around the model are asked, too: merged tokens are fine for a language model that takes as many
as there are (LLaVA) and for a class token that is read alone; averages, cross-attention and layouts on a grid are
refused, and so is any module that is not known. A bare encoder, such as `Dinov2Model` or `VideoMAEModel`, hands them
to whoever patched it.

**Positions.** `positions="mean"` (the default) puts a merged token at the size-weighted mean of its patches'
coordinates, or gives it the mean relative bias of their pairs; `positions="destination"` takes those of the one token
that the others joined. Prefix tokens have none. The mean over pairs costs time where attention has relative biases: BEiT-B/16 at 384
pixels with `speedup=2` runs 1.55 times as fast with it and 1.74 times with `"destination"` (ViT-B/16, which has none, 1.90 times; two
CPU cores, batch 2). Matching compares keys before they are rotated.

**Padding.** Boolean or additive masks `[B, 1, 1 or N, N]` that mask padding are obeyed: padding has size 0, is merged
with padding, and changes nothing. Any other mask is refused while tokens merge."""


def kind(model: Any) -> tuple[str, str]:
    """Return the block class (with its attention class if that is unusual) and the kind of positions in attention."""
    tower = getattr(model, "encoder", model)
    block = type(tower.blocks[0]).__name__
    attention = type(getattr(tower.blocks[0], "attn", None)).__name__
    rope = getattr(tower, "rope", None)
    if rope is not None:
        where = "rotary, " + type(rope).__name__.replace("RotaryEmbedding", "")
    elif type(tower).__name__ in ("Beit", "VisionTransformerRelPos"):
        where = "relative bias"
    else:
        where = "absolute"
    return (f"{block}, {attention}" if attention == "DiffAttention" else block), where


def timm_rows() -> tuple[dict[tuple[str, str, str, str], list[str]], list[str]]:
    """Return the patched names by (module, block, positions, output), and "name: reasons" for refused names."""
    patched: dict[tuple[str, str, str, str], list[str]] = collections.defaultdict(list)
    refused = []
    for module in (*flat.PLAIN, *flat.OTHERS):
        for name in flat.names(module):
            model = tiny(name)
            try:
                tokenmerge.patch(model, r=5).remove()
            except tokenmerge.UnsupportedModelError as error:
                refused.append(f"`{name}`: {'; '.join(error.reasons)}")
                continue
            patched[module, *kind(model), find_target(model).family.output].append(name)
    for name in flat.names(*flat.REFUSED):
        module = next(m for m in flat.REFUSED if name in timm.list_models(module=m))
        refused.append(f"`{name}`: {TIMM_REFUSED[module]}")
    return patched, refused


def timm_part() -> list[str]:
    """Return the section on timm."""
    patched, refused = timm_rows()
    count = sum(map(len, patched.values()))
    lines = [
        "## timm",
        "",
        f"{count} of the {count + len(refused)} names whose blocks see one flat sequence with global self-attention "
        f"are patched ({100 * count / (count + len(refused)):.1f} %).",
        "",
        "| module | blocks | positions in attention | output | names | for example |",
        "|---|---|---|---|---|---|",
    ]
    for (module, block, where, output), names in sorted(patched.items(), key=lambda item: -len(item[1])):
        lines.append(f"| `{module}` | {block} | {where} | {output} | {len(names)} | `{names[len(names) // 2]}` |")
    lines += ["", "Flat, but refused:", "", *(f"* {line}" for line in refused), ""]
    return [*lines, "Refused as not flat:", "", *_reasons(TIMM_REFUSED, flat.REFUSED)]


def _reasons(table: dict[str, str], without: tuple[str, ...] = ()) -> list[str]:
    """Return one line per reason, with the modules it applies to."""
    by_reason: dict[str, list[str]] = collections.defaultdict(list)
    for module, reason in table.items():
        if module not in without:
            by_reason[reason].append(f"`{module}`")
    return [f"* {', '.join(sorted(modules))}: {reason}" for reason, modules in by_reason.items()]


def transformers_part() -> list[str]:
    """Return the section on transformers."""
    tested = {tower.name.replace("git.GitVisionModel", "git.GitVisionTransformer"): tower for tower in TESTED}
    lines = [
        "## transformers",
        "",
        "The tower is found inside classifiers, CLIP-like pairs, language models and backbones, and only it is patched. "
        "Attention implementations `eager` and `sdpa` carry the sizes; others are refused with that advice.",
        "",
        "| tower | layer | how it is read | positions in attention | output |",
        "|---|---|---|---|---|",
    ]
    for name in TOWERS:
        tower = tested.get(name)
        if tower is None:
            lines.append(
                f"| `{name.partition('.')[2]}` | like its model's | like its model's | like its model's | full |"
            )
            continue
        model = tower.build()
        target = find_target(model)
        where = {"": "absolute"}.get(tower.rope or tower.bias, "rotary" if tower.rope else "relative bias")
        output = "full only" if target.family.merged_output(target.model) else "full, or merged"
        layer = type(target.blocks[0][0]).__name__
        lines.append(
            f"| `{type(target.model).__name__}` | {layer} | {target.family.pooling(target.model)} | {where} | {output} |"
        )
    return [*lines, "", "Refused:", "", *_reasons(HF_REFUSED)]


def other_part() -> list[str]:
    """Return the sections on torchvision and open_clip."""
    vit = importlib.import_module("torchvision.models").list_models(include="vit_*")
    return [
        "## torchvision",
        "",
        f"`VisionTransformer` with `nn.MultiheadAttention`: {', '.join(f'`{name}`' for name in vit)}; class token, "
        "absolute positions, output merged. Swin and MaxViT are refused.",
        "",
        "## open_clip",
        "",
        "`VisionTransformer` with both of its block kinds (`ResidualAttentionBlock` on `nn.MultiheadAttention`, and "
        "`CustomResidualAttentionBlock`); class token, average and attention pooling; `forward_intermediates`; output "
        "full, or merged where the class token is read. Towers that wrap a timm model are timm's. Refused: scaled cosine "
        "attention, `batch_first=False`, `ModifiedResNet`.",
        "",
        "## tokenmerge",
        "",
        f"`video_mae:NAME` is the spatiotemporal Vision Transformer of the paper's experiments on video (arXiv 2205.09113), which no library "
        f"has: {', '.join(f'`{name}`' for name in NAMES)}. Clips `[B, T, C, H, W]` of 16 frames, tubelets of 2×16×16, separate positions "
        "of space and time, class token, mean weighted by size; output merged. `--checkpoint` reads the authors' files, pretrained or "
        "fine-tuned ([videos](tutorials/video.md)).",
    ]


def page() -> str:
    """Return the whole page."""
    versions = {
        "timm": timm.__version__,
        "transformers": transformers.__version__,
        "torchvision": torchvision.__version__.partition("+")[0],
        "open_clip": open_clip.__version__,
    }
    parts = [HEAD.format(**versions), "", *timm_part(), "", *transformers_part(), "", *other_part()]
    return "\n".join(parts) + "\n"


def main() -> int:
    """Write the page, or check it and return 1 if it differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 if the page is out of date")
    args = parser.parse_args()
    new = page()
    if args.check:
        old = PAGE.read_text() if PAGE.exists() else ""
        if new != old:
            print("docs/models.md is out of date: run python scripts/models_page.py", file=sys.stderr)
        return int(new != old)
    PAGE.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
