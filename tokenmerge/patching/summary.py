"""Summary of a patched model, as data and as a table that fits 80 columns."""

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
    """Summary of a patched model, which `Handle.summary()` returns; `str()` turns it into a table.

    Attributes:
        model: class name of the model.
        blocks: number of patched blocks.
        protected: prefix tokens, which never merge.
        pooling: how the head reads the tokens, in words.
        prop_attn: whether attention is proportional.
        prop_attn_reason: the reason for that, in words.
        attention: form in which attention takes the sizes (see `MergeConfig.attention`).
        attention_reason: the reason for that form, in words.
        backend: backend of matching and merging: "triton", "c" or "torch".
        backend_reason: the reason for that backend, in words.
        matcher: name of the matcher.
        adaptive: whether the number of tokens left depends on the images, so that r and all counts are the schedule's alone.
        input_size: input size for which the summary holds, as it was given; `None` is the model's own size.
        requested: requested r per block at that size.
        r: r per block, cut to the possible maximum at that size.
        tokens: tokens that enter each block, followed by the tokens that leave the last one.
        flops_before: multiply-adds per image without merging.
        flops_after: multiply-adds per image with merging.
        block_flops: multiply-adds of each block with merging.
        matching_flops: multiply-adds per image of merging itself (metric and matching), which by convention no other figure
            here includes; `None` if they cannot be counted, because blocks are sharded or a predictor is not trained yet.
        tuned: what a tuning chose, for which inputs, as a sentence; `None` if none is in force.
    """

    model: str
    blocks: int
    protected: int
    pooling: str
    prop_attn: bool
    prop_attn_reason: str
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
    tuned: str | None = None

    @property
    def flops_ratio(self) -> float:
        """FLOPs without merging divided by FLOPs with merging: the speed-up if time were proportional to FLOPs."""
        return self.flops_before / self.flops_after

    @property
    def adaptive_in_words(self) -> str:
        """What the counts of a matcher that goes by the images are, as a sentence."""
        return "r, tokens and FLOPs are those of the schedule: how many tokens really leave depends on what is in the images"

    @property
    def shape_in_words(self) -> str:
        """The inputs for which the summary holds, in words."""
        if self.input_size is None:
            return "inputs of the model's own size"
        sizes = [self.input_size] if isinstance(self.input_size, int) else self.input_size
        return f"inputs of {'×'.join(map(str, sizes))}"

    @property
    def matching_in_words(self) -> str:
        """What the matching adds to the FLOPs, as a phrase."""
        if self.matching_flops is None:
            return "matching not counted"
        return f"matching adds {100 * self.matching_flops / self.flops_after:.2g} %"

    def __str__(self) -> str:
        lines = [
            f"{self.model}: {self.blocks} blocks patched, matcher {self.matcher}",
            f"  for {self.shape_in_words}: {self.tokens[0]} tokens",
            f"  prefix tokens {self.protected}, pooling {self.pooling}",
            *_wrapped(f"proportional attention {'on' if self.prop_attn else 'off'}: {self.prop_attn_reason}"),
            *(_wrapped(self.adaptive_in_words) if self.adaptive else []),
            *_wrapped(f"attention form {self.attention}: {self.attention_reason}"),
            *_wrapped(f"backend {self.backend}: {self.backend_reason}"),
            *(_wrapped(self.tuned) if self.tuned else []),
            f"  {self.flops_before / 1e9:.4g} -> {self.flops_after / 1e9:.4g} GFLOPs per image "
            f"({100 / self.flops_ratio:.1f} %); {self.matching_in_words}",
            "  block   tokens in   merged   tokens out   GFLOPs",
        ]
        for i, (asked, r) in enumerate(zip(self.requested, self.r, strict=True)):
            note = f"   r={asked} was cut to {r}" if asked != r else ""
            lines.append(
                f"  {i:5d}   {self.tokens[i]:9d}   {r:6d}   {self.tokens[i + 1]:10d}   {self.block_flops[i] / 1e9:6.4g}{note}"
            )
        return "\n".join(lines)


def _wrapped(text: str) -> list[str]:
    """Return a sentence in lines of at most 80 columns."""
    return textwrap.wrap(text, 80, initial_indent="  ", subsequent_indent="    ")


def summarize(
    settings: Settings,
    *,
    model: str,
    pooling: str,
    proportional: Choice,
    choice: Choice,
    backend: Choice,
    matcher: str,
    schedule: Schedule,
    cost: ModelCost,
    matching: tuple[int, ...] | None,
    input_size: int | Sequence[int] | None,
    tuned: str | None = None,
) -> Summary:
    """Return the summary of a model.

    Args:
        settings: settings of the model.
        model: class name of the model.
        pooling: how the head reads the tokens, in words.
        proportional: whether attention is proportional, and the reason for it.
        choice: form of attention, and the reason for it.
        backend: backend, and the reason for it.
        matcher: name of the matcher, and further options in words.
        schedule: requested r per block.
        cost: cost of the model for the number of tokens that the summary is for.
        matching: multiply-adds of merging in each block, or `None`.
        input_size: input size for which the summary holds.
        tuned: what a tuning chose, in words.
    """
    return Summary(
        model=model,
        blocks=settings.layers,
        protected=cost.protected,
        pooling=pooling,
        prop_attn=settings.prop_attn,
        prop_attn_reason=proportional.reason,
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
        tuned=tuned,
    )
