"""What was put on modules is still on those that run: layers, heads, pooling, blocks and tokens exchanged after `patch`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import tokenmerge
from tests.helpers.tiny import images_for, tiny
from tests.helpers.towers import TOWERS
from tokenmerge.errors import PatchError
from tokenmerge.patching.state import state_of
from tokenmerge.patching.swap import original_class

EXCHANGED = "exchanged or wrapped since the model was patched"


class Adapter(nn.Module):
    """A layer around another one, as adapters put it there."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.more = nn.Linear(base_layer.in_features, base_layer.out_features)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base_layer(x) + self.more(x)
        return out


def _adapt(model: nn.Module) -> int:
    """Put an adapter around every projection of keys; how many there were."""
    torch.manual_seed(3)
    names = [
        name
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in ("k_proj", "key") and isinstance(module, nn.Linear)
    ]
    for name in names:
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, Adapter(model.get_submodule(name)))  # type: ignore[arg-type]
    return len(names)


def _features(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else next(value for value in out.values() if isinstance(value, Tensor))


@pytest.mark.parametrize("tower", TOWERS, ids=lambda tower: tower.name)
def test_an_adapter_that_comes_later_is_not_left_out(tower: Any) -> None:
    """Put on before, it takes part in matching; put on afterwards, it is refused, or takes part as well."""
    before, after = tower.build(), tower.build()
    after.load_state_dict(before.state_dict())
    if not _adapt(before):
        pytest.skip("its keys are not projected apart")
    feed = tower.feed(2)
    tokenmerge.patch(before, r=4)
    handle = tokenmerge.patch(after, r=4)
    _adapt(after)
    with torch.no_grad():
        try:
            found = _features(after(**feed))
        except PatchError:
            with pytest.raises(PatchError, match=EXCHANGED):
                after(**feed)
            handle.remove()
            tokenmerge.patch(after, r=4)
            found = _features(after(**feed))
        assert torch.equal(found, _features(before(**feed)))


def _towers_with(part: str) -> Iterator[tuple[Any, str]]:
    for tower in TOWERS:
        model = tower.build()
        name = next((name for name, module in model.named_modules() if part in type(module).__name__), None)
        if name:
            yield tower, name


def test_a_part_that_gives_sizes_to_attention_is_missed() -> None:
    """BLIP's sizes reach its attention at a dropout: another one there would turn proportional attention off."""
    tower = next(tower for tower in TOWERS if tower.name.endswith("BlipVisionModel") and "instruct" not in tower.name)
    model, feed = tower.build(), tower.feed(2)
    tokenmerge.patch(model, r=4)
    for module in [module for module in model.modules() if isinstance(getattr(module, "dropout", None), nn.Dropout)]:
        module.dropout = nn.Dropout(0.0)
    with torch.no_grad(), pytest.raises(PatchError, match=EXCHANGED):
        model(**feed)


def test_a_head_that_comes_later_is_not_given_merged_tokens() -> None:
    seen = 0
    for tower, name in _towers_with("PoolingHead"):
        model, feed = tower.build(), tower.feed(2)
        try:
            handle = tokenmerge.patch(model, r=4, output="merged")
        except tokenmerge.ConfigError:
            continue
        parent, _, own = name.rpartition(".")
        old = model.get_submodule(name)
        new = type(old)(model.config).eval()
        new.load_state_dict(old.state_dict())
        setattr(model.get_submodule(parent), own, new)
        with torch.no_grad(), pytest.raises(PatchError, match="has taken another's place"):
            model(**feed)
        handle.update(r=0)
        with torch.no_grad():
            model(**feed)
        seen += 1
    assert seen


# --- pooling -----------------------------------------------------------------------------------------------

TOKEN_POOLED: dict[str, dict[str, Any]] = {
    "eva02_tiny_patch14_224": {},
    "vit_small_patch16_dinov3": {},
    "beit_base_patch16_224": {},
    "vit_relpos_small_patch16_224": {"class_token": True},
    "naflexvit_base_patch16_gap": {"class_token": True},
}


@pytest.mark.parametrize("name", TOKEN_POOLED)
def test_pooling_that_changes_after_patching_never_averages_merged_tokens(name: str) -> None:
    if name not in timm.list_models():
        pytest.skip("this timm does not have it")
    model = tiny(name, global_pool="token", **TOKEN_POOLED[name])
    images = images_for(model)
    with torch.no_grad():
        wanted = model(images)
        handle = tokenmerge.patch(model, r=4, output="merged")
        features = model.forward_features(images)
        if hasattr(model, "pool"):
            model.pool(features, "token")
            with pytest.raises(PatchError, match="knows nothing of sizes"):
                model.pool(features, "avg")
        model.reset_classifier(0, "avg")
        with pytest.raises(PatchError, match="output='full'"):
            model(images)
        with pytest.raises(PatchError, match="output='full'"):
            model.forward_head(features)
        handle.update(output="full")
        assert model(images).shape == (2, wanted.shape[1] if model.num_classes else model.num_features)


def test_pooling_of_open_clip_that_changes_is_seen_and_its_features_agree() -> None:
    transformer = pytest.importorskip("open_clip.transformer")
    torch.manual_seed(0)
    model = transformer.VisionTransformer(96, 16, 48, 3, 4, 4.0, output_dim=32, pool_type="none").eval()
    images = torch.randn(2, 3, 96, 96)
    tokenmerge.patch(model, r=4, output="merged")
    with torch.no_grad():
        assert torch.equal(model.forward_intermediates(images)["image_features"], model(images))
        model.pool_type = "avg"
        with pytest.raises(PatchError, match="output='full'"):
            model(images)


@pytest.mark.parametrize("kind", ["avg", "avgmax", "map"])
def test_padding_is_pooled_as_upstream_pools_it(kind: str) -> None:
    """timm's pooling counts what a mask says is padding: so it does when tokens merge, and nothing jumps between r=0 and 1."""
    model = tiny("vit_small_patch16_224", global_pool=kind, class_token=False)
    images, tokens = images_for(model), 36
    seen = torch.ones(2, 1, 1, tokens, dtype=torch.bool)
    seen[1, ..., 20:] = False
    mask = seen.expand(2, 1, tokens, tokens)
    with torch.no_grad():
        wanted = model(images, attn_mask=mask)
        handle = tokenmerge.patch(model, r=0)
        assert torch.equal(model(images, attn_mask=mask), wanted)
        handle.update(r=4)
        features = model.forward_features(images, attn_mask=mask)
        state = state_of(features)
        assert state is not None
        assert features.shape[1] == tokens - 12
        cls: Any = original_class(model)
        upstream = cls.pool(model, state.unmerge(features))
        assert torch.equal(model.pool(features), upstream)


# --- who runs the blocks -----------------------------------------------------------------------------------


class Averages(nn.Sequential):
    """A container with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        for module in self:
            x = module(x)
        return x.mean(dim=1)


class EachBlock(nn.Module):
    """Runs the blocks itself and reads what each hands on."""

    def __init__(self, vit: Any) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, images: Tensor) -> list[Tensor]:
        x, means = self.vit._pos_embed(self.vit.patch_embed(images)), []
        for block in self.vit.blocks:
            x = block(x)
            means.append(x.mean(dim=1))
        return means


def test_a_container_counts_as_transparent_only_with_its_own_forward_unchanged() -> None:
    model = tiny("vit_tiny_patch16_224", num_classes=0, global_pool="")
    images = images_for(model)
    wrapper = Averages(model)
    tokenmerge.patch(wrapper, r=4)
    assert model(images).shape[1] == 37
    tokenmerge.unpatch(wrapper)
    tokenmerge.patch(nn.Sequential(model), r=4)
    assert model(images).shape[1] == 25


def test_who_runs_the_blocks_reads_full_tokens_where_full_ones_are_handed_on() -> None:
    model = tiny("vit_tiny_patch16_224")
    images, seen = images_for(model), []
    wrapper = EachBlock(model)
    tokenmerge.patch(wrapper, r=4)
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    with torch.no_grad():
        full = model.forward_features(images)
        means = wrapper(images)
        assert seen == [33, 29, 37, 37, 37, 37]
        assert len(means) == 3
        assert torch.equal(model.forward_features(images), full)
        assert seen[6:] == [33, 29, 37]


def test_who_asks_is_not_a_matter_of_history() -> None:
    """Whatever ran before, also with an error: blocks that are run by hand hand on full tokens, the model's own pass does not."""
    model = tiny("vit_tiny_patch16_224")
    images = images_for(model)
    wrapper = EachBlock(model)
    handle = tokenmerge.patch(wrapper, r=0)
    seen: list[int] = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))

    def fails(module: Any, args: Any) -> None:
        raise ValueError("on purpose")

    with torch.no_grad():
        model(images)
        handle.update(r=4)
        hook = model.patch_embed.register_forward_pre_hook(fails)
        with pytest.raises(ValueError, match="on purpose"):
            model(images)
        hook.remove()
    for _ in range(2):
        seen.clear()
        wrapper(images)
        assert seen == [37, 37, 37]
        seen.clear()
        model(images)
        assert seen == [33, 29, 37]
    torch.utils.checkpoint.checkpoint(model, images.requires_grad_(), use_reentrant=False).sum().backward()
    seen.clear()
    wrapper(images)
    assert seen == [37, 37, 37]


def test_a_patched_model_within_the_pass_of_another_does_not_end_it() -> None:
    outer, inner = tiny("vit_tiny_patch16_224"), tiny("vit_tiny_patch16_224")
    images = images_for(outer)
    wrapper = EachBlock(outer)
    tokenmerge.patch(wrapper, r=4)
    tokenmerge.patch(inner, r=2)
    seen: list[int] = []
    for block in outer.blocks:
        block.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    with torch.no_grad():
        wanted = outer(images)
        outer.patch_embed.register_forward_hook(lambda *_: (inner(images), None)[1])
        assert torch.equal(outer(images), wanted)
    assert seen == [33, 29, 37] * 2


def test_merged_tokens_do_not_begin_another_pass() -> None:
    model = tiny("vit_tiny_patch16_224")
    images = images_for(model)
    handle = tokenmerge.patch(model, r=4)
    with torch.no_grad():
        features = model.forward_features(images)
        with pytest.raises(PatchError, match="25 tokens that stand for 37"):
            model.blocks[0](features)
        handle.update(output="full")
        model.blocks[0](model.forward_features(images))


def test_blocks_that_another_model_runs_do_not_merge_in_silence() -> None:
    one, other = tiny("vit_tiny_patch16_224"), tiny("vit_tiny_patch16_224")
    images = images_for(one)
    other.blocks = one.blocks
    with torch.no_grad():
        wanted = other(images)
        with tokenmerge.patched(one, r=4):
            one(images)
            with pytest.raises(PatchError, match="run inside another VisionTransformer"):
                other(images)
            one(images)
        assert torch.equal(other(images), wanted)


def test_tokens_that_begin_two_passes_keep_their_grid() -> None:
    model = tiny("vit_tiny_patch16_224", dynamic_img_size=True)
    tokenmerge.patch(model, r=2, trace=True)
    patch = model.patch_embed.patch_size[0]

    def embedded(rows: int, columns: int) -> Any:
        return model._pos_embed(model.patch_embed(torch.randn(1, 3, rows * patch, columns * patch)))

    def grid_of(tokens: Tensor) -> Any:
        for block in model.blocks:
            tokens = block(tokens)
        state = state_of(tokens)
        assert state is not None
        return state.run.grid

    first = embedded(4, 9)
    assert grid_of(first) == (4, 9)
    second = embedded(9, 4)
    assert (grid_of(first), grid_of(second), grid_of(first)) == ((4, 9), (9, 4), (4, 9))


def test_memory_that_is_written_anew_holds_other_tokens() -> None:
    """As the static input of a CUDA graph: the grid is that of what was written last."""
    model = tiny("vit_tiny_patch16_224", dynamic_img_size=True)
    tokenmerge.patch(model, r=2, trace=True)
    patch = model.patch_embed.patch_size[0]
    buffer = torch.zeros(1, 37, model.embed_dim)
    with torch.no_grad():
        for rows, columns in ((4, 9), (9, 4), (6, 6)):
            x = buffer.copy_(model._pos_embed(model.patch_embed(torch.randn(1, 3, rows * patch, columns * patch))))
            for block in model.blocks:
                x = block(x)
            state = state_of(x)
            assert state is not None
            assert state.run.grid == (rows, columns)


def test_two_models_that_share_their_attention_are_not_both_patched() -> None:
    for name in ("vit_tiny_patch16_224", "beit_base_patch16_224", "cait_xxs24_224"):
        one, other = tiny(name), tiny(name)
        images = images_for(one)
        for mine, theirs in zip(other.blocks, one.blocks, strict=True):
            mine.attn = theirs.attn
        handle = tokenmerge.patch(one, r=4)
        with torch.no_grad():
            wanted = one(images)
            with pytest.raises(PatchError, match="modules inside them, belong to another model"):
                tokenmerge.patch(other, r=4)
            assert torch.equal(one(images), wanted)
        handle.remove()
        tokenmerge.patch(other, r=4)


def test_prefix_tokens_that_change_are_noticed() -> None:
    model = tiny("vit_tiny_patch16_224")
    images = images_for(model)
    tokenmerge.patch(model, r=4)
    model.reg_token = nn.Parameter(torch.zeros(1, 2, model.embed_dim))
    model.num_reg_tokens, model.num_prefix_tokens = 2, 3
    with torch.no_grad(), pytest.raises(PatchError, match="has 3 prefix tokens, but 1 when it was patched"):
        model(images)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "cait_xxs24_224"])
def test_an_embedding_may_be_wrapped_or_taken_away(name: str) -> None:
    model = tiny(name)
    images = images_for(model)
    handle = tokenmerge.patch(model, r=4)
    with torch.no_grad():
        wanted, patches = model(images), model.patch_embed(images)
        model.patch_embed = nn.Sequential(model.patch_embed, nn.Identity())
        torch.testing.assert_close(model(images), wanted)
        own, model.patch_embed = model.patch_embed[0], nn.Identity()
        torch.testing.assert_close(model(patches), wanted)
        model.patch_embed = own
        old = own.proj
        own.proj = nn.Conv2d(3, old.out_channels, old.kernel_size, old.stride)
        model(images)
        gone, own.proj = own.proj, old
    handle.remove()
    for module in (gone, old):
        assert not module._forward_hooks
        assert not any(key.startswith("_tokenmerge") for key in vars(module))


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "cait_xxs24_224", "vit_tiny_patch16_224"])
def test_an_attention_may_be_compiled_after_patching(name: str) -> None:
    model = tiny(name)
    images = images_for(model)
    tokenmerge.patch(model, r=4)
    with torch.no_grad():
        wanted = model(images)
        for block in model.blocks:
            block.attn = torch.compile(block.attn, backend="eager")
        torch.testing.assert_close(model(images), wanted)


def test_sizes_are_looked_at_only_where_they_can_be() -> None:
    tokens = torch.randn(2, 6, 4)
    plan, size = tokenmerge.bipartite_matching(tokens, 2), torch.ones(2, 6)
    torch.func.vmap(lambda x, s: plan.merge(x, s)[0])(tokens[None], size[None])
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        plan.merge(mode.from_tensor(tokens), mode.from_tensor(size))
    merged = torch.compile(lambda x, s: plan.merge(x, s)[0], backend="eager", fullgraph=True)(tokens, size)
    torch.testing.assert_close(merged, plan.merge(tokens, size)[0])


HOOKS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "another order of images": (lambda x: x.flip(0), False),
    "another order of tokens": (lambda x: x.flip(1), False),
    "fewer tokens": (lambda x: x[:, :-2], False),
    "other values": (lambda x: x * 1.5, False),
    "the same": (lambda x: x, True),
    "the same memory": (lambda x: x.view_as(x), True),
    "carried": (lambda x: tokenmerge.carry(x * 1.5, like=x), True),
}


@pytest.mark.parametrize("name", HOOKS)
def test_what_hooks_before_a_block_put_in_place_of_its_tokens(name: str) -> None:
    change, fits = HOOKS[name]
    model = tiny("vit_tiny_patch16_224")
    images = images_for(model)
    tokenmerge.patch(model, r=4)
    model.blocks[1].register_forward_pre_hook(lambda module, args: (change(args[0]), *args[1:]))
    with torch.no_grad():
        if fits:
            model(images)
        else:
            with pytest.raises(PatchError, match=r"tokenmerge\.carry"):
                model(images)


# --- what is counted ---------------------------------------------------------------------------------------


def test_a_head_that_is_the_same_layer_in_another_form_costs_the_same() -> None:
    model = tiny("vit_tiny_patch16_224", num_classes=1000)
    handle = tokenmerge.patch(model, flops=0.9)
    cost, schedule = tokenmerge.model_cost(model), handle.schedule
    torch.nn.utils.parametrizations.weight_norm(model.head)
    assert tokenmerge.model_cost(model) == cost
    model.head = Adapter(nn.Linear(model.embed_dim, 1000))
    assert tokenmerge.model_cost(model).head == 2 * cost.head
    model.head = torch.compile(model.head.base_layer, backend="eager")
    assert tokenmerge.model_cost(model) == cost
    with torch.no_grad():
        model(images_for(model))
    assert handle.schedule == schedule


@pytest.mark.parametrize("change", ["head", "patches"])
def test_a_share_of_flops_is_of_the_model_as_it_is_now(change: str) -> None:
    model: Any = timm.create_model("vit_tiny_patch16_224", depth=4, num_classes=10).eval()
    images = torch.randn(1, 3, 224, 224)
    handle = tokenmerge.patch(model, flops=0.7)
    before = handle.schedule
    if change == "head":
        model.reset_classifier(100_000)
    else:
        model.set_input_size(patch_size=8)
    with torch.no_grad():
        model(images)
    again = copy.deepcopy(model)
    tokenmerge.unpatch(again)
    assert handle.schedule == tokenmerge.patch(again, flops=0.7).schedule != before
    assert handle.summary().r == tokenmerge.handle_of(again).summary().r
