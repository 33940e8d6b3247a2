"""Files that are damaged, hostile or odd: each kind has one reader, one error, and an end."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm.data.readers.reader_image_folder as timm_folder
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save, save_file

from tests.conftest import Run
from tests.helpers.tiny import tiny
from tokenmerge import files
from tokenmerge.errors import DamagedFileError, InputError
from tokenmerge.patching.predictors import add_predictors, load_predictors, predicting, save_predictors
from tokenmerge.tools.explore.pictures import open_picture, samples_in
from tokenmerge.tools.folders import ClassFolder
from tokenmerge.tools.media import IMAGES, medium_of
from tokenmerge.tools.models import load_checkpoint
from tokenmerge.tools.reading.documents import parse_yaml, read_class_map, read_yaml
from tokenmerge.tools.reading.pictures import decode_picture, read_picture
from tokenmerge.tools.reading.walk import Walk, natural_key
from tokenmerge.tools.reading.weights import read_metadata, read_weights

Change = tuple[str, int, int]
CHANGES = st.one_of(
    st.tuples(st.just("cut"), st.integers(0, 2**16), st.just(0)),
    st.tuples(st.just("flip"), st.integers(0, 2**16), st.integers(1, 255)),
    st.tuples(st.just("fill"), st.integers(0, 2**16), st.integers(0, 255)),
)


def changed(data: bytes, change: Change) -> bytes:
    """The data cut off, with one byte changed, or with up to 64 equal bytes from some place on."""
    kind, place, value = change
    place %= len(data)
    if kind == "cut":
        return data[:place]
    width = 1 if kind == "flip" else min(64, len(data) - place)
    middle = bytes([data[place] ^ value]) if kind == "flip" else bytes([value]) * width
    return data[:place] + middle + data[place + width :]


def one_error(read: Callable[[], Any]) -> Any:
    """What was read, or `None` after the one error in one line; any other error passes."""
    try:
        return read()
    except InputError as error:
        message = str(error)
    assert len(message.splitlines()) == 1
    return None


def picture(size: tuple[int, int] = (20, 14), mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def encoded(kind: str, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    picture(mode=mode).save(file, kind)
    return file.getvalue()


ENCODED = {
    kind: encoded(kind, mode)
    for kind, mode in (
        ("PNG", "RGBA"), ("JPEG", "CMYK"), ("GIF", "P"), ("BMP", "RGB"), ("TIFF", "LA"), ("PPM", "L"), ("WEBP", "RGB")
    )
}  # fmt: skip


@settings(max_examples=60)
@given(kind=st.sampled_from(sorted(ENCODED)), changes=st.lists(CHANGES, min_size=1, max_size=3))
def test_damaged_pictures_raise_one_error(kind: str, changes: list[Change]) -> None:
    data = ENCODED[kind]
    for change in changes:
        data = changed(data, change) or b"\0"
    for upright in (False, True):
        read = one_error(lambda upright=upright: decode_picture(data, "a.png", upright=upright))  # type: ignore[misc]
        assert read is None or read.mode == "RGB"
    one_error(lambda: open_picture(data))


@settings(max_examples=50)
@given(data=st.binary(max_size=200))
def test_random_bytes_are_no_file_of_any_kind(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "random"
    path.write_bytes(data)
    for suffix in ("", ".safetensors"):
        path = path.rename(path.with_suffix(suffix)) if path.suffix != suffix else path
        with pytest.raises(InputError, match="cannot be read"):
            read_weights(path)
    path = path.rename(path.with_suffix(""))
    readers: tuple[Callable[[], Any], ...] = (
        lambda: read_picture(path),
        lambda: files.read_json(path, "it"),
        lambda: read_yaml(path, "it"),
        lambda: read_class_map(path, "it"),
    )
    for reader in readers:
        one_error(reader)


def mean_of(path: Path) -> float:
    read = read_picture(path)
    assert read.mode == "RGB"
    return float(np.asarray(read, dtype=np.float64).mean())


RAMP = np.linspace(0, 1, 20 * 14).reshape(14, 20)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("a.png", (RAMP * 65535).astype(np.uint16)),
        ("a.tif", (RAMP * 65535).astype(np.uint16)),
        ("b.tif", (RAMP * 65535).astype(">u2")),
        ("c.tif", (RAMP * 65535).astype(np.int32)),
        ("d.tif", RAMP.astype(np.float32)),
        ("a.pgm", (RAMP * 65535).astype(np.uint16)),
    ],
)
def test_more_than_8_bits_keep_their_range(tmp_path: Path, name: str, values: Any) -> None:
    Image.fromarray(values).save(tmp_path / name)
    found = np.asarray(read_picture(tmp_path / name))
    np.testing.assert_allclose(found, np.repeat((RAMP * 255)[..., None], 3, 2), atol=0.51)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ((RAMP * 70000).astype(np.int32), "from 0 to 70000, and whole numbers from 0 to 65535"),
        ((RAMP * 9 - 5).astype(np.int32), "from -5 to 4"),
        ((RAMP * 255).astype(np.float32), "from 0 to 255, and real numbers from 0 to 1"),
        ((RAMP - 1).astype(np.float32), "from -1 to 0"),
        (np.where(RAMP > 0.5, np.nan, RAMP).astype(np.float32), "nan"),
    ],
)
def test_values_of_another_range_are_no_brightness(tmp_path: Path, values: Any, words: str) -> None:
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(DamagedFileError, match=words):
        read_picture(tmp_path / "a.tif")


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("1", "png"), ("L", "jpg"), ("P", "gif"), ("LA", "png"), ("RGBA", "webp"), ("CMYK", "jpg"), ("YCbCr", "tif")],
)
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str, suffix: str) -> None:
    picture(mode=mode).save(tmp_path / f"a.{suffix}")
    assert abs(mean_of(tmp_path / f"a.{suffix}") - 127) < 6


def test_palettes_with_transparency_and_animations(tmp_path: Path) -> None:
    picture(mode="P").save(tmp_path / "a.png", transparency=bytes(range(256)))
    assert mean_of(tmp_path / "a.png") == mean_of_rgb(picture(mode="P"))
    white = Image.new("RGB", (20, 14), "white")
    picture().save(tmp_path / "b.webp", save_all=True, append_images=[white], lossless=True)
    assert mean_of(tmp_path / "b.webp") == mean_of_rgb(picture())


def mean_of_rgb(image: Image.Image) -> float:
    return float(np.asarray(image.convert("RGB"), dtype=np.float64).mean())


def test_pictures_over_a_limit(tmp_path: Path) -> None:
    Image.new("RGB", (65000, 1)).save(tmp_path / "long.jpg")
    Image.new("1", (1, 40000)).save(tmp_path / "high.png")
    Image.new("1", (20000, 20000)).save(tmp_path / "bomb.png")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "eps.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    os.mkfifo(tmp_path / "pipe.png")
    for name, words in (
        ("long.jpg", "64 times as long"),
        ("high.png", "64 times as long"),
        ("bomb.png", "million"),
        ("empty.png", "it is empty"),
        ("text.png", "no picture that can be read"),
        ("eps.png", "no picture that can be read"),
        ("pipe.png", "it is a pipe"),
        (".", "it is a folder"),
        ("nowhere.png", "No such file"),
        ("a\0b.png", "null"),
    ):
        with pytest.raises(DamagedFileError, match=words):
            read_picture(tmp_path / name)
    with pytest.raises(DamagedFileError, match="it is a device"):
        read_picture("/dev/zero")


def test_orientation_is_read_where_it_can_be(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    picture().save(tmp_path / "turned.jpg", exif=turned)
    assert read_picture(tmp_path / "turned.jpg").size == (20, 14)
    assert read_picture(tmp_path / "turned.jpg", upright=True).size == (14, 20)
    broken = (
        b"Exif\0\0MM\0*\0\0\0\x08\0\x02\x01\x12\0\x05\0\0\0\x01\xff\xff\xff\xff\x87\x69\0\x04\0\0\0\x01\xff\xff\xff\xf0"
    )
    for number, tags in enumerate((broken, b"Exif\0\0II*\0\xff\xff", b"Exif\0\0nothing")):
        picture().save(tmp_path / f"{number}.jpg", exif=tags)
        assert read_picture(tmp_path / f"{number}.jpg", upright=True).size == (20, 14)
        assert open_picture((tmp_path / f"{number}.jpg").read_bytes()).size == (20, 14)


# folders


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three classes of two pictures, of which numbers and capitals try the order."""
    for name in ("ant", "bee10", "bee2"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in ("2.png", "10.PNG", "B.jpg"):
            picture((48, 48)).save(tmp_path / "data" / name / number)
    return tmp_path / "data"


def test_the_order_is_that_of_timm(data: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    picture().save(tmp_path / "elsewhere" / "1.png")
    (data / "cow").symlink_to(tmp_path / "elsewhere")  # links to folders elsewhere are followed
    expected, classes = timm_folder.find_images_and_targets(str(data))
    folder = ClassFolder(data, None, 4)
    assert [(str(path), label) for path, label in folder.samples] == expected
    assert folder.names == list(classes)
    assert folder.left_out == []
    assert natural_key("a²1²b") < natural_key("a²10²b")  # which timm's key raises ValueError for


def test_a_walk_ends_and_says_what_it_left_out(data: Path) -> None:
    (data / "ant" / "up").symlink_to("..")
    (data / "bee2" / "there").symlink_to(data / "bee10")
    (data / "self.png").symlink_to("self.png")
    (data / "bee2" / "gone.png").symlink_to("nowhere.png")
    os.mkfifo(data / "bee2" / "pipe.png")
    os.mkfifo(data / "bee2" / "pipe.txt")  # no picture by its name
    walk = Walk(data, (".png", ".jpg"))
    assert len(list(walk)) == 9
    assert sorted(line.partition(": ")[0] for line in walk.left_out) == [
        "ant/up", "bee2/gone.png", "bee2/pipe.png", "bee2/there", "self.png"
    ]  # fmt: skip
    folder = ClassFolder(data, lambda image: torch.zeros(1), 3)
    assert (len(folder), sorted(folder.left_out)) == (9, sorted(walk.left_out))
    assert medium_of(data) is IMAGES
    found, left_out = samples_in(data, IMAGES)
    assert len(found) == 9
    assert any("pipe.png: it is a pipe" in line for line in left_out)


def damage(data: Path) -> None:
    """Add files of each kind of damage to a class folder, and what is no file."""
    place = data / "ant"
    picture((64, 64)).save(place / "avif.png", "AVIF")
    whole = (place / "avif.png").read_bytes()
    (place / "avif.png").write_bytes(whole[: len(whole) // 2])
    Image.new("RGB", (65000, 1)).save(place / "long.jpg")
    Image.fromarray((RAMP * 255).astype(np.float32)).save(place / "real.png", "TIFF")
    (place / "empty.png").write_bytes(b"")
    os.mkfifo(place / "pipe.png")
    (place / "up").symlink_to("..")


@pytest.mark.parametrize("workers", [0, 2])
def test_eval_skips_and_lists_damaged_files(
    data: Path, model_dir: Path, tmp_path: Path, run: Run, workers: int
) -> None:
    damage(data)
    words = ("eval", f"local-dir:{model_dir}", "--pretrained", "--data", data, "--r", 4, "--workers", workers)
    code, _, err = run(*words, "--json", tmp_path / "rows.json", "--strict")
    assert code == 1, err
    row = json.loads((tmp_path / "rows.json").read_text())[0]
    assert (row["images"], row["skipped"]) == (9, 6)
    reasons = dict(line.split(": ", 1) for line in row["skipped_files"])
    assert sorted(reasons) == [
        f"ant/{name}" for name in ("avif.png", "empty.png", "long.jpg", "pipe.png", "real.png", "up")
    ]
    assert "64 times as long" in reasons["ant/long.jpg"]
    assert "from 0 to 255" in reasons["ant/real.png"]
    assert "6 images could not be evaluated and were skipped" in err


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_eval_and_visualize_see_the_same_16_bit_picture(tmp_path: Path, value: float) -> None:
    from tokenmerge.tools.eval import EvalOptions
    from tokenmerge.tools.eval.data import make_dataset
    from tokenmerge.tools.visualize.load import Loader

    model = tiny("vit_tiny_patch16_224", img_size=48, patch_size=8, embed_dim=48, depth=1, num_heads=3, num_classes=1)
    (tmp_path / "a").mkdir()
    Image.fromarray(np.full((48, 48), value * 65535).astype(np.uint16)).save(tmp_path / "a" / "1.png")
    loader = Loader(model)
    pixels = loader(tmp_path / "a" / "1.png").pixels
    torch.testing.assert_close(pixels, torch.full_like(pixels, value), atol=3e-3, rtol=0)
    image, _, _ = make_dataset(model, EvalOptions(model="m", data=tmp_path), IMAGES)[0]
    assert image is not None
    torch.testing.assert_close(image, loader(tmp_path / "a" / "1.png").batch[0])


# class maps and documents


class Marker:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_class_maps_are_text(data: Path, model_dir: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "map.txt").write_bytes(b"\xef\xbb\xbfant\r\nbee 2\r\ncow\r\n")
    assert read_class_map(tmp_path / "map.txt", "the class map") == {"ant": 0, "bee 2": 1, "cow": 2}
    for protocol, name in ((0, "map.pkl"), (2, "other.txt"), (4, "map.names")):
        (tmp_path / name).write_bytes(pickle.dumps({"ant": Marker(tmp_path / "ran")}, protocol))
        words = ("eval", f"local-dir:{model_dir}", "--pretrained", "--r", 4, "--data", data, "--class-map")
        code, _, err = run(*words, tmp_path / name)
        assert (code, len(err.strip().splitlines())) == (2, 1), err
        assert "the class map" in err
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"ant\n\nbee\n", "no class in line 2"),
        (b"", "no class in line 1"),
        (b"ant\nbee\nant\n", "'ant' again, after line 1, in line 3"),
        (b"ant\nbee\x00\n", "null byte"),
        (b"ant\n\xff\xfe\n", "UTF-8"),
        (b"ant\n" + b"x" * 300, "no name of a folder, in line 2"),
        (b"ant\n\x1b[31mbee\n", "no name of a folder, in line 2"),
    ],
)
def test_class_maps_that_are_refused(tmp_path: Path, text: bytes, words: str) -> None:
    (tmp_path / "map.txt").write_bytes(text)
    with pytest.raises(InputError, match=words):
        read_class_map(tmp_path / "map.txt", "the class map")


LAUGHS = "a: &a [x, x, x]\n" + "".join(
    f"{n}: &{n} [*{m}, *{m}, *{m}]\n" for m, n in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LAUGHS, "an alias in line 2"),
        ("a: &a [*a]", "an alias"),
        ("[" * 50_000, "nested more than 64 deep"),
        ("".join(" " * n + "a:\n" for n in range(200)), "nested more than 64 deep"),
        ("a: !!python/object/apply:os.mkdir [ran]", "the tag"),
        ("a: !own 3", "the tag '!own'"),
        ("a: !!binary aGk=", "the tag"),
        ("a: 1\nb: 2\na: 3", "'a' twice"),
        ("a: {1: x, +1: y}", "1 twice"),
        ("a: .nan", "only finite"),
        ("a: [-.inf]", "only finite"),
        ("a: 1.0e+999", "only finite"),
        ("a: " + "9" * 5000, "5000 digits"),
        ("a: b: c", "in line 1"),
        ("a: 'open", "in line 1"),
        ("a: 1\n---\nb: 2", "second document"),
        ("? [1]\n: 2", "not YAML"),
        ("a: \x07", "not YAML"),
    ],
)
def test_yaml_that_is_refused(text: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as raised:
        parse_yaml(text, "the config")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("16:1", "16:1"),  # a schedule, and not 961 to the base 60
        ("1:30.5", "1:30.5"),
        ("010", "010"),
        ("0x1F", "0x1F"),
        ("1_000", "1_000"),
        ("2001-01-01", "2001-01-01"),
        ("on", "on"),
        ("no", "no"),
        ("true", True),
        ("-3", -3),
        ("1e-4", 1e-4),
        (".5", 0.5),
        ("", None),
        ("~", None),
    ],
)
def test_yaml_reads_as_the_command_line_does(text: str, value: Any) -> None:
    found = parse_yaml(f"a: {text}", "the config")["a"]
    assert found == value
    assert type(found) is type(value)


def test_yaml_that_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"\xef\xbb\xbfa: [1, 2.5, true, null]\r\nb: {c: !!str 3}\n")
    assert read_yaml(tmp_path / "a.yaml", "the config") == {"a": [1, 2.5, True, None], "b": {"c": "3"}}
    (tmp_path / "large.yaml").write_bytes(b"#" * 2**20)
    with pytest.raises(InputError, match="has 1,048,576 bytes"):
        read_yaml(tmp_path / "large.yaml", "the config")


@settings(max_examples=60)
@given(text=st.text(st.sampled_from("a1:-[]{}&*!'\"\n ,?.#|>%@\t0x"), max_size=40))
def test_yaml_raises_one_error(text: str) -> None:
    one_error(lambda: parse_yaml(text, "the config"))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"[" * 100_000, "is not JSON"),
        (b'{"a":' * 80 + b"1" + b"}" * 80, "nested more than 64 deep"),
        (b"[" + b"9" * 4000 + b"]", "4000 digits"),
        (b"[" + b"9" * 5000 + b"]", "5000 digits"),
        (b"[1e999]", "too large for a number"),
        (b"[NaN]", "NaN"),
        (b"[-Infinity]", "-Infinity"),
        (b'{"r": 1, "r": 2}', "'r' twice"),
        (b"[1]\0", "null byte"),
        (b"\xff\xfe[\x001\x00]\x00", "UTF-8"),
        (b"", "is not JSON"),
    ],
)
def test_json_that_is_refused(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(InputError, match=words) as raised:
        files.read_json(tmp_path / "a.json", "the config")
    assert "\n" not in str(raised.value)


def test_files_that_are_none_and_files_that_are_too_large(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(files.MOST_TEXT + 1)  # a hole
    cases: tuple[tuple[Any, str], ...] = (
        (tmp_path / "pipe", "it is a pipe, but a file was expected"),
        (tmp_path, "it is a folder"),
        ("/dev/zero", "it is a device"),
        (tmp_path / "loop", "cannot be read"),
        (tmp_path / "large", "at most 67,108,864"),
        (tmp_path / ("x" * 300), "cannot be read"),
        ("a\0b", "null"),
        (None, "cannot be read"),
    )
    for path, words in cases:
        with pytest.raises(InputError, match=words):
            files.read_json(path, "the config")
    assert files.read_bytes("/proc/self/stat", "it")  # which states a size of 0
    with pytest.raises(InputError, match="over 10 bytes"):
        files.read_bytes("/proc/self/stat", "it", most=10)


def test_other_programs_infinities_are_read_where_they_may_be(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('\ufeff{"a": Infinity}', encoding="utf-8")
    assert files.read_json(tmp_path / "a.json", "the config", finite=False) == {"a": float("inf")}


# weights

WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3)}


def packed_torch(**options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(WEIGHTS, file, **options)
    return file.getvalue()


FILES = {
    "a.safetensors": save(WEIGHTS),
    "a.pth": packed_torch(),
    "old.pth": packed_torch(_use_new_zipfile_serialization=False),
}


@settings(max_examples=90)
@given(name=st.sampled_from(sorted(FILES)), changes=st.lists(CHANGES, min_size=1, max_size=3))
def test_damaged_weights_raise_one_error(
    name: str, changes: list[Change], tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = FILES[name]
    for change in changes:
        data = changed(data, change) or b"\0"
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(data)
    found = one_error(lambda: read_weights(path))
    assert all(isinstance(value, torch.Tensor) for value in (found or {}).values())


def test_weights_that_are_read(tmp_path: Path) -> None:
    for name, data in FILES.items():
        (tmp_path / name).write_bytes(data)
        found = read_weights(tmp_path / name)
        assert all(torch.equal(found[key], WEIGHTS[key]) for key in WEIGHTS)
    torch.save(
        {"state_dict_ema": WEIGHTS, "args": argparse.Namespace(lr=1)}, tmp_path / "run.pth"
    )  # of timm's train.py
    assert read_weights(tmp_path / "run.pth").keys() == WEIGHTS.keys()


def hostile(folder: Path) -> None:
    """Files that make a folder named `ran` when they are unpickled by Python itself."""
    marker = Marker(folder / "ran")
    torch.save({"a": marker}, folder / "zip.pth")
    torch.save({"a": marker}, folder / "old.pth", _use_new_zipfile_serialization=False)
    for protocol in (0, 2, 5):
        (folder / f"bare{protocol}.pt").write_bytes(pickle.dumps(marker, protocol))
    with tarfile.open(folder / "tar.pth", "w") as tar:
        for name in ("storages", "tensors", "pickle"):
            data = pickle.dumps(marker, 2)
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    np.savez(folder / "a.npz", a=np.array([marker], dtype=object))
    np.save(folder / "a.npy", np.array([marker], dtype=object))
    module = torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2))
    module.save(str(folder / "script.pt"))
    with zipfile.ZipFile(folder / "script.pt") as packed, zipfile.ZipFile(folder / "script2.pt", "w") as other:
        for part in packed.namelist():
            other.writestr(part, pickle.dumps(marker, 2) if part.endswith("data.pkl") else packed.read(part))


def test_no_pickle_is_run(tmp_path: Path) -> None:
    hostile(tmp_path)
    model = torch.nn.Linear(2, 2)
    places = [path for path in tmp_path.iterdir() if path.is_file()]
    assert len(places) == 10
    for path in places:
        with pytest.raises(InputError, match="cannot be read"):
            load_checkpoint(model, path)
        with pytest.raises(InputError, match="cannot be"):
            load_predictors(tiny("vit_tiny_patch16_224"), path)
    assert not (tmp_path / "ran").exists()


def test_model_folders_with_pickles_and_pipes(model_dir: Path, tmp_path: Path, run: Run) -> None:
    (model_dir / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.npz", "model.pth"):
        torch.save({"a": Marker(tmp_path / "ran")}, model_dir / name)
        code, _, err = run("bench", f"local-dir:{model_dir}", "--pretrained", "--r", 4)
        assert (code, len(err.strip().splitlines())) == (2, 1), err
        assert "cannot be made" in err or "holds no weights" in err
        (model_dir / name).unlink()
    assert not (tmp_path / "ran").exists()
    os.mkfifo(model_dir / "model.safetensors")
    code, _, err = run("bench", f"local-dir:{model_dir}", "--pretrained", "--r", 4)
    assert (code, "it is a pipe" in err) == (2, True), err


CODE = """
import os
from transformers import PretrainedConfig, ViTModel
os.mkdir({place!r})
class Config(PretrainedConfig):
    model_type = "own"
class Model(ViTModel):
    pass
"""


@pytest.mark.parametrize("kind", ["own", "vit"])
def test_no_code_that_comes_with_a_model_is_run(kind: str, tmp_path: Path, run: Run) -> None:
    from transformers import ViTConfig, ViTModel

    sizes: dict[str, Any] = {
        "hidden_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    }
    ViTModel(ViTConfig(image_size=32, patch_size=8, **sizes)).save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config |= {"model_type": kind, "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "code.py").write_text(CODE.format(place=str(tmp_path / "ran")))
    for more in ((), ("--pretrained",)):
        code, _, err = run("bench", f"hf:{tmp_path / 'model'}", "--r", 1, "--num-bench-iter", 1, *more)
        assert code == 2, err
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save({"a": Marker(tmp_path / "ran")}, tmp_path / "model" / "pytorch_model.bin")
    code, _, err = run("bench", f"hf:{tmp_path / 'model'}", "--r", 1, "--num-bench-iter", 1, "--pretrained")
    assert (code, len(err.strip().splitlines())) == (2, 1), err
    assert not (tmp_path / "ran").exists()


def test_names_that_are_too_long_are_one_sentence(model_dir: Path, run: Run) -> None:
    long, model = "x" * 300, f"local-dir:{model_dir}"
    for words in (
        ("bench", f"local-dir:{long}", "--r", 4),
        ("bench", f"hf:{long}", "--r", 4),
        ("bench", model, "--r", 4, "--checkpoint", long),
        ("eval", model, "--pretrained", "--r", 4, "--data", long),
        ("eval", model, "--pretrained", "--r", 4, "--data", model_dir, "--class-map", long),
        ("compare", model, "--r", 4, "--data", long),
        ("visualize", model, long, "--r", 4),
        ("explore", model, "--data", long),
        ("train", model, "--r", 4, "--data", long, "--output", "run"),
        ("bench", model, "--r", 4, "--tune", "--tuning", long),
    ):
        code, _, err = run(*words)
        told = [line for line in err.splitlines() if line.startswith("tokenmerge")]
        assert (code, len(told)) == (2, 1), err


def header(length: int, text: bytes, rest: bytes = b"") -> bytes:
    return struct.pack("<Q", length) + text + rest


@pytest.mark.parametrize(
    "data",
    [
        header(2**63, b"{}"),
        header(2**64 - 1, b"{}"),
        header(99_000_000, b"{}"),
        header(100_000, b"[" * 100_000),
        header(70, b'{"a":{"dtype":"F32","shape":[99999999999,9999999],"data_offsets":[0,4]}}'.ljust(70), b"1234"),
        header(62, b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,400000000]}}', b"1234"),
        header(52, b'{"a":{"dtype":"Q9","shape":[1],"data_offsets":[0,4]}}'.ljust(52), b"1234"),
        header(2, b"\xff\xff"),
        b"",
        b"\0" * 7,
    ],
)
def test_absurd_headers_of_safetensors(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(data)
    with pytest.raises(InputError, match="cannot be read"):
        read_weights(tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="cannot be read"):
        read_metadata(tmp_path / "a.safetensors", "tokenmerge")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"weight": torch.zeros(2, 2), "bias": 5}, "'bias', which is no tensor"),
        ({1: torch.zeros(2)}, "cannot be read"),
        ([torch.zeros(2)], "cannot be read"),
        (torch.zeros(2), "cannot be read"),
        ({"weight": torch.zeros(2, 2), "bias": torch.zeros(2, device="meta")}, "no dense tensor"),
        ({"weight": torch.zeros(2, 2).to_sparse(), "bias": torch.zeros(2)}, "no dense tensor"),
        ({"weight": torch.zeros(2, 2), "bias": torch.zeros(2, dtype=torch.complex64)}, "another kind of number"),
        ({"weight": torch.zeros(2, 2), "bias": torch.zeros(2, dtype=torch.int64)}, "another kind of number"),
        ({"weight": torch.zeros(1).expand(10**7, 10**7), "bias": torch.zeros(2)}, "of another shape"),
    ],
)
def test_weights_that_are_refused(tmp_path: Path, value: Any, words: str) -> None:
    torch.save(value, tmp_path / "a.pth")
    with pytest.raises(InputError, match=words) as raised:
        load_checkpoint(torch.nn.Linear(2, 2), tmp_path / "a.pth")
    assert "\n" not in str(raised.value)


def test_torch_files_that_unpack_to_far_more(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2**22)}, tmp_path / "a.pth")
    with (
        zipfile.ZipFile(tmp_path / "a.pth") as packed,
        zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED) as other,
    ):
        for entry in packed.infolist():
            other.writestr(entry.filename, packed.read(entry))
    with pytest.raises(InputError, match="unpacks to"):
        read_weights(tmp_path / "b.pth")


@pytest.mark.parametrize("text", ['{"a": NaN}', "[1]", "not JSON", "[" * 10_000, '{"a": 1, "a": 2}'])
def test_damaged_settings_beside_weights_are_no_default(tmp_path: Path, model_dir: Path, run: Run, text: str) -> None:
    """They say how the weights were trained; without them the model would run otherwise, and nobody would know."""
    model = tiny("vit_tiny_patch16_224", img_size=48, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=3)
    save_file(model.state_dict(), tmp_path / "a.safetensors", metadata={"tokenmerge": text})
    code, _, err = run("bench", f"local-dir:{model_dir}", "--checkpoint", tmp_path / "a.safetensors", "--r", 4)
    assert (code, len(err.strip().splitlines())) == (2, 1), err
    assert "the settings of merging in" in err or "is not JSON" in err


def test_predictors_that_do_not_fit_leave_the_model_as_it_was(tmp_path: Path) -> None:
    def model() -> Any:
        return tiny("vit_tiny_patch16_224", img_size=48, patch_size=8, embed_dim=48, depth=3, num_heads=3)

    first = model()
    add_predictors(first, [0, 2])
    save_predictors(first, tmp_path / "a.safetensors")
    again = model()
    load_predictors(again, tmp_path / "a.safetensors")
    assert sorted(predicting(again)) == [0, 2]
    state = {name: value for name, value in read_weights(tmp_path / "a.safetensors").items() if name != "2.0.weight"}
    extra = torch.zeros(1)
    for number, odd in enumerate(({**state, "2.more": extra}, {**state, "77.x": extra}, {"x": extra})):
        save_file(odd, tmp_path / f"{number}.safetensors")
        left = model()
        with pytest.raises(InputError, match="cannot be used"):
            load_predictors(left, tmp_path / f"{number}.safetensors")
        assert not predicting(left)


def test_a_damaged_config_of_the_image_processor_is_no_default(tmp_path: Path, run: Run) -> None:
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    sizes: dict[str, Any] = {
        "hidden_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    }
    folder = tmp_path / "model"
    ViTModel(ViTConfig(image_size=32, patch_size=8, **sizes)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    words = ("visualize", f"hf:{folder}", tmp_path / "a.png", "--r", 2)
    assert run(*words)[0] == 0
    for text in ("{", "[]", '{"image_processor_type": "ViTImageProcessor", "image_mean": ["a", 1, 2]}'):
        (folder / "preprocessor_config.json").write_text(text)
        code, _, err = run(*words)
        assert (code, len(err.strip().splitlines())) == (2, 1), err
