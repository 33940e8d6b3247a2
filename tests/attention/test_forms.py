"""Every form of proportional attention computes the same, in values, gradients and whole models."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import timm
import torch
from torch import Tensor
from torch.nn import functional as F

import tokenmerge
from tests.helpers.tiny import images_for, tiny
from tests.helpers.towers import TOWERS
from tokenmerge.attention import forms as attention_forms
from tokenmerge.attention.call import AttentionCall
from tokenmerge.attention.forms import FORMS, choose_form
from tokenmerge.attention.tap import Tap, open_tap, size_bias
from tokenmerge.errors import ConfigError, InputError
from tokenmerge.ops.timing import take_turns

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EVERY = pytest.mark.parametrize("form", [form for form in FORMS if form not in ("auto", "mask")])
HERE = pytest.mark.parametrize("form", ["mask", "math", "key_channel", "value_channel"])
# relative to the largest output. Half precision: scores, weights and (for the value channel) weighted values are rounded
# kernels of GPUs add up in other orders
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-6 if DEVICE == "cpu" else 1e-5,
    torch.bfloat16: 2e-2,
    torch.float16: 3e-3,
}


@pytest.fixture(autouse=True)
def flex_without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU flex attention runs by its definition: its compiler has no backward pass there."""
    from torch.nn.attention.flex_attention import flex_attention

    if DEVICE == "cpu":
        monkeypatch.setattr(attention_forms, "_compiled_flex", lambda: flex_attention)


def reference(q: Tensor, k: Tensor, v: Tensor, size: Tensor, scale: float) -> Tensor:
    """softmax(QKᵀ·scale + log size) V in float64; paper, section 3."""
    scores = q.double() @ k.double().transpose(2, 3) * scale + size.double().log()[:, None, None, :]
    return scores.softmax(dim=-1) @ v.double()


def attend(form: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, **options: Any) -> Tensor:
    """Attention as upstream calls it, answered in that form."""
    with AttentionCall(form):
        return F.scaled_dot_product_attention(q, k, v, mask, **options)


@EVERY
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "channels", "scale"), [(7, 8, None), (50, 64, None), (65, 72, 0.2), (33, 80, None)])
def test_values_and_gradients(form: str, dtype: torch.dtype, tokens: int, channels: int, scale: float | None) -> None:
    """Odd numbers of tokens, heads that are no power of two, large sizes, and padding (size 0)."""
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(2, 3, tokens, channels, device=DEVICE).to(dtype) for _ in range(4))
    size = torch.randint(1, 400, (2, tokens), device=DEVICE).float()
    size[:, -2] = 0
    mask = size_bias(size, v)
    assert mask is not None
    size = mask.exp()[:, 0, 0].float()  # as the mask holds it, in this dtype
    for x in (q, k, v):
        x.requires_grad_()
    factor = channels**-0.5 if scale is None else scale
    wanted = reference(q, k, v, size, factor)
    wanted_grads = torch.autograd.grad(wanted, (q, k, v), grad.double())
    backward = form != "flex" or DEVICE == "cuda"  # PyTorch's flex attention has no gradient on a CPU
    with torch.set_grad_enabled(backward):
        inputs = (q, k, v) if backward else (q.detach(), k.detach(), v.detach())
        found = attend(form, *inputs, mask, scale=scale)
    assert type(found) is Tensor
    assert found.dtype == dtype
    grads = torch.autograd.grad(found, (q, k, v), grad) if backward else ()
    for ours, theirs in zip((found, *grads), (wanted, *wanted_grads), strict=backward):
        assert ours.isfinite().all()
        gap = (ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()
        assert gap <= TOLERANCE[dtype], f"{gap:.1e}"


@HERE
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_ranges(form: str, dtype: torch.dtype) -> None:
    """float64 is computed in float64; large values and sizes together do not overflow float16."""
    if form == "mask":
        pytest.skip("PyTorch's own")
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 33, 64, device=DEVICE).to(dtype) for _ in range(3))
    v = v * (1 if dtype == torch.float64 else 200)
    size = torch.full((2, 33), 400.0, device=DEVICE, dtype=dtype)
    size[:, 3] = 1
    mask = size.log()[:, None, None, :]
    wanted = reference(q, k, v, mask.double().exp()[:, 0, 0], 0.125)
    found = attend(form, q, k, v, mask)
    gap = (found.double() - wanted).abs().max() / wanted.abs().max()
    assert gap <= TOLERANCE[dtype], f"{gap:.1e}"


@EVERY
def test_dropout_drops_from_the_weights_alone(form: str) -> None:
    """Its mean over many draws is attention without dropout; a divisor that drops as well would change the spread."""
    q, k = torch.zeros(2, 1, 4000, 8, 16, device=DEVICE).unbind(0)
    v = torch.ones(1, 4000, 8, 16, device=DEVICE)
    mask = torch.zeros(1, 1, 1, 8, device=DEVICE)
    out = attend(form, q, k, v, mask, dropout_p=0.5)
    # each output is the mean of eight weights that are 0 or 2, so its variance is 1/8
    assert float(out.mean()) == pytest.approx(1.0, abs=0.02)
    assert float(out[..., 0].var()) == pytest.approx(1 / 8, rel=0.1)


@EVERY
def test_more_than_sizes_is_left_to_pytorch(form: str) -> None:
    """A mask with a row per query is no column of sizes: no form takes it apart."""
    q, k, v = torch.randn(3, 1, 2, 6, 16, device=DEVICE).unbind(0)
    mask = torch.randn(1, 1, 6, 6, device=DEVICE)
    found = attend(form, q, k, v, mask)
    assert torch.equal(found, F.scaled_dot_product_attention(q, k, v, mask))


def test_a_call_is_answered_in_its_thread_and_its_time_only() -> None:
    """What is noted belongs to the thread that computes, and ends with the context, also after an error."""
    q, k, v = torch.randn(3, 1, 2, 6, 16, device=DEVICE).unbind(0)
    with Tap() as tap, AttentionCall(watch=True):
        other = threading.Thread(target=F.scaled_dot_product_attention, args=(q, k, v))
        other.start()
        other.join()
        early: Any = tap.inside
        assert early is None
        F.scaled_dot_product_attention(q, k, v)
    assert tap.inside is not None
    assert tap.inside[1] is k
    with Tap() as outer:
        with pytest.raises(ValueError, match="nope"), Tap(), AttentionCall(watch=True):
            int("nope")
        assert open_tap() is outer
        F.scaled_dot_product_attention(q, k, v)
        assert outer.inside is None
    assert open_tap() is None


@HERE
def test_multi_head_attention_is_answered_inside(form: str) -> None:
    """PyTorch's own module: no mask is given to it, and the sizes act as a float key padding mask does."""
    module = torch.nn.MultiheadAttention(32, 2, batch_first=True).eval()
    x = torch.randn(2, 7, 32)
    size = torch.randint(1, 9, (2, 7)).float()
    bias = size_bias(size, x)
    wanted = module(x, x, x, need_weights=False, key_padding_mask=size.log())[0]
    with Tap() as tap, AttentionCall(form, watch=True, bias=bias):
        found = module(x, x, x, need_weights=False)[0]
    torch.testing.assert_close(found, wanted, atol=2e-6, rtol=2e-5)
    assert tap.inside is not None
    assert tap.inside[1].shape == (2, 2, 7, 16)
    with torch.no_grad():  # nothing of it is left behind
        assert torch.equal(module(x, x, x)[0], copy.deepcopy(module)(x, x, x)[0])


@pytest.mark.parametrize(
    ("name", "form"),
    [
        pytest.param(
            name, form, marks=() if name == "deit_tiny_patch16_224" or form == "key_channel" else pytest.mark.slow
        )
        for name in ("deit_tiny_patch16_224", "eva02_tiny_patch14_224", "vit_small_patch14_reg4_dinov2")
        for form in ("mask", "math", "key_channel", "value_channel")
    ],
)
def test_whole_models_of_timm(name: str, form: str) -> None:
    torch.compiler.reset()  # models of one class share a limit of compiled versions, patched or not
    model = tiny(name, depth=2)
    images = images_for(model)
    with torch.set_grad_enabled(name.startswith("deit")):  # one with a backward pass to trace, too
        with tokenmerge.patched(model, r=5, attention="mask"):
            wanted = model(images)
        with tokenmerge.patched(model, r=5, attention=form) as handle:
            assert handle.summary().attention == form
            torch.testing.assert_close(model(images), wanted, atol=2e-5, rtol=2e-5)
            # it takes sizes and merges, and is of the class of the other
            model.blocks[-1].compile(fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(model(images), wanted, atol=2e-5, rtol=2e-5)


@HERE
@pytest.mark.parametrize("name", ["vit.ViTModel", "videomae.VideoMAEModel"])
def test_whole_models_of_transformers(name: str, form: str) -> None:
    """The second one's attention takes no mask at all: the sizes reach it by the name of its implementation."""
    tower = next(tower for tower in TOWERS if tower.name == name)
    model = tower.build(attn_implementation="sdpa")
    inputs = tower.feed(2)
    with torch.no_grad():
        with tokenmerge.patched(model, r=5, attention="mask"):
            wanted = model(**inputs).last_hidden_state
        with tokenmerge.patched(model, r=5, attention=form):
            torch.testing.assert_close(model(**inputs).last_hidden_state, wanted, atol=2e-5, rtol=2e-5)


def test_what_auto_means() -> None:
    half, full = torch.bfloat16, torch.float32
    assert choose_form("auto", "cuda", True, half).form == "triton"
    assert choose_form("auto", "cuda", True, half, kernels=False).form == "mask"
    assert choose_form("auto", "cuda", True, half, learns=True).form == "efficient"
    assert choose_form("auto", "cuda", True, full).form == "mask"
    assert choose_form("auto", "cuda", False, half).form == "mask"
    assert choose_form("auto", "cpu", False, full).form == "mask"
    assert choose_form("flex", "cuda", True, half).form == "flex"


@pytest.mark.skipif(DEVICE == "cuda", reason="needs a machine without a GPU")
@pytest.mark.parametrize("form", ["cudnn", "efficient", "flex"])
def test_forms_that_need_a_gpu(form: Any) -> None:
    model = tiny("deit_tiny_patch16_224")
    with pytest.raises(ConfigError, match=rf"attention='{form}' needs a CUDA device.*use attention='auto'"):
        tokenmerge.patch(model, r=5, attention=form)
    assert not tokenmerge.is_patched(model)


def test_attention_that_has_no_choice() -> None:
    """Sizes that reach attention elsewhere: "auto" says so, a form that is asked for is an error."""
    model = tiny("beit_base_patch16_224")
    handle = tokenmerge.patch(model, r=5)
    assert handle.summary().attention == "mask"
    assert "elsewhere" in str(handle.summary())
    with pytest.raises(ConfigError, match="takes the sizes elsewhere"):
        handle.update(attention="key_channel")
    assert handle.config.attention == "auto"
    with pytest.raises(ConfigError, match="must be one of auto, mask"):
        handle.update(attention="fast")


def test_tuning_times_passes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What checks whether a form can run, and what switches to it, is done outside of what is timed."""
    from tokenmerge.patching import check
    from tokenmerge.patching.tuning import measure

    model = tiny("deit_tiny_patch16_224")
    handle = tokenmerge.patch(model, r=5)
    events: list[str] = []

    def checked(*_: Any) -> bool:
        events.append("check")
        return True

    monkeypatch.setattr(check, "reaches_sdpa", checked)

    def watched(calls: Any, *args: Any, **options: Any) -> Any:
        events.append("start")
        found = take_turns(calls, *args, **options)
        events.append("end")
        return found

    monkeypatch.setattr(measure, "take_turns", watched)
    handle.tune(images_for(model), rounds=2)
    assert events.count("start") == 2  # forms of attention, then backends
    while "start" in events:
        assert "check" not in events[events.index("start") : events.index("end")]
        events = events[events.index("end") + 1 :]


def test_tuning_measures_and_chooses() -> None:
    model = tiny("deit_tiny_patch16_224")
    images = images_for(model)
    handle = tokenmerge.patch(model, r=5)
    wanted = model(images)
    tuning = handle.tune(images, rounds=2)
    ran = {one.choice for one in tuning.tried if one.what == "attention" and one.seconds is not None}
    if DEVICE == "cpu":
        assert ran == {"mask", "math", "key_channel", "value_channel"}  # Triton's interpreter is not measured
    assert handle.config.attention == tuning.chosen["attention"]
    torch.testing.assert_close(model(images), wanted, atol=2e-5, rtol=2e-5)
    assert handle.tune(images, forms=["math"], rounds=1).chosen["attention"] == "math"
    assert handle.config.attention == "math"
    for rounds, forms in ((0, None), (1, [])):
        with pytest.raises(InputError):
            handle.tune(images, rounds=rounds, forms=forms)
        assert handle.config.attention == "math"
    with pytest.raises(TypeError):
        handle.tune(rounds=1)  # the model's own error for missing inputs
    assert handle.config.attention == "math"


@HERE
def test_training_and_autocast(form: str) -> None:
    """Gradients of a checkpointed step, in float32 and under autocast, are those of the mask."""
    model = tiny("deit_tiny_patch16_224")
    model.set_grad_checkpointing(True)
    images = images_for(model)
    found = []
    for attention in ("mask", form):
        with tokenmerge.patched(model, r=5, attention=attention):
            model.zero_grad()
            model(images).square().sum().backward()
            found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
            with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
                assert model(images).isfinite().all()
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-4)


def test_exported_programs_hold_plain_masks() -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=64).eval()
    with tokenmerge.patched(model, r=3, attention="key_channel"):
        program = torch.export.export(model, (torch.randn(2, 3, 64, 64),))
    calls = [str(node.target) for node in program.graph.nodes if "attention" in str(node.target)]
    assert len(calls) == 2
