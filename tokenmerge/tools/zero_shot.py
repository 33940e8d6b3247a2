"""Zero-shot classification by open_clip: pictures are compared with the texts of class names; only the image tower merges."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenmerge.errors import InputError
from tokenmerge.files import words_of

_TEMPLATE = "a photo of a {}."
_SYNSET = re.compile(r"n\d{8}")


class ZeroShot(nn.Module):
    """Classifier from an open_clip model; its classes are given by `name_classes` before it can run.

    Args:
        clip: model of open_clip, with an image and a text tower.
        architecture: name of the model, whose tokenizer is used.

    Attributes:
        visual: the image tower.
        names: class names in the order of the outputs; empty at first.
    """

    texts: Tensor
    scale: Tensor
    bias: Tensor

    def __init__(self, clip: Any, architecture: str) -> None:
        super().__init__()
        self.visual, self.architecture = clip.visual, architecture
        self.names: list[str] = []
        self._clip: tuple[Any, ...] = (clip,)  # a tuple, because the text tower is no part of the classifier
        bias = getattr(clip, "logit_bias", None)
        self.register_buffer("scale", clip.logit_scale.detach().exp())
        self.register_buffer("bias", torch.zeros(()) if bias is None else bias.detach().clone())
        self.register_buffer("texts", torch.empty(0, 0))

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.names)

    @torch.no_grad()
    def name_classes(self, names: Sequence[str]) -> None:
        """Encode the class names by the text tower with the template "a photo of a …", and free it.

        Raises:
            InputError: if the tokenizer of the model is not there.
        """
        open_clip = importlib.import_module("open_clip")
        (clip,) = self._clip
        try:
            tokenizer = open_clip.get_tokenizer(self.architecture)
        except Exception as error:  # tokenizers of other libraries raise their own types
            raise InputError(
                f"the tokenizer of open_clip:{self.architecture} cannot be made ({words_of(error)}): check that the network is there if it "
                "is to be downloaded"
            ) from None
        place = next(self.visual.parameters())
        clip.to(device=place.device, dtype=place.dtype).eval()
        found = open_clip.build_zero_shot_classifier(
            clip, tokenizer, [words(name) for name in names], (_TEMPLATE.format,), 10, place.device, use_tqdm=False
        )
        self.texts = found.T.contiguous().to(place.dtype)
        self.names, self._clip = list(names), ()

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits `[B, classes]` of images `[B, 3, H, W]`.

        Raises:
            InputError: if the classes have not been named.
        """
        if not self.names:
            raise InputError("the classes of a zero-shot classifier are unknown: call name_classes first")
        features = F.normalize(self.visual(images), dim=-1)
        return self.scale * features @ self.texts.T + self.bias


def words(name: str) -> str:
    """Return a class name in words: the first name of a synset of ImageNet, otherwise without underscores."""
    if _SYNSET.fullmatch(name):
        from timm.data import ImageNetInfo

        return (ImageNetInfo("imagenet-12k").label_name_to_description(name) or name).split(",")[0]
    return name.replace("_", " ")


def clip_transform(tower: Any, overrides: dict[str, Any]) -> Any:
    """Return open_clip's own transform from an RGB image to the input of an image tower.

    Raises:
        InputError: if an override is not known to open_clip.
    """
    library = importlib.import_module("open_clip.transform")
    odd = next((name for name in overrides if name not in ("mean", "std", "interpolation")), None)
    if odd is not None:
        raise InputError(f"--{odd.replace('_', '-')} is not known to open_clip's preprocessing: leave it out")
    config = {**tower.preprocess_cfg, **overrides}
    try:
        return library.image_transform_v2(library.PreprocessCfg(**config), is_train=False)
    except Exception as error:  # torchvision raises many exception types for invalid values
        raise InputError(
            f"the preprocessing {overrides or config} does not work ({words_of(error)}): check --interpolation, --mean and --std"
        ) from None
