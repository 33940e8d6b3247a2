"""Patching as a user meets it: what works, what is refused, and in which words."""

from __future__ import annotations

import concurrent.futures
import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.layers.attention import Attention
from torch import nn

import tokenmerge
from tests.families.test_timm_models import KINDS
from tests.helpers.tiny import images_for, tiny
from tokenmerge import ConfigError, InputError, MergeConfig, PatchError, UnsupportedModelError

GOLDEN_RUNS = [(name, run) for name in ("vit_cls", "vit_avgpool") for run in range(8)]


@pytest.mark.parametrize(("name", "run"), GOLDEN_RUNS)
def test_golden_models(shared: Path, name: str, run: int) -> None:
    import json

    golden = load_file(shared / f"reference/{name}.safetensors")
    spec = json.loads((shared / f"reference/{name}.json").read_text())
    model = timm.models.vision_transformer.VisionTransformer(**spec["model"]).eval()
    model.load_state_dict({key[6:]: value for key, value in golden.items() if key.startswith("state.")})
    r = spec["runs"][run]["r"]
    r = (r[0], r[1]) if isinstance(r, list) and len(r) == 2 else r
    with (
        tokenmerge.patched(model, r=r, prop_attn=spec["runs"][run]["prop_attn"], trace=True) as handle,
        torch.no_grad(),
    ):
        logits = model(golden["input"])
        size = handle.trace.size()
    torch.testing.assert_close(logits, golden[f"run{run}.logits"], rtol=0, atol=1e-5)
    if f"run{run}.size" in golden:
        assert torch.equal(size, golden[f"run{run}.size"].reshape(size.shape))


def test_importing_tokenmerge_imports_torch_and_no_more() -> None:
    code = (
        "import sys, tokenmerge; heavy = {'timm', 'torchvision', 'transformers', 'open_clip', 'PIL', 'rich', 'sklearn', "
        "'matplotlib', 'safetensors'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_update_remove_and_the_config_in_force() -> None:
    model = tiny("vit_tiny_patch16_224")
    images = images_for(model)
    with torch.no_grad():
        original = model(images)
        handle = tokenmerge.patch(model, r=4)
        four = model(images)
        handle.update(r=0)
        assert torch.equal(model(images), original)
        handle.update(MergeConfig(r=4))
        assert torch.equal(model(images), four)
        handle.update(flops=0.6)
        assert handle.config == MergeConfig(flops=0.6)
        assert 1 / handle.summary().flops_ratio <= 0.6
        with pytest.raises(ConfigError):
            handle.update(r=[1] * 9)
        assert handle.config == MergeConfig(flops=0.6)  # a refused update changes nothing
        handle.update(keep=0.9, prop_attn=False)
        assert handle.summary().prop_attn is False
        handle.remove()
        assert torch.equal(model(images), original)
    assert not tokenmerge.is_patched(model)
    for stale in (
        handle.remove,
        handle.summary,
        lambda: handle.update(r=1),
        lambda: handle.trace,
        lambda: handle.config,
    ):
        with pytest.raises(PatchError, match="no longer patched"):
            stale()
    assert "removed" in repr(handle)


def test_patched_undoes_also_after_an_error() -> None:
    model = tiny("vit_tiny_patch16_224")
    with pytest.raises(ZeroDivisionError), tokenmerge.patched(model, r=2):
        _ = 1 / (1 - tokenmerge.is_patched(model))  # an error, because it is patched
    assert not tokenmerge.is_patched(model)
    with tokenmerge.patched(model, r=2) as handle:
        handle.remove()  # by hand inside the block is fine


def test_patching_twice_or_across_handles_is_refused() -> None:
    model = tiny("vit_tiny_patch16_224")
    wrapper = nn.Sequential(model, nn.Identity())
    handle = tokenmerge.patch(wrapper, r=3)
    for target in (model, wrapper):
        with pytest.raises(PatchError, match=r"patched already.*handle_of\(model\)\.update"):
            tokenmerge.patch(target, r=3)
    with pytest.raises(PatchError, match="belong to another model"):
        tokenmerge.patch(model.blocks, r=3)
    assert tokenmerge.handle_of(wrapper).config == handle.config
    tokenmerge.unpatch(wrapper)
    with pytest.raises(PatchError, match="nothing to undo"):
        tokenmerge.unpatch(model)
    with pytest.raises(PatchError, match="0 patched models"):
        tokenmerge.handle_of(model)


def test_what_cannot_be_patched_is_left_alone() -> None:
    with pytest.raises(UnsupportedModelError, match="Linear holds no model that tokenmerge supports"):
        tokenmerge.patch(nn.Linear(2, 2), r=1)
    with pytest.raises(UnsupportedModelError, match=r"a torch\.nn\.Module was expected"):
        tokenmerge.patch("vit_tiny_patch16_224", r=1)  # type: ignore[arg-type]
    swin = timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1), embed_dim=24)
    with pytest.raises(UnsupportedModelError, match="SwinTransformer"):
        tokenmerge.patch(swin, r=1)
    two = nn.ModuleList([tiny("vit_tiny_patch16_224"), tiny("vit_tiny_patch16_224")])
    with pytest.raises(UnsupportedModelError, match=r"2 supported models \(0, 1\)"):
        tokenmerge.patch(two, r=1)


class OwnPool(timm.models.vision_transformer.VisionTransformer):
    def forward_features(self, x: Any, attn_mask: Any = None, is_causal: bool = False) -> Any:
        return super().forward_features(x).mean(1)


class OwnAttention(Attention):
    def forward(self, x: Any, attn_mask: Any = None, is_causal: bool = False) -> Any:
        return super().forward(x)  # quietly drops the mask


class OwnBlock(timm.models.vision_transformer.Block):
    def forward(self, x: Any, attn_mask: Any = None, is_causal: bool = False) -> Any:
        return super().forward(x) * 2


class Renamed(timm.models.vision_transformer.VisionTransformer):
    """Changes nothing that merging relies on."""


def test_code_of_the_users_own_is_refused_where_it_matters() -> None:
    small: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    with pytest.raises(UnsupportedModelError, match=r"its own forward_features\(\)") as caught:
        tokenmerge.patch(OwnPool(**small), r=1)
    assert caught.value.reasons == ("it has its own forward_features()",)
    with pytest.raises(UnsupportedModelError, match="only timm's own Attention"):
        tokenmerge.patch(Renamed(**small, attn_layer=OwnAttention), r=1)
    with pytest.raises(UnsupportedModelError, match=r"OwnBlock\): it has its own forward\(\)"):
        tokenmerge.patch(Renamed(**small, block_fn=OwnBlock), r=1)
    bound = Renamed(**small)
    vars(bound)["forward_head"] = lambda x: x[:, 0]
    with pytest.raises(UnsupportedModelError, match=r"its own forward_head\(\)"):
        tokenmerge.patch(bound, r=1)
    fine = Renamed(**small)
    with tokenmerge.patched(fine, r=2):
        assert isinstance(fine, Renamed)


def test_the_check_at_patch_time_names_version_and_block(monkeypatch: pytest.MonkeyPatch) -> None:
    block = timm.models.vision_transformer.Block
    original = block.forward

    def changed(self: Any, x: Any, attn_mask: Any = None, is_causal: bool = False) -> Any:
        return original(self, x, attn_mask=attn_mask) + 1e-3

    model = tiny("vit_tiny_patch16_224")
    monkeypatch.setattr(block, "forward", changed)
    with pytest.raises(
        UnsupportedModelError, match=rf"block 0 .*Block, timm {timm.__version__}.*differ from the whole"
    ):
        tokenmerge.patch(model, r=1)
    assert not tokenmerge.is_patched(model)
    assert type(model.blocks[0]) is block


def test_the_check_sees_a_bias_that_does_not_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Attention.forward
    monkeypatch.setattr(Attention, "forward", lambda self, x, attn_mask=None, is_causal=False: original(self, x))
    with pytest.raises(UnsupportedModelError, match="token sizes change its attention wrongly"):
        tokenmerge.patch(tiny("vit_tiny_patch16_224"), r=1)


def test_a_schedule_is_asked_for() -> None:
    model = tiny("vit_tiny_patch16_224")
    with pytest.raises(ConfigError, match="no schedule was given"):
        tokenmerge.patch(model)
    with pytest.raises(ConfigError, match="is not registered"):
        tokenmerge.patch(model, r=1, matcher="nope")
    with pytest.raises(TypeError, match="'ratio' is no field"):
        tokenmerge.patch(model, ratio=1)
    assert not tokenmerge.is_patched(model)


def test_r_is_cut_and_the_summary_shows_it() -> None:
    model = tiny("vit_tiny_patch16_224")
    handle = tokenmerge.patch(model, r=100)
    summary = handle.summary()
    assert summary.r == (18, 9, 4)
    assert summary.tokens == (37, 19, 10, 6)
    assert "r=100 was cut to 18" in str(summary)
    assert max(map(len, str(summary).splitlines())) <= 80
    with torch.no_grad():
        assert model.forward_features(images_for(model)).shape[1] == 6


def test_copies_and_pickles_are_patched_models_of_their_own() -> None:
    model = tiny("vit_base_patch16_xp_224")
    images = images_for(model)
    tokenmerge.patch(model, r=4, trace=True)
    with torch.no_grad():
        wanted = model(images)
        twin = copy.deepcopy(model)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for again in (twin, pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
            assert torch.equal(again(images), wanted)
            handle = tokenmerge.handle_of(again)
            handle.update(r=0)
            assert torch.equal(model(images), wanted)  # the original did not notice
            handle.remove()
            assert not tokenmerge.is_patched(again)
        twin.load_state_dict(model.state_dict())
    assert tokenmerge.is_patched(model)
    assert "MergeBlock" not in repr(twin)
    assert "MergeParallelScalingBlock" in repr(model)


def test_shapes_types_and_formats() -> None:
    model = tiny("vit_base_patch14_reg4_dinov2")
    images = images_for(model, batch=3)
    tokenmerge.patch(model, r=4)
    with torch.no_grad():
        wanted = model(images)
        for one in range(3):  # an image's result does not depend on its batch
            torch.testing.assert_close(model(images[one : one + 1])[0], wanted[one], rtol=1e-4, atol=1e-5)
        assert model(images[:0]).shape == (0, 7)
        model.to(memory_format=torch.channels_last)
        torch.testing.assert_close(
            model(images.contiguous(memory_format=torch.channels_last)), wanted, rtol=1e-4, atol=1e-5
        )


@tokenmerge.register_matcher("neighbours")
def neighbours(metric: torch.Tensor, r: int, protected: int = 0) -> tokenmerge.MergePlan:
    """Merges the first r pairs of neighbours, whatever their values: every precision merges the same."""
    batch, tokens, _ = metric.shape
    pairs = torch.arange(tokens - protected) // 2
    rest = torch.arange(tokens - protected - 2 * r) + r
    assign = torch.cat([torch.arange(protected), protected + pairs[: 2 * r], protected + rest])
    return tokenmerge.MergePlan.from_assign(assign.expand(batch, -1), tokens - r)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, "autocast"])
@pytest.mark.parametrize("name", [name for name in KINDS if "rpn" not in name])
def test_other_precisions(name: str, dtype: Any) -> None:
    model = tiny(name)
    images = images_for(model)
    with torch.no_grad():
        plain = model(images)
        tokenmerge.patch(model, r=6, matcher="neighbours")
        wanted = model(images)
        if dtype == "autocast":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                got = model(images)
        else:
            got = model.to(dtype)(images.to(dtype))
            assert got.dtype == dtype
            sizes = tokenmerge.token_sizes(model.forward_features(images.to(dtype)))
            assert sizes.dtype == torch.float32
            assert sizes.sum(1).tolist() == [36 + model.num_prefix_tokens] * 2
    effect, error = (wanted - plain).norm(), (got - wanted).norm()
    assert error < (1e-4 if dtype == torch.float64 else 0.5) * effect  # far nearer to merged than to unmerged


@pytest.mark.parametrize("case", ["bfloat16", "float16", "layer scale"])
def test_the_check_sees_a_lost_bias_in_every_precision(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("vit_tiny_patch16_224", **({"init_values": 1e-6} if case == "layer scale" else {}))
    if case == "layer scale":
        for block in model.blocks:
            block.ls1.gamma.data.fill_(1e-6)
    else:
        model.to(getattr(torch, case))
    original = Attention.forward
    monkeypatch.setattr(Attention, "forward", lambda self, x, attn_mask=None, is_causal=False: original(self, x))
    with pytest.raises(UnsupportedModelError, match="token sizes change its attention wrongly"):
        tokenmerge.patch(model, r=1)


def test_a_patch_that_fails_half_way_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("vit_tiny_patch16_224")
    anatomy = [(type(m), sorted(vars(m)), len(m._forward_hooks)) for m in model.modules()]
    module = sys.modules["tokenmerge.patching.apply"]

    def fails_half_way(target: Any, record: Any) -> None:
        tokenmerge.patching.install.install(target, record)
        _ = 1 / 0

    monkeypatch.setattr(module, "install", fails_half_way)
    with pytest.raises(ZeroDivisionError):
        tokenmerge.patch(model, r=1)
    assert [(type(m), sorted(vars(m)), len(m._forward_hooks)) for m in model.modules()] == anatomy


def test_shared_blocks_and_extra_tokens_are_refused() -> None:
    model = tiny("vit_tiny_patch16_224")
    model.blocks = nn.Sequential(*[model.blocks[0]] * 3)
    with pytest.raises(UnsupportedModelError, match="the same block object more than once"):
        tokenmerge.patch(model, r=1)

    class Prompted(timm.models.vision_transformer.VisionTransformer):
        def _pos_embed(self, x: Any) -> Any:
            return torch.cat([super()._pos_embed(x), torch.zeros(x.shape[0], 4, self.embed_dim)], dim=1)

    with pytest.raises(UnsupportedModelError, match=r"its own _pos_embed\(\)"):
        tokenmerge.patch(Prompted(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2), r=1)


def test_replaced_modules_and_wrong_matchers_are_named() -> None:
    model = tiny("vit_tiny_patch16_224")
    images = images_for(model)
    handle = tokenmerge.patch(model, r=2)
    model.blocks[1].attn.k_norm = nn.Identity()
    with torch.no_grad(), pytest.raises(PatchError, match="inside the attention of block 1 was exchanged"):
        model(images)
    handle.remove()

    @tokenmerge.register_matcher("one too many")
    def greedy(metric: torch.Tensor, r: int, protected: int = 0) -> tokenmerge.MergePlan:
        return tokenmerge.bipartite_matching(metric, r + 1, protected)

    tokenmerge.patch(model, r=2, matcher="one too many")
    with (
        torch.no_grad(),
        pytest.raises(PatchError, match=r"merged 3 of \d+ tokens in 2 images, but block 0 asked for 2"),
    ):
        model(images)
    for function in (tokenmerge.is_patched, tokenmerge.handle_of, tokenmerge.unpatch):
        with pytest.raises(UnsupportedModelError, match="was expected"):
            function("vit")  # type: ignore[arg-type]


def test_keep_follows_the_image_size() -> None:
    model = tiny("vit_tiny_patch16_224", dynamic_img_size=True)
    handle = tokenmerge.patch(model, keep=0.75)
    assert handle.summary().tokens == (37, 28, 22, 17)
    with torch.no_grad():
        assert model.forward_features(torch.randn(1, 3, 192, 192)).shape[1] == 1 + 61  # 144 -> 108 -> 81 -> 61


def test_map_pooling_without_proportional_attention_is_the_same_from_full_maps() -> None:
    model = tiny("vit_base_patch16_siglip_224")
    images = images_for(model)
    tokenmerge.patch(model, r=5, prop_attn=False)
    with torch.no_grad():
        full, _ = model.forward_intermediates(images)
        torch.testing.assert_close(model.forward_head(full), model(images), rtol=1e-4, atol=1e-5)


def test_intermediates_keep_upstreams_shapes() -> None:
    model = tiny("vit_base_patch14_reg4_dinov2")
    images = images_for(model)
    with torch.no_grad():
        final, maps = model.forward_intermediates(images)
        handle = tokenmerge.patch(model, r=5, trace=True)
        logits = model(images)
        plain = model.forward_features(images)
        full, merged_maps = model.forward_intermediates(images)
        assert [m.shape for m in merged_maps] == [m.shape for m in maps] == [torch.Size([2, 48, 6, 6])] * 3
        assert torch.equal(full, plain)  # as upstream promises
        assert handle.trace.unmerge(full).shape == final.shape
        torch.testing.assert_close(model.forward_head(full), logits)
        layers = model.get_intermediate_layers(images, n=2, reshape=True, norm=True)
        assert [layer.shape for layer in layers] == [torch.Size([2, 48, 6, 6])] * 2
        early = model.forward_intermediates(
            images, indices=[0], stop_early=True, intermediates_only=True, output_fmt="NLC"
        )
        assert early[0].shape == (2, 36, 48)
        assert handle.trace.source().max() == 25  # the latest whole pass: 41 − 15 tokens are left
        assert plain.shape == (2, 41 - 15, 48)  # forward_features gives what is left
        assert tokenmerge.token_sizes(plain).sum(1).tolist() == [41, 41]
        assert torch.equal(tokenmerge.token_sizes(full), tokenmerge.token_sizes(plain))
        assert tokenmerge.token_sizes(handle.trace.unmerge(full)).tolist() == [[1] * 41] * 2
        with pytest.raises(InputError, match="carry no token sizes"):
            tokenmerge.token_sizes(plain * 1)
    handle.remove()
    backbone = timm.create_model("vit_tiny_patch16_224", features_only=True, img_size=96, out_indices=(0, 2)).eval()
    tokenmerge.patch(backbone, r=4)
    assert [m.shape for m in backbone(images_for(model, 1).new_zeros(1, 3, 96, 96))] == [torch.Size([1, 192, 6, 6])] * 2


def test_maps_are_each_token_spread_over_its_patches() -> None:
    model = tiny("vit_tiny_patch16_224")
    images = images_for(model)
    with torch.no_grad(), tokenmerge.patched(model, r=5, trace=True) as handle:
        model(images)
        maps = model.forward_intermediates(images, intermediates_only=True)
        for block, features in enumerate(maps):
            source = handle.trace.source(block)[:, 1:].reshape(2, 6, 6)
            for image in range(2):
                for token in source[image].unique():
                    members = features[image, :, source[image] == token]
                    assert torch.equal(members, members[:, :1].expand_as(members))


def test_dynamic_sizes_and_patch_dropout() -> None:
    model = tiny("vit_tiny_patch16_224", dynamic_img_size=True)
    tokenmerge.patch(model, r=4)
    with torch.no_grad():
        assert model.forward_features(torch.randn(1, 3, 128, 64)).shape[1] == 33 - 12
        assert model.forward_features(torch.randn(1, 3, 32, 16)).shape[1] == 2  # 3 tokens: r is cut to 1, then 0
    dropping = tiny("vit_tiny_patch16_224", patch_drop_rate=0.5)
    tokenmerge.patch(dropping, r=2)
    dropping.train()
    assert dropping.forward_features(images_for(dropping)).shape[1] == 19 - 6
    dropping(images_for(dropping)).sum().backward()


def test_the_trace() -> None:
    model = tiny("vit_tiny_patch16_224")
    handle = tokenmerge.patch(model, r=[5, 0, 7])
    with pytest.raises(PatchError, match="tracing is off"):
        _ = handle.trace
    handle.update(trace=True)
    with pytest.raises(PatchError, match="no forward pass had run"):
        _ = handle.trace.plans
    with torch.no_grad():
        features = model.forward_features(images_for(model))
    trace = handle.trace
    assert [None if plan is None else plan.r for plan in trace.plans] == [5, None, 7]
    assert trace.size(0).shape == trace.size(1).shape == (2, 32)
    assert torch.equal(trace.size(), torch.stack([torch.bincount(row) for row in trace.source()]).float())
    assert trace.unmerge(features).shape == (2, 37, 48)
    with pytest.raises(InputError, match="block 3 is not in this trace"):
        trace.source(3)
    with pytest.raises(InputError, match="carry no plans"):
        trace.unmerge(features * 1)
    handle.update(r=0)
    with torch.no_grad():
        model(images_for(model))
    assert torch.equal(handle.trace.source(), torch.arange(37).expand(2, -1))
    assert torch.equal(handle.trace.size(), torch.ones(2, 37))


def test_lost_sizes_and_masks_are_errors_not_wrong_numbers() -> None:
    model = tiny("vit_base_patch16_siglip_gap_224")
    images = images_for(model)
    tokenmerge.patch(model, r=4)
    with torch.no_grad():
        features = model.forward_features(images)
        with pytest.raises(PatchError, match="avg pooling received tokens without their sizes"):
            model.forward_head(features * 1)
        with pytest.raises(PatchError, match="block 1 received tokens without their sizes"):
            model.blocks[1](model.blocks[0](torch.randn(1, 36, 48)) * 1)
        with pytest.raises(PatchError, match="an attention mask"):
            model(images, attn_mask=torch.ones(36, 36, dtype=torch.bool))
        tokenmerge.handle_of(model).update(r=0)
        masked = model(images, attn_mask=torch.ones(36, 36, dtype=torch.bool))
        torch.testing.assert_close(masked, model(images))


def test_threads_may_share_a_model() -> None:
    model = tiny("vit_tiny_patch16_224")
    tokenmerge.patch(model, r=4)
    images = [images_for(model, seed=seed) for seed in range(4)]
    with torch.no_grad():
        wanted = [model(image) for image in images]
    wrong: list[int] = []

    def work(which: int) -> None:
        with torch.no_grad():
            for _ in range(30):
                if which % 2:
                    if not torch.equal(model(images[which]), wanted[which]):
                        wrong.append(which)
                elif model.forward_intermediates(images[which], intermediates_only=True)[-1].shape != (2, 48, 6, 6):
                    wrong.append(which)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))  # raises what a thread raised
    assert not wrong


def test_pruned_models_follow() -> None:
    model = tiny("vit_tiny_patch16_224")
    handle = tokenmerge.patch(model, r=4, trace=True)
    model.prune_intermediate_layers([0, 1])
    with torch.no_grad():
        model(images_for(model))
    assert len(handle.trace.plans) == handle.summary().blocks == 2
    handle.update(r=2)
    handle.remove()
    assert not tokenmerge.is_patched(model)


def test_meta_models_can_be_looked_at() -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_large_patch16_224")
    with tokenmerge.patched(model, r=8) as handle:
        summary = handle.summary()
        assert model(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 1000)
    assert f"{summary.flops_after / 1e9:.2f}" == "30.96"
