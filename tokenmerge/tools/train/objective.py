"""The training loss: classification with mixup and label smoothing, and optional distillation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenmerge.tools.inputs import logits_of
from tokenmerge.tools.train.options import TrainOptions


class Objective:
    """Function from model, images and labels to the loss.

    Args:
        args: options of mixup, smoothing, loss and distillation.
        num_classes: number of classes.
        teacher: unmerged model to distil from with weight `distill_weight`; `None` trains without distillation.
        further: function that returns an additional loss after each pass, such as the loss of predictors, or `None`.
    """

    def __init__(
        self,
        args: TrainOptions,
        num_classes: int,
        teacher: nn.Module | None,
        further: Callable[[], Tensor | None] = lambda: None,
    ) -> None:
        self.args, self.teacher, self.further = args, teacher, further
        self.mixup = None
        if args.mixup > 0 or args.cutmix > 0:
            self.mixup = (_mixup_of_several() if args.several else _mixup())(
                mixup_alpha=args.mixup,
                cutmix_alpha=args.cutmix,
                prob=args.mixup_prob,
                switch_prob=args.mixup_switch_prob,
                label_smoothing=args.smoothing,
                num_classes=num_classes,
            )
        smoothing = 0.0 if self.mixup else args.smoothing  # mixed targets are smoothed already
        if args.several:
            self.criterion: nn.Module = SeveralLabels(smoothing)
        elif args.bce_loss:
            from timm.loss import BinaryCrossEntropy

            self.criterion = BinaryCrossEntropy(smoothing=smoothing)
        else:
            self.criterion = nn.CrossEntropyLoss(label_smoothing=smoothing)

    def set_epoch(self, epoch: int) -> None:
        """Turn mixup and cutmix off from `mixup_off_epoch` on."""
        if self.mixup is not None and self.args.mixup_off_epoch:
            self.mixup.mixup_enabled = epoch < self.args.mixup_off_epoch

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss of a batch, float32."""
        targets = labels
        if self.mixup is not None:
            # frames become channels, so that all frames of a clip are mixed alike; spectra [B, H, W] get one
            flat = images.unsqueeze(1) if images.dim() == 3 else images.flatten(1, -3)
            mixed, targets = self.mixup(flat.clone(), labels)
            images = mixed.view(images.shape)
        logits = logits_of(model(images)).float()
        loss: Tensor = self.criterion(logits, targets)
        further = self.further()
        if self.teacher is None:
            return loss if further is None else loss + further
        with torch.no_grad():
            wanted = logits_of(self.teacher(images)).float()
        heat, share = self.args.distill_temp, self.args.distill_weight
        gap = F.kl_div(
            F.log_softmax(logits / heat, dim=1),
            F.log_softmax(wanted / heat, dim=1),
            reduction="batchmean",
            log_target=True,
        )
        loss = (1 - share) * loss + share * heat**2 * gap
        return loss if further is None else loss + further


class SeveralLabels(nn.Module):
    """Binary cross-entropy over all classes, with label smoothing as timm's `BinaryCrossEntropy` has it.

    Args:
        smoothing: share of each target that all classes share.
    """

    def __init__(self, smoothing: float) -> None:
        super().__init__()
        self.smoothing = smoothing

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean over files and classes of the loss of `logits [b, classes]` for `targets [b, classes]` in [0, 1]."""
        return F.binary_cross_entropy_with_logits(logits, smoothed(targets, self.smoothing))


def smoothed(targets: Tensor, smoothing: float) -> Tensor:
    """Return targets `[b, classes]` with a share of them divided among all classes."""
    return targets * (1 - smoothing) + smoothing / targets.shape[1]


def _mixup() -> Any:
    from timm.data.mixup import Mixup

    return Mixup


def _mixup_of_several() -> Any:
    """Return timm's `Mixup` for targets of several labels, which are mixed as the inputs are."""

    class MixupOfSeveral(_mixup()):  # type: ignore[misc]
        def __call__(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
            share = self._mix_batch(x)
            target = smoothed(target, self.label_smoothing)
            return x, target * share + target.flip(0) * (1 - share)

    return MixupOfSeveral


def teacher_of(model: nn.Module) -> Any:
    """Return a frozen copy of the unpatched model in evaluation mode."""
    teacher = copy.deepcopy(model).eval()
    return teacher.requires_grad_(False)
