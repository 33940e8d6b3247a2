"""torchvision in eval, compare, visualize and train; open_clip by zero-shot classification."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import load_file
from torchvision.models import VisionTransformer, ViT_B_32_Weights, _api

from tests.conftest import CLASSES, Run
from tokenmerge.tools.common import DeviceOptions
from tokenmerge.tools.eval import EvalOptions
from tokenmerge.tools.eval.data import make_dataset
from tokenmerge.tools.inputs import class_names
from tokenmerge.tools.media import IMAGES
from tokenmerge.tools.models import RANDOM_WEIGHTS, load_model
from tokenmerge.tools.zero_shot import words

ARCHITECTURE = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture(autouse=True)
def _tiny_models(tmp_path: Path) -> Iterator[None]:
    """A small architecture in each library, which the commands then know by its name."""

    def tiny_vit(
        *, weights: ViT_B_32_Weights | None = None, progress: bool = True, image_size: int = 32, **kwargs: Any
    ) -> VisionTransformer:
        assert weights is None
        torch.manual_seed(0)
        return VisionTransformer(image_size, 8, 2, 2, 32, 64, **kwargs)

    tiny_vit.__annotations__["weights"] = ViT_B_32_Weights | None
    _api.register_model("tiny_vit")(tiny_vit)
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "Tiny-ViT.json").write_text(json.dumps(ARCHITECTURE))
    open_clip.add_model_config(tmp_path / "clip")
    yield
    del _api.BUILTIN_MODELS["tiny_vit"]
    open_clip.factory._MODEL_CONFIGS.pop("Tiny-ViT", None)


def rows_of(run: Run, tmp_path: Path, *arguments: object) -> tuple[list[Any], str]:
    code, _, err = run(*arguments, "--json", tmp_path / "rows.json")
    assert code == 0, err
    found: list[Any] = json.loads((tmp_path / "rows.json").read_text())
    return found, " ".join(err.split())


def test_torchvision_is_trained_and_read_again(data: Path, tmp_path: Path, run: Run) -> None:
    """The weights, with a file that names classes and preprocessing beside them."""
    for split in ("train", "val"):
        shutil.copytree(data, tmp_path / "data" / split)
    words = ("--data", tmp_path / "data", "--output", tmp_path / "run", "--workers", 0, "--device", "cpu")
    more = ("--epochs", 1, "--warmup-epochs", 0, "-b", 4, "--r", 2, "--lr", "0.01", "--layer-decay", "0.5")
    code, out, err = run("train", "torchvision:tiny_vit", *words, *more, "--mean", "0.1", "0.2", "0.3")
    assert code == 0, err
    made = tmp_path / "run" / "model"
    again = f"eval torchvision:tiny_vit --checkpoint {made / 'model.safetensors'} --num-classes 3"
    assert again.replace(" ", "") in "".join(out.split())
    about = json.loads((made / "torchvision.json").read_text())
    assert about["name"] == "torchvision:tiny_vit"
    assert about["classes"] == list(CLASSES)
    rows, err = rows_of(run, tmp_path, *again.split(), "--data", tmp_path / "data" / "val", "--r", 2, "--workers", 0)
    assert "random weights" not in err
    log = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["top1"] == [row["top1"] for row in log if row["kind"] == "eval"][-1]
    args = DeviceOptions(model="torchvision:tiny_vit", num_classes=3, checkpoint=made / "model.safetensors")
    model = load_model(args)
    assert class_names(model) == list(CLASSES)
    dataset: Any = make_dataset(model, EvalOptions(model="m", data=data), IMAGES)
    with Image.open(dataset.samples[0][0]) as image:
        own = ViT_B_32_Weights.DEFAULT.transforms(crop_size=32, resize_size=36, mean=(0.1, 0.2, 0.3))
        torch.testing.assert_close(dataset[0][0], own(image.convert("RGB")), atol=1e-5, rtol=0)
    plain = VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=3)
    plain.load_state_dict(load_file(made / "model.safetensors"))
    plain.eval()
    batch = dataset[0][0][None]
    with torch.inference_mode():
        torch.testing.assert_close(model(batch), plain(batch))
    picture = dataset.samples[0][0]
    rows, err = rows_of(run, tmp_path, "visualize", *again.split()[1:2], picture, *again.split()[2:4], "--r", 2,
                        "--num-classes", 3)  # fmt: skip
    assert {row["class"] for row in rows[0]["top"]} == set(CLASSES)
    (made / "torchvision.json").write_text(json.dumps({**about, "name": "torchvision:vit_b_16"}))
    code, _, err = run(*again.split(), "--data", data, "--r", 2)
    assert code == 2
    assert "give the model that was trained" in err


def test_torchvision_in_compare(data: Path, tmp_path: Path, run: Run) -> None:
    model = ("torchvision:tiny_vit", "--num-classes", 3, "--data", data, "--workers", 0, "--r", 2)
    rows, err = rows_of(
        run, tmp_path, "compare", *model, "--methods", "tome", "--rounds", 0, "--output", tmp_path / "c"
    )
    assert len(rows) == 2
    assert RANDOM_WEIGHTS in err


@pytest.fixture
def clip_weights(tmp_path: Path) -> tuple[Any, Path]:
    torch.manual_seed(1)
    clip = open_clip.create_model("Tiny-ViT")
    with torch.no_grad():
        for parameter in clip.parameters():
            if parameter.dim():
                parameter.normal_(0, 0.3)
    path = tmp_path / "clip.pt"
    torch.save(clip.state_dict(), path)
    return clip.eval(), path


def test_zero_shot_classification_is_open_clips(
    data: Path, tmp_path: Path, run: Run, clip_weights: tuple[Any, Path]
) -> None:
    """The same hits as by the library alone, with its own transform, tokenizer and template."""
    clip, weights = clip_weights
    preprocess = image_transform_v2(PreprocessCfg(**clip.visual.preprocess_cfg), is_train=False)
    texts = open_clip.get_tokenizer("Tiny-ViT")([f"a photo of a {name}." for name in CLASSES])
    hits = []
    with torch.inference_mode():
        wanted = clip.encode_text(texts, normalize=True)
        for label, name in enumerate(CLASSES):
            for path in sorted((data / name).iterdir()):
                with Image.open(path) as image:
                    found = clip.encode_image(preprocess(image.convert("RGB"))[None], normalize=True)
                hits.append(int((found @ wanted.T).argmax()) == label)
    name = f"open_clip:Tiny-ViT:{weights}"
    rows, err = rows_of(run, tmp_path, "eval", name, "--data", data, "--r", 0, 2, "--workers", 2)
    assert rows[0]["top1"] == pytest.approx(100 * np.mean(hits))
    assert rows[1]["gflops"] < rows[0]["gflops"]
    assert "random weights" not in err  # a file of weights was named
    (tmp_path / "map.txt").write_text("\n".join(["dog", *reversed(CLASSES)]))
    rows, _ = rows_of(run, tmp_path, "eval", name, "--data", data, "--r", 0, "--class-map", tmp_path / "map.txt")
    assert rows[0]["images"] == 12
    rows, _ = rows_of(
        run, tmp_path, "compare", name, "--data", data, "--r", 2, "--methods", "tome", "--rounds", 0, "--workers", 0,
        "--output", tmp_path / "c",
    )  # fmt: skip
    assert rows[0]["top1"] == pytest.approx(100 * np.mean(hits))


def test_open_clip_elsewhere(data: Path, tmp_path: Path, run: Run) -> None:
    rows, err = rows_of(run, tmp_path, "eval", "open_clip:Tiny-ViT", "--data", data, "--r", 0, "--workers", 0)
    assert RANDOM_WEIGHTS in err
    shutil.copytree(data, tmp_path / "data" / "train")
    code, _, err = run("train", "open_clip:Tiny-ViT", "--data", tmp_path / "data", "--output", tmp_path / "run")
    assert code == 2
    assert "classifies by comparing pictures with texts" in err
    code, _, err = run("eval", "open_clip:Tiny-ViT", "--data", data, "--r", 0, "--crop-pct", "0.9")
    assert code == 2
    assert "--crop-pct is not known to open_clip's preprocessing" in err
    rows, _ = rows_of(run, tmp_path, "visualize", "open_clip:Tiny-ViT", data / "ant" / "0.png", "--r", 2)
    assert rows[0]["top"] == []


def test_class_names_in_words() -> None:
    assert words("n01440764") == "tench"
    assert words("palm_tree") == "palm tree"


def test_another_number_of_classes_is_no_random_head(model_dir: Path, data: Path, run: Run) -> None:
    (data / "dog").mkdir()
    shutil.copy(data / "ant" / "0.png", data / "dog" / "0.png")
    code, _, err = run("eval", f"local-dir:{model_dir}", "--num-classes", 4, "--data", data, "--r", 2)
    assert code == 2
    assert "whose head would be random" in " ".join(err.split())


def test_a_folder_without_weights_is_an_error(model_dir: Path, data: Path, run: Run) -> None:
    (model_dir / "model.safetensors").unlink()
    code, _, err = run("eval", f"local-dir:{model_dir}", "--data", data, "--r", 2)
    assert code == 2
    assert "holds no weights, but model.safetensors was expected" in " ".join(err.split())
    assert run("inspect", f"local-dir:{model_dir}")[0] == 0
