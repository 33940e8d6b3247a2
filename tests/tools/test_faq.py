"""What docs/faq.md answers is what happens: each test quotes the question and the words that it checks.

Questions about training, hooks and changes are in `test_faq_changes.py`, and the code blocks of the page run in `test_docs.py`.
A question without a test fails, unless `NOT_RUN` in `tests/helpers/faq.py` says why.
"""

from __future__ import annotations

import itertools
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import tokenmerge
from tests.conftest import Run
from tests.families.test_transformers_heads import IMAGES, llava, prompt
from tests.helpers.faq import ANSWERS, CLAIMED, NOT_RUN, ROOT, claim, said, small  # noqa: F401  (a fixture of every test)
from tests.helpers.tiny import images_for, tiny
from tests.helpers.towers import BY_NAME
from tests.tools import test_faq_changes  # noqa: F401  (its tests answer questions, too)
from tokenmerge import UnsupportedModelError
from tokenmerge.ops import native_build
from tokenmerge.patching.tuning import run as tuning


def test_every_question_is_tested_or_says_why_not() -> None:
    assert len(ANSWERS) > 15
    assert set(CLAIMED) | set(NOT_RUN) == set(ANSWERS)
    assert not set(CLAIMED) & set(NOT_RUN)


# --- speed -------------------------------------------------------------------------------------------------


@claim("Is it ever slower?", "sets r=0 if merging does not pay there")
def test_tune(monkeypatch: pytest.MonkeyPatch) -> None:
    def merging_is_slower(call: Any, use: Any, count: int, device: Any, rounds: int) -> list[list[float]]:
        found = []
        for which in range(count):
            use(which)
            found.append([2.0 if any(handle.schedule) else 1.0] * rounds)
        return found

    monkeypatch.setattr(tuning, "in_turns", merging_is_slower)
    model = small()
    handle = tokenmerge.patch(model, r=5)
    handle.tune(images_for(model), schedule=True, rounds=3, forms=["mask"], backends=["torch"])
    assert handle.schedule == (0, 0, 0)


@claim(
    "How do I see what was decided, and why?",
    "where r was cut, the form of attention, whether attention is proportional, and the backend, each with its reason",
    "`print(handle)` shows the settings that are not the defaults",
    "at level `INFO` whenever a model is patched or updated, and once for each number of tokens where r was cut",
)
def test_what_was_decided(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tokenmerge")
    model = small()
    handle = tokenmerge.patch(model, r=30)
    summary = handle.summary()
    for reason in (summary.attention_reason, summary.prop_attn_reason, summary.backend_reason):
        assert reason in " ".join(str(summary).split())
        assert any(record.getMessage().endswith(reason) for record in caplog.records)
    assert "was cut to" in str(summary)
    assert sum("r was cut" in record.getMessage() for record in caplog.records) == 1
    assert str(handle) == f"<Handle of {summary.model}: r=30>"
    caplog.clear()
    handle.update(r=2)
    assert "r 2 in each" in caplog.text


@claim(
    "Why is it no faster on my GPU?",
    "`tokenmerge bench MODEL --break-even --device cuda` finds",
    "`handle.summary()` shows whether the Triton kernels run, and the reason if they do not.",
)
def test_why_no_kernels(run: Run) -> None:
    """Times need a GPU (benchmarks/gpu.py); the command is understood, and the summary says what runs."""
    with tokenmerge.patched(small(), r=5) as handle:
        summary = handle.summary()
        assert f"backend {summary.backend}: {summary.backend_reason[:20]}" in str(summary)
        assert summary.backend_reason
    if not torch.cuda.is_available():
        code, _, err = run("bench", "test_vit", "--break-even", "--device", "cuda")
        assert code == 2
        assert "cuda" in err


@claim(
    "Does it compile something on my CPU?",
    "(or `$XDG_CACHE_HOME`), which must not be writable by other users",
    'with `backend="torch"`, PyTorch\'s operators compute the same',
    "The summary says which backend runs",
)
def test_functions_in_c(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    request.addfinalizer(native_build._own_folder.cache_clear)
    native_build._own_folder.cache_clear()
    folder = native_build._own_folder()
    assert folder == tmp_path / "tokenmerge"
    assert folder.stat().st_mode & 0o077 == 0
    folder.chmod(0o777)
    native_build._own_folder.cache_clear()
    with pytest.raises(native_build.BuildError, match="can be written by, other users"):
        native_build._own_folder()
    model = small()
    images, found = images_for(model), {}
    for backend in ("auto", "torch"):
        with tokenmerge.patched(model, r=5, backend=backend) as handle, torch.inference_mode():
            found[handle.summary().backend] = model(images)
    assert "torch" in found
    for other in found.values():  # one where there is no compiler
        torch.testing.assert_close(other, found["torch"])


@claim("Does it work with `torch.compile`?", "Yes, without graph breaks.", "A change of r causes a recompilation.")
def test_compiles() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    model = small()
    images = images_for(model)
    handle = tokenmerge.patch(model, r=5)
    compiled: Any = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), model(images))
        assert counter.frame_count == 1
        compiled(images)
        assert counter.frame_count == 1
        handle.update(r=3)
        torch.testing.assert_close(compiled(images), model(images))
    assert counter.frame_count == 2


# --- choice of r, and accuracy -----------------------------------------------------------------------------


@claim("Which r should I use?", "`speedup=2` halves the FLOPs.")
def test_half_the_flops() -> None:
    """How accuracy falls with r needs real weights: docs/compare.md."""
    with tokenmerge.patched(timm.create_model("test_vit"), speedup=2) as handle:
        assert 2 <= handle.summary().flops_ratio < 2.1


@claim(
    "Why is my accuracy far below the paper's?",
    "It must be off for MAE-pretrained weights that are used without training, and on for all others",
    "overrides the automatic choice",
)
def test_proportional_attention() -> None:
    small_sizes: dict[str, Any] = {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 64}
    for name, on in (("vit_base_patch16_224.mae", False), ("vit_base_patch16_224.augreg_in1k", True)):
        with tokenmerge.patched(timm.create_model(name, **small_sizes), r=2) as handle:
            assert handle.summary().prop_attn is on
            assert f"proportional attention {'on' if on else 'off'}" in str(handle.summary())
            handle.update(prop_attn=not on)
            assert handle.summary().prop_attn is not on


@claim(
    "Does it work with images of another size, or 16:9?",
    "timm: `dynamic_img_size=True`; transformers: `interpolate_pos_encoding=True`",
    "`keep`, `flops` and `speedup` are resolved for the number of tokens in each pass.",
    "`r` is a number of tokens and does not depend on the image size.",
    "`summary` computes in advance how many tokens remain, and `handle.trace.grid` is the grid of a pass",
)
@pytest.mark.parametrize("schedule", [{"keep": 0.8}, {"flops": 0.7}, {"speedup": 1.4}, {"r": 5}], ids=str)
@torch.no_grad()
def test_sizes(schedule: dict[str, Any]) -> None:
    model: Any = timm.create_model("test_vit", dynamic_img_size=True).eval()
    handle = tokenmerge.patch(model, trace=True, **schedule)
    counts = {}
    for size, grid in (((160, 160), (10, 10)), ((144, 256), (9, 16))):
        features = model.forward_features(torch.randn(1, 3, *size))
        counts[size] = handle.summary(input_size=size).tokens
        assert counts[size][-1] == features.shape[1]
        assert handle.trace.grid == grid
    merged = {size: tuple(before - after for before, after in itertools.pairwise(c)) for size, c in counts.items()}
    assert (len(set(merged.values())) == 1) is ("r" in schedule)
    tower = BY_NAME["ViTModel"].build()
    tokenmerge.patch(tower, **schedule)
    found = tower(torch.randn(1, 3, 96, 160), interpolate_pos_encoding=True).last_hidden_state
    assert found.shape[1] == 61


# --- features ----------------------------------------------------------------------------------------------


@claim(
    "Can I use it for dense prediction (segmentation, depth)?",
    "`handle.trace.unmerge(features)` and `to_grid` map features back to the grid",
    "`forward_intermediates` returns full maps, together with the features of `forward_features`",
    "All patches of a token get the same features",
)
@torch.no_grad()
def test_dense() -> None:
    model = small()
    images = images_for(model)
    handle = tokenmerge.patch(model, r=5, trace=True)
    features = model.forward_features(images)
    full, source = handle.trace.unmerge(features), handle.trace.source()
    assert full.shape == (2, 37, 48)
    assert torch.equal(full, features.gather(1, source.unsqueeze(2).expand_as(full)))
    assert torch.equal(handle.trace.to_grid(features).flatten(2).transpose(1, 2), full[:, 1:])
    last, maps = model.forward_intermediates(images)
    assert [tuple(one.shape) for one in maps] == [(2, 48, 6, 6)] * 3
    torch.testing.assert_close(last, features)


@claim("Can I pool the features myself?", "Yes, weighted by size, without class token and registers")
@torch.no_grad()
def test_pooling() -> None:
    """The weighted mean is the mean over all patches."""
    model = tiny("vit_medium_patch16_reg4_gap_256")
    handle = tokenmerge.patch(model, r=5, trace=True)
    features = model.forward_features(images_for(model))
    prefix = model.num_prefix_tokens
    x, sizes = features[:, prefix:], tokenmerge.token_sizes(features)[:, prefix:]
    pooled = (x * sizes.unsqueeze(2)).sum(1) / sizes.sum(1, keepdim=True)
    torch.testing.assert_close(pooled, handle.trace.unmerge(features)[:, prefix:].mean(1))


@claim(
    "What did the model attend to?",
    "`handle.trace.rollout()` returns attention rollout through all merges, as a map on the grid",
    '`trace="attention"` records class attention block by block',
)
@torch.no_grad()
def test_attended() -> None:
    model = small()
    handle = tokenmerge.patch(model, r=5, trace="rollout")
    model(images_for(model))
    assert handle.trace.rollout().shape == (2, 6, 6)
    handle.update(trace="attention")
    model(images_for(model))
    assert [None if one is None else tuple(one.shape) for one in handle.trace.attention] == [(2, 37), (2, 32), (2, 27)]


@claim(
    "Can I use it for vision-language models?",
    "`patch` finds the tower inside CLIP, SigLIP or LLaVA-like models; the modules that read it get unmerged tokens",
    "LLaVA's language model; CLIP, which reads the class token",
    "`output_tokens(layer=-2)` is for models that read the last layer but one",
    "A bare tower (`Dinov2Model`, `VideoMAEModel`) returns merged tokens on request.",
    "A module of your own around a model gets unmerged tokens",
    "patch the model inside it (`tokenmerge.patch(mine.backbone, …)`) to get merged ones",
)
@torch.no_grad()
def test_towers() -> None:
    model = llava(vision_feature_layer=-1).eval()
    with tokenmerge.patched(model, r=3) as handle:
        assert model(**IMAGES, input_ids=prompt(36)).logits.isfinite().all()
        handle.update(output="merged")
        words = handle.output_tokens() - 1
        assert handle.output_tokens(layer=-2) > handle.output_tokens() < 37
        assert model(**IMAGES, input_ids=prompt(words)).logits.isfinite().all()
    for name in ("CLIPVisionModel", "SiglipVisionModel", "Dinov2Model", "VideoMAEModel"):
        tower = BY_NAME[name]
        own, feed = tower.build(), tower.feed(2)
        before = own(**feed).last_hidden_state.shape
        with tokenmerge.patched(own, r=3) as handle:
            assert own(**feed).last_hidden_state.shape == before
            if name in ("Dinov2Model", "VideoMAEModel", "CLIPVisionModel"):
                handle.update(output="merged")
                assert own(**feed).last_hidden_state.shape[1] == handle.output_tokens() < before[1]

    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = BY_NAME["Dinov2Model"].build()

        def forward(self, **feed: Tensor) -> Tensor:
            features: Tensor = self.backbone(**feed).last_hidden_state
            return features

    mine, feed = Mine().eval(), BY_NAME["Dinov2Model"].feed(2)
    before = mine(**feed).shape
    with tokenmerge.patched(mine, r=3):
        assert mine(**feed).shape == before
    with pytest.raises(tokenmerge.ConfigError):
        tokenmerge.patch(mine, r=3, output="merged")
    with tokenmerge.patched(mine.backbone, r=3, output="merged") as handle:
        assert mine(**feed).shape[1] == handle.output_tokens() < before[1]


# --- models ------------------------------------------------------------------------------------------------


@claim(
    "Does it work with Swin, MViT, Hiera, ConvNeXt, SAM?",
    "No: windows, pooling and convolution need every patch in its place.",
    "`tokenmerge inspect MODEL` prints the reason, and so does `patch`, before it changes anything",
)
@pytest.mark.parametrize(
    "name",
    ["swin_tiny_patch4_window7_224", "mvitv2_tiny", "hiera_tiny_224", "convnext_tiny", "samvit_base_patch16"],
)
def test_refused(name: str, run: Run) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    classes, keys = [type(part) for part in model.modules()], list(model.state_dict())
    with pytest.raises(UnsupportedModelError) as error:
        tokenmerge.patch(model, r=8)
    assert error.value.reasons
    assert ([type(part) for part in model.modules()], list(model.state_dict())) == (classes, keys)
    if name.startswith("swin"):
        code, out, err = run("inspect", name)
        assert code == 2
        assert "attend within windows" in " ".join((out + err).split())


@claim(
    "Can I merge tokens in an architecture of my own?",
    "Add `size.log()` to the attention scores of the next block.",
    "(This needs no library but torch.)",
    "pass the sizes on: `plan.merge(y, size)`",
)
def test_own_architecture() -> None:
    """Attention to a merged token with the log of its size is attention to all of its equal members."""
    x = torch.randn(1, 6, 8)
    x[:, 2] = x[:, 5]
    plan = tokenmerge.bipartite_matching(x, r=1)
    y, size = plan.merge(x)
    assert plan.tokens_out == 5
    scores = y @ y.transpose(1, 2) / 8**0.5 + size.log().unsqueeze(1)
    wanted = torch.nn.functional.scaled_dot_product_attention(x, x, x)
    torch.testing.assert_close(plan.unmerge(scores.softmax(dim=2) @ y), wanted)
    again, sizes = tokenmerge.bipartite_matching(y, r=1).merge(y, size)
    assert again.shape[1] == 4
    assert sizes.sum() == 6
    code = "import sys, tokenmerge; print({'timm', 'transformers', 'torchvision', 'numpy.testing'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "set()"


@claim("Can I use it for diffusion models (tomesd)?", '(`matcher="strided"`)')
@torch.no_grad()
def test_strided() -> None:
    """A U-Net has no tokens that go from block to block; only the matching can be run here."""
    model = small()
    with tokenmerge.patched(model, r=5, matcher="strided") as handle:
        assert model.forward_features(images_for(model)).shape[1] == handle.output_tokens() == 22
    with pytest.raises(UnsupportedModelError):
        tokenmerge.patch(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 3, 3)), r=5)


# --- licence -----------------------------------------------------------------------------------------------


@claim("Can I use it commercially?", "Yes, under Apache-2.0.")
def test_licence() -> None:
    assert "Apache License" in (ROOT / "LICENSE").read_text("utf-8")
    assert 'license = "Apache-2.0"' in (ROOT / "pyproject.toml").read_text("utf-8")


@claim("How do I cite it?", "The file CITATION.cff in the repository holds the reference.")
def test_citation() -> None:
    assert "Token Merging: Your ViT But Faster" in (ROOT / "CITATION.cff").read_text("utf-8")
