"""Sounds as log-mel spectrograms, as AST and AudioMAE take them."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenmerge.errors import InputError
from tokenmerge.tools.media import SAMPLE_RATE

MEAN, STD = -4.2677393, 4.5689974
"""Of AudioSet's log-mel energies, with which AST and AudioMAE were trained; features are (x − mean) / (2·std)."""


@dataclasses.dataclass(frozen=True)
class SoundAugmentation:
    """What changes from epoch to epoch.

    Attributes:
        roll: whether sounds are turned around in time and made up to twice as soft (AudioMAE, `--roll_mag_aug`).
        time_mask: most frames that one mask covers (SpecAugment; AST's `--timem`).
        frequency_mask: most bands that one mask covers (SpecAugment; AST's `--freqm`).
    """

    roll: bool = False
    time_mask: int = 0
    frequency_mask: int = 0


class Spectrogram:
    """`[samples]` at 16 kHz -> `shape`: Kaldi's log-mel energies every 10 ms, cut or padded with zeros, normalised.

    Args:
        shape: `(1, frames, bands)`, of the model's input.
        augmentation: for training.
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
        with warnings.catch_warnings():  # AST's own lowest bands are narrower than the bins of its spectrum
            warnings.filterwarnings("ignore", "At least one mel filter")
            self.features = ASTFeatureExtractor(num_mel_bins=bands, max_length=frames, mean=MEAN, std=STD)

    def __call__(self, samples: np.ndarray[Any, Any]) -> Tensor:
        """The spectrogram, float32.

        Raises:
            ValueError: if the sound is shorter than one window of 25 ms.
        """
        if len(samples) < SAMPLE_RATE // 40:
            raise ValueError(f"it has {len(samples)} samples, fewer than one window of 25 ms")
        if self.augmentation.roll:
            samples = _rolled(samples)
        values = self.features(samples, sampling_rate=SAMPLE_RATE, return_tensors="pt")["input_values"]
        spectrum: Tensor = values.reshape(self.shape)
        for axis, widest in ((1, self.augmentation.time_mask), (2, self.augmentation.frequency_mask)):
            if widest:
                spectrum = _masked(spectrum, axis, widest)
        return spectrum


def _rolled(samples: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    start = int(torch.randint(len(samples), ()))
    loudness = 0.5 + 0.5 * float(torch.rand(()))
    return np.roll(samples, start) * np.float32(loudness)


def _masked(spectrum: Tensor, axis: int, widest: int) -> Tensor:
    """One band of at most `widest` set to the mean, which is 0 after normalisation."""
    length = spectrum.shape[axis]
    width = int(torch.randint(min(widest, length) + 1, ()))
    start = int(torch.randint(length - width + 1, ()))
    spectrum.narrow(axis, start, width).zero_()
    return spectrum
