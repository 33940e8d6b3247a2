"""Classifiers of transformers in every command: images, videos and sounds, with their own heads and processors."""

from __future__ import annotations

import base64
import dataclasses
import importlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import tokenmerge
from tests.conftest import Run
from tests.helpers.tiny import randomize
from tests.tools.test_sounds import tone, write_wav
from tests.tools.test_videos import growing, write_video
from tokenmerge.tools.common import DeviceOptions
from tokenmerge.tools.eval import EvalOptions
from tokenmerge.tools.eval.data import make_dataset
from tokenmerge.tools.explore import ExploreOptions
from tokenmerge.tools.explore.main import Explorer, make_app
from tokenmerge.tools.folders import ClassFolder
from tokenmerge.tools.media import IMAGES, SOUNDS, VIDEOS, Medium, read_frames, read_sound
from tokenmerge.tools.models import RANDOM_WEIGHTS, load_model, random_weights
from tokenmerge.tools.settings import parse_setting
from tokenmerge.tools.visualize.flat import flat
from tokenmerge.tools.visualize.load import Loader
from tokenmerge.tools.visualize.looks import merged_copies
from tokenmerge.tools.visualize.panels import painted
from tokenmerge.tracing.paint import table

transformers: Any = importlib.import_module("transformers")  # parts of it have no annotations

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
LABELS: dict[str, Any] = {"id2label": {0: "dark", 1: "light"}, "label2id": {"dark": 0, "light": 1}}
CROP: dict[str, Any] = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}
ODD: dict[str, Any] = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 3}


@dataclasses.dataclass(frozen=True)
class Kind:
    """One classifier with its processor."""

    medium: Medium
    model: Callable[[], Any]
    processor: Callable[[], Any]


def _image(name: str, **values: Any) -> Any:
    config = getattr(transformers, f"{name}Config")(**SIZES, **LABELS, image_size=32, patch_size=8, **values)
    return getattr(transformers, f"{name}ForImageClassification")(config)


def _video(name: str, **values: Any) -> Any:
    config = getattr(transformers, f"{name}Config")(**SIZES, **LABELS, image_size=32, num_frames=4, **values)
    return getattr(transformers, f"{name}ForVideoClassification")(config)


def _ast() -> Any:
    config = transformers.ASTConfig(**SIZES, **LABELS, max_length=60, num_mel_bins=32)
    return transformers.ASTForAudioClassification(config)


def _whisper() -> Any:
    sizes = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 64}
    config = transformers.WhisperConfig(**sizes, **LABELS, num_mel_bins=40, max_source_positions=50)
    return transformers.WhisperForAudioClassification(config)


KINDS: dict[str, Kind] = {
    "vit": Kind(
        IMAGES, lambda: _image("ViT"), lambda: transformers.ViTImageProcessor(size={"height": 32, "width": 32}, **ODD)
    ),
    "deit": Kind(IMAGES, lambda: _image("DeiT"), lambda: transformers.DeiTImageProcessor(**CROP, **ODD)),
    "dinov2": Kind(
        IMAGES, lambda: _image("Dinov2", mlp_ratio=2), lambda: transformers.BitImageProcessor(**CROP, **ODD)
    ),
    "videomae": Kind(
        VIDEOS,
        lambda: _video("VideoMAE", patch_size=8),
        lambda: transformers.VideoMAEImageProcessor(**CROP, **ODD),
    ),
    "vivit": Kind(
        VIDEOS, lambda: _video("Vivit", tubelet_size=[2, 8, 8]), lambda: transformers.VivitImageProcessor(**CROP)
    ),
    "ast": Kind(
        SOUNDS, _ast, lambda: transformers.ASTFeatureExtractor(max_length=60, num_mel_bins=32, mean=-3.0, std=3.5)
    ),
    "whisper": Kind(SOUNDS, _whisper, lambda: transformers.WhisperFeatureExtractor(feature_size=40, chunk_length=1)),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def save(kind: str, folder: Path, processor: bool = True) -> Path:
    """Write a classifier with lively weights, and its processor."""
    torch.manual_seed(0)
    model = KINDS[kind].model()
    randomize(model)
    model.save_pretrained(folder)
    if processor:
        KINDS[kind].processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """For each medium two classes: eight files to train on, four to validate."""
    root = tmp_path_factory.mktemp("media")
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for label, name in enumerate(("dark", "light")):
            for number in range(count):
                place = root / "{}" / split / name
                picture = Path(str(place).format("images"), f"{number}.png")
                picture.parent.mkdir(parents=True, exist_ok=True)
                pixels = rng.integers(0, 128, (50 + number, 70, 3), dtype=np.uint8) + np.uint8(120 * label)
                Image.fromarray(pixels).save(picture)
                write_video(Path(str(place).format("videos"), f"{number}.mp4"), growing(9, label == 0))
                samples = tone((300, 3000)[label], 0.6) + 0.02 * rng.standard_normal(9600)
                write_wav(Path(str(place).format("sounds"), f"{number}.wav"), samples)
    return {name: root / name for name in ("images", "videos", "sounds")}


def first_file(data: dict[str, Path], kind: str) -> Path:
    return next(path for path in sorted((data[KINDS[kind].medium.name] / "val").rglob("*")) if path.is_file())


def loaded(kind: str, folder: Path, **values: Any) -> tuple[Any, Any]:
    """The model as eval loads it, and the library's own."""
    args = DeviceOptions(model=f"hf:{folder}", **values)
    return load_model(args, head=KINDS[kind].medium.name), type(KINDS[kind].model()).from_pretrained(folder).eval()


def rows_of(run: Run, tmp_path: Path, *words: object) -> list[Any]:
    code, _, err = run(*words, "--json", tmp_path / "rows.json")
    assert code == 0, err
    assert "random weights" not in err
    found: list[Any] = json.loads((tmp_path / "rows.json").read_text())
    return found


def by_hand(kind: str, folder: Path, path: Path) -> torch.Tensor:
    """What the library's own processor makes of a file."""
    processor = (
        transformers.AutoFeatureExtractor if KINDS[kind].medium is SOUNDS else transformers.AutoImageProcessor
    ).from_pretrained(folder)
    if KINDS[kind].medium is IMAGES:
        with Image.open(path) as image:
            found = processor(image.convert("RGB"), return_tensors="pt")
    elif KINDS[kind].medium is SOUNDS:
        found = processor(read_sound(path), sampling_rate=16_000, return_tensors="pt")
    else:
        frames = read_frames(path, lambda total: [(total - 4) // 2 + i for i in range(4)])
        found = processor(list(frames), return_tensors="pt")
    made: torch.Tensor = next(iter(found.values()))[0]
    return made


@kinds
def test_inputs_are_those_of_the_models_own_processor(kind: str, data: dict[str, Path], tmp_path: Path) -> None:
    """In eval and in visualize, bit for bit, also after a trip to another process."""
    save(kind, tmp_path)
    model, own = loaded(kind, tmp_path)
    medium = KINDS[kind].medium
    folder = EvalOptions(model="m", data=data[medium.name] / "val")
    dataset = make_dataset(model, folder, medium, sampling_rate=1)
    assert isinstance(dataset, ClassFolder)
    dataset = pickle.loads(pickle.dumps(dataset))
    for index, (path, label) in enumerate(dataset.samples):
        expected = by_hand(kind, tmp_path, path)
        found, target, problem = dataset[index]
        assert problem == ""
        assert found is not None
        assert torch.equal(found, expected)
        assert own.config.id2label[target] == path.parent.name
        assert target == label
        assert torch.equal(Loader(model, sampling_rate=1)(path).batch[0], expected)
    with torch.inference_mode():
        torch.testing.assert_close(model(expected[None]).logits, own(expected[None]).logits)


@kinds
def test_eval_compare_and_visualize(kind: str, data: dict[str, Path], tmp_path: Path, run: Run) -> None:
    """The accuracy is the one of the library's own loop."""
    folder = save(kind, tmp_path / "model")
    name, val = f"hf:{folder}", data[KINDS[kind].medium.name] / "val"
    _, own = loaded(kind, folder)
    hits = []
    with torch.inference_mode():
        for path in sorted(path for path in val.rglob("*") if path.is_file()):
            best = int(own(by_hand(kind, folder, path)[None]).logits.argmax())
            hits.append(own.config.id2label[best] == path.parent.name)
    rows = rows_of(run, tmp_path, "eval", name, "--data", val, "--r", 0, 2, "--workers", 2, "--sampling-rate", 1)
    assert rows[0]["top1"] == pytest.approx(100 * np.mean(hits))
    assert rows[1]["gflops"] < rows[0]["gflops"]
    words = ("--data", val, "--r", 2, "--methods", "tome", "--workers", 0, "--rounds", 0, "--output", tmp_path / "out")
    assert len(rows_of(run, tmp_path, "compare", name, *words)) == 2
    file = first_file(data, kind)
    rows = rows_of(run, tmp_path, "visualize", name, file, "--r", 2, "--out", tmp_path / "merged.png")
    assert {row["class"] for row in rows[0]["top"]} == {"dark", "light"}
    assert (tmp_path / "merged.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "kind",
    [
        "vit",
        "whisper",
        "videomae",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("dinov2", "vivit", "ast")),
    ],
)
def test_trained_folders_evaluate_the_same(kind: str, data: dict[str, Path], tmp_path: Path, run: Run) -> None:
    """Training writes the processor with the model; the library itself then gives the same logits."""
    folder = save(kind, tmp_path / "model")
    root = data[KINDS[kind].medium.name]
    run("--version")  # what saving the model printed is not the command's
    words = ("train", f"hf:{folder}", "--data", root, "--output", tmp_path / "run", "--workers", 0, "--device", "cpu")
    more = ("--epochs", 1, "--warmup-epochs", 0, "-b", 4, "--r", 2, "--lr", "0.001", "--mixup", "0.2")
    code, out, err = run(*words, *more, "--sampling-rate", 1, "--layer-decay", "0.9", "--log-interval", 1)
    assert code == 0, err
    made = tmp_path / "run" / "model"
    assert f"eval hf:{made}" in out.replace("\n", "")
    assert "Writing" not in err
    path = first_file(data, kind)
    assert torch.equal(by_hand(kind, made, path), by_hand(kind, folder, path))
    model, own = loaded(kind, made)
    before = load_file(folder / "model.safetensors")
    assert any(not torch.equal(before[name], value) for name, value in own.state_dict().items())
    assert own.config.id2label == {0: "dark", 1: "light"}
    batch = by_hand(kind, made, path)[None]
    with torch.inference_mode():
        torch.testing.assert_close(model(batch).logits, own(batch).logits)
    rows = rows_of(
        run, tmp_path, "eval", f"hf:{made}", "--data", root / "val", "--r", 2, "--workers", 0, "--sampling-rate", 1
    )
    log = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["top1"] == [row["top1"] for row in log if row["kind"] == "eval"][-1]


@kinds
def test_pages_and_the_explorer_show_every_medium(kind: str, data: dict[str, Path], tmp_path: Path, run: Run) -> None:
    """One cell per patch, whatever the medium; the cells that merge are those of the trace."""
    folder = save(kind, tmp_path / "saved")
    file = first_file(data, kind)
    code, _, err = run("visualize", f"hf:{folder}", file, "--r", 2, "--out", tmp_path / "a.html")
    assert code == 0, err
    medium = KINDS[kind].medium
    explorer = Explorer(ExploreOptions(model=f"hf:{folder}", data=data[medium.name] / "val"))
    assert len(explorer.samples) > 1
    sample = explorer.sample(0)
    shown = explorer.run(sample, [parse_setting("2")])
    sent = explorer.upload(explorer.samples[0].read_bytes(), f"C:\\mine\\{explorer.samples[0].name}")
    again = explorer.run(sent, [parse_setting("2")])
    assert again["picture"] == shown["picture"]
    rows, columns = shown["grid"]
    names = np.frombuffer(base64.b64decode(shown["looks"][0]["blocks"][-1]["names"]), "<u2")
    assert len(names) == rows * columns
    merged = merged_copies(explorer.model, [parse_setting("2")], explorer.fields)[0]
    trace = merged.look(sample).trace
    source = trace.source()[0, trace.protected :]
    picture = flat(sample, trace)
    drawn = [patch for patch in range(len(source)) if picture.cell[patch] >= 0]
    assert len(drawn) == len(source) if medium.name != "sounds" else 0 < len(drawn) <= len(source)
    assert shown["patches"] == len(source)
    for one in drawn[::3]:
        for other in drawn:
            together = names[picture.cell[one]] == names[picture.cell[other]]
            assert bool(together) == bool(source[one] == source[other])
    hidden = [patch for patch in range(len(source)) if picture.cell[patch] < 0]
    if hidden:  # the size of a token counts its members in the padding, too
        unseen = np.frombuffer(base64.b64decode(shown["looks"][0]["blocks"][-1]["unseen"]), "<u2")
        for one in drawn:
            assert unseen[picture.cell[one]] == sum(bool(source[one] == source[other]) for other in hidden)
    else:
        assert "unseen" not in shown["looks"][0]["blocks"][-1]
    palette = np.frombuffer(base64.b64decode(shown["palette"]), np.uint8).reshape(-1, 3)
    assert len(np.unique(palette, axis=0)) == rows * columns, "one colour for each cell, empty ones included"
    with pytest.raises(tokenmerge.InputError):
        explorer.upload(b"no such file", "a.xyz")
    if medium is SOUNDS:
        write_wav(tmp_path / "long.wav", np.zeros(1000 * 601), rate=1000)
        with pytest.raises(tokenmerge.InputError, match="longer than 10 minutes"):
            explorer.upload((tmp_path / "long.wav").read_bytes(), "long.wav")
        unmerged = explorer.unmerged.look(sample)
        sizes = painted(sample, unmerged, 0, "sizes")
        dark = table("cividis")[0]
        assert bool((sizes == dark[:, None, None]).all(dim=0).any()), "one patch is the darkest, whatever is not drawn"


def test_the_explorer_shows_classes_or_warns(data: dict[str, Path], tmp_path: Path) -> None:
    from starlette.testclient import TestClient

    named = ExploreOptions(model=f"hf:{save('vit', tmp_path)}", data=data["images"] / "val")
    explorer = Explorer(named)
    found = explorer.run(explorer.sample(0), [parse_setting("2")])
    assert {name for name, _ in found["unmerged"]["top"]} == {"dark", "light"}
    pages = [
        TestClient(make_app(one, ["testserver"])).get("/").text
        for one in (explorer, Explorer(ExploreOptions(model="hf:vit", model_kwargs=SIZES)))
    ]
    assert [RANDOM_WEIGHTS in page for page in pages] == [False, True]


def test_random_weights_are_said(data: dict[str, Path], tmp_path: Path, run: Run) -> None:
    """On the terminal, in the picture and on the page; not for a folder, whose weights are wanted."""
    folder = save("vit", tmp_path / "model")
    assert not random_weights(DeviceOptions(model=f"hf:{folder}"))
    assert not random_weights(DeviceOptions(model="vit_tiny_patch16_224", checkpoint=Path("a")))
    assert random_weights(DeviceOptions(model="hf:vit"))
    assert random_weights(DeviceOptions(model="hf:google/vit"))
    file = first_file(data, "vit")
    for model, warns in ((f"hf:{folder}", False), ("vit_tiny_patch16_224", True)):
        for out in ("merged.png", "merged.html"):
            code, _, err = run("visualize", model, file, "--r", 2, "--out", tmp_path / out)
            assert code == 0, err
            assert (RANDOM_WEIGHTS in " ".join(err.split())) == warns
        assert (RANDOM_WEIGHTS in (tmp_path / "merged.html").read_text()) == warns
    from tokenmerge.tools.visualize.looks import merged_copies
    from tokenmerge.tools.visualize.main import sheet

    model = load_model(DeviceOptions(model=f"hf:{folder}"))
    shown = Loader(model)(file)
    looks = [[merged_copies(model, [parse_setting("2")], {})[0].look(shown)]]
    plain, with_foot = (sheet([shown], looks, [1], "picture", foot) for foot in ("", RANDOM_WEIGHTS))
    assert with_foot.height > plain.height


def error_of(run: Run, *words: object) -> str:
    code, _, err = run(*words)
    assert code == 2, err
    lines = [line for line in err.splitlines() if line.startswith("tokenmerge: ")]
    assert len(lines) == 1, err
    assert err.splitlines()[-1] == lines[0]
    return lines[0]


MARK = "import pathlib; pathlib.Path({!r}).write_text('ran')\n"


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
@pytest.mark.parametrize("model_type", ["vit", "mine"])
def test_code_in_a_folder_is_never_run(
    file: str, model_type: str, data: dict[str, Path], tmp_path: Path, run: Run
) -> None:
    folder, marker = save("vit", tmp_path / "model"), tmp_path / "marker"
    (folder / "own.py").write_text(MARK.format(str(marker)) + "class C: pass\n")
    autos = ("AutoConfig", "AutoModel", "AutoModelForImageClassification", "AutoImageProcessor", "AutoFeatureExtractor")
    entries = json.loads((folder / file).read_text()) | {"auto_map": dict.fromkeys(autos, "own.C")}
    entries |= {"model_type": model_type} if file == "config.json" else {"image_processor_type": model_type}
    (folder / file).write_text(json.dumps(entries))
    words = ("--r", 2, "--data", data["images"] / "val", "--workers", 0)
    assert "such code is never run" in error_of(run, "eval", f"hf:{folder}", *words)
    if file == "config.json":
        assert "such code is never run" in error_of(run, "inspect", f"hf:{folder}")
    picture = first_file(data, "vit")
    assert "such code is never run" in error_of(run, "visualize", f"hf:{folder}", picture, "--r", 2)
    assert not marker.exists()


def test_tokenizers_in_a_folder_are_not_read(data: dict[str, Path], tmp_path: Path, run: Run) -> None:
    folder, marker = save("whisper", tmp_path / "model"), tmp_path / "marker"
    (folder / "own.py").write_text(MARK.format(str(marker)) + "class C: pass\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["own.C", None]}}))
    words = ("--r", 2, "--data", data["sounds"] / "val", "--workers", 0)
    rows_of(run, tmp_path, "eval", f"hf:{folder}", *words)
    assert not marker.exists()


def test_only_safetensors_are_loaded(data: dict[str, Path], tmp_path: Path, run: Run) -> None:
    folder, marker = save("vit", tmp_path / "model"), tmp_path / "marker"

    class Evil:
        def __reduce__(self) -> Any:
            return exec, (MARK.format(str(marker)),)

    (folder / "model.safetensors").unlink()
    words = ("eval", f"hf:{folder}", "--r", 2, "--data", data["images"] / "val", "--workers", 0)
    assert "holds no weights, but model.safetensors was expected" in error_of(run, *words)
    torch.save({"vit.layernorm.weight": Evil()}, folder / "pytorch_model.bin")
    assert "weights only as pytorch_model.bin, which may run code" in error_of(run, *words)
    assert not marker.exists()


def test_a_missing_processor_is_no_default(data: dict[str, Path], tmp_path: Path, run: Run) -> None:
    """Flags may stand in for it, if they say everything."""
    folder = save("deit", tmp_path / "model", processor=False)
    words = ("eval", f"hf:{folder}", "--r", 2, "--data", data["images"] / "val", "--workers", 0)
    assert "holds weights but no preprocessor_config.json" in error_of(run, *words)
    flags = ("--mean", "0.1", "0.2", "0.3", "--std", "0.4", "0.5", "0.6")
    assert "holds weights but no preprocessor_config.json" in error_of(run, *words, *flags)
    rows = rows_of(run, tmp_path, *words, *flags, "--crop-pct", "0.8", "--interpolation", "bicubic")
    KINDS["deit"].processor().save_pretrained(folder)
    assert rows_of(run, tmp_path, *words)[0]["top1"] == rows[0]["top1"]
    (folder / "preprocessor_config.json").write_text("{ no json")
    assert "is not JSON" in error_of(run, *words)
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "NoSuch"}')
    assert "cannot be made" in error_of(run, *words)
    for kind in ("ast", "videomae"):
        other = save(kind, tmp_path / kind, processor=False)
        val = data[KINDS[kind].medium.name] / "val"
        message = error_of(run, "eval", f"hf:{other}", "--r", 2, "--data", val, "--workers", 0)
        assert "holds weights but no preprocessor_config.json" in message


def test_overrides_replace_what_the_processor_says(data: dict[str, Path], tmp_path: Path) -> None:
    from tokenmerge.tools.processors import processor_of

    model, _ = loaded("vivit", save("vivit", tmp_path))
    found = processor_of(model, {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)})
    mean, std = found.normalisation((4, 3, 32, 32))  # although ViViT's maps pixels to [−1, 1] first
    assert mean == pytest.approx((0.1, 0.2, 0.3), abs=1e-5)
    assert std == pytest.approx((0.4, 0.5, 0.6), abs=1e-5)


def test_partly_missing_weights_are_an_error(data: dict[str, Path], tmp_path: Path, run: Run) -> None:
    folder = save("vit", tmp_path / "model")
    state = load_file(folder / "model.safetensors")
    words = ("eval", f"hf:{folder}", "--r", 2, "--data", data["images"] / "val", "--workers", 0)
    assert "of shape (2,), but (5,) was expected" in error_of(run, *words, "--num-classes", 5)
    gone = next(name for name in state if "layer.1" in name or "layers.1" in name)
    save_file({name: value for name, value in state.items() if name != gone}, folder / "model.safetensors")
    assert "so that the model would be partly random" in error_of(run, *words)
    tower = transformers.ViTModel(KINDS["vit"].model().config)
    tower.save_pretrained(folder)
    assert "without a classifier" in error_of(run, *words)


def test_more_classes_and_towers_are_for_training(data: dict[str, Path], tmp_path: Path, run: Run) -> None:
    """Weights of another number of classes, or without a head, get a new one, and only that."""
    folder = tmp_path / "model"
    tower = transformers.ViTModel(KINDS["vit"].model().config)
    randomize(tower)
    tower.save_pretrained(folder)
    KINDS["vit"].processor().save_pretrained(folder)
    words = ("--data", data["images"], "--workers", 0, "--device", "cpu", "--warmup-epochs", 0, "-b", 4, "--lr", 0)
    code, _, err = run("train", f"hf:{folder}", "--output", tmp_path / "run", *words, "--epochs", 1, "--r", 2)
    assert code == 0, err
    made = load_file(tmp_path / "run" / "model" / "model.safetensors")
    before = load_file(folder / "model.safetensors")
    for name, value in before.items():
        if "pooler" not in name:
            torch.testing.assert_close(made[f"vit.{name}"], value, atol=1e-4, rtol=0)  # the least rate is not 0


@pytest.mark.slow
def test_types_take_the_head_of_the_data(data: dict[str, Path], tmp_path: Path, run: Run) -> None:
    for kind, name in (("vit", "hf:vit"), ("ast", "hf:audio-spectrogram-transformer")):
        val = data[KINDS[kind].medium.name] / "val"
        code, _, err = run("eval", name, "--num-classes", 2, "--r", 2, "--data", val, "--workers", 0, "-b", 2)
        assert code == 0, err
        assert RANDOM_WEIGHTS in " ".join(err.split())


def test_types_without_such_a_head(data: dict[str, Path], run: Run) -> None:
    message = error_of(run, "eval", "hf:vit", "--r", 2, "--data", data["sounds"] / "val")
    assert "no classifier of sounds for hf:vit" in message
    with pytest.raises(Exception, match="has no no_such_value"):
        load_model(DeviceOptions(model="hf:vit", model_kwargs={"no_such_value": 1}))


def test_frequencies_of_whispers_bands() -> None:
    """The peaks of its filters lie at the frequencies that the picture shows."""
    from tokenmerge.tools.visualize.load import slaney_bands

    filters = transformers.WhisperFeatureExtractor().mel_filters
    peaks = filters.argmax(axis=0) * 8000 / (len(filters) - 1)
    assert np.abs(np.array(slaney_bands(80)) - peaks)[20:].max() < 60
