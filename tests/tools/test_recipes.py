"""The training recipes give the published values, each with its source, when the real parser has read them."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import yaml

from tests.helpers.training import KWARGS, MODEL, write_classes
from tests.tools.test_sounds import KWARGS as SOUND_KWARGS
from tests.tools.test_sounds import tone, write_wav
from tests.tools.test_videos import KWARGS as VIDEO_KWARGS
from tests.tools.test_videos import growing, write_video
from tokenmerge.cli import COMMANDS, main
from tokenmerge.cli.parsing import parse
from tokenmerge.errors import InputError
from tokenmerge.tools.train.optim import optimizer_of, schedule_of
from tokenmerge.tools.train.options import TrainOptions, recipes

PUBLISHED = json.loads((Path(__file__).parents[1] / "data" / "published_recipes.json").read_text("utf-8"))["recipes"]
OURS = ("digits", "laptop")
LINE = re.compile(r"^(?P<key>\w+): (?P<value>[^#]+?)(?:\s+# (?P<comment>.+))?$")


def parsed(file: Path) -> TrainOptions:
    """The options that `tokenmerge train --config` trains with."""
    words = ["m", "--data", "d", "--output", "o", "-c", str(file)]
    options, _ = parse(COMMANDS["train"], TrainOptions, words, recipes())
    assert isinstance(options, TrainOptions)
    return options


def equal(found: Any, published: Any) -> bool:
    """Whether an option has the published value; lists and tuples are alike, and whole numbers and fractions."""
    if isinstance(published, list):
        return isinstance(found, tuple | list) and list(found) == published
    return bool(found == published) and isinstance(found, bool) == isinstance(published, bool)


def problems(file: Path, published: dict[str, Any]) -> list[str]:
    """All that a recipe's file has against the published table."""
    comments = {}
    for line in file.read_text("utf-8").splitlines():
        if not line.startswith("#"):
            match = LINE.match(line)
            assert match is not None, line
            comments[match["key"]] = match["comment"] or ""
    assert comments.keys() == yaml.safe_load(file.read_text("utf-8")).keys()
    options, values, ours = parsed(file), published["values"], published["ours"]
    found = []
    for key, entry in values.items():
        if key not in comments:
            found.append(f"{key} is missing")
        elif not equal(getattr(options, key), entry["value"]):
            found.append(f"{key} is {getattr(options, key)!r}, but {entry['value']!r} is published")
        elif not comments[key].startswith(entry["source"]):
            found.append(f"{key} does not name its source {entry['source']!r}: {comments[key]!r}")
    for key in comments.keys() - values.keys():
        if key not in ours or not comments[key].startswith("ours"):
            found.append(f"{key} is neither published nor marked as ours")
    found += [f"{key}, which is ours, is missing" for key in ours if key not in comments]
    processes = published["processes"]
    if options.global_batch(processes) != published["global_batch"]["value"]:
        found.append(f"the global batch is {options.global_batch(processes)}")
    if options.learning_rate(processes) != pytest.approx(published["learning_rate"]["value"], rel=1e-9):
        found.append(f"the peak learning rate is {options.learning_rate(processes)}")
    return found


def test_every_recipe_of_a_paper_is_in_the_table() -> None:
    assert set(PUBLISHED) == set(recipes()) - set(OURS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipe_has_the_published_values(name: str) -> None:
    assert problems(recipes()[name], PUBLISHED[name]) == []


@pytest.mark.parametrize("name", PUBLISHED)
def test_table_says_what_its_values_rest_on(name: str) -> None:
    entries = PUBLISHED[name]["values"]
    assert all(entry["source"] for entry in entries.values())
    assert all(bool(entry.get("rests_on")) != entry.get("seen", True) for entry in entries.values())
    table = entries["lr_base"]["value"] * PUBLISHED[name]["global_batch"]["value"] / entries["lr_base_size"]["value"]
    assert table == pytest.approx(PUBLISHED[name]["learning_rate"]["value"])


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("lr_base_size: 256", "lr_base_size: 512", "lr_base_size is 512, but 256 is published"),
        ("lr_base_size: 256", "lr_base_size: 512", "the peak learning rate is 0.001"),
        ("batch_size: 16", "batch_size: 8", "the global batch is 256"),
        (r"drop_path: .*\n", "", "drop_path is missing"),
        (r"sched: .*\n", "", "sched is missing"),  # although the option's default is the published value
        ("mixup: 0.8 ", "mixup: 0.5 ", "mixup is 0.5, but 0.8 is published"),
        ("bce_loss: false", "bce_loss: true", "bce_loss is True, but False is published"),
        ("epochs: 75 .*", "epochs: 75", "epochs does not name its source 'table 10': ''"),
        ("amp_dtype: bfloat16 .*", "amp_dtype: bfloat16", "amp_dtype is neither published nor marked as ours"),
        ("amp: true", "model_ema: true  # ours\namp: true", "model_ema is neither published nor marked as ours"),
    ],
)
def test_a_fault_in_a_recipe_is_found(old: str, new: str, problem: str, tmp_path: Path) -> None:
    text = recipes()["videomae_finetune"].read_text("utf-8")
    changed = re.sub(rf"^{old}", new, text, flags=re.MULTILINE)
    assert changed != text
    (tmp_path / "changed.yaml").write_text(changed, "utf-8")
    assert problem in problems(tmp_path / "changed.yaml", PUBLISHED["videomae_finetune"])


@pytest.mark.parametrize("name", PUBLISHED)
def test_optimizer_and_schedule_follow_the_recipe(name: str) -> None:
    """The rate rises to the published peak at the end of the warm-up and falls to the published end."""
    published = PUBLISHED[name]["values"]
    args = dataclasses.replace(parsed(recipes()[name]), layer_decay=None)
    optimizer = optimizer_of(timm.create_model("test_vit"), args, PUBLISHED[name]["processes"])
    assert {tuple(group["betas"]) for group in optimizer.param_groups} == {tuple(published["opt_betas"]["value"])}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, published["weight_decay"]["value"]}
    schedule, rates = schedule_of(optimizer, args, 10), []
    for update in range(10 * args.epochs + 1):
        schedule.step_update(update)
        rates.append(optimizer.param_groups[0]["lr"])
    peak, warm = PUBLISHED[name]["learning_rate"]["value"], 10 * published["warmup_epochs"]["value"]
    assert rates[0] == pytest.approx(published["warmup_lr"]["value"])
    assert rates[:warm] == sorted(rates[:warm])
    assert rates[warm:] == sorted(rates[warm:], reverse=True)
    assert rates[-1] == pytest.approx(published["min_lr"]["value"], rel=1e-3)
    if args.warmup_prefix:
        assert max(rates) == rates[warm] == pytest.approx(peak)
    else:  # the cosine has begun with the warm-up
        assert 0.99 * peak < max(rates) < peak


def test_betas_of_an_optimizer_without_them_are_an_error() -> None:
    args = TrainOptions(model="m", data=Path(), output=Path(), opt="sgd", opt_betas=(0.9, 0.99))
    with pytest.raises(InputError, match="the optimizer 'sgd' has no betas: leave it out"):
        optimizer_of(timm.create_model("test_vit"), args, 1)


def deep(kwargs: tuple[str, ...]) -> list[str]:
    """The model's arguments with 12 layers, so that half of the FLOPs can be saved."""
    return [re.sub(r"^(depth|num_hidden_layers)=2$", r"\1=12", word) for word in kwargs]


SMALL = {
    "audiomae_finetune": ("sounds", "vit_tiny_patch16_224", [*deep(SOUND_KWARGS), "global_pool=avg"]),
    "audiomae_finetune_audioset": ("several", "vit_tiny_patch16_224", [*deep(SOUND_KWARGS), "global_pool=avg"]),
    "deit_from_scratch": ("images", MODEL, KWARGS[1:]),
    "mae_finetune_base": ("images", MODEL, [*KWARGS[1:], "global_pool=avg"]),
    "mae_finetune_large": ("images", MODEL, [*KWARGS[1:], "global_pool=avg"]),
    "mae_finetune_huge": ("images", MODEL, [*KWARGS[1:], "global_pool=avg"]),
    "video_mae_finetune": (
        "videos",
        "video_mae:vit_tiny_patch16_224",
        ["img_size=32", "patch_size=8", "num_frames=4", "embed_dim=32", "depth=2", "num_heads=2"],
    ),
    "videomae_finetune": ("videos", "hf:videomae", deep(VIDEO_KWARGS)),
}
"""Medium, model and its arguments, by recipe."""


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two classes of each medium."""
    roots = {name: tmp_path_factory.mktemp(name) for name in ("images", "sounds", "videos")}
    write_classes(roots["images"])
    for split, number, label in itertools.product(("train", "val"), range(4), (0, 1)):
        write_wav(roots["sounds"] / split / str(label) / f"{number}.wav", tone(300 + 900 * label, 0.6))
        write_video(roots["videos"] / split / str(label) / f"{number}.mp4", growing(16, dark=bool(label)))
    roots["several"] = roots["sounds"]
    for split in ("train", "val"):
        text = "".join(f'{number}-{label}, 0, 0.6, "{label}"\n' for label in "01" for number in range(4))
        (roots["sounds"] / f"{split}.csv").write_text(text)
        for path in sorted((roots["sounds"] / split).rglob("*.wav")):
            path.rename(path.with_stem(f"{path.stem}-{path.parent.name}"))
    return roots


@pytest.mark.parametrize("name", SMALL)
def test_recipe_trains_a_small_model(name: str, media: dict[str, Path], tmp_path: Path) -> None:
    """All but sizes, epochs and precision is the recipe's own."""
    medium, model, kwargs = SMALL[name]
    words = ["train", model, "--config", name, "--data", media[medium], "--output", tmp_path / "run"]
    words += ["--model-kwargs", *kwargs, "--epochs", 1, "--warmup-epochs", 0, "--batch-size", 4]
    words += ["--grad-accum-steps", 1, "--no-amp", "--workers", 0, "--device", "cpu"]
    words += (
        ["--train-labels", "train.csv", "--val-labels", "val.csv", "--epoch-size", 8] if medium == "several" else []
    )
    assert main([str(word) for word in words]) == 0
    about = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))["args"]
    changed = {"epoch_size", "epochs", "warmup_epochs", "batch_size", "grad_accum_steps", "amp", "model_kwargs"}
    for key, entry in PUBLISHED[name]["values"].items():
        assert key in changed or equal(about[key], entry["value"]), key
    assert list((tmp_path / "run" / "model").glob("*.safetensors"))


DOCS = Path(__file__).parents[2] / "docs" / "training.md"


def described() -> list[str]:
    """The rows of the table in docs/training.md: value and letter of the source of every key of the recipes."""
    order = ["deit_from_scratch", *(f"mae_finetune_{size}" for size in ("base", "large", "huge"))]
    order += ["audiomae_finetune", "audiomae_finetune_audioset", "video_mae_finetune", "videomae_finetune"]
    keys: dict[str, None] = {}
    for name in order:
        keys |= dict.fromkeys(yaml.safe_load(recipes()[name].read_text("utf-8")))
    rows = [
        f"| `{key}` | {' | '.join(cell(name, key) for name in order)} |"
        for key in sorted(keys)
        if key != "model_kwargs"
    ]
    for key, label in (("global_batch", "global batch"), ("learning_rate", "peak learning rate")):
        rows.append(f"| {label} | {' | '.join(short(PUBLISHED[name][key]['value']) for name in order)} |")
    return rows


def cell(name: str, key: str) -> str:
    """Value and letter of the source, with a question mark if the source itself was not seen."""
    entry = PUBLISHED[name]["values"].get(key)
    if entry is None:
        ours = yaml.safe_load(recipes()[name].read_text("utf-8")).get(key)
        return "" if ours is None else f"{short(ours)} O"
    letter = {"guide": "G", "code": "C", "MAE's code": "C"}.get(entry["source"], "P")
    return f"{short(entry['value'])} {letter}{'' if entry.get('seen', True) else '?'}"


def short(value: Any) -> str:
    """A value as people write it."""
    if isinstance(value, list):
        return ", ".join(short(part) for part in value)
    if isinstance(value, float):
        return re.sub(
            r"e-0*", "e-", f"{value:g}" if value == 0 or value > 0.004 else f"{value:.1e}".replace(".0e", "e")
        )
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def test_docs_describe_the_recipes() -> None:
    text = DOCS.read_text("utf-8")
    assert [row for row in described() if row not in text] == []
