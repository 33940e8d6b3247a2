"""FLOPs of a Vision Transformer before and after merging.

One multiply-add counts as one FLOP, as in the paper and in timm. Only products count: patch embedding, linear layers, the two
products of attention, the head. Norms, activations, softmax and the merge do not, as in every published figure; the products of
the matching are counted apart (`Summary.matching_flops`).

A block costs `4NC² + 2N²C` before its merge and `8N'C²` after it.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from typing import Any, NamedTuple

from tokenmerge.config import Place
from tokenmerge.errors import InputError
from tokenmerge.schedule import Most, Schedule, is_count, token_counts


@dataclasses.dataclass(frozen=True)
class BlockCost:
    """Cost of one block, in multiply-adds.

    Attributes:
        before: cost per token that enters the block (linear layers of attention).
        after: cost per token that leaves the block (MLP).
        pair: cost per pair of tokens that enter the block (QKᵀ and the product with V).
        fixed: cost per forward pass, independent of the number of tokens (an MLP that computes relative position biases).
    """

    before: int
    after: int
    pair: int
    fixed: int = 0

    def total(self, tokens_in: int, tokens_out: int) -> int:
        """Return the multiply-adds for one image.

        Args:
            tokens_in: tokens that enter the block.
            tokens_out: tokens that leave the block.
        """
        return self.before * tokens_in + self.pair * tokens_in**2 + self.after * tokens_out + self.fixed


class Ends(NamedTuple):
    """Cost before and after the blocks, in multiply-adds for one image at the model's own input size.

    Attributes:
        stem: cost of the patch embedding; it grows with the number of patches.
        head: cost of the head that does not depend on the number of tokens.
        head_per_token: cost of the head per token that leaves the last block.
        head_per_patch: cost of the head per token that enters the first block, for heads that read unmerged tokens.
        head_per_pair: cost of the head per pair of tokens that enter the first block.
    """

    stem: int
    head: int = 0
    head_per_token: int = 0
    head_per_patch: int = 0
    head_per_pair: int = 0

    def plus(self, other: Ends) -> Ends:
        """Return the sum, part by part."""
        return Ends(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))


NO_ENDS = Ends(0)
"""The ends of a model that has none."""


@dataclasses.dataclass(frozen=True)
class ModelCost:
    """Cost of a whole model for one image, in multiply-adds, for any schedule and number of tokens.

    Attributes:
        tokens: tokens N₀ that enter the first block, prefix tokens included.
        protected: leading tokens that never merge.
        blocks: cost of each block.
        stem: cost of the patch embedding.
        head: cost of the head that does not depend on the number of tokens.
        head_per_token: cost of the head per token that leaves the last block.
        head_per_patch: cost of the head per token that enters the first block.
        head_per_pair: cost of the head per pair of tokens that enter the first block.
        place: where blocks merge (`MergeConfig.place`): before attention, between attention and MLP, or after the MLP.
        most: how many tokens a block can merge away.

    Raises:
        InputError: if `place` or `most` has no meaning.

    Example:
        >>> import tokenmerge
        >>> cost = tokenmerge.vit_cost(embed_dim=192, depth=12)
        >>> f"{cost.total() / 1e9:.2f} -> {cost.total((13,) * 12) / 1e9:.2f} GFLOPs"
        '1.25 -> 0.73 GFLOPs'
        >>> cost.counts((13,) * 12)[-1]
        41
    """

    tokens: int
    protected: int
    blocks: tuple[BlockCost, ...]
    stem: int = 0
    head: int = 0
    head_per_token: int = 0
    head_per_patch: int = 0
    head_per_pair: int = 0
    place: Place = "between"
    most: Most = "half"

    def __post_init__(self) -> None:
        for name, value, choices in (("place", self.place, Place), ("most", self.most, Most)):
            if value not in typing.get_args(choices):
                raise InputError(
                    f"{name}={value!r:.60}, but one of {', '.join(typing.get_args(choices))} was expected: choose one"
                )

    def at(self, tokens: int) -> ModelCost:
        """Return the cost of the same model when another number of tokens enters its first block.

        Raises:
            InputError: if `tokens` is no whole number, or smaller than the number of protected tokens.
        """
        if not is_count(tokens) or tokens < self.protected:
            raise InputError(
                f"tokens={tokens!r:.60}, but a whole number of at least {self.protected} was expected: change it"
            )
        patches, own = tokens - self.protected, self.tokens - self.protected
        return dataclasses.replace(self, tokens=tokens, stem=self.stem * patches // own if own else 0)

    def with_full_output(self) -> ModelCost:
        """Return the cost of the same model when its head reads unmerged tokens."""
        per_patch = self.head_per_patch + self.head_per_token
        return dataclasses.replace(self, head_per_token=0, head_per_patch=per_patch)

    def counts(self, schedule: Schedule) -> tuple[int, ...]:
        """Return the tokens that enter each block under `schedule`, and at the end the tokens that leave the last block.

        Raises:
            InputError: if the schedule is not one whole number for each block.
        """
        whole = isinstance(schedule, list | tuple) and all(is_count(r) for r in schedule)
        if not whole or len(schedule) != len(self.blocks):
            raise InputError(
                f"schedule={schedule!r:.60}, but r of each of {len(self.blocks)} blocks was expected: give a tuple of as many"
            )
        return token_counts(schedule, self.tokens, self.protected, self.most)

    def per_block(self, schedule: Schedule) -> tuple[int, ...]:
        """Return the multiply-adds of each block under `schedule` (one r per block, cut where it is too large)."""
        return self._per_block(self.counts(schedule))

    def _per_block(self, counts: Sequence[int]) -> tuple[int, ...]:
        attend = counts[1:] if self.place == "before" else counts[:-1]
        leave = counts[:-1] if self.place == "after" else counts[1:]
        return tuple(block.total(n_in, n_out) for block, n_in, n_out in zip(self.blocks, attend, leave, strict=True))

    def total(self, schedule: Schedule | None = None) -> int:
        """Return the multiply-adds for one image under `schedule`; `None` means the unmerged model."""
        return self.total_of(self.counts((0,) * len(self.blocks) if schedule is None else schedule))

    def total_of(self, counts: Sequence[int]) -> int:
        """Return the multiply-adds for one image of which `counts` tokens enter each block, and at the end leave the last one."""
        head = self.head + self.head_per_token * counts[-1]
        head += self.head_per_patch * self.tokens + self.head_per_pair * self.tokens**2
        return self.stem + sum(self._per_block(counts)) + head

    def fraction(self, schedule: Schedule) -> float:
        """Return the FLOPs under `schedule` divided by the FLOPs of the unmerged model."""
        return self.total(schedule) / self.total()


def vit_cost(
    *,
    embed_dim: int,
    depth: int,
    img_size: int | tuple[int, int] = 224,
    patch_size: int = 16,
    mlp_ratio: float = 4.0,
    num_classes: int = 1000,
    in_chans: int = 3,
    protected: int = 1,
) -> ModelCost:
    """Compute the cost of a plain ViT from its dimensions alone.

    Args:
        embed_dim: channels C.
        depth: number of blocks.
        img_size: side of the image, or (height, width), in pixels.
        patch_size: side of a patch in pixels.
        mlp_ratio: hidden channels of the MLP ÷ C.
        num_classes: classes of the head; 0 means no head.
        in_chans: channels of the image.
        protected: number of prefix tokens (class, distillation, registers).

    Returns:
        The cost, for any schedule.

    Raises:
        InputError: if a number is out of range.

    Example:
        >>> import tokenmerge
        >>> cost = tokenmerge.vit_cost(embed_dim=1024, depth=24)
        >>> round(cost.total() / 1e9, 2), round(cost.total((8,) * 24) / 1e9, 2)
        (61.55, 30.96)
    """
    counts: dict[str, tuple[Any, int]] = {
        "embed_dim": (embed_dim, 1),
        "depth": (depth, 1),
        "patch_size": (patch_size, 1),
        "num_classes": (num_classes, 0),
        "in_chans": (in_chans, 1),
        "protected": (protected, 0),
    }
    sides = img_size if isinstance(img_size, list | tuple) else (img_size, img_size)
    counts |= {f"img_size, side {number + 1}": (side, 1) for number, side in enumerate(sides)}
    for name, (value, least) in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**31:
            raise InputError(f"{name} is {value!r:.60}, but a whole number of at least {least} was expected: change it")
    if len(sides) != 2 or not isinstance(mlp_ratio, int | float) or not 0 <= mlp_ratio < 1e6:
        raise InputError(
            f"img_size={img_size!r:.60} and mlp_ratio={mlp_ratio!r:.60}, but one side or (height, width) and a positive number were "
            "expected: change them"
        )
    height, width = sides
    patches = (height // patch_size) * (width // patch_size)
    block = BlockCost(before=4 * embed_dim**2, after=2 * int(embed_dim * mlp_ratio) * embed_dim, pair=2 * embed_dim)
    return ModelCost(
        tokens=patches + protected,
        protected=protected,
        blocks=(block,) * depth,
        stem=in_chans * patch_size**2 * embed_dim * patches,
        head=embed_dim * num_classes,
    )
