"""The model behind the interactive page: samples, uploads and passes, whose errors name no folder of the server."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from tokenmerge.errors import DamagedFileError, InputError, TokenMergeError, shown
from tokenmerge.ops.timing import Spread, take_turns
from tokenmerge.tools.explore.options import ExploreOptions
from tokenmerge.tools.explore.pictures import open_picture, open_sample, plain_name, samples_in
from tokenmerge.tools.media import IMAGES
from tokenmerge.tools.models import load_model, random_weights
from tokenmerge.tools.pages import printable, title_of
from tokenmerge.tools.reading.recordings import FOR_VISITORS
from tokenmerge.tools.saved import kept_of, saved_with, say_used
from tokenmerge.tools.settings import Setting, label_of
from tokenmerge.tools.visualize.load import Loader, Shown
from tokenmerge.tools.visualize.looks import Merged, merged_copies
from tokenmerge.tools.visualize.page import image_data

_ROUNDS = 3
_USUAL = ("8", "16")
"""Initial schedules of models that were saved without one."""
_PATH = re.compile(r"(?<![\w.:/<])(?:/[^\s'\"()/,;:]+)+/?")
"""Absolute path without spaces."""


class Explorer:
    """A model that runs on samples and uploaded pictures.

    Args:
        options: model, merging and folder of sample pictures.

    Raises:
        InputError: if the folder holds no files of the medium that the model takes.
    """

    def __init__(self, options: ExploreOptions) -> None:
        data = options.data
        self.name = title_of(options.model)
        self.model = load_model(options)
        self.random = random_weights(options)
        self.loader = Loader(self.model, limits=FOR_VISITORS)
        self.remarks: list[str] = []
        self.texts, self.fields = _merging(options, self.remarks.append)
        self.samples, self.left_out = ([], []) if data is None else samples_in(data, self.loader.medium)
        self.sample_names = [] if data is None else [printable(str(path.relative_to(data))) for path in self.samples]
        self.unmerged = merged_copies(self.model, [Setting(0, {"r": 0})], {})[0]
        folders = {os.path.abspath(one) for one in (data, tempfile.gettempdir(), Path.cwd(), Path.home()) if one}
        self._folders = sorted(folders, key=len, reverse=True)  # a folder before the one that it lies in

    def sample(self, index: int) -> Shown:
        """Load a sample picture.

        Raises:
            InputError: if there is no such sample, or it cannot be read.
        """
        if not 0 <= index < len(self.samples):
            raise InputError(
                f"there is no sample {index}, but {len(self.samples)} of them: choose one, or a picture of yours"
            )
        path, name = self.samples[index], self.sample_names[index]
        with _named(path, name):
            if self.loader.medium is not IMAGES:
                return dataclasses.replace(self.loader(path), name=name)
            return self.loader.image(open_sample(path), name)

    def upload(self, data: bytes, name: str) -> Shown:
        """Decode and preprocess an uploaded picture, sound or video.

        Raises:
            InputError: if it is of another medium than the model takes, or cannot be decoded.
        """
        medium = self.loader.medium
        if medium is IMAGES:
            return self.loader.image(open_picture(data), plain_name(name))
        suffix = Path(plain_name(name)).suffix.lower()
        if suffix not in (medium.suffixes or ()):
            raise InputError(
                f"{plain_name(name)!r} is none of the {medium.name} that the model takes: give one of them"
            )
        with tempfile.TemporaryDirectory() as folder:  # FFmpeg reads files
            file = Path(folder, f"upload{suffix}")
            file.write_bytes(data)
            with _named(file, plain_name(name)):
                return dataclasses.replace(self.loader(file), name=plain_name(name))

    def run(self, shown: Shown, settings: list[Setting]) -> dict[str, Any]:
        """Run all settings on a picture, and return the data for the page.

        Raises:
            TokenMergeError: if the model does not support a setting.
        """
        merged = merged_copies(self.model, settings, self.fields, attention=True)
        looks = [one.look(shown) for one in (self.unmerged, *merged)]
        return image_data(shown, looks, self._speeds(shown, merged))

    def without_paths(self, text: str) -> str:
        """Return a message for strangers: names of files stay, and the folders of this machine that they lie in go."""
        for folder in self._folders:
            if folder != os.path.dirname(folder):  # the root itself would take every slash
                text = text.replace(folder + os.sep, "").replace(folder, os.path.basename(folder))
        return _PATH.sub(lambda found: os.path.basename(found[0].rstrip("/")), text)

    @torch.inference_mode()
    def _speeds(self, shown: Shown, merged: list[Merged]) -> list[float | None]:
        for one in merged:
            one.handle.update(trace=False)  # tracing would distort the timing
        calls: list[Any] = [lambda one=one: one(shown.batch) for one in (self.model, *(m.model for m in merged))]
        times = take_turns(calls, shown.batch.device, 1, _ROUNDS)
        return [Spread.of_ratios(times[0], mine).p50 for mine in times[1:]]


def _merging(options: ExploreOptions, say: Callable[[str], Any]) -> tuple[list[str], dict[str, Any]]:
    """Return the initial schedules as text, and the other fields of `MergeConfig`: as given, otherwise as saved with the model."""
    saved = saved_with(options)
    given = options.merging(saved)
    if saved is None:
        return options.texts or list(_USUAL), given
    texts = options.texts or ([str(label_of(saved))] if saved.scheduled else list(_USUAL))
    kept = kept_of(saved, given)
    say_used(saved, {*kept, *(saved.changed("schedule") if not options.texts else ())}, say)
    return texts, {**kept, **given}


@contextlib.contextmanager
def _named(path: Path, name: str) -> Iterator[None]:
    """Let errors about a file name it as the page lists it, and not by its path."""
    try:
        yield
    except DamagedFileError as error:
        raise InputError(f"{shown(name)} cannot be read ({error.reason}): choose another one") from None
    except TokenMergeError as error:
        raise InputError(str(error).replace(repr(str(path)), shown(name)).replace(str(path), name)) from None
