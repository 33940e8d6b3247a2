"""`patch`, `unpatch`, `patched`, `is_patched` and the `Handle` they give."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from tokenmerge.config import MergeConfig
from tokenmerge.errors import ConfigError, PatchError
from tokenmerge.flops import ModelCost
from tokenmerge.patching.check import attention_choice, check_block, check_rotary, reaches_sdpa
from tokenmerge.patching.install import install_block, install_model, remove_hooks
from tokenmerge.patching.root import Patch, merge_blocks
from tokenmerge.patching.rule import check_rule
from tokenmerge.patching.specs import backend_choice, matching_in_words, rule_for, set_specs
from tokenmerge.patching.summary import Summary, summarize
from tokenmerge.patching.swap import Swapped, check_restorable, original_class, restore_class
from tokenmerge.patching.target import (
    Target,
    check_is_module,
    find_target,
    misread_by,
    patch_of,
    patched_inside,
    refuse_if_patched,
)
from tokenmerge.patching.tune import measure_forms
from tokenmerge.schedule import Schedule, expand, flops_target, keep_ratio, max_merges, token_counts
from tokenmerge.tracing.trace import Trace

_OURS = ("_tokenmerge_spec", "_tokenmerge_seen", "_tokenmerge_attention", "_tokenmerge_similarity", "_tokenmerge_patch")
"""Attributes that only a patched module has."""


class Handle:
    """A patched model's controls. It holds no state of its own, so any number may exist for one model."""

    def __init__(self, model: nn.Module, patch: Patch) -> None:
        self._model = model
        self._patch = patch

    def _live(self) -> tuple[nn.Module, Patch]:
        if patch_of(self._model) is not self._patch:
            raise PatchError(
                "this handle's model is no longer patched by it (removed, unpatched, or patched anew): "
                "get the current handle with tokenmerge.handle(model), or patch the model again"
            )
        return self._model, self._patch

    @property
    def config(self) -> MergeConfig:
        """The settings in force."""
        return self._live()[1].config

    @property
    def schedule(self) -> Schedule:
        """r per block as asked for; `summary()` shows where it is cut."""
        model, patch = self._live()
        return patch.schedule[: len(merge_blocks(model))]  # blocks may have been pruned away since

    def update(self, config: MergeConfig | None = None, **fields: Any) -> None:
        """Change any field of the config, without patching again.

        Raises:
            ConfigError: for a bad value; the model then keeps its old settings.
            UnknownFieldError: (a TypeError) for a keyword that is no field.
            PatchError: if the model is no longer patched.
        """
        model, patch = self._live()
        config = MergeConfig.create(config or patch.config, **fields)
        target = find_target(model)
        new = _plan_patch(target, config, patch.misread)
        patch.config, patch.schedule = new.config, new.schedule
        patch.prop_attn, patch.full_output = new.prop_attn, new.full_output
        set_specs(target, patch)

    def tune(
        self, *inputs: Any, forms: Sequence[str] | None = None, rounds: int = 7, **options: Any
    ) -> dict[str, float]:
        """Measure every form of attention on these inputs, and use the fastest one from now on.

        All forms compute the same; which is fastest depends on device, shape and dtype, so give inputs like those
        that will come. A compiled model must be tuned before it is compiled.

        Args:
            *inputs: positional arguments of a forward pass.
            forms: which of `MergeConfig.attention` to try; by default all that can run here.
            rounds: measured passes per form.
            **options: keyword arguments of a forward pass.

        Returns:
            Median seconds of a pass with each form.

        Raises:
            ConfigError: if one of the given `forms` cannot run here.
            InputError: if none is left to measure.
        """
        model, patch = self._live()
        target = find_target(model)
        best: str = patch.config.attention
        try:
            seconds = measure_forms(target, inputs, options, forms, rounds)
            best = min(seconds, key=lambda form: seconds[form])
        finally:
            patch.config = MergeConfig.create(patch.config, attention=best)
            set_specs(target, patch)
        return seconds

    def remove(self) -> None:
        """Give the model back exactly as it was.

        Raises:
            PatchError: if the model is no longer patched by this handle.
        """
        _restore(self._live()[0])

    def summary(self) -> Summary:
        """How many blocks are patched, r and tokens per block, FLOPs before and after, at the model's own input size."""
        model, patch = self._live()
        target = find_target(model)
        if len(target.blocks) != len(self.schedule):
            raise PatchError(
                f"the model has {len(target.blocks)} blocks, but {len(self.schedule)} of them are patched: "
                "unpatch before adding blocks, and patch again"
            )
        return summarize(
            original_class(model).__name__,
            target.family.pooling(model),
            patch.prop_attn,
            attention_choice(target, patch.config.attention),
            backend_choice(target, patch.config),
            matching_in_words(patch.config),
            self.schedule,
            target.cost(patch.config.place),
        )

    @property
    def output_tokens(self) -> int:
        """Tokens per image that leave the last block, prefix included, at the model's own input size.

        Known before any forward pass runs: what a language model must reserve for an image whose vision tower
        is patched with `output="merged"`.
        """
        model, patch = self._live()
        target = find_target(model)
        tokens = target.family.tokens(model)
        if patch.full_output:
            return tokens
        return token_counts(self.schedule, tokens, patch.protected)[-1]

    @property
    def trace(self) -> Trace:
        """The plans of the latest forward pass.

        Raises:
            PatchError: if tracing is off or no pass has run since it was turned on.
        """
        model, patch = self._live()
        if not patch.config.trace:
            raise PatchError(
                "tracing is off for this model: turn it on with handle.update(trace=True), then run the model"
            )
        noted = [vars(block).get("_tokenmerge_seen") for block in merge_blocks(model)]
        seen = [one for one in noted if one is not None]
        if not seen:
            raise PatchError("no forward pass has run since tracing was turned on: call the model first")
        sizes = tuple(one.state.size for one in seen)
        grid = find_target(model).family.grid(model)
        return Trace(
            plans=seen[-1].state.plans,
            sizes=sizes,
            protected=patch.protected,
            tokens=seen[0].tokens,
            batch=seen[0].batch,
            device=seen[0].device,
            grid=grid,
            similarities=tuple(one.similarity for one in seen),
            attention=tuple(one.attention for one in seen),
        )

    def __repr__(self) -> str:
        name = original_class(self._model).__name__
        if patch_of(self._model) is not self._patch:
            return f"<Handle of {name}: removed>"
        return f"<Handle of {name}: {self._patch.config}>"


def patch(model: nn.Module, config: MergeConfig | None = None, **fields: Any) -> Handle:
    """Make a Vision Transformer merge similar tokens, in place.

    Weights, `state_dict` keys and outputs keep their shapes, except that `forward_features` returns fewer
    tokens. Nothing is changed unless everything can be.

    Args:
        model: a supported model, or a module that holds exactly one.
        config: settings; `fields` replace single ones of them.
        **fields: fields of `MergeConfig`, such as `r=8` or `flops=0.5`.

    Raises:
        UnsupportedModelError: if the model cannot be patched right; lists the reasons.
        PatchError: if it, or a part of it, is patched already.
        ConfigError: for a bad value, or if no schedule is given.
        UnknownFieldError: (a TypeError) for a keyword that is no field of `MergeConfig`.
    """
    config = MergeConfig.create(config, **fields)
    check_is_module(model)
    refuse_if_patched(model)
    target = find_target(model)
    record = _plan_patch(target, config, misread_by(model))
    block, row = target.blocks[0]
    check_block(row, block, target.channels, "block 0", target.family.library)
    check_rotary(target)

    try:
        _apply(target, record)
    except BaseException:
        _restore(target.model)
        raise
    return Handle(target.model, record)


def _apply(target: Target, record: Patch) -> None:
    """Everything that `_restore` undoes."""
    target.model._tokenmerge_patch = record
    install_model(target.family, target.model)
    for block, row in target.blocks:
        install_block(row, block)
    set_specs(target, record)


def unpatch(model: nn.Module) -> None:
    """Give every patched model in `model` back exactly as it was.

    Raises:
        PatchError: if there is none.
    """
    check_is_module(model)
    found = patched_inside(model)
    if not found:
        raise PatchError(
            f"{type(model).__name__} is not patched, so there is nothing to undo: check tokenmerge.is_patched(model)"
        )
    for _, module in found:
        _restore(module)


@contextlib.contextmanager
def patched(model: nn.Module, config: MergeConfig | None = None, **fields: Any) -> Iterator[Handle]:
    """`patch` for the length of a `with` block; unpatched at its end, also after an error.

    With gradient checkpointing, call `backward` inside it: blocks run again there, and must still be patched.
    """
    handle = patch(model, config, **fields)
    try:
        yield handle
    finally:
        if patch_of(handle._model) is handle._patch:
            handle.remove()


def is_patched(model: nn.Module) -> bool:
    """Whether `model` is patched or holds a patched model."""
    check_is_module(model)
    return bool(patched_inside(model))


def handle(model: nn.Module) -> Handle:
    """A handle of the patched model in `model`, for instance of a deep copy.

    Raises:
        PatchError: if `model` holds no patched model, or several.
    """
    check_is_module(model)
    found = patched_inside(model)
    if len(found) != 1:
        names = f" ({', '.join(name or 'the model itself' for name, _ in found)})" if found else ""
        raise PatchError(
            f"{type(model).__name__} holds {len(found)} patched models{names}, but one was expected: pass that one"
        )
    module = found[0][1]
    record = patch_of(module)
    assert record is not None
    return Handle(module, record)


def model_cost(model: nn.Module) -> ModelCost:
    """What a supported model, patched or not, costs for one image at its own input size.

    Raises:
        UnsupportedModelError: if the model is not supported.
    """
    return find_target(model).cost()


def _plan_patch(target: Target, config: MergeConfig, misread: tuple[str, ...] = ()) -> Patch:
    """Everything a config means for this model; raises before anything is touched."""
    check_rule(config)
    if rule_for(target, config, 0).looks_inside and not all(
        reaches_sdpa(row, block, target.channels) for block, row in target.blocks[:1]
    ):
        raise ConfigError(
            f"metric={config.metric!r} with matcher {config.matcher!r} looks at Q, K and V, but the attention of "
            f"{original_class(target.model).__name__} does not call PyTorch's scaled_dot_product_attention: switch it to fused "
            "('sdpa') attention, or use a matcher that looks at keys alone"
        )
    protected = target.family.protected(target.model)
    prop_attn = not target.family.mae(target.model) if config.prop_attn == "auto" else config.prop_attn
    output = target.family.output if config.output == "auto" else config.output
    reasons = [*target.family.merged_output(target.model), *misread] if output == "merged" else []
    if reasons:
        raise ConfigError(
            f"output='merged' would be silently wrong for {original_class(target.model).__name__} ({'; '.join(reasons)}): "
            "use output='full'"
        )
    if config.attention not in ("auto", "mask"):
        attention_choice(target, config.attention)
    return Patch(config, _schedule(target, config), bool(prop_attn), protected, output == "full", misread)


def _schedule(target: Target, config: MergeConfig) -> Schedule:
    layers, protected = len(target.blocks), target.family.protected(target.model)
    tokens = target.family.tokens(target.model)
    if config.r is not None:
        return expand(config.r, layers)
    if config.keep is not None:
        return keep_ratio(config.keep, layers, tokens, protected)
    flops = config.flops if config.speedup is None else 1 / config.speedup
    if flops is not None:
        return flops_target(flops, layers, max_merges(tokens, protected), target.cost(config.place).fraction)
    raise ConfigError(
        "no schedule was given, but a patch needs one: pass r=8 (tokens merged per block), keep=0.9, flops=0.5 or speedup=2 "
        "(r=0 merges nothing)"
    )


def _restore(model: Any) -> None:
    """Undo everything `patch` did; looks at the modules themselves, so it works on copies, too."""
    swapped: list[nn.Module] = [module for module in model.modules() if issubclass(type(module), Swapped)]
    for module in swapped:
        check_restorable(module)  # before anything is undone
    for module in swapped:
        restore_class(module)
    for module in model.modules():
        for name in [name for name in vars(module) if name in _OURS]:
            del vars(module)[name]
        remove_hooks(module)
