"""What a patched model remembers, and the base of the mix-ins that go before a model's own class."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, TypeGuard

from torch import nn

from tokenmerge.config import MergeConfig
from tokenmerge.patching.block import MergeBlock
from tokenmerge.patching.state import wish_full_output
from tokenmerge.schedule import Schedule


@dataclasses.dataclass(eq=False)
class Patch:
    """The one record of a patched model; every handle of the model shares it, and a copied model copies it.

    Attributes:
        config: what the user asked for.
        schedule: r per block as asked for, before it is cut to what is possible.
        prop_attn: `config.prop_attn` with "auto" resolved.
        full_output: `config.output`, likewise: whether unmerged tokens leave the last block.
        protected: number of prefix tokens.
        misread: who around the model would misread merged tokens, and why.
    """

    config: MergeConfig
    schedule: Schedule
    prop_attn: bool
    protected: int
    full_output: bool = False
    misread: tuple[str, ...] = ()

    @property
    def merges(self) -> bool:
        """Whether any block merges."""
        return any(self.schedule)


def is_merge_block(module: nn.Module) -> TypeGuard[MergeBlock]:
    """Whether a module is a patched block."""
    return isinstance(module, MergeBlock)


def merge_blocks(model: nn.Module) -> list[MergeBlock]:
    """The patched blocks inside a model, in order; found anew each time, because models may be pruned."""
    return [module for module in model.modules() if is_merge_block(module)]


class MergeRoot:
    """Base of the mix-ins that `ModelFamily.swap` names."""

    _tokenmerge_patch: Patch

    @contextlib.contextmanager
    def _tokenmerge_full_output(self) -> Iterator[None]:
        """A pass within it hands on unmerged tokens, for readers that expect upstream's shapes."""
        assert isinstance(self, nn.Module)
        for block in merge_blocks(self):
            # a run that stops early must not leave an older trace in the blocks it does not reach
            vars(block).pop("_tokenmerge_seen", None)
        with wish_full_output():
            yield

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        """timm's `forward_intermediates`; every map has upstream's shape, merged tokens spread back."""
        with self._tokenmerge_full_output():
            return super().forward_intermediates(*args, **kwargs)  # type: ignore[misc]

    def prune_intermediate_layers(self, *args: Any, **kwargs: Any) -> Any:
        """timm's; what is now the last block takes over what the last one did."""
        taken = super().prune_intermediate_layers(*args, **kwargs)  # type: ignore[misc]
        assert isinstance(self, nn.Module)
        blocks = merge_blocks(self)
        if blocks:
            full = self._tokenmerge_patch.full_output
            blocks[-1]._tokenmerge_spec = dataclasses.replace(blocks[-1]._tokenmerge_spec, full_output=full)
        return taken
