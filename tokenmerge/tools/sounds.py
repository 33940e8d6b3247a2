"""Log-mel spectrograms of sounds, the inputs of AST and AudioMAE."""

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
"""Mean and standard deviation of the log-mel energies of AudioSet, which AST and AudioMAE normalize with: (x − mean) / (2·std)."""


@dataclasses.dataclass(frozen=True)
class SoundAugmentation:
    """Random augmentation of sounds.

    Attributes:
        roll: whether sounds are shifted cyclically in time and scaled by 0.5 to 1 (AudioMAE, `--roll_mag_aug`).
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
    """Set a random band of at most `widest` rows to 0, which is the mean after normalization."""
    length = spectrum.shape[axis]
    width = int(torch.randint(min(widest, length) + 1, ()))
    start = int(torch.randint(length - width + 1, ()))
    spectrum.narrow(axis, start, width).zero_()
    return spectrum
