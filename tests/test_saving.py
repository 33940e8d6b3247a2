"""Saving a model with its merging and loading it again: same settings, same logits, and no silence where it cannot be."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import tokenmerge
from tests.helpers.tiny import images_for, tiny
from tokenmerge import MergeConfig
from tokenmerge.patching.predictors import add_predictors

SETTINGS: list[dict[str, Any]] = [
    {"r": 8},
    {"r": (5, -1.0), "combine": "norm"},
    {"keep": 0.8, "metric": "x", "distance": "euclidean"},
    {"r": [3, 0, 2], "preset": "accurate"},
    {"r": 4, "matcher": "kmeans", "options": {"iterations": 3}, "prop_attn": False, "order": "spatial"},
]


@pytest.mark.parametrize("fields", SETTINGS, ids=str)
def test_configs_are_kept_in_files(tmp_path: Path, fields: dict[str, Any]) -> None:
    config = MergeConfig.create(**fields)
    file = tmp_path / "merging.json"
    config.save(file)
    assert MergeConfig.load(file) == MergeConfig.from_json(file) == MergeConfig.from_json(str(file)) == config
    with pytest.raises(tokenmerge.InputError, match="cannot be read"):
        MergeConfig.load(tmp_path / "none.json")
    with pytest.raises(tokenmerge.InputError, match="is a folder"):
        MergeConfig.load(tmp_path)
    with pytest.raises(tokenmerge.InputError, match="cannot be written"):
        config.save(tmp_path)
    assert MergeConfig.load(file) == config


@pytest.mark.parametrize("fields", SETTINGS, ids=str)
def test_a_timm_model_comes_back_merged(tmp_path: Path, fields: dict[str, Any]) -> None:
    model = tiny("vit_tiny_patch16_224")
    args: dict[str, Any] = {"img_size": 64, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **args).eval()
    handle = tokenmerge.patch(model, **fields, attention="mask", trace=True)
    tokenmerge.save(model, tmp_path, model_args=args, label_names=list("abcde"))
    images = torch.randn(2, 3, 64, 64)
    again = tokenmerge.load(tmp_path)
    found = tokenmerge.handle_of(again).config
    assert found == MergeConfig.create(**fields)  # attention and trace belong to the process
    handle.update(attention="auto")
    assert torch.equal(again(images), model(images))
    plain = timm.create_model(
        f"local-dir:{tmp_path}", pretrained=True
    ).eval()  # timm's own loader gives the unmerged model
    assert not tokenmerge.is_patched(plain)
    handle.remove()
    assert torch.equal(plain(images), model(images))
    assert json.loads((tmp_path / "config.json").read_text())["label_names"] == list("abcde")
    assert MergeConfig.load(tmp_path / "tokenmerge.json") == found
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors", "tokenmerge.json"]


def test_arguments_that_are_not_recorded_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Older versions of timm record none; a folder that would give another model is not written."""
    model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32).eval()
    vars(model).pop("model_args", None)
    monkeypatch.setattr("timm.models._hub.get_model_args", lambda model, args: dict(args), raising=False)
    tokenmerge.patch(model, r=2)
    with pytest.raises(tokenmerge.InputError, match="give them as model_args="):
        tokenmerge.save(model, tmp_path / "model")
    assert not list((tmp_path / "model").iterdir())
    tokenmerge.save(model, tmp_path / "model", model_args={"depth": 2, "img_size": 32})
    assert tokenmerge.handle_of(tokenmerge.load(tmp_path / "model")).schedule == (2, 2)


def test_predictors_are_saved_beside(tmp_path: Path) -> None:
    args: dict[str, Any] = {"depth": 2, "img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **args).eval()
    tokenmerge.patch(model, r=3, matcher="dynamicvit")
    add_predictors(model, [0, 1])
    tokenmerge.save(model, tmp_path, model_args=args)
    assert not any("predict" in name for name in load_file(tmp_path / "model.safetensors"))
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(tokenmerge.load(tmp_path)(images), model(images))


def _vit() -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    sizes |= {"image_size": 64, "patch_size": 8, "num_labels": 5}
    return ViTForImageClassification(ViTConfig(**sizes)).eval()


@pytest.mark.parametrize("fields", SETTINGS, ids=str)
def test_a_transformers_model_keeps_them_in_its_config(tmp_path: Path, fields: dict[str, Any]) -> None:
    from transformers import AutoConfig, AutoModelForImageClassification

    model = _vit()
    handle = tokenmerge.patch(model, r=1)
    handle.update(MergeConfig.create(**fields))
    model.save_pretrained(tmp_path)  # upstream's own
    kept = MergeConfig.create(**fields)
    assert MergeConfig.from_json(json.dumps(AutoConfig.from_pretrained(tmp_path).tokenmerge)) == kept
    images = torch.randn(2, 3, 64, 64)
    plain = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert not tokenmerge.is_patched(plain)
    for again in (tokenmerge.load(tmp_path), tokenmerge.load(plain)):
        assert tokenmerge.handle_of(again).config == kept
        assert torch.equal(again(images).logits, model(images).logits)
    tokenmerge.save(model, tmp_path / "ours")
    assert not (tmp_path / "ours" / "tokenmerge.json").exists()  # one source: a second one could contradict
    assert MergeConfig.from_json(json.dumps(AutoConfig.from_pretrained(tmp_path / "ours").tokenmerge)) == kept
    assert torch.equal(tokenmerge.load(tmp_path / "ours")(images).logits, model(images).logits)
    double = copy.deepcopy(model)
    handle.remove()
    assert not hasattr(model.config, "tokenmerge")
    assert hasattr(double.config, "tokenmerge")


def test_a_tower_inside_keeps_them_in_its_part_of_the_config(tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel

    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    model = CLIPModel(
        CLIPConfig(vision_config={**sizes, "image_size": 64, "patch_size": 8}, text_config={**sizes, "vocab_size": 99})
    ).eval()
    handle = tokenmerge.patch(model, r=6, combine="max")
    model.save_pretrained(tmp_path)
    assert tokenmerge.handle_of(tokenmerge.load(tmp_path)).config == handle.config


def test_what_cannot_be_kept_is_said(tmp_path: Path) -> None:
    model = _vit()
    with pytest.raises(tokenmerge.PatchError, match="holds 0 patched models"):
        tokenmerge.save(model, tmp_path / "none")
    for unmerged in (model, tmp_path):
        model.save_pretrained(tmp_path)
        with pytest.raises(tokenmerge.InputError, match="no settings of merging"):
            tokenmerge.load(unmerged)
    with pytest.raises(tokenmerge.InputError, match="cannot be read"):
        tokenmerge.load(tmp_path / "nothing")

    @tokenmerge.register_matcher("keeps_a_tensor")
    def own(metric: torch.Tensor, r: int, protected: int = 0, like: Any = None) -> Any:
        return tokenmerge.bipartite_matching(metric, r, protected)

    tokenmerge.patch(model, r=2, matcher="keeps_a_tensor", options={"like": torch.float32})
    with pytest.raises(tokenmerge.ConfigError, match="cannot be written as JSON"):
        tokenmerge.save(model, tmp_path / "tensor")
    assert not (tmp_path / "tensor").exists()
    model.save_pretrained(tmp_path)
    with pytest.raises(tokenmerge.InputError, match="cannot be written as JSON"):
        tokenmerge.load(tmp_path)


@pytest.mark.parametrize("spoil", ["settings", "config", "weights", "shape", "kind", "class"])
def test_damaged_folders_are_refused_in_one_sentence(tmp_path: Path, spoil: str) -> None:
    model = _vit() if spoil == "class" else timm.create_model("test_vit", num_classes=3).eval()
    tokenmerge.patch(model, r=2)
    tokenmerge.save(model, tmp_path)
    if spoil == "settings":
        (tmp_path / "tokenmerge.json").write_text('{"r": 8, "combine": "sum"}')
    elif spoil == "config":
        (tmp_path / "config.json").write_text("[" * 100_000)
    elif spoil == "weights":
        (tmp_path / "model.safetensors").write_bytes(b"\x80\x04." * 9)  # a pickle is no safetensors file
    elif spoil == "shape":
        state = load_file(tmp_path / "model.safetensors")
        save_file({name: value[:1].contiguous() for name, value in state.items()}, tmp_path / "model.safetensors")
    elif spoil == "kind":
        (tmp_path / "config.json").write_text('{"epochs": 3}')
    else:
        about = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**about, "architectures": ["os.system"]}))
    with pytest.raises(tokenmerge.TokenMergeError) as caught:
        tokenmerge.load(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_code_in_a_folder_never_runs(tmp_path: Path) -> None:
    model = _vit()
    tokenmerge.patch(model, r=2)
    tokenmerge.save(model, tmp_path)
    about = json.loads((tmp_path / "config.json").read_text())
    about["auto_map"] = {"AutoModelForImageClassification": "evil.Evil", "AutoConfig": "evil.EvilConfig"}
    about["architectures"] = ["Evil"]
    (tmp_path / "config.json").write_text(json.dumps(about))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(tokenmerge.InputError, match="has no model 'Evil'"):
        tokenmerge.load(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_merging_survives_in_another_process_and_format(tmp_path: Path) -> None:
    """The same logits from the folder after the files were moved, as a download moves them."""
    model = tiny("vit_tiny_patch16_224")
    images = images_for(model)
    tokenmerge.patch(model, r=3, combine="tofu")
    try:
        tokenmerge.save(model, tmp_path / "a")
    except tokenmerge.InputError:
        pytest.skip("this version of timm does not record the arguments of this model")
    (tmp_path / "a").rename(tmp_path / "b")
    assert torch.equal(tokenmerge.load(tmp_path / "b")(images), model(images))


def _settings(folder: Path) -> MergeConfig:
    return tokenmerge.handle_of(tokenmerge.load(folder)).config


def test_settings_that_contradict_each_other_are_an_error(tmp_path: Path) -> None:
    """As after save_pretrained into a folder of an older save: nobody can tell which of two mergings counts."""
    model = _vit()
    handle = tokenmerge.patch(model, r=4)
    tokenmerge.save(model, tmp_path)
    handle.update(r=9, combine="norm")
    model.save_pretrained(tmp_path)
    assert _settings(tmp_path) == MergeConfig(r=9, combine="norm")  # the config alone holds them
    MergeConfig(r=9, combine="norm").save(tmp_path / "tokenmerge.json")  # as search writes it
    assert _settings(tmp_path) == MergeConfig(r=9, combine="norm")
    MergeConfig(r=2).save(tmp_path / "tokenmerge.json")
    with pytest.raises(tokenmerge.InputError, match=r"one merging in config.json and another in tokenmerge.json"):
        tokenmerge.load(tmp_path)
    tokenmerge.save(model, tmp_path)
    assert _settings(tmp_path) == MergeConfig(r=9, combine="norm")
    handle.remove()
    model.save_pretrained(tmp_path)
    with pytest.raises(tokenmerge.InputError, match="no settings of merging"):
        tokenmerge.load(tmp_path)


def test_settings_of_a_device_are_not_taken_over(tmp_path: Path) -> None:
    model = timm.create_model("test_vit", num_classes=3).eval()
    tokenmerge.patch(model, r=2)
    tokenmerge.save(model, tmp_path)
    (tmp_path / "tokenmerge.json").write_text('{"r": 3, "attention": "math", "backend": "torch", "trace": "rollout"}')
    assert _settings(tmp_path) == MergeConfig(r=3)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: state.pop("classifier.weight"),
        lambda state: state.update({"vit.encoder.layer.9.output.dense.bias": torch.zeros(32)}),
        lambda state: state.update({"classifier.weight": torch.zeros(7, 32)}),
    ],
    ids=["missing", "unexpected", "mismatched"],
)
def test_a_model_that_would_be_partly_random_is_not_loaded(tmp_path: Path, spoil: Any) -> None:
    model = _vit()
    tokenmerge.patch(model, r=2)
    tokenmerge.save(model, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    spoil(state)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(tokenmerge.InputError, match=r"cannot be loaded|are not those of its config"):
        tokenmerge.load(tmp_path)


@pytest.mark.parametrize("make", [_vit, lambda: timm.create_model("test_vit", num_classes=3).eval()])
def test_a_compiled_model_is_saved_as_itself(tmp_path: Path, make: Any) -> None:
    model = make()
    handle = tokenmerge.patch(model, r=2)
    compiled: Any = torch.compile(model, backend="eager")
    tokenmerge.save(compiled, tmp_path)
    again = tokenmerge.load(tmp_path)
    assert tokenmerge.handle_of(again).config == handle.config
    assert all(torch.equal(one, again.state_dict()[name]) for name, one in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("make", [_vit, lambda: timm.create_model("test_vit", num_classes=3).eval()])
def test_the_dtype_comes_back(tmp_path: Path, make: Any, dtype: torch.dtype) -> None:
    model = make().to(dtype)
    tokenmerge.patch(model, r=2)
    tokenmerge.save(model, tmp_path)
    again = tokenmerge.load(tmp_path)
    images = torch.randn(2, *((3, 64, 64) if make is _vit else (3, 160, 160)), dtype=dtype)
    found, wanted = (getattr(out, "logits", out) for out in (again(images), model(images)))
    assert found.dtype == dtype
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("labels", [["a"], "abc", [1, 2, 3], ["a"] * 4])
def test_there_is_one_name_for_each_class(tmp_path: Path, labels: Any) -> None:
    for model in (_vit(), timm.create_model("test_vit", num_classes=3).eval()):
        tokenmerge.patch(model, r=2)
        with pytest.raises(tokenmerge.InputError, match="label_names"):
            tokenmerge.save(model, tmp_path / "model", label_names=labels)
        assert not (tmp_path / "model").exists()
        assert "a" not in getattr(getattr(model, "config", None), "label2id", {})


def test_errors_are_ours(tmp_path: Path) -> None:
    model = timm.create_model("test_vit", num_classes=3).eval()
    tokenmerge.patch(model, r=2)
    for odd in (None, 3, ""):
        with pytest.raises(tokenmerge.InputError, match="the path of a folder was expected"):
            tokenmerge.load(odd)  # type: ignore[arg-type]
        with pytest.raises(tokenmerge.InputError, match="the path of a folder was expected"):
            tokenmerge.save(model, odd)  # type: ignore[arg-type]
    for args in (3, {"foo": 3}, {"norm_layer": torch.nn.LayerNorm}):
        with pytest.raises(tokenmerge.InputError):
            tokenmerge.save(model, tmp_path / "model", model_args=args)  # type: ignore[arg-type]
    with pytest.raises(tokenmerge.InputError, match="meta device"):
        tokenmerge.save(model.to("meta"), tmp_path / "model")
    for options in ({"a": float("nan")}, {"a": {1: 2}}):
        with pytest.raises(tokenmerge.ConfigError, match="cannot be written as JSON"):
            MergeConfig(options=options).to_json()
    tokenmerge.save(again := _vit_patched(), tmp_path / "vit")
    about = json.loads((tmp_path / "vit" / "config.json").read_text())
    for name in ("ViTConfig", "pipeline", "AutoConfig"):
        (tmp_path / "vit" / "config.json").write_text(json.dumps({**about, "architectures": [name]}))
        with pytest.raises(tokenmerge.InputError, match="has no model"):
            tokenmerge.load(tmp_path / "vit")
    about["tokenmerge"]["window"] = 3
    (tmp_path / "vit" / "config.json").write_text(json.dumps(about))
    with pytest.raises(tokenmerge.InputError, match=r"config.json.*'window' is no field.*a newer version"):
        tokenmerge.load(tmp_path / "vit")
    assert tokenmerge.is_patched(again)


def _vit_patched() -> Any:
    model = _vit()
    tokenmerge.patch(model, r=2)
    return model
