"""Grids of patches and shapes of inputs from transformers' configs."""

from __future__ import annotations

from typing import Any

Grid = tuple[int, ...] | None


def pair(value: Any) -> tuple[int, int]:
    """Return one number twice, or two numbers unchanged."""
    return (int(value[0]), int(value[1])) if isinstance(value, list | tuple) else (int(value), int(value))


def image_grid(config: Any) -> Grid:
    """Return the patches of an image: rows and columns."""
    (height, width), (down, right) = pair(config.image_size), pair(config.patch_size)
    return height // down, width // right


def video_grid(config: Any) -> Grid:
    """Return the patches of a video: frames, rows and columns."""
    height, width = pair(config.image_size)
    if isinstance(config.tubelet_size, list | tuple):  # ViViT: frames, rows, columns
        frames, down, right = config.tubelet_size
    else:
        frames, (down, right) = config.tubelet_size, pair(config.patch_size)
    return int(config.num_frames) // int(frames), height // int(down), width // int(right)


def clip_grid(config: Any) -> Grid:
    """Return the patches of a video clip, by V-JEPA 2's names of the sizes: frames, rows and columns."""
    side = config.crop_size // config.patch_size
    return config.frames_per_clip // config.tubelet_size, side, side


def spectrogram_grid(config: Any) -> Grid:
    """Return the patches of a spectrogram, which may overlap: rows and columns."""
    rows = (config.num_mel_bins - config.patch_size) // config.frequency_stride + 1
    columns = (config.max_length - config.patch_size) // config.time_stride + 1
    return rows, columns


def sound_grid(config: Any) -> Grid:
    """Return the number of positions of a sound."""
    return (int(config.max_source_positions),)


def frames(config: Any) -> tuple[int, ...]:
    """Return the shape of a video: frames, channels, height and width."""
    return (int(config.num_frames), int(config.num_channels), *pair(config.image_size))


def clip_frames(config: Any) -> tuple[int, ...]:
    """Return the shape of a video clip: frames, channels, height and width."""
    return int(config.frames_per_clip), int(config.in_chans), int(config.crop_size), int(config.crop_size)


def spectrum(config: Any) -> tuple[int, ...]:
    """Return the shape of a spectrogram: time, frequencies."""
    return int(config.max_length), int(config.num_mel_bins)


def mel(config: Any) -> tuple[int, ...]:
    """Return the shape of a mel spectrogram: frequencies, time."""
    return int(config.num_mel_bins), 2 * int(config.max_source_positions)


def several(config: Any) -> None:
    """Return `None`: models that take several inputs have no single input shape."""
    return


def any_shape(config: Any) -> Grid:
    """Return `None`: models that take inputs of any shape have no grid of their own."""
    return None


def with_registers(config: Any) -> int:
    """Return the number of prefix tokens of models with register tokens."""
    return 1 + int(config.num_register_tokens)
