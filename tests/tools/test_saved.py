"""Which merging a command runs with: what the options say, before a config file, before what was saved with the model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import timm

import tokenmerge
from tests.conftest import Run
from tests.tools.test_train_folder import data  # noqa: F401 the fixture
from tokenmerge import MergeConfig
from tokenmerge.errors import InputError
from tokenmerge.tools.compare import CompareOptions
from tokenmerge.tools.compare import run as compare
from tokenmerge.tools.eval import EvalOptions
from tokenmerge.tools.explore import ExploreOptions
from tokenmerge.tools.explore.main import Explorer
from tokenmerge.tools.saved import merging_of
from tokenmerge.tools.train import TrainOptions
from tokenmerge.tools.train.merging import as_saved

ARGS: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of models: one with the default matcher, and one with another matcher and arguments."""
    root = tmp_path_factory.mktemp("saved")
    for name, fields in (
        ("norm", {"r": 3, "combine": "norm", "prop_attn": True}),
        ("means", {"keep": [0.9, 0.8], "matcher": "kmeans", "options": {"iterations": 2}, "metric": "x"}),
    ):
        model = timm.create_model("vit_tiny_patch16_224", num_classes=2, **ARGS).eval()
        tokenmerge.patch(model, **fields)
        tokenmerge.save(model, root / name, model_args=ARGS, label_names=["dark", "light"])
    MergeConfig(r=2, combine="max").save(root / "max.json")
    MergeConfig(r=2, matcher="kmeans", options={"iterations": 4}).save(root / "kmeans.json")
    return root


NORM: dict[str, Any] = {"r": 3, "combine": "norm", "prop_attn": True}
MEANS: dict[str, Any] = {"keep": [0.9, 0.8], "matcher": "kmeans", "options": {"iterations": 2}, "metric": "x"}


@pytest.mark.parametrize(
    ("model", "given", "wanted", "unused"),
    [
        ("norm", {}, NORM, []),
        ("norm", {"r": [5]}, {**NORM, "r": 5}, ["r"]),
        ("norm", {"r": ["keep=0.5"]}, {"keep": 0.5, "combine": "norm", "prop_attn": True}, ["r"]),
        ("norm", {"set": {"combine": "max"}}, {**NORM, "combine": "max"}, ["combine"]),
        ("norm", {"set": {"combine": "mean"}}, {"r": 3, "prop_attn": True}, ["combine"]),
        ("norm", {"prop_attn": "auto"}, {"r": 3, "combine": "norm"}, ["prop_attn"]),
        ("norm", {"prop_attn": "off"}, {**NORM, "prop_attn": False}, ["prop_attn"]),
        ("norm", {"matcher": "kmeans"}, {"r": 3, "prop_attn": True, "matcher": "kmeans"}, ["combine"]),
        ("norm", {"preset": "paper"}, {"r": 3, "prop_attn": True}, ["combine"]),
        ("norm", {"r": ["max.json"]}, {"r": 2, "combine": "max"}, ["r", "combine", "prop_attn"]),
        ("norm", {"r": ["max.json"], "set": {"metric": "v"}}, {"r": 2, "combine": "max", "metric": "v"}, ["r"]),
        ("means", {}, MEANS, []),
        ("means", {"set": {"iterations": 7}}, {**MEANS, "options": {"iterations": 7}}, []),
        ("means", {"matcher": "bipartite"}, {"keep": [0.9, 0.8]}, ["matcher", "options", "metric"]),
        ("means", {"r": ["max.json"]}, {"r": 2, "combine": "max"}, ["keep", "matcher"]),
        (
            "norm",
            {"r": ["kmeans.json"], "set": {"iterations": 1}},
            {"r": 2, "matcher": "kmeans", "options": {"iterations": 1}},
            ["combine"],
        ),
    ],
)
def test_options_before_files_before_what_was_saved(
    saved: Path, model: str, given: dict[str, Any], wanted: dict[str, Any], unused: Sequence[str]
) -> None:
    texts = [saved / one if str(one).endswith(".json") else one for one in given.get("r", [])]
    options: dict[str, Any] = {**given, "r": [text if isinstance(text, int) else str(text) for text in texts]}
    said: list[str] = []
    settings, fields = merging_of(
        EvalOptions(model=f"local-dir:{saved / model}", data=Path("d"), **options), said.append
    )
    assert settings[0].config(**fields) == MergeConfig.create(**wanted)
    assert len(said) == 1
    for name in unused:
        assert "is not used" in said[0] or name in said[0].partition("(not its")[2]
    assert unused or "not" not in said[0]


def test_what_does_not_fit_the_saved_matcher_is_an_error(saved: Path) -> None:
    options = EvalOptions(model=f"local-dir:{saved / 'norm'}", data=Path("d"), set={"iterations": 3})
    with pytest.raises(tokenmerge.ConfigError, match="has no option 'iterations'"):
        merging_of(options, str)


def test_a_folder_that_is_not_there_is_named_first() -> None:
    with pytest.raises(InputError, match=r"'no/folder' holds no config.json"):
        merging_of(EvalOptions(model="local-dir:no/folder", data=Path("d")), str)


def test_training_goes_on_with_what_was_saved(saved: Path) -> None:
    def resolved(model: str, **given: Any) -> MergeConfig:
        said: list[str] = []
        options = TrainOptions(
            model=f"local-dir:{saved / model}", data=Path("d"), output=Path("o"), warmup_epochs=0, **given
        )
        again = as_saved(options, said.append)
        assert again == as_saved(again, str)  # a resumed run resolves its options once more
        assert len(said) == 1
        return again.setting.config(**again.merging())

    means = {**MEANS, "prop_attn": True}
    assert resolved("norm") == MergeConfig.create(**NORM)
    assert resolved("norm", prop_attn="off", r=5) == MergeConfig.create(**{**NORM, "r": 5, "prop_attn": False})
    assert resolved("norm", r=str(saved / "max.json")) == MergeConfig(r=2, combine="max", prop_attn=True)
    assert resolved("means") == MergeConfig.create(**means)
    assert resolved("means", set={"iterations": 9}) == MergeConfig.create(**{**means, "options": {"iterations": 9}})
    assert resolved("means", matcher="bipartite") == MergeConfig(keep=[0.9, 0.8], prop_attn=True)


def test_the_command_trains_with_it(saved: Path, data: Path, tmp_path: Path, run: Run) -> None:  # noqa: F811
    words = ["train", f"local-dir:{saved / 'means'}", "--data", data, "--output", tmp_path / "run", "-b", 4]
    code, out, err = run(*words, "--epochs", 1, "--warmup-epochs", 0, "--workers", 0, "--device", "cpu")
    assert code == 0, err
    assert "merging as saved with the model: keep=0.9,0.8" in " ".join(out.split())
    found = MergeConfig.load(tmp_path / "run" / "model" / "tokenmerge.json")
    assert found == MergeConfig.create(**{**MEANS, "prop_attn": True})
    assert json.loads((tmp_path / "run" / "run.json").read_text())["args"]["r"] == "keep=0.9,0.8"


def test_the_explorer_begins_with_it(saved: Path) -> None:
    explorer = Explorer(ExploreOptions(model=f"local-dir:{saved / 'norm'}"))
    assert explorer.texts == ["3"]
    assert explorer.fields == {"combine": "norm", "prop_attn": True}
    assert Explorer(ExploreOptions(model=f"local-dir:{saved / 'norm'}", r=["0", "4"])).texts == ["0", "4"]
    assert Explorer(ExploreOptions(model="vit_tiny_patch16_224", model_kwargs=ARGS)).texts == ["8", "16"]


def test_methods_are_compared_at_it(saved: Path, data: Path, tmp_path: Path) -> None:  # noqa: F811
    options: dict[str, Any] = {"data": data / "val", "output": tmp_path, "rounds": 0, "workers": 0, "methods": ["tome"]}
    rows = compare(CompareOptions(model=f"local-dir:{saved / 'norm'}", **options))
    assert [row["setting"] for row in rows] == ["r=0", "r=3"]
    with pytest.raises(InputError, match="nothing says how much to merge"):
        compare(CompareOptions(model="vit_tiny_patch16_224", **options))
