"""How much work a Vision Transformer does before and after merging.

FLOPs are counted as the paper and timm count them: one multiply-add is one. Only matrix products count
(patch embedding, linear layers, the two products of attention, the classifier); norms, activations, softmax,
the matching and the merge are left out, as in every published figure.

Per block, for N tokens of C channels: `4NC² + 2N²C` before the merge, `8NC²` after it.
"""

from __future__ import annotations

import dataclasses
import typing
from typing import Any, NamedTuple

from tokenmerge.config import Place
from tokenmerge.errors import InputError
from tokenmerge.schedule import Most, Schedule, is_count, token_counts


@dataclasses.dataclass(frozen=True)
class BlockCost:
    """What one block costs, in multiply-adds.

    Attributes:
        before: per token that enters the block (attention's linear layers).
        after: per token that leaves it (the MLP).
        pair: per pair of tokens that enter it (QKᵀ and the product with V).
        fixed: per pass, whatever the number of tokens (an MLP that makes relative position biases).
    """

    before: int
    after: int
    pair: int
    fixed: int = 0

    def total(self, tokens_in: int, tokens_out: int) -> int:
        """Return the multiply-adds of one image when `tokens_in` tokens enter the block and `tokens_out` leave it."""
        return self.before * tokens_in + self.pair * tokens_in**2 + self.after * tokens_out + self.fixed


class Ends(NamedTuple):
    """What stands before and after the blocks, in multiply-adds for one image at the model's own input size.

    Attributes:
        stem: the patch embedding; it grows with the number of patches.
        head: the classifier, whatever the number of tokens.
        head_per_token: a head's part for each token that leaves the last block.
        head_per_patch: a head's part for each token that enters the first block: it reads unmerged tokens.
        head_per_pair: a head's part for each pair of those.
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
    """What a whole model costs for one image.

    Attributes:
        tokens: tokens that enter the first block, prefix tokens included.
        protected: leading tokens that never merge.
        blocks: the cost of each block.
        stem: multiply-adds of the patch embedding.
        head: multiply-adds of the classifier.
        head_per_token: multiply-adds of an attention-pooling head for each token that leaves the last block.
        head_per_patch: multiply-adds of a head for each token that enters the first block.
        head_per_pair: multiply-adds of a head for each pair of those.
        place: where blocks merge (`MergeConfig.place`): before attention, between it and the MLP, or after that.
        most: how many tokens a block can merge away.
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
        """The same model, with another number of tokens entering its first block.

        Raises:
            InputError: if that is no whole number, or the protected tokens are more.
        """
        if not is_count(tokens) or tokens < self.protected:
            raise InputError(
                f"tokens={tokens!r:.60}, but a whole number of at least {self.protected} was expected: change it"
            )
        patches, own = tokens - self.protected, self.tokens - self.protected
        return dataclasses.replace(self, tokens=tokens, stem=self.stem * patches // own if own else 0)

    def with_full_output(self) -> ModelCost:
        """Return the same model with a head that is given unmerged tokens."""
        per_patch = self.head_per_patch + self.head_per_token
        return dataclasses.replace(self, head_per_token=0, head_per_patch=per_patch)

    def counts(self, schedule: Schedule) -> tuple[int, ...]:
        """Tokens entering each block under `schedule`, then those leaving the last one.

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
        """Multiply-adds of each block under `schedule` (one r per block, cut where too large)."""
        counts = self.counts(schedule)
        attend = counts[1:] if self.place == "before" else counts[:-1]
        leave = counts[:-1] if self.place == "after" else counts[1:]
        return tuple(block.total(n_in, n_out) for block, n_in, n_out in zip(self.blocks, attend, leave, strict=True))

    def total(self, schedule: Schedule | None = None) -> int:
        """Multiply-adds for one image under `schedule`; `None` is the unmerged model."""
        schedule = (0,) * len(self.blocks) if schedule is None else schedule
        head = self.head + self.head_per_token * self.counts(schedule)[-1]
        head += self.head_per_patch * self.tokens + self.head_per_pair * self.tokens**2
        return self.stem + sum(self.per_block(schedule)) + head

    def fraction(self, schedule: Schedule) -> float:
        """FLOPs under `schedule` ÷ FLOPs of the unmerged model."""
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
    """The cost of a plain ViT from its dimensions alone.

    Args:
        embed_dim: channels C.
        depth: number of blocks L.
        img_size: side of the image, or (height, width), in pixels.
        patch_size: side of a patch in pixels.
        mlp_ratio: hidden channels of the MLP ÷ C.
        num_classes: classes of the head; 0 for none.
        in_chans: channels of the image.
        protected: number of prefix tokens (class, distillation, registers).

    Raises:
        InputError: for a number that means nothing.
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
