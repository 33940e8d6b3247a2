"""Pictures are right: every drawn region is exactly the source map's, whatever the model looks at."""

from __future__ import annotations

import json
import wave
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import tokenmerge
from tests.conftest import Run
from tests.helpers.pictures import expected, photo, write_model
from tests.helpers.tiny import images_for, tiny
from tokenmerge import InputError
from tokenmerge.tools.common import DeviceOptions
from tokenmerge.tools.models import load_model
from tokenmerge.tools.settings import parse_setting
from tokenmerge.tools.visualize.load import Loader, mel_bands
from tokenmerge.tools.visualize.looks import merged_copies
from tokenmerge.tools.visualize.panels import painted
from tokenmerge.tracing import VIEWS, View, borders, paint, region_map
from tokenmerge.tracing.figure import as_pixels, strip
from tokenmerge.tracing.regions import anchors

OF_PICTURES = [view for view in VIEWS if view != "frames"]
"""Views of pictures; tests/tools/test_video_model.py looks at the other one."""


@given(
    st.tuples(st.integers(1, 5), st.integers(1, 5)), st.tuples(st.integers(1, 4), st.integers(1, 4)), st.integers(0, 99)
)
def test_regions_are_the_source_map(grid: tuple[int, int], patch: tuple[int, int], seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    source = torch.randint(-1, 6, (grid[0] * grid[1],), generator=draw)
    region = region_map(source, grid, (grid[0] * patch[0], grid[1] * patch[1]))
    for y in range(region.shape[0]):
        for x in range(region.shape[1]):
            assert region[y, x] == source[(y // patch[0]) * grid[1] + x // patch[1]]
    first = anchors(source)
    for i, name in enumerate(source.tolist()):
        assert first[i] == (-1 if name < 0 else source.tolist().index(name))


def test_painting_is_what_a_loop_over_pixels_paints() -> None:
    pixels = torch.rand(3, 12, 24)
    names = torch.tensor([[0, 0, 2, 3], [0, 5, 2, 3]]).reshape(-1)
    region = region_map(names, (2, 4), (12, 24))
    found = paint(pixels, region).permute(1, 2, 0).numpy() * 255
    np.testing.assert_allclose(found, expected(pixels.permute(1, 2, 0).numpy() * 255, names, (2, 4)), atol=1e-3)
    inside = ~borders(region)
    outlines = paint(pixels, region, "outlines")
    assert torch.equal(outlines[:, inside], pixels[:, inside])
    views: list[View] = ["sizes", "tokens"]
    for view in views:
        colour = paint(pixels, region, view)
        for name in names.unique():
            mine = colour[:, inside & (region == name)]
            assert torch.equal(mine, mine[:, :1].expand_as(mine)), view
    light = paint(pixels, region, "sizes")[:, inside].mean(dim=0)
    sizes = torch.bincount(region.flatten())[region][inside]
    assert light[sizes == sizes.max()].min() > light[sizes == sizes.min()].max(), "larger tokens are brighter"
    gone = paint(pixels, region.masked_fill(region == 0, -1))
    assert float(gone[:, 3, 3].max()) < 0.2, "dropped patches are dark"
    with pytest.raises(InputError, match="this map"):
        paint(pixels, region[:6])
    with pytest.raises(InputError, match="one of picture"):
        paint(pixels, region, "x")  # type: ignore[arg-type]


def test_a_token_keeps_its_colour_from_block_to_block() -> None:
    model = tiny("deit_tiny_patch16_224")
    with tokenmerge.patched(model, r=6, trace=True) as handle, torch.no_grad():
        model(images_for(model))
        trace = handle.trace
    before = trace.regions((36, 36), 0, image=1)
    after = trace.regions((36, 36), 2, image=1)
    assert set(after.unique().tolist()) < set(before.unique().tolist()), "what is left kept its name"
    pixels = torch.rand(3, 36, 36)
    colours = [paint(pixels, region, "tokens") for region in (before, after)]
    same = (before == after) & ~borders(before) & ~borders(after)
    assert bool(same.any())
    assert torch.equal(colours[0][:, same], colours[1][:, same])
    assert not torch.equal(trace.regions((36, 36), image=0), after)


ARCHITECTURES: dict[str, tuple[str, dict[str, Any], tuple[int, int]]] = {
    "square": ("vit_tiny_patch16_224", {"img_size": 64, "patch_size": 8}, (64, 64)),
    "wide": ("vit_tiny_patch16_224", {"img_size": [32, 96], "patch_size": 8}, (96, 32)),
    "tall": ("vit_tiny_patch16_224", {"img_size": [96, 48], "patch_size": 8}, (48, 96)),
    "oblong patches": ("vit_tiny_patch16_224", {"img_size": [64, 64], "patch_size": [8, 16]}, (64, 64)),
    "registers": ("vit_medium_patch16_reg4_gap_256", {"img_size": 48, "patch_size": 8}, (48, 48)),
    "distilled": ("deit_tiny_distilled_patch16_224", {"img_size": 48, "patch_size": 8}, (48, 48)),
}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_pixel_of_the_file_is_right(kind: str, tmp_path: Path, run: Run) -> None:
    architecture, arguments, (width, height) = ARCHITECTURES[kind]
    name = write_model(tmp_path / "model", architecture, **arguments)
    picture, out = photo(tmp_path / "in.png", width, height), tmp_path / "out.png"
    code, text, err = run("visualize", name, picture, "--pretrained", "--r", "4", "--layer", "all", "--out", out)
    assert code == 0, err
    assert "wrote" in text
    sheet = np.asarray(Image.open(out)).astype(float)

    model = load_model(DeviceOptions(model=name, pretrained=True))
    grid = model.patch_embed.grid_size
    shown = Loader(model)(picture)
    source = np.asarray(Image.open(picture)).astype(float)
    np.testing.assert_allclose(shown.pixels.permute(1, 2, 0).numpy() * 255, source, atol=1), "it is what the file holds"
    with tokenmerge.patched(model, r=4, trace=True) as handle, torch.no_grad():
        model(shown.batch)
        trace = handle.trace
    scale = max(1, round(224 / max(height, width)))
    large = np.repeat(np.repeat(shown.pixels.permute(1, 2, 0).numpy() * 255, scale, 0), scale, 1)
    blocks = strip(6)
    assert blocks == [1, 3, 5]
    for column, block in enumerate([-1, *blocks]):
        left, top = 10 + column * (width * scale + 10), 26 + 20
        panel = sheet[top : top + height * scale, left : left + width * scale]
        if block < 0:
            np.testing.assert_allclose(panel, large, atol=0.51)
            continue
        names = trace.source(block)[0, trace.protected :]
        np.testing.assert_allclose(panel, expected(large, names, grid), atol=0.51)


def test_videos(tmp_path: Path, run: Run) -> None:
    """A token's colour is the mean over all of its frames, and so the same in each of them."""
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification, VideoMAEImageProcessor

    sizes: dict[str, Any] = {"image_size": 32, "patch_size": 8, "num_frames": 8, "tubelet_size": 2, "hidden_size": 32}
    config = VideoMAEConfig(**sizes, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64)
    VideoMAEForVideoClassification(config).save_pretrained(tmp_path / "model")
    processor = VideoMAEImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path / "model")
    rng = np.random.default_rng(0)
    with av.open(str(tmp_path / "in.mp4"), "w") as container:
        stream: Any = container.add_stream("mpeg4", rate=10)
        stream.height, stream.width, stream.pix_fmt, stream.bit_rate = 32, 32, "yuv420p", 4_000_000
        scene = np.asarray(Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((64, 32)))
        for shift in range(20):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(scene[:, shift : shift + 32]), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    name, video = f"hf:{tmp_path / 'model'}", tmp_path / "in.mp4"
    model = load_model(DeviceOptions(model=name, pretrained=True), head="videos")
    shown = Loader(model, sampling_rate=2)(video)
    assert shown.pixels.shape == (3, 8, 32, 32)
    assert shown.rate == 5
    look = merged_copies(model, [parse_setting("20")], {})[0].look(shown)
    region = shown.regions(look.trace, None)
    cells = look.trace.source()[0].reshape(4, 4, 4)
    film = painted(shown, look, 2, "picture")
    inside = ~borders(region)
    for token in cells.unique():
        mine = cells.repeat_interleave(2, 0).repeat_interleave(8, 1).repeat_interleave(8, 2) == token
        assert len(region[mine].unique()) == 1
        colour = film[:, mine & inside]
        mean = shown.pixels[:, mine].mean(dim=1, keepdim=True)
        torch.testing.assert_close(colour, mean.expand_as(colour), atol=1e-4, rtol=0)
    assert any(len({int(t) for t, *_ in (cells == token).nonzero()}) > 1 for token in cells.unique()), (
        "some span frames"
    )

    base = ("visualize", name, video, "--pretrained", "--r", "20", "--sampling-rate", "2")
    for file in ("out.mp4", "out.gif", "out.png"):
        code, _, err = run(*base, "--out", tmp_path / file)
        assert code == 0, err
    with av.open(str(tmp_path / "out.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 8
    wanted = (film[:, 5].repeat_interleave(7, 1).repeat_interleave(7, 2).permute(1, 2, 0).numpy() * 255).astype(float)
    panel = frames[5][26 : 26 + 224, 10 + 234 : 10 + 234 + 224].astype(float)
    assert np.abs(panel - wanted)[4::7, 4::7].mean() < 16, "the codec shares colour among 2×2 pixels, borders included"
    assert Image.open(tmp_path / "out.gif").n_frames == 8  # type: ignore[attr-defined]
    code, _, err = run(*base, "--out", tmp_path / "out.html")
    assert code == 0, err  # a page shows a sheet of frames
    assert "data:image/png" in (tmp_path / "out.html").read_text()


def write_tone(path: Path) -> None:
    time = np.arange(16_000) / 16_000
    samples = 0.5 * np.sin(2 * np.pi * (400 + 2000 * time) * time) + 0.01 * np.random.default_rng(0).standard_normal(
        16_000
    )
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes((samples * 32767).astype("<i2").tobytes())


def test_sounds(tmp_path: Path, run: Run) -> None:
    """timm's spectrograms have time first, AST's frequency; a picture has time along x, low frequencies at the bottom."""
    from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification

    write_tone(tmp_path / "in.wav")
    small: dict[str, Any] = {
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 96,
    }
    config = ASTConfig(**small, max_length=96, num_mel_bins=32, frequency_stride=8, time_stride=8, patch_size=16)
    ASTForAudioClassification(config).save_pretrained(tmp_path / "ast")
    ASTFeatureExtractor(max_length=96, num_mel_bins=32).save_pretrained(tmp_path / "ast")
    timms = write_model(tmp_path / "timm", img_size=[96, 32], patch_size=8, in_chans=1, depth=2)
    for name, grid in ((timms, (12, 4)), (f"hf:{tmp_path / 'ast'}", (3, 11))):
        model = load_model(DeviceOptions(model=name, pretrained=True))
        shown = Loader(model)(tmp_path / "in.wav")
        assert shown.pixels.shape == (3, 32, 96)
        look = merged_copies(model, [parse_setting("7")], {})[0].look(shown)
        assert look.trace.grid == grid
        region = shown.regions(look.trace, 1)
        cells = look.trace.source(1)[0, look.trace.protected :].reshape(grid)
        for band in range(32):
            for frame in range(96):
                cell = (
                    cells[frame * 12 // 96, band * 4 // 32]
                    if name == timms
                    else cells[band * 3 // 32, frame * 11 // 96]
                )
                assert int(region[band, frame]) == int((cells == cell).flatten().nonzero()[0])
        out = tmp_path / "out.png"
        code, _, err = run("visualize", name, tmp_path / "in.wav", "--pretrained", "--r", "7", "--out", out)
        assert code == 0, err
        assert Image.open(out).size[0] == 1200
    bands = mel_bands(128)
    assert bands == sorted(bands)
    assert bands[0] > 20
    assert bands[-1] < 8000


def test_plot(tmp_path: Path) -> None:
    model = tiny("vit_small_patch14_reg4_dinov2")
    images = images_for(model)
    with tokenmerge.patched(model, r=5, trace=True) as handle, torch.no_grad():
        model(images)
        trace = handle.trace
    pixels = images[1].sigmoid()
    figure = trace.plot(pixels, block="all", image=1)
    assert [axes.get_title().split(":")[0] for axes in figure.axes] == [
        "input",
        "after block 0",
        "after block 1",
        "after block 2",
    ]
    shown = figure.axes[2].images[0].get_array()
    assert shown is not None
    wanted = expected(pixels.permute(1, 2, 0).numpy() * 255, trace.source(1)[1, trace.protected :], (6, 6))
    np.testing.assert_allclose(np.asarray(shown) * 255, wanted, atol=0.01)
    figure.savefig(tmp_path / "plot.png")
    assert figure._repr_png_()[:4] == b"\x89PNG", "a notebook shows it"  # type: ignore[attr-defined]
    array = (pixels.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    for picture in (array, Image.fromarray(array), torch.from_numpy(array).permute(2, 0, 1)):
        assert as_pixels(picture).shape == pixels.shape
    for view in OF_PICTURES:
        assert len(trace.plot(pixels, [0, 2], cast("View", view)).axes) == 2
    with pytest.raises(InputError, match="blocks 0 … 2"):
        trace.plot(pixels, 3)
    with pytest.raises(InputError, match="images 0 … 1"):
        trace.plot(pixels, image=2)
    with pytest.raises(InputError, match=r"the grid is \(5, 5\)"):
        trace.with_grid((5, 5)).plot(pixels)
    with pytest.raises(InputError, match="as many axes"):
        trace.plot(torch.rand(4, 3, 84, 84))


def test_the_trace_knows_similarity_and_attention() -> None:
    model = tiny("deit_tiny_patch16_224")
    images = images_for(model)
    with torch.no_grad(), tokenmerge.patched(model, r=[6, 0, 4], trace="attention") as handle:
        wanted = model(images)
        trace = handle.trace
        handle.update(trace=False)
        assert torch.equal(model(images), wanted), "looking changes nothing"
    assert [None if one is None else tuple(one.shape) for one in trace.similarities] == [(2, 6), None, (2, 4)]
    for plan, similarity in zip(trace.plans, trace.similarities, strict=True):
        if plan is not None and similarity is not None and plan.r:
            assert bool((similarity.diff(dim=1) <= 1e-6).all()), "bipartite matching merges the most similar first"
            assert float(similarity.max()) <= 1 + 1e-5
    attention = [one for one in trace.attention if one is not None]
    assert [tuple(one.shape) for one in attention] == [(2, 37), (2, 31), (2, 31)]
    for one in attention:
        torch.testing.assert_close(one.sum(dim=1), torch.ones(2))
    with tokenmerge.patched(model, r=6, trace=True, matcher="attention_prune") as handle, torch.no_grad():
        model(images)
        dropped = handle.trace.similarities[0]
        assert dropped is not None
        assert bool(dropped.isnan().all())
        assert float((handle.trace.regions((36, 36)) < 0).float().mean()) == pytest.approx(18 / 36)


def test_models_without_classes_and_tokens_that_merge_first(tmp_path: Path, run: Run) -> None:
    name = write_model(tmp_path / "model", img_size=32, patch_size=8, num_classes=0)
    picture = photo(tmp_path / "in.png", 32, 32)
    out = tmp_path / "out.html"
    place = ("--set", "place=before", "metric=x_pre")
    code, _, err = run("visualize", name, picture, "--r", "2", *place, "--out", out, "--json", tmp_path / "rows.json")
    assert code == 0, err
    assert json.loads((tmp_path / "rows.json").read_text())[0]["top"] == [], "features are no classes"
    code, _, err = run("visualize", name, picture, "--matcher", "attention_prune", "--r", "2", "--out", out)
    assert code == 0, err
    for broken in (b"\xff\xd8\xff\xe1\x00\x10Exif\x00\x00MM\x00*\xff\xff", b"GIF89a"):
        (tmp_path / "broken.jpg").write_bytes(broken)
        code, _, err = run("visualize", name, tmp_path / "broken.jpg", "--out", out)
        assert code == 2
        assert "cannot be read" in err


def test_the_command_says_what_is_wrong(tmp_path: Path, run: Run) -> None:
    name = write_model(tmp_path / "model", img_size=32, patch_size=8)
    good = photo(tmp_path / "in.png", 40, 32)
    (tmp_path / "odd.png").write_text("no picture")
    (tmp_path / "sound.wav").write_text("")
    out = tmp_path / "out.png"
    for words, text in (
        ((good, "--out", tmp_path / "out.xyz"), "no picture, film or page"),
        ((good, "--out", tmp_path / "none" / "out.png"), "does not exist"),
        ((good, "--out", tmp_path / "out.mp4"), "is a film"),
        ((tmp_path / "none.png", "--out", out), "is not a file"),
        ((tmp_path / "odd.png", "--out", out), "cannot be read"),
        ((tmp_path / "sound.wav", "--out", out), "the model takes images"),
        ((good, "--layer", "7", "--out", out), "from 0 to 6"),
        ((good, "--layer", "first", "--out", out), "all, last"),
        ((good, "--r", "4", "4", "--out", out), "given twice"),
    ):
        code, _, err = run("visualize", name, *words)
        assert code == 2, err
        assert text in err
        assert not out.exists()
    code, text, err = run(
        "visualize", name, good, good, "--r", "0", "4", "--layer", "last", "--out", out, "--json", "-"
    )
    assert code == 0, err
    rows = json.loads(text)
    assert [(row["setting"], row["patches"], row["tokens"]) for row in rows] == 2 * [("r=0", 16, 16), ("r=4", 16, 1)]
    assert Image.open(out).size == (10 + 234, 26 + 4 * (224 + 30))
    for view in OF_PICTURES:
        code, _, err = run("visualize", name, good, "--view", view, "--layer", "3", "--out", tmp_path / f"{view}.jpg")
        assert code == 0, err
