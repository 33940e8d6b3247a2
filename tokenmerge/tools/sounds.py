"""Log-mel spectrograms of sounds, the inputs of AST and AudioMAE."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenmerge.errors import InputError
from tokenmerge.tools.media import SAMPLE_RATE
from tokenmerge.tools.reading.damage import damaged

MEAN, STD = -4.2677393, 4.5689974
"""Mean and standard deviation of the log-mel energies of AudioSet, which AST and AudioMAE normalize with: (x − mean) / (2·std)."""


@dataclasses.dataclass(frozen=True)
class SoundAugmentation:
    """Random augmentation of sounds.

    Attributes:
        roll: whether sounds are shifted cyclically in time, and scaled by 0.5 plus a number of Beta(10, 10), so by 0.5 to 1.5
            with a mean of 1 (AudioMAE, `--roll_mag_aug`).
        time_mask: largest width of the time mask in frames (SpecAugment; AST's `--timem`).
        frequency_mask: largest width of the frequency mask in bands (SpecAugment; AST's `--freqm`).
    """

    roll: bool = False
    time_mask: int = 0
    frequency_mask: int = 0


class Spectrogram:
    """Transform from `[samples]` at 16 kHz to Kaldi's log-mel energies every 10 ms, normalized.

    Args:
        shape: `(1, frames, bands)` of the model's input; sounds are cut or padded with zeros to it.
        augmentation: augmentation for training; `None` for evaluation.
    """

    def __init__(self, shape: tuple[int, ...], augmentation: SoundAugmentation | None = None) -> None:
        try:
            from transformers import ASTFeatureExtractor
        except ImportError:
            raise InputError(
                "transformers is not installed, but spectrograms are made by it: pip install 'tokenmerge[media]'"
            ) from None
        self.shape, self.augmentation = shape, augmentation or SoundAugmentation()
        _, frames, bands = shape
        with warnings.catch_warnings():  # the lowest bands of AST are narrower than the bins of its spectrum
            warnings.filterwarnings("ignore", "At least one mel filter")
            self.features = ASTFeatureExtractor(num_mel_bins=bands, max_length=frames, mean=MEAN, std=STD)

    def __call__(self, samples: np.ndarray[Any, Any]) -> Tensor:
        """Return the spectrogram `[1, frames, bands]` float32.

        Raises:
            DamagedFileError: if the sound is shorter than one window of 25 ms.
        """
        samples = prepared(samples, SAMPLE_RATE, self.augmentation)
        values = self.features(samples, sampling_rate=SAMPLE_RATE, return_tensors="pt")["input_values"]
        return masked(values.reshape(self.shape), self.augmentation, 1, 2)


class Features:
    """Transform from `[samples]` to the spectrum that a processor of transformers makes, with augmentation in training.

    Args:
        processor: function from samples at `rate` Hz to the spectrum, `[frames, bands]` or `[bands, frames]`.
        rate: sample rate in Hz.
        time_axis: axis of the frames.
        augmentation: augmentation for training; `None` for evaluation.
    """

    def __init__(
        self,
        processor: Callable[[Any], Tensor],
        rate: int,
        time_axis: int,
        augmentation: SoundAugmentation | None = None,
    ) -> None:
        self.processor, self.rate, self.time_axis = processor, rate, time_axis
        self.augmentation = augmentation or SoundAugmentation()

    def __call__(self, samples: np.ndarray[Any, Any]) -> Tensor:
        """Return the spectrum, float32.

        Raises:
            DamagedFileError: if the sound is shorter than one window of 25 ms.
        """
        spectrum = self.processor(prepared(samples, self.rate, self.augmentation))
        return masked(spectrum, self.augmentation, self.time_axis, 1 - self.time_axis)


def prepared(samples: np.ndarray[Any, Any], rate: int, augmentation: SoundAugmentation) -> np.ndarray[Any, Any]:
    """Return the samples, shifted at random if the augmentation says so.

    Raises:
        DamagedFileError: if the sound is shorter than one window of 25 ms.
    """
    if len(samples) < rate // 40:
        raise damaged("the sound", f"it has {len(samples)} samples, fewer than one window of 25 ms", "a longer one")
    return _rolled(samples) if augmentation.roll else samples


def masked(spectrum: Tensor, augmentation: SoundAugmentation, time_axis: int, band_axis: int) -> Tensor:
    """Return the spectrum with random masks in time and frequency, if the augmentation has them."""
    for axis, widest in ((time_axis, augmentation.time_mask), (band_axis, augmentation.frequency_mask)):
        if widest:
            spectrum = _masked(spectrum, axis, widest)
    return spectrum


def _rolled(samples: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    start = int(torch.randint(len(samples), ()))
    loudness = 0.5 + float(torch.distributions.Beta(10.0, 10.0).sample())
    return np.roll(samples, start) * np.float32(loudness)


def _masked(spectrum: Tensor, axis: int, widest: int) -> Tensor:
    """Set a random band of at most `widest` rows to 0, which is the mean after normalization."""
    length = spectrum.shape[axis]
    width = int(torch.randint(min(widest, length) + 1, ()))
    start = int(torch.randint(length - width + 1, ()))
    spectrum.narrow(axis, start, width).zero_()
    return spectrum
