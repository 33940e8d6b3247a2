"""What a patched model remembers, and the base of the mix-ins that go before a model's own class."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import TypeGuard

from torch import nn

from tokenmerge.config import MergeConfig
from tokenmerge.patching.block import MergeBlock
from tokenmerge.schedule import Schedule
from tokenmerge.state import wish_full_output


@dataclasses.dataclass(eq=False)
class Patch:
    """The one record of a patched model; every handle of the model shares it, and a copied model copies it.

    Attributes:
        config: what the user asked for.
        schedule: r per block as asked for, before it is cut to what is possible.
        prop_attn: `config.prop_attn` with "auto" resolved.
        protected: number of prefix tokens.
    """

    config: MergeConfig
    schedule: Schedule
    prop_attn: bool
    protected: int

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
