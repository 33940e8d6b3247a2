"""Damaged and hostile sounds and videos: one error, no other file opened, and an end."""

from __future__ import annotations

import os
import struct
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tools.test_reading import CHANGES, Change, changed, one_error
from tokenmerge.errors import DamagedFileError
from tokenmerge.tools.folders import ClassFolder
from tokenmerge.tools.media import SOUNDS, VIDEOS, frame_rate, read_frames, read_sound
from tokenmerge.tools.reading import wholeness
from tokenmerge.tools.reading.recordings import Limits
from tokenmerge.tools.sounds import Spectrogram
from tokenmerge.tools.videos import Clip

av = pytest.importorskip("av")

CLIP = Clip((4, 3, 16, 16), 2)


def write_video(
    path: Path, frames: int = 12, size: tuple[int, int] = (32, 16), codec: str = "mpeg4", rate: int = 25
) -> Path:
    """A video whose n-th frame has the grey value 16·n."""
    width, height = size
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(frames):
            pixels = np.full((height, width, 3), 16 * number % 256, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def write_wav(path: Path, samples: int = 8000, rate: int = 16000, channels: int = 1) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.arange(samples * channels).astype("<i2").tobytes())
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """One file of each container."""
    folder = tmp_path_factory.mktemp("whole")
    found = {"a.wav": write_wav(folder / "a.wav").read_bytes()}
    for name, codec in (("a.mp4", "mpeg4"), ("a.avi", "mpeg4"), ("a.mkv", "mpeg4"), ("a.mpg", "mpeg1video")):
        found[name] = write_video(folder / name, codec=codec).read_bytes()
    for name, codec in (("a.flac", "flac"), ("a.mp3", "mp3"), ("a.ogg", "libopus"), ("a.m4a", "aac")):
        with av.open(str(folder / name), "w") as container:
            stream = container.add_stream(codec, rate=16000)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="flt", layout="mono")
            frame.rate = 16000
            resampler = av.AudioResampler(stream.format, stream.layout, 16000, stream.codec_context.frame_size or 1024)
            for part in (frame, None):
                for out in resampler.resample(part):
                    container.mux(stream.encode(out))
            container.mux(stream.encode(None))
        found[name] = (folder / name).read_bytes()
    return found


def read(path: Path) -> Any:
    return CLIP(path) if path.suffix in (VIDEOS.suffixes or ()) else read_sound(path)


def test_every_container_is_read(whole: dict[str, bytes], tmp_path: Path) -> None:
    for name, data in whole.items():
        (tmp_path / name).write_bytes(data)
        assert len(read(tmp_path / name)), name


@settings(max_examples=80)
@given(place=st.integers(0, 8), changes=st.lists(CHANGES, min_size=1, max_size=3))
def test_damaged_recordings_raise_one_error(
    place: int, changes: list[Change], whole: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory
) -> None:
    name = sorted(whole)[place]
    data = whole[name]
    for change in changes:
        data = changed(data, change) or b"\0"
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(data)
    one_error(lambda: read(path))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("concat.mp4", "ffconcat version 1.0\nfile secret.mp4\n"),
        ("hls.mp4", "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nsecret.mp4\n#EXT-X-ENDLIST\n"),
        ("remote.mkv", "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n"),
        ("list.mp4", "#EXTM3U\nsecret.mp4\n"),
        ("session.mp4", "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"),
        ("dash.mp4", '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"></MPD>'),
        ("concat.wav", "ffconcat version 1.0\nfile secret.wav\n"),
    ],
)
def test_a_playlist_opens_no_other_file(tmp_path: Path, name: str, text: str) -> None:
    write_video(tmp_path / "secret.mp4")
    write_wav(tmp_path / "secret.wav")
    (tmp_path / name).write_text(text)
    with pytest.raises(DamagedFileError, match=r"format that is read|Invalid data"):
        read(tmp_path / name)


def test_ffmpeg_itself_would_open_the_other_file(tmp_path: Path) -> None:
    """Otherwise the test above could not fail."""
    write_video(tmp_path / "secret.mp4")
    (tmp_path / "concat.mp4").write_text("ffconcat version 1.0\nfile secret.mp4\n")
    with av.open(str(tmp_path / "concat.mp4")) as container:
        assert len(list(container.decode(video=0))) == 12


def test_a_name_is_no_list_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "b.mp4", frames=2)
    os.replace(write_video(tmp_path / "a.mp4"), "concat:b.mp4|b.mp4")
    assert read_frames(Path("concat:b.mp4|b.mp4"), lambda total: [total - 1])[0].mean() > 150  # frame 11 of a.mp4


def stating(whole: dict[str, bytes], frames: int) -> bytes:
    """An .avi that states another number of frames."""
    data = bytearray(whole["a.avi"])
    for mark, offset in ((b"avih", 24), (b"strh", 40)):
        place = data.index(mark) + offset
        data[place : place + 4] = struct.pack("<I", frames)
    return bytes(data)


@pytest.mark.parametrize("stated", [13, 1000, 10**9, 2**32 - 1])
def test_more_frames_stated_than_there_are(whole: dict[str, bytes], tmp_path: Path, stated: int) -> None:
    """The frames that are there are sampled evenly; the last one does not stand for those that are not."""
    (tmp_path / "a.avi").write_bytes(stating(whole, stated))
    (tmp_path / "true.avi").write_bytes(whole["a.avi"])

    def choose(total: int) -> list[int]:
        return [total * step // 4 for step in range(1, 4)] + [total - 1]

    assert (read_frames(tmp_path / "a.avi", choose) == read_frames(tmp_path / "true.avi", choose)).all()


def resized(path: Path, width: int, height: int) -> Path:
    """The raw video with another size in its header."""
    data = bytearray(path.read_bytes())
    place = data.index(b"strf") + 12
    data[place : place + 8] = struct.pack("<ii", width, height)
    path.write_bytes(data)
    return path


def test_videos_over_a_limit(tmp_path: Path) -> None:
    write_video(tmp_path / "long.avi", size=(4096, 16), frames=2, codec="rawvideo")
    resized(write_video(tmp_path / "wide.avi", codec="rawvideo"), 32768, 32768)
    resized(write_video(tmp_path / "tall.avi", codec="rawvideo"), 16, 16000)
    data = bytearray(write_video(tmp_path / "fast.avi").read_bytes())
    place = data.index(b"strh") + 28
    data[place : place + 8] = struct.pack("<II", 1, 100_000)
    (tmp_path / "fast.avi").write_bytes(data)
    (tmp_path / "empty.mp4").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe.mp4")
    for name, words in (
        ("long.avi", "64 times as long"),
        ("wide.avi", r"not fit|Invalid"),
        ("tall.avi", "64 times as long"),
        ("empty.mp4", "it is empty"),
        ("pipe.mp4", "it is a pipe"),
        ("nowhere.mp4", "No such file"),
    ):
        with pytest.raises(DamagedFileError, match=words):
            CLIP(tmp_path / name)
    with pytest.raises(DamagedFileError, match="frames per second"):
        frame_rate(tmp_path / "fast.avi")
    write_video(tmp_path / "a.mp4")
    with pytest.raises(DamagedFileError, match="4 of them would not fit"):
        read_frames(tmp_path / "a.mp4", lambda total: range(4), Limits(clip=3 * 32 * 16 * 3))
    with pytest.raises(DamagedFileError, match="more than 5 frames"):
        read_frames(tmp_path / "a.mp4", lambda total: [total - 1], Limits(frames=5))


def test_sounds_over_a_limit(tmp_path: Path) -> None:
    write_wav(tmp_path / "slow.wav", rate=1)
    write_wav(tmp_path / "fast.wav", rate=2**31 - 1)
    write_wav(tmp_path / "none.wav", samples=0)
    write_wav(tmp_path / "many.wav", channels=1000)
    write_video(tmp_path / "silent.mp4")
    os.mkfifo(tmp_path / "pipe.wav")
    for name, words in (
        ("slow.wav", "1 Hz"),
        ("fast.wav", "Hz"),
        ("none.wav", "its audio is empty"),
        ("many.wav", "damaged"),
        ("silent.mp4", "holds no audio"),
        ("pipe.wav", "it is a pipe"),
        (".", "it is a folder"),
    ):
        with pytest.raises(DamagedFileError, match=words):
            read_sound(tmp_path / name)
    write_wav(tmp_path / "long.wav", samples=16000 * 61)
    with pytest.raises(DamagedFileError, match="longer than 1 minutes"):
        read_sound(tmp_path / "long.wav", limits=Limits(seconds=60))


def test_samples_that_are_not_finite(whole: dict[str, bytes], tmp_path: Path) -> None:
    data = bytearray(whole["a.wav"])
    data[20:22], data[32:36] = struct.pack("<H", 3), struct.pack("<HH", 4, 32)  # real numbers of 32 bits
    data[44:] = np.full(4000, np.nan, "<f4").tobytes()
    (tmp_path / "a.wav").write_bytes(data)
    with pytest.raises(DamagedFileError, match="not finite"):
        read_sound(tmp_path / "a.wav")


def test_a_data_set_skips_them(whole: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "s" / "low").mkdir(parents=True)
    for name, data in (("a.wav", whole["a.wav"]), ("b.wav", whole["a.wav"][:100]), ("c.wav", b"RIFF"), ("d.mp3", b"")):
        (tmp_path / "s" / "low" / name).write_bytes(data)
    sounds = ClassFolder(tmp_path / "s", Spectrogram((1, 32, 16)), 1, medium=SOUNDS)
    assert [found[0] is not None for found in map(sounds.__getitem__, range(4))] == [True, False, False, False]
    (tmp_path / "v" / "low").mkdir(parents=True)
    for name, data in (("a.mp4", whole["a.mp4"]), ("b.mp4", whole["a.mp4"][:400]), ("c.mp4", b"")):
        (tmp_path / "v" / "low" / name).write_bytes(data)
    videos = ClassFolder(tmp_path / "v", CLIP, 1, medium=VIDEOS)
    found = [videos[number] for number in range(3)]
    assert isinstance(found[0][0], torch.Tensor)
    assert [problem.partition(": ")[0] for _, _, problem in found[1:]] == ["low/b.mp4", "low/c.mp4"]


def test_recordings_that_were_cut_off(tmp_path: Path) -> None:
    """FFmpeg decodes the rest of them without a word."""
    write_wav(tmp_path / "a.wav", samples=4000)
    write_video(tmp_path / "a.mkv")
    write_video(tmp_path / "a.avi")
    for name in ("a.wav", "a.mkv", "a.avi"):
        data = (tmp_path / name).read_bytes()
        read: Any = read_sound if name.endswith("wav") else CLIP
        assert len(read(tmp_path / name))
        for share in (0.5, 0.9):
            (tmp_path / f"cut-{name}").write_bytes(data[: int(share * len(data))])
            with pytest.raises(DamagedFileError, match=f"it is cut off: it states {len(data):,} bytes"):
                read(tmp_path / f"cut-{name}")
        (tmp_path / f"more-{name}").write_bytes(data + b"tags of a player")
        assert len(read(tmp_path / f"more-{name}"))
    wav = (tmp_path / "a.wav").read_bytes()
    for size in (0, 0xFFFFFFFF):  # written to a pipe
        (tmp_path / "piped.wav").write_bytes(wav[:4] + struct.pack("<I", size) + wav[8:40] + b"\xff" * 4 + wav[44:])
        assert len(read_sound(tmp_path / "piped.wav")) == 4000


@pytest.mark.parametrize(
    ("head", "size"),
    [
        (b"", None),
        (b"RIFF", None),
        (b"RIFF\x10\x00\x00\x00WAVE", 24),
        (b"\x1a\x45\xdf\xa3\x82ab\x18\x53\x80\x67\x40\x20", 13 + 32),
        (b"\x1a\x45\xdf\xa3\x82ab\x18\x53\x80\x67\x01" + b"\xff" * 7, None),  # of a live stream
        (b"\x1a\x45\xdf\xa3\x82ab\x18\x53\x80\x67\x01\x00", None),
        (b"\x1a\x45\xdf\xa3\x00", None),
        (b"\x1a\x45\xdf\xa3", None),
        (b"\x1a\x45\xdf\xa3\x81a\x00\x00\x00\x00\x81", None),
    ],
)
def test_sizes_that_headers_state(head: bytes, size: int | None) -> None:
    assert wholeness._stated_size(head) == size


def test_samples_that_are_far_too_loud(whole: dict[str, bytes], tmp_path: Path) -> None:
    """Their spectra would overflow, and end the evaluation of all others."""
    data = bytearray(whole["a.wav"])
    data[20:22], data[32:36] = struct.pack("<H", 3), struct.pack("<HH", 4, 32)  # real numbers of 32 bits
    for level, fine in ((1.0, True), (32768.0, True), (1e30, False), (-3e38, False)):
        data[44:] = np.full(4000, level, "<f4").tobytes()[: len(data) - 44]
        (tmp_path / "a.wav").write_bytes(data)
        if fine:
            assert np.abs(read_sound(tmp_path / "a.wav")).max() == pytest.approx(level)
        else:
            with pytest.raises(DamagedFileError, match=r"its loudest sample is \de\+\d+, and at most 1e\+06"):
                read_sound(tmp_path / "a.wav")
