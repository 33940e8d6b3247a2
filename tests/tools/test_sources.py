"""MODEL on the command line from transformers, torchvision and open_clip."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import ViTConfig, ViTForImageClassification

from tests.helpers.tiny import randomize
from tokenmerge.cli import main


@pytest.mark.parametrize(
    ("model", "cls", "blocks", "tokens"),
    [
        ("hf:vit", "ViTModel", 12, 197),
        ("hf:videomae", "VideoMAEModel", 12, 1568),
        ("hf:clip", "CLIPVisionModel", 12, 50),
        ("torchvision:vit_b_16", "VisionTransformer", 12, 197),
        ("open_clip:ViT-B-32", "VisionTransformer", 12, 50),
    ],
)
def test_inspect(model: str, cls: str, blocks: int, tokens: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", model, "--r", "2", "--json", "-"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["class"], row["blocks"], row["tokens"][0]) == (cls, blocks, tokens)
    assert row["tokens"][-1] == tokens - 2 * blocks
    assert row["gflops"] < row["gflops_before"]


def test_bench_of_a_saved_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ViTConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, image_size=96)
    model = ViTForImageClassification(config)
    randomize(model)
    model.save_pretrained(tmp_path)
    options = ["--pretrained", "--batch-size", "1", "--num-warm-iter", "0", "--num-bench-iter", "2", "--json", "-"]
    assert main(["bench", f"hf:{tmp_path}", "--r", "4", *options]) == 0
    base, merged = json.loads(capsys.readouterr().out)
    assert (base["r"], merged["r"]) == (0, 4)
    assert merged["flops_ratio"] > 1
    assert merged["overhead"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["inspect", "hf:nowhere/nothing"], "cannot be made"),
        (["inspect", "torchvision:vit_z"], "has no model 'vit_z'"),
        (["inspect", "open_clip:ViT-Z"], "has no model"),
        (["inspect", "hf:vit", "--num-classes", "3"], "--num-classes is for timm models"),
        (["bench", "hf:vit", "--pretrained", "--r", "4"], "model type without weights"),
        (["bench", "hf:siglip2_vision_model", "--r", "4"], "takes several inputs"),
        (["bench", "torchvision:swin_t", "--r", "4"], "attend within windows"),
        (["bench", "hf:swin", "--r", "4"], "attend within windows"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    err = capsys.readouterr().err.strip()
    assert words in err
    assert len(err.splitlines()) == 1, err
