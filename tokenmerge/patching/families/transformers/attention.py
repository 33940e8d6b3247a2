"""Sizes for transformers' attention modules that pass no mask on, and biases for merged tokens."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tokenmerge.attention.tap import context

CAN_CARRY = ("eager", "sdpa")
"""Implementations that add a mask `[B, 1, 1, N]` to the scores; flash attention reads it as a padding mask instead."""

_NAME = "tokenmerge_with_sizes"


def _attention_with_sizes(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Run the implementation that the user chose, with the sizes as its mask.

    For "eager", scores and weights are computed here, because upstream's own eager function may ignore masks.
    """
    bias = context().bias
    scaling, dropout = kwargs["scaling"], kwargs.get("dropout", 0.0)
    if module.config.chosen_attention != "eager":
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout, scale=scaling)
        return out.transpose(1, 2).contiguous(), None
    scores = query @ key.transpose(2, 3) * scaling
    weights = (scores if bias is None else scores + bias).softmax(dim=-1)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


ALL_ATTENTION_FUNCTIONS.register(_NAME, _attention_with_sizes)


class _WithSizes:
    """Config that selects `_attention_with_sizes`; all other attributes come from the model's own config."""

    _attn_implementation = _NAME

    def __init__(self, config: Any) -> None:
        self._config = config

    @property
    def chosen_attention(self) -> str:
        """The implementation that the user chose."""
        return str(self._config._attn_implementation)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


class TakesSizes:
    """Mix-in for an attention that calls its implementation without a mask.

    Such an attention looks up its implementation in `self.config`. While there are sizes, that config selects
    `_attention_with_sizes`.
    """

    _tokenmerge_moved: ClassVar = {"config": "_tokenmerge_config"}

    @property
    def config(self: Any) -> Any:
        """The model's config, or one that selects the attention with sizes."""
        own = self._tokenmerge_config
        return own if context().bias is None else _WithSizes(own)

    @config.setter
    def config(self: Any, value: Any) -> None:
        self._tokenmerge_config = value


class TurnsByPosition(TakesSizes):
    """Mix-in for V-JEPA 2's attention, which computes positions from the order of its tokens."""

    def get_position_ids(self: Any, x: Tensor, masks: Tensor | None = None) -> Any:
        """Return the frame, row and column of each token, `[B, 1, N]` each; fractional for merged tokens."""
        positions = context().positions
        if positions is None:
            return super().get_position_ids(x, masks=masks)  # type: ignore[misc]
        return tuple(positions[:, None, :, axis].to(x.dtype) for axis in range(3))


class FollowsTokens:
    """Mix-in for a module that returns a bias between original tokens: its rows and columns follow the merge."""

    def forward(self, window_size: Any, interpolate_pos_encoding: bool = False, dim_size: int | None = None) -> Tensor:
        """Return upstream's bias `[1, H, N₀, N₀]`, moved to the current tokens: `[B, H, N, N]`."""
        pairs, upstream = context().pairs, super().forward  # type: ignore[misc]
        if pairs is None:
            return upstream(window_size, interpolate_pos_encoding, dim_size)  # type: ignore[no-any-return]
        return pairs(upstream(window_size, interpolate_pos_encoding, pairs.source.shape[1]))


def refuse_implementation(config: Any) -> list[str]:
    """Return why the chosen attention implementation cannot carry sizes; empty if it can."""
    chosen = getattr(config, "_attn_implementation", "eager") or "eager"
    if chosen in CAN_CARRY:
        return []
    return [
        f"its attention implementation {chosen!r} cannot carry token sizes: "
        "call model.set_attn_implementation('sdpa') first (fast kernels are chosen by PyTorch then)"
    ]
