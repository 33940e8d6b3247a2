"""Models of the paper: names in their libraries, or files that no library downloads and where these come from."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_RECIPE = "tokenmerge train {} --data imagenet --output {}"


@dataclasses.dataclass(frozen=True)
class Model:
    """One model of the paper.

    Attributes:
        name: own name, for MODEL.
        title: name in tables.
        model: MODEL argument that builds it; of a run of `train`, the model that was trained.
        blocks: number of its blocks.
        tokens: number of tokens that enter the first block.
        num_classes: number of classes of its head; `None` if MODEL says it.
        model_kwargs: further arguments of the model.
        file: place below the folder of `--weights`: a file of weights, or the folder `model` that `train` writes; empty for
            weights that the library downloads.
        origin: where the file comes from, or the command that makes it.
        recipe: recipe that trained it, for weights of a run of `train`.
        r: r of that training, if it is not the recipe's.
        global_batch: images per update of the recipe on as many processes as it names.
        fields: fields of `MergeConfig` for all lines.
        classes: number of classes that the weights have.
        medium: "images", "videos" or "sounds".
        offline: MODEL argument and arguments that build the same architecture without a download; empty for `model`.
        stands_in: what the paper used, if these weights are others.
    """

    name: str
    title: str
    model: str
    blocks: int
    tokens: int
    num_classes: int | None = None
    model_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    file: str = ""
    origin: str = ""
    recipe: str = ""
    r: str | None = None
    global_batch: int = 1024
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    classes: int = 1000
    medium: str = "images"
    offline: str = ""
    stands_in: str = ""

    @property
    def trained_here(self) -> bool:
        """Whether the weights are the folder of a run of `train`, with everything that describes the model."""
        return self.file.endswith("/model")

    def missing(self, weights: Path) -> str:
        """Return why the weights cannot be loaded from `weights`, with the file and its origin; empty if nothing is missing."""
        place = weights / self.file
        wanted = place / "config.json" if self.trained_here else place
        if not self.file or os.path.isfile(wanted):
            return ""
        made = "it is made by" if self.trained_here else "it is"
        return f"{place} is missing: {made} {self.origin_in(weights)}"

    def origin_in(self, weights: Path) -> str:
        """Return where the file comes from, or the command that makes it below `weights`."""
        return self.origin.replace("{weights}", str(weights))

    def options(self, options: Any) -> Any:
        """Return the options of a command for this model, with its weights."""
        place = options.weights / self.file
        if self.trained_here:
            given: dict[str, Any] = {"model": f"local-dir:{place}", "num_classes": None, "model_kwargs": {}}
        else:
            given = {"model": self.model, "num_classes": self.num_classes, "model_kwargs": dict(self.model_kwargs)}
        checkpoint = place if self.file and not self.trained_here else None
        return dataclasses.replace(options, **given, pretrained=checkpoint is None, checkpoint=checkpoint)


_IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "crop_pct": 0.875}
"""Preprocessing of the MAE authors' evaluation, which timm's entry of the architecture lacks."""
_FINE_TUNED = {"global_pool": "avg", "pretrained_cfg_overlay": _IMAGENET}
_AUGREG = "augreg_in21k_ft_in1k"


def _mae(size: str, model: str, patch: int, blocks: int, tokens: int) -> list[Model]:
    """Return a MAE ViT fine-tuned on ImageNet-1k by our recipe, without merging and with ToMe."""
    title = f"MAE ViT-{size[0].upper()}/{patch}"
    found = []
    for name, more, words in (
        (f"mae_{size}_trained", "--r 0 ", ""),
        (f"mae_{size}_tome", "", " with ToMe"),
    ):
        place = f"mae_vit_{size}{'' if more else '_tome'}"
        recipe = f"{model}.mae --pretrained --config mae_finetune_{size} {more}".strip()
        made = _RECIPE.format(recipe, f"{{weights}}/{place}")
        found.append(
            Model(
                name,
                title + words,
                model,
                blocks,
                tokens,
                1000,
                {"global_pool": "avg"},
                f"{place}/model",
                made,
                f"mae_finetune_{size}",
                "0" if more else None,
            )
        )
    return found


def _deit(size: str) -> list[Model]:
    """Return DeiT of one size as published, and trained with ToMe by our recipe."""
    model, title = f"deit_{size}_patch16_224", f"DeiT-{'Ti' if size == 'tiny' else 'S'}"
    place = f"deit_{size}_tome"
    made = _RECIPE.format(f"{model} --config deit_from_scratch", f"{{weights}}/{place}")
    return [
        Model(f"deit_{size}", title, f"{model}.fb_in1k", 12, 197),
        Model(
            f"deit_{size}_tome",
            f"{title} with ToMe",
            model,
            12,
            197,
            file=f"{place}/model",
            origin=made,
            recipe="deit_from_scratch",
        ),
    ]


MODELS: Mapping[str, Model] = {
    one.name: one
    for one in (
        Model("augreg_small", "AugReg ViT-S/16", f"vit_small_patch16_224.{_AUGREG}", 12, 197),
        Model("augreg_base", "AugReg ViT-B/16", f"vit_base_patch16_224.{_AUGREG}", 12, 197),
        Model("augreg_large", "AugReg ViT-L/16", f"vit_large_patch16_224.{_AUGREG}", 24, 197),
        Model("augreg_large_384", "AugReg ViT-L/16 at 384", f"vit_large_patch16_384.{_AUGREG}", 24, 577),
        Model("swag_base", "SWAG ViT-B/16 at 384", "torchvision:vit_b_16:IMAGENET1K_SWAG_E2E_V1", 12, 577),
        Model("swag_large", "SWAG ViT-L/16 at 512", "torchvision:vit_l_16:IMAGENET1K_SWAG_E2E_V1", 24, 1025),
        Model("swag_huge", "SWAG ViT-H/14 at 518", "torchvision:vit_h_14:IMAGENET1K_SWAG_E2E_V1", 32, 1370),
        Model(
            "mae_large",
            "MAE ViT-L/16",
            "vit_large_patch16_224",
            24,
            197,
            1000,
            _FINE_TUNED,
            "mae_finetuned_vit_large.pth",
            "the fine-tuned ViT-Large of the MAE authors' release (facebookresearch/mae, FINETUNE.md)",
            fields={"prop_attn": False},
        ),
        *_deit("tiny"),
        *_deit("small"),
        *_mae("base", "vit_base_patch16_224", 16, 12, 197),
        *_mae("large", "vit_large_patch16_224", 16, 24, 197),
        *_mae("huge", "vit_huge_patch14_224", 14, 32, 257),
        Model(
            "video_mae_large",
            "Spatiotemporal MAE ViT-L",
            "video_mae:vit_large_patch16_224",
            24,
            1569,
            file="video_mae_vit_large/model",
            origin=_RECIPE.replace("imagenet", "kinetics400").format(
                "video_mae:vit_large_patch16_224 --checkpoint {weights}/mae_pretrain_vit_large_k400.pth --config video_mae_finetune --r 0",
                "{weights}/video_mae_vit_large",
            ),
            recipe="video_mae_finetune",
            r="0",
            global_batch=512,
            fields={"prop_attn": False},
            classes=400,
            medium="videos",
        ),
        Model(
            "videomae_large",
            "VideoMAE ViT-L",
            "hf:MCG-NJU/videomae-large-finetuned-kinetics",
            24,
            1568,
            fields={"prop_attn": False},
            classes=400,
            medium="videos",
            offline="hf:videomae-large",
            stands_in="a spatiotemporal MAE ViT-L on Kinetics-400",
        ),
        Model(
            "audiomae_base",
            "AudioMAE ViT-B",
            "vit_base_patch16_224",
            12,
            513,
            527,
            {"img_size": [1024, 128], "in_chans": 1, "global_pool": "avg"},
            "audiomae_finetuned_vit_base.pth",
            "the fine-tuned ViT-B of the AudioMAE authors' release (facebookresearch/AudioMAE), on AudioSet",
            fields={"prop_attn": False},
            classes=527,
            medium="sounds",
            stands_in="AudioMAE ViT-B trained with ToMe on AudioSet, scored by mAP",
        ),
    )
}
"""The models by their own names."""
