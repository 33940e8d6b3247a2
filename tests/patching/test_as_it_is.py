"""Models as people have them: quantised, pruned, prepared, traced. What works unpatched works patched, or one sentence says why not."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.utils import prune
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import tokenmerge
from tests.helpers.tiny import images_for, randomize, tiny
from tests.helpers.towers import BY_NAME
from tokenmerge import PatchError, UnsupportedModelError

NAMES = [
    "vit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "vit_base_patch14_reg4_dinov2",
    "vit_base_patch16_siglip_224",
    "vit_small_patch16_18x2_224",
    "vit_base_patch16_xp_224",
    "cait_xxs24_224",
    "vit_relpos_small_patch16_224",
    "eva02_tiny_patch14_224",
    "beit_base_patch16_224",
]


def _torchvision() -> Any:
    model = torchvision.models.VisionTransformer(96, 16, 3, 4, 48, 96).eval()
    randomize(model)
    return model


MAKE: dict[str, Callable[[], Any]] = {
    **{name: lambda name=name: tiny(name) for name in NAMES},  # type: ignore[misc]
    "torchvision": _torchvision,
    "ViTModel": lambda: BY_NAME["ViTModel"].build(),
    "Dinov2Model": lambda: BY_NAME["Dinov2Model"].build(),
    "CLIPVisionModel": lambda: BY_NAME["CLIPVisionModel"].build(),
    "BlipVisionModel": lambda: BY_NAME["BlipVisionModel"].build(),
}

FEW = ["vit_tiny_patch16_224", "cait_xxs24_224", "torchvision", "ViTModel"]  # each library, and two kinds of attention


def _input(model: Any) -> Tensor:
    if hasattr(model, "patch_embed"):
        return images_for(model)
    return torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(1))


def _out(model: Any, images: Tensor) -> Tensor:
    out = model(images)
    tokens: Tensor = out if isinstance(out, Tensor) else out.last_hidden_state
    return tokens


def _dynamic_int8(model: Any) -> Any:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def _weight_only(model: Any) -> Any:
    """torchao's int8 weights: tensors of another class."""
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("quantise", [_dynamic_int8, _weight_only])
@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE.keys())
def test_quantised_first_patched_second(make: Callable[[], Any], quantise: Callable[[Any], Any]) -> None:
    model = quantise(make())
    images = _input(model)
    try:
        wanted = _out(model, images)
    except Exception as error:  # upstream reads its own weights as plain tensors
        pytest.skip(f"it does not run unpatched ({type(error).__name__})")
    handle = tokenmerge.patch(model, r=0)
    assert torch.equal(_out(model, images), wanted)
    handle.update(r=3)
    merged = _out(model, images)
    assert torch.isfinite(merged).all()
    assert not torch.equal(merged, wanted)
    handle.remove()
    assert torch.equal(_out(model, images), wanted)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize(
    "computed",
    [
        lambda linear: prune.l1_unstructured(linear, "weight", amount=0.3),
        torch.nn.utils.weight_norm,
        torch.nn.utils.spectral_norm,
        torch.nn.utils.parametrizations.weight_norm,
        torch.nn.utils.parametrizations.orthogonal,
    ],
    ids=["pruned", "weight norm", "spectral norm", "weight norm, parametrized", "orthogonal"],
)
@pytest.mark.parametrize("name", FEW)
def test_weights_that_are_computed(name: str, computed: Callable[[Any], Any]) -> None:
    """By hooks before each pass, or by parametrizations: such weights are no leaves of the graph."""
    model = MAKE[name]()
    images = _input(model)
    for module in [module for module in model.modules() if type(module) is nn.Linear]:
        computed(module)
    with torch.no_grad():
        wanted = _out(model, images)
    handle = tokenmerge.patch(model, r=0)
    with torch.no_grad():
        assert torch.equal(_out(model, images), wanted)
        handle.update(r=3)
        assert _out(model, images).isfinite().all()
    handle.remove()
    with torch.no_grad():
        assert torch.equal(_out(model, images), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "beit_base_patch16_224", "cait_xxs24_224"]
)
def test_in_half_precision_nothing_changes_at_r_0(name: str, dtype: torch.dtype) -> None:
    model = tiny(name).to(dtype)
    images = images_for(model).to(dtype)
    wanted = model(images)
    tokenmerge.patch(model, r=0)
    assert torch.equal(model(images), wanted)


@torch.no_grad()
def test_channels_that_were_pruned() -> None:
    """Fewer channels than the model was made with: what the blocks have counts, not what the model remembers."""
    model = tiny("vit_tiny_patch16_224")
    kept = torch.arange(0, 48, 2)
    _prune(model, kept)
    assert model.embed_dim == 48
    images = images_for(model)
    wanted = model(images)
    with tokenmerge.patched(model, r=0):
        assert torch.equal(model(images), wanted)
    with tokenmerge.patched(model, r=4) as handle:
        assert model(images).shape == wanted.shape
        assert handle.summary().flops_before < tokenmerge.model_cost(tiny("vit_tiny_patch16_224")).total()


def _prune(model: Any, kept: Tensor) -> None:
    """Keep some channels of the residual stream: rows and columns of what reads and writes it."""
    model.patch_embed.proj.weight = nn.Parameter(model.patch_embed.proj.weight[kept])
    model.patch_embed.proj.bias = nn.Parameter(model.patch_embed.proj.bias[kept])
    for name in ("cls_token", "pos_embed"):
        setattr(model, name, nn.Parameter(getattr(model, name)[..., kept]))
    norms = [model.norm, *(norm for block in model.blocks for norm in (block.norm1, block.norm2))]
    for norm in norms:
        norm.weight, norm.bias = nn.Parameter(norm.weight[kept]), nn.Parameter(norm.bias[kept])
        norm.normalized_shape = (len(kept),)
    readers = [model.head, *(layer for block in model.blocks for layer in (block.attn.qkv, block.mlp.fc1))]
    for layer in readers:
        layer.weight, layer.in_features = nn.Parameter(layer.weight[:, kept]), len(kept)
    for layer in (layer for block in model.blocks for layer in (block.attn.proj, block.mlp.fc2)):
        layer.weight, layer.bias, layer.out_features = (
            nn.Parameter(layer.weight[kept]),
            nn.Parameter(layer.bias[kept]),
            len(kept),
        )


def _hook_all(model: Any, folder: Path) -> None:
    for module in model.modules():
        accelerate.hooks.add_hook_to_module(module, accelerate.hooks.ModelHook())


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "cait_xxs24_224", "ViTModel", "CLIPVisionModel"])
@pytest.mark.parametrize(
    "prepare",
    [
        lambda model, folder: accelerate.cpu_offload(model, torch.device("cpu")),
        lambda model, folder: accelerate.disk_offload(model, folder, torch.device("cpu")),
        _hook_all,
    ],
    ids=["offloaded to the CPU", "to disk", "a hook on every module"],
)
def test_patched_first_prepared_second(name: str, prepare: Callable[[Any, Path], Any], tmp_path: Path) -> None:
    """The handle works on, and what Accelerate has kept of a module's methods is upstream's again when the patch is removed."""
    model = MAKE[name]()
    images = _input(model)
    plain = _out(model, images)
    handle = tokenmerge.patch(model, r=3)
    merged = _out(model, images)
    prepare(model, tmp_path)
    assert torch.equal(_out(model, images), merged)
    tokens = handle.summary().tokens
    assert handle.output_tokens() in tokens
    handle.update(r=0)
    assert torch.equal(_out(model, images), plain)
    handle.update(r=3)
    assert torch.equal(_out(model, images), merged)
    handle.remove()
    assert torch.equal(_out(model, images), plain)


@torch.no_grad()
@pytest.mark.parametrize("name", [*NAMES, "vit_base_patch16_dinov3", "vit_base_patch16_rope_mixed_224"])
def test_patched_models_are_files(name: str) -> None:
    model = tiny(name)
    images = images_for(model)
    tokenmerge.patch(model, r=3)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(images), model(images))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_patched_first_quantised_second(name: str) -> None:
    """Tools that look layers up by their class find all of them."""
    model = tiny(name)
    images = images_for(model)
    linear = sum(type(module) is nn.Linear for module in model.modules())
    try:
        wanted = _dynamic_int8(copy.deepcopy(model))(images)
    except (AttributeError, TypeError, RuntimeError):
        wanted = None  # BEiT and EVA read the weights of their layers themselves
    handle = tokenmerge.patch(model, r=0)
    assert sum(type(module) is nn.Linear for module in model.modules()) == linear
    if wanted is not None:
        quantised = _dynamic_int8(model)
        assert torch.equal(quantised(images), wanted)
        tokenmerge.handle_of(quantised).update(r=3)
        assert quantised(images).isfinite().all()
    handle.remove()


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "vit_base_patch16_siglip_224", "vit_base_patch14_reg4_dinov2"]
)
def test_a_model_that_merges_nothing_has_upstreams_nodes(name: str) -> None:
    model = tiny(name)
    wanted = get_graph_node_names(model)
    tokenmerge.patch(model, r=0)
    assert get_graph_node_names(model) == wanted


def test_the_real_cause_is_named() -> None:
    left = tiny("vit_tiny_patch16_224")
    accelerate.hooks.add_hook_to_module(left, accelerate.hooks.ModelHook())
    accelerate.hooks.remove_hook_from_module(left, recurse=True)
    with pytest.raises(UnsupportedModelError, match=r"its own forward\(\), set on the module itself as Accelerate's"):
        tokenmerge.patch(left, r=2)
    del left.forward
    tokenmerge.patch(left, r=2)
    reset = accelerate.state.AcceleratorState._reset_state
    reset(reset_partial_state=True)
    try:
        prepared = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(tiny("vit_tiny_patch16_224"))
        with pytest.raises(UnsupportedModelError, match=r"patch before accelerator\.prepare"):
            tokenmerge.patch(prepared, r=2)
    finally:
        reset(reset_partial_state=True)
    traced = torch.fx.symbolic_trace(tiny("vit_tiny_patch16_224"))
    with pytest.raises(UnsupportedModelError, match=r"traced by torch\.fx.*patch first, then trace"):
        tokenmerge.patch(traced, r=2)
    broken = tiny("vit_tiny_patch16_224")
    broken.blocks[0].mlp.fc1 = nn.Linear(40, 192)
    with pytest.raises(UnsupportedModelError, match="the block itself fails on 7 tokens of 48 channels"):
        tokenmerge.patch(broken, r=2)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", FEW)
def test_torchscript_traces_and_refuses_to_script(name: str) -> None:
    model = MAKE[name]()
    images = _input(model)
    handle = tokenmerge.patch(model, r=3)
    for scripted in (model, nn.Sequential(model)):
        with pytest.raises(PatchError, match=r"torch\.jit\.script cannot compile a model that merges tokens"):
            torch.jit.script(scripted)
    with torch.no_grad():
        wanted = model(images)
        traced = torch.jit.trace(model, images, strict=False)
        got = traced(images)
    if isinstance(wanted, Tensor):
        assert torch.equal(got, wanted)
    else:
        assert torch.equal(got["last_hidden_state"], wanted.last_hidden_state)
    handle.remove()
    if hasattr(model, "patch_embed"):
        torch.jit.script(model)  # as before


# --- torch.fx ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*NAMES, "torchvision"])
@pytest.mark.parametrize("pool", ["", "avg"])
def test_a_merged_model_can_be_traced(name: str, pool: str) -> None:
    """Sizes travel from node to node; forward and backward are those of the model itself."""
    if pool and name not in ("vit_tiny_patch16_224", "vit_base_patch14_reg4_dinov2"):
        pytest.skip("pools in one way")
    model = tiny(name, global_pool="avg") if pool else MAKE[name]()
    images = _input(model)
    for r in (0, 3):
        with tokenmerge.patched(model, r=r):
            wanted = model(images)
            slopes = torch.autograd.grad(wanted.square().sum(), next(model.parameters()))[0]
            traced = torch.fx.symbolic_trace(model)
            found = traced(images)
            assert torch.equal(found, wanted)
            again = torch.autograd.grad(found.square().sum(), next(model.parameters()))[0]
            torch.testing.assert_close(again, slopes)
            assert torch.equal(traced(images[:1]), model(images[:1]))


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_feature_extractors_of_torchvision(name: str) -> None:
    model = tiny(name)
    images = images_for(model)
    for r in (0, 3):
        with tokenmerge.patched(model, r=r) as handle:
            tokens: list[Tensor] = []
            hook = model.blocks[1].register_forward_hook(
                lambda module, args, output, tokens=tokens: tokens.append(output)
            )
            model(images)
            hook.remove()
            found = create_feature_extractor(copy.deepcopy(model), ["blocks.1"])(images)["blocks.1"]
            assert torch.equal(found, tokens[0])
            if r:
                assert tokenmerge.token_sizes(found).sum(dim=1).tolist() == [handle.summary().tokens[0]] * 2


@torch.no_grad()
def test_timms_attention_maps_by_fx() -> None:
    """Unmerged they are there; of a merged block nobody can look inside, and timm says that it found none."""
    from timm.utils import AttentionExtract

    model = tiny("vit_tiny_patch16_224")
    for block in model.blocks:
        block.attn.fused_attn = False
    tokenmerge.patch(model, r=0)
    maps = AttentionExtract(model, method="fx")(images_for(model))
    assert len(maps) == 3
