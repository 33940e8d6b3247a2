"""Models whose folders or names are odd: one sentence, at once, and never another model than the one that was meant."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import tokenmerge
from tests.tools.test_hf_classifiers import KINDS
from tests.tools.test_saved import ARGS
from tokenmerge.errors import InputError
from tokenmerge.tools.common import DeviceOptions
from tokenmerge.tools.inputs import class_names, preprocessing
from tokenmerge.tools.models import load_model
from tokenmerge.tools.processors import processor_of
from tokenmerge.tools.visualize.looks import top_of


def _timm(folder: Path) -> str:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=2, **ARGS).eval()
    tokenmerge.patch(model, r=2)
    tokenmerge.save(model, folder, model_args=ARGS)
    return f"local-dir:{folder}"


def _vit(folder: Path) -> str:
    KINDS["vit"].model().save_pretrained(folder)
    KINDS["vit"].processor().save_pretrained(folder)
    return f"hf:{folder}"


def _edit(file: Path, **values: Any) -> None:
    found = json.loads(file.read_text())
    for path, value in values.items():
        place = found
        *outer, name = path.split("__")
        for one in outer:
            place = place[one]
        place[name] = value
    file.write_text(json.dumps(found))


def _load(name: str) -> Any:
    return load_model(DeviceOptions(model=name), head="images")


@pytest.mark.parametrize("make", [_timm, _vit])
@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
def test_weights_of_another_kind_are_not_converted(
    tmp_path: Path, make: Callable[[Path], str], dtype: torch.dtype, recwarn: pytest.WarningsRecorder
) -> None:
    name = make(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({key: value.to(dtype) for key, value in load_file(file).items()}, file, {"format": "pt"})
    recwarn.clear()
    with pytest.raises(InputError, match=r"but torch.float32 was expected: give the model's own"):
        _load(name)
    assert not recwarn.list
    with pytest.raises(InputError, match="was expected"):
        tokenmerge.load(tmp_path) if make is _timm else _load(name)


@pytest.mark.parametrize("change", [{"num_hidden_layers": 1}, {"qkv_bias": False}])
def test_a_config_that_leaves_weights_out_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    name = _vit(tmp_path)
    _edit(tmp_path / "config.json", **change)
    with pytest.raises(InputError, match="which its config leaves out"):
        _load(name)


def test_weights_of_further_heads_are_passed_over(tmp_path: Path) -> None:
    """As of a checkpoint of pretraining, whose pooler or decoder the classifier has not."""
    name = _vit(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    more = {"vit.pooler.dense.weight": torch.zeros(32, 32), "decoder.layers.0.weight": torch.zeros(3)}
    save_file({**state, **more}, file, {"format": "pt"})
    assert torch.equal(_load(name).classifier.weight, state["classifier.weight"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pretrained_cfg__std": [float("inf")] * 3}, r"std=\[inf"),
        ({"pretrained_cfg__std": [-1, 1, 1]}, r"std=\[-1"),
        ({"pretrained_cfg__mean": []}, r"mean=\[\]"),
        ({"pretrained_cfg__mean": "grey"}, "mean='grey'"),
        ({"pretrained_cfg__crop_pct": 0}, "crop_pct=0"),
        ({"pretrained_cfg__crop_pct": 1e-3}, "crop_pct=0.001"),
        ({"pretrained_cfg__crop_mode": "x"}, "crop_mode='x'"),
    ],
)
def test_preprocessing_that_cannot_be_right(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    name = _timm(tmp_path)
    _edit(tmp_path / "config.json", **change)
    with pytest.raises(InputError, match=words):
        preprocessing(_load(name), {})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"size": {"shortest_edge": 32}}, "from oblong images"),
        ({"do_resize": False}, "from oblong images"),
        ({"size": {"height": 20_000, "width": 20_000}}, "at most 512 were expected"),
        ({"device": "meta"}, "on the device meta"),
        ({"image_std": [0.0, 1.0, 1.0]}, "not finite"),
        ({"image_mean": "grey"}, "does not work|cannot be made"),
    ],
)
def test_processors_that_cannot_be_right(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    name = _vit(tmp_path)
    _edit(tmp_path / "preprocessor_config.json", **change)
    with pytest.raises(InputError, match=words):
        processor_of(_load(name))


def test_names_of_classes_that_cannot_be_right(tmp_path: Path) -> None:
    name = _vit(tmp_path / "hf")
    _edit(tmp_path / "hf" / "config.json", id2label={"0": "dark", "5": "light"}, label2id={"dark": 0, "light": 5})
    with pytest.raises(InputError, match=r"names the classes \[0, 5\], but 0 to 1"):
        class_names(_load(name))
    name = _timm(tmp_path / "timm")
    _edit(tmp_path / "timm" / "config.json", label_names=[["dark"], ["light"]])
    with pytest.raises(InputError, match="a list of names was expected"):
        class_names(_load(name))


def test_outputs_are_read_by_name_whatever_the_config_says(tmp_path: Path) -> None:
    name = _vit(tmp_path)
    _edit(tmp_path / "config.json", return_dict=False)
    assert _load(name)(torch.zeros(1, 3, 32, 32)).logits.shape == (1, 2)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"num_hidden_layers": 10**8}, "over 50,000 modules"), ({"num_labels": 10**14}, "at most 1,000,000 classes")],
)
def test_absurd_sizes_end_at_once(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    name = _vit(tmp_path)
    _edit(tmp_path / "config.json", **change)
    with pytest.raises(InputError, match=words):
        _load(name)


@pytest.mark.parametrize(
    ("model", "values", "words"),
    [
        ("hf:vit", {"img_size": 64}, "has no img_size"),
        ("hf:vit", {"pretrained": 1}, "has no pretrained"),
        ("hf:vit", {"head": 1, "new_head": 1}, "has no head"),
        ("hf:vit", {"num_labels": 10**14}, "at most 1,000,000 classes"),
        ("hf:vit", {"_attn_implementation": "a/b"}, "names code of its own"),
        ("hf:vit", {"auto_map": {"AutoModel": "a.B"}}, "names code of its own"),
        ("vit_tiny_patch16_224", {"pretrained": 1}, "which --pretrained says"),
        ("vit_tiny_patch16_224", {"name": "a"}, "which MODEL says"),
        ("vit_tiny_patch16_224", {"checkpoint_path": "a.pth"}, "which --checkpoint says"),
        ("torchvision:vit_b_16", {"pretrained": 1}, "has no such argument"),
        ("torchvision:vit_b_16", {"drop_path_rate": 0.0}, "--drop-path was given"),
        ("open_clip:ViT-B-32", {"name": 1}, "has no such argument"),
        ("vit_smal_patch16_224", {}, "did you mean vit_small_patch16_224"),
        ("torchvision:vit_b_61", {}, "did you mean torchvision:vit_b_16?"),
        ("open_clip:ViT-B-23", {}, "did you mean open_clip:ViT-B-32?"),
        ("local_dir:m", {}, "did you mean local-dir:?"),
        ("torchvison:vit_b_16", {}, "did you mean torchvision:?"),
        ("hf:no/folder", {}, "there is no folder of this name"),
        ("hf:", {}, "nothing after hf:"),
    ],
)
def test_names_and_arguments(model: str, values: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        load_model(DeviceOptions(model=model, model_kwargs=values))
    assert words in str(caught.value)


def test_classes_are_not_told_from_nan() -> None:
    with pytest.raises(InputError, match="at r=2 are NaN"):
        top_of(torch.tensor([[0.0, float("nan")]]), None, "r=2")
    assert top_of(torch.tensor([[0.0, 1.0]]), ["a", "b"], "r=2")[0][0] == "b"


@pytest.mark.parametrize("kind", ["vit", "deit", "dinov2", "videomae", "vivit", "ast", "whisper"])
def test_a_checkpoint_of_save_pretrained_has_names_of_its_own(tmp_path: Path, kind: str) -> None:
    """transformers renames weights when it saves and loads them."""
    model = KINDS[kind].model().eval()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    options = DeviceOptions(model=f"hf:{tmp_path}", checkpoint=file)
    state = load_model(options, head=KINDS[kind].medium.name).state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    stored = load_file(file)
    name = next(name for name in stored if stored[name].shape[:1] > (1,))
    rest, value = {other: stored[other] for other in stored if other != name}, stored[name].clone()
    for spoilt in ({}, {name: value.int()}, {name: value[:1]}, {name: value, f"{name}.more": value.clone()}):
        save_file({**rest, **spoilt}, file, {"format": "pt"})
        with pytest.raises(InputError, match="does not fit the model"):
            load_model(options, head=KINDS[kind].medium.name)
