"""The oracle of `tests/helpers/oracle.py` for towers of transformers, torchvision and open_clip.

It uses no code of tokenmerge: all N0 tokens remain, tokens of one group have equal values, and positions and relative biases are
recomputed for every block from the groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from tests.helpers.oracle import group_mean, naive_matching


class TowerOracle:
    """Hooks on the blocks of an unpatched model.

    Args:
        blocks: its blocks, in order.
        second: name of the module in a block before which tokens merge.
        keys: `(block, note) -> None`: hooks that call `note(K [B, N, H, D])`.
        schedule, protected, prop_attn: as in the patch.
        on_block: called before each block with (oracle, block, args, kwargs); returns changed (args, kwargs).
    """

    def __init__(
        self,
        blocks: list[Any],
        second: str,
        keys: Callable[[Any, Callable[[Tensor], None]], list[Any]],
        schedule: tuple[int, ...],
        protected: int,
        on_block: Callable[..., Any] | None = None,
        destination: bool = False,
        batch_first: bool = True,
    ) -> None:
        self.schedule, self.protected, self.on_block = schedule, protected, on_block
        self.batch_first = batch_first
        self.destination = destination
        self.source: Tensor | None = None
        self.anchor: Tensor | None = None
        self.key: Tensor | None = None
        self.handles: list[Any] = []
        for index, block in enumerate(blocks):
            self.handles.append(block.register_forward_pre_hook(self._enter, with_kwargs=True))
            self.handles += keys(block, self._note)
            norm = attrgetter(second)(block)
            self.handles.append(norm.register_forward_pre_hook(lambda m, a, index=index: (self._merge(a[0], index),)))
            self.handles.append(block.register_forward_hook(self._leave))

    def _note(self, key: Tensor) -> None:
        self.key = key.detach()

    def _enter(self, block: nn.Module, args: Any, kwargs: Any) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        if self.source is None:
            batch, tokens = x.shape[:2] if self.batch_first else (x.shape[1], x.shape[0])
            self.source = torch.arange(tokens).expand(batch, -1).clone()
            self.anchor = self.source.clone()
        return self.on_block(self, block, args, kwargs) if self.on_block else None

    def _merge(self, x: Tensor, index: int) -> Tensor:
        assert self.key is not None
        assert self.source is not None
        assert self.anchor is not None
        metric = self.key.mean(dim=2)
        new, anchors = [], []
        for image in range(metric.shape[0]):
            source = self.source[image]
            first = [int((source == group).nonzero()[0]) for group in range(int(source.max()) + 1)]
            place = torch.tensor(naive_matching(metric[image, first], self.schedule[index], self.protected))
            new.append(place[source])
            # the destination keeps its position: it is the token in B, or the only token
            old_anchor = [int(self.anchor[image, i]) for i in first]
            chosen: dict[int, int] = {}
            count = len(first)
            for old, position in enumerate(place.tolist()):
                joined = (place == position).sum() > 1
                if not joined or (old % 2 == 1 and old >= self.protected):
                    chosen[position] = old_anchor[old]
            assert len(chosen) == len(set(place.tolist())) <= count
            anchors.append(torch.tensor([chosen[int(p)] for p in place[source]]))
        self.source, self.anchor = torch.stack(new), torch.stack(anchors)
        return self._grouped(x)

    def _grouped(self, x: Tensor) -> Tensor:
        assert self.source is not None
        if self.batch_first:
            return group_mean(x, self.source)
        return group_mean(x.transpose(0, 1), self.source).transpose(0, 1)

    def _leave(self, block: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (self._grouped(output[0]), *output[1:])
        return self._grouped(output)

    def place(self, coordinates: Tensor) -> Tensor:
        """Return the coordinates `[B, N0, P]` of each token's group from those of the original tokens `[N0, P]`."""
        assert self.source is not None
        assert self.anchor is not None
        batch = self.source.shape[0]
        every = coordinates.expand(batch, -1, -1)
        if self.destination:
            return torch.stack([coordinates[anchor] for anchor in self.anchor])
        return group_mean(every, self.source)

    def pairs(self, bias: Tensor) -> Tensor:
        """Return the bias `[B, H, N0, N0]` between groups from that between original tokens `[1, H, N0, N0]`."""
        assert self.source is not None
        assert self.anchor is not None
        if self.destination:
            return torch.stack([bias[0][:, a][:, :, a] for a in self.anchor])
        rows = []
        for source in self.source:
            same = (source[:, None] == source[None]).to(bias.dtype)
            mean = same / same.sum(1, keepdim=True)
            rows.append(torch.stack([mean @ head @ mean.T for head in bias[0]]))
        return torch.stack(rows)


@contextmanager
def tower_oracle(*args: Any, **kwargs: Any) -> Iterator[TowerOracle]:
    """Add the oracle's hooks to a model, for one forward pass per use."""
    oracle = TowerOracle(*args, **kwargs)
    try:
        yield oracle
    finally:
        for handle in oracle.handles:
            handle.remove()


def key_hooks(path: str, heads: int) -> Callable[[Any, Callable[[Tensor], None]], list[Any]]:
    """Add hooks to the module at `path` of a block, whose output is K, or Q, K and V concatenated (`qkv`)."""

    def attach(block: Any, note: Callable[[Tensor], None]) -> list[Any]:
        owner, _, name = path.rpartition(".")
        if name == "*":  # the name of the K projection differs between versions
            owner, name = next(
                n.rpartition(".")[::2] for n, _ in block.named_modules() if n.rpartition(".")[2] in ("k_proj", "key")
            )
        module = getattr(attrgetter(owner)(block), name)

        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            k = output.chunk(3, dim=-1)[1] if name == "qkv" else output
            note(k.unflatten(-1, (heads, -1)))

        return [module.register_forward_hook(hook)]

    return attach


def turn(kind: str, model: Any, prefix: int) -> Callable[..., Any] | None:
    """Return the changes before each block for attention with positions, written from the papers."""
    if kind == "dinov3":
        config = model.config
        side, dim = config.image_size // config.patch_size, config.hidden_size // config.num_attention_heads
        centre = 2 * (torch.arange(side) + 0.5) / side - 1
        grid = torch.cartesian_prod(centre, centre)
        speeds = 2 * math.pi / config.rope_theta ** (torch.arange(0, 1, 4 / dim))

        def dinov3(oracle: TowerOracle, block: Any, args: Any, kwargs: Any) -> Any:
            padded = torch.cat([torch.zeros(prefix, 2), grid])
            angles = (oracle.place(padded)[:, prefix:, :, None] * speeds).flatten(2).repeat(1, 1, 2).unsqueeze(1)
            return args, {**kwargs, "position_embeddings": (angles.cos(), angles.sin())}

        return dinov3
    if kind == "pixtral":
        config = model.config
        side, dim = config.image_size // config.patch_size, config.hidden_size // config.num_attention_heads
        grid = torch.cartesian_prod(torch.arange(side), torch.arange(side)).float()
        base = config.rope_parameters["rope_theta"]
        speeds = 1 / base ** (torch.arange(0, dim, 2) / dim)

        def pixtral(oracle: TowerOracle, block: Any, args: Any, kwargs: Any) -> Any:
            row, column = oracle.place(grid)[0].unbind(1)
            angles = torch.cat([row[:, None] * speeds[0::2], column[:, None] * speeds[1::2]], dim=1).repeat(1, 2)
            return args, {**kwargs, "position_embeddings": (angles.cos(), angles.sin())}

        return pixtral
    if kind == "vjepa2":
        config = model.config
        side, frames = config.crop_size // config.patch_size, config.frames_per_clip // config.tubelet_size
        sides = torch.arange(side)
        grid = torch.cartesian_prod(torch.arange(frames), sides, sides).float()

        def vjepa2(oracle: TowerOracle, block: Any, args: Any, kwargs: Any) -> Any:
            ids = tuple(oracle.place(grid)[:, None, :, axis] for axis in range(3))
            block.attention.get_position_ids = lambda x, masks=None: ids

        return vjepa2
    if kind == "shared":

        def shared(oracle: TowerOracle, block: Any, args: Any, kwargs: Any) -> Any:
            return args, {**kwargs, "attention_mask": oracle.pairs(kwargs["attention_mask"])}

        return shared
    if kind == "own":

        def own(oracle: TowerOracle, block: Any, args: Any, kwargs: Any) -> Any:
            table = next(m for n, m in block.named_modules() if n.rpartition(".")[2] == "relative_position_bias")
            oracle.handles.append(table.register_forward_hook(lambda m, a, out: oracle.pairs(out)))

        return own
    return None
