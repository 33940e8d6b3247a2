"""transformers: grids of patches and shapes of inputs, read off configs."""

from __future__ import annotations

from typing import Any

Grid = tuple[int, ...] | None


def pair(value: Any) -> tuple[int, int]:
    """A number, or two of them, as two."""
    return (int(value[0]), int(value[1])) if isinstance(value, list | tuple) else (int(value), int(value))


def image_grid(config: Any) -> Grid:
    """Patches of an image."""
    (height, width), (down, right) = pair(config.image_size), pair(config.patch_size)
    return height // down, width // right


def video_grid(config: Any) -> Grid:
    """Patches of a video: frames, rows, columns."""
    height, width = pair(config.image_size)
    if isinstance(config.tubelet_size, list | tuple):  # ViViT: frames, rows, columns
        frames, down, right = config.tubelet_size
    else:
        frames, (down, right) = config.tubelet_size, pair(config.patch_size)
    return int(config.num_frames) // int(frames), height // int(down), width // int(right)


def clip_grid(config: Any) -> Grid:
    """Patches of a clip, as V-JEPA 2 names its sizes."""
    side = config.crop_size // config.patch_size
    return config.frames_per_clip // config.tubelet_size, side, side


def spectrogram_grid(config: Any) -> Grid:
    """Patches of a spectrogram, which may overlap."""
    rows = (config.num_mel_bins - config.patch_size) // config.frequency_stride + 1
    columns = (config.max_length - config.patch_size) // config.time_stride + 1
    return rows, columns


def sound_grid(config: Any) -> Grid:
    """Positions of a sound."""
    return (int(config.max_source_positions),)


def frames(config: Any) -> tuple[int, ...]:
    """Shape of a video."""
    return (int(config.num_frames), int(config.num_channels), *pair(config.image_size))


def clip_frames(config: Any) -> tuple[int, ...]:
    """Shape of a clip."""
    return int(config.frames_per_clip), int(config.in_chans), int(config.crop_size), int(config.crop_size)


def spectrum(config: Any) -> tuple[int, ...]:
    """Shape of a spectrogram, time first."""
    return int(config.max_length), int(config.num_mel_bins)


def mel(config: Any) -> tuple[int, ...]:
    """Shape of a mel spectrogram."""
    return int(config.num_mel_bins), 2 * int(config.max_source_positions)


def several(config: Any) -> None:
    """Models that take several inputs have no one shape."""
    return


def any_shape(config: Any) -> Grid:
    """Models that take any shape have no grid of their own."""
    return None


def with_registers(config: Any) -> int:
    """Prefix tokens of models with registers."""
    return 1 + int(config.num_register_tokens)
