"""What a patch does to a model, as data and as a table that fits 80 columns."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Sequence

from tokenmerge.attention.forms import Choice
from tokenmerge.flops import ModelCost
from tokenmerge.patching.record import Settings
from tokenmerge.schedule import Schedule, cut


@dataclasses.dataclass(frozen=True)
class Summary:
    """What `Handle.summary()` returns; `str()` of it is a table.

    Attributes:
        model: class of the model.
        blocks: how many blocks are patched.
        protected: prefix tokens that never merge.
        pooling: how the head reads the tokens.
        prop_attn: whether sizes weigh in attention.
        attention: which form of attention runs with sizes (see `MergeConfig.attention`).
        attention_reason: why, in words.
        backend: what matches and merges, "triton" or "torch".
        backend_reason: why, in words.
        matcher: name of the matching algorithm.
        adaptive: whether the tokens that are left depend on what is in the images, so that r and all counts are averages.
        input_size: the input size that all of this is for, as it was given; `None` is the model's own.
        requested: r per block as asked for, at that size.
        r: r per block after cutting it to what is possible there.
        tokens: tokens that enter each block, then those that leave the last one.
        flops_before: multiply-adds for one image without merging.
        flops_after: multiply-adds for one image with merging.
        block_flops: multiply-adds of each block with merging.
        matching_flops: multiply-adds for one image that merging itself adds (metric, matching), which by convention no other
            figure here holds; `None` where it cannot be known: blocks are sharded, or a predictor is not trained yet.
    """

    model: str
    blocks: int
    protected: int
    pooling: str
    prop_attn: bool
    attention: str
    attention_reason: str
    backend: str
    backend_reason: str
    matcher: str
    adaptive: bool
    input_size: int | Sequence[int] | None
    requested: Schedule
    r: Schedule
    tokens: tuple[int, ...]
    flops_before: int
    flops_after: int
    block_flops: tuple[int, ...]
    matching_flops: int | None = None

    @property
    def flops_ratio(self) -> float:
        """FLOPs before ÷ after: the speed-up that the arithmetic alone would allow."""
        return self.flops_before / self.flops_after

    @property
    def shape_in_words(self) -> str:
        """Which inputs all of this is for."""
        if self.input_size is None:
            return "inputs of the model's own size"
        sizes = [self.input_size] if isinstance(self.input_size, int) else self.input_size
        return f"inputs of {'×'.join(map(str, sizes))}"

    def _matching_in_words(self) -> str:
        """What the matching adds, in words."""
        if self.matching_flops is None:
            return ", matching not counted"
        return f", matching {100 * self.matching_flops / self.flops_after:.2g} % more" if self.matching_flops else ""

    def __str__(self) -> str:
        lines = [
            f"{self.model}: {self.blocks} blocks patched, matcher {self.matcher}",
            f"  for {self.shape_in_words}: {self.tokens[0]} tokens",
            f"  prefix tokens {self.protected}, pooling {self.pooling}",
            f"  proportional attention {'on' if self.prop_attn else 'off'}",
            *(["  r is what merges on average: the matcher goes by what is in the images"] if self.adaptive else []),
            *textwrap.wrap(f"  attention form {self.attention}: {self.attention_reason}", 80, subsequent_indent="    "),
            *textwrap.wrap(f"  backend {self.backend}: {self.backend_reason}", 80, subsequent_indent="    "),
            f"  {self.flops_before / 1e9:.4g} -> {self.flops_after / 1e9:.4g} GFLOPs per image "
            f"({100 / self.flops_ratio:.1f} %){self._matching_in_words()}",
            "  block   tokens in   merged   tokens out   GFLOPs",
        ]
        for i, (asked, r) in enumerate(zip(self.requested, self.r, strict=True)):
            note = f"   r={asked} was cut to {r}" if asked != r else ""
            lines.append(
                f"  {i:5d}   {self.tokens[i]:9d}   {r:6d}   {self.tokens[i + 1]:10d}   {self.block_flops[i] / 1e9:6.4g}{note}"
            )
        return "\n".join(lines)


def summarize(
    settings: Settings,
    *,
    model: str,
    pooling: str,
    choice: Choice,
    backend: Choice,
    matcher: str,
    schedule: Schedule,
    cost: ModelCost,
    matching: tuple[int, ...] | None,
    input_size: int | Sequence[int] | None,
) -> Summary:
    """The summary of a model with those settings, at the number of tokens that `cost` is for, under `schedule`."""
    return Summary(
        model=model,
        blocks=settings.layers,
        protected=cost.protected,
        pooling=pooling,
        prop_attn=settings.prop_attn,
        attention=choice.form,
        attention_reason=choice.reason,
        backend=backend.form,
        backend_reason=backend.reason,
        matcher=matcher,
        adaptive=settings.entry.adaptive,
        input_size=input_size,
        requested=schedule,
        r=cut(schedule, cost.tokens, cost.protected, cost.most),
        tokens=cost.counts(schedule),
        flops_before=cost.total(),
        flops_after=cost.total(schedule),
        block_flops=cost.per_block(schedule),
        matching_flops=None if matching is None else sum(matching),
    )
