from __future__ import annotations

import dataclasses
import json
import pickle
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from tokenmerge import ConfigError, MergeConfig, TokenMergeError
from tokenmerge.errors import UnknownFieldError


@pytest.mark.parametrize(
    "config",
    [
        MergeConfig(r=8),
        MergeConfig(r=(16, -1), prop_attn=False),
        MergeConfig(r=[3, 3]),
        MergeConfig(keep=0.9, trace=True),
        MergeConfig(flops=0.5, prop_attn=True),
        MergeConfig(),
    ],
)
def test_json_and_pickle_round_trip(config: MergeConfig) -> None:
    again = MergeConfig.from_json(config.to_json())
    assert again == config
    assert type(again.r) is type(config.r)  # a pair stays a pair, a list a list
    assert pickle.loads(pickle.dumps(config)) == config


def test_is_frozen_and_keeps_its_own_list() -> None:
    mine = [1, 2]
    config = MergeConfig(r=mine)
    mine.append(99)
    assert config.r == [1, 2]
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.r = 3  # type: ignore[misc]


def test_unknown_field_is_a_type_error() -> None:
    with pytest.raises(TypeError, match=r"'ratio' is no field of MergeConfig, which has r, keep"):
        MergeConfig.create(ratio=0.5)
    with pytest.raises(TokenMergeError):
        MergeConfig.from_json('{"ratio": 0.5}')


@pytest.mark.parametrize(
    "fields",
    [
        {"r": -1},
        {"r": 8, "flops": 0.5},
        {"keep": 0.0},
        {"keep": 1.5},
        {"flops": 0},
        {"flops": float("nan")},
        {"flops": "half"},
        {"prop_attn": "maybe"},
        {"prop_attn": 1},
        {"matcher": 3},
        {"trace": "yes"},
    ],
)
def test_values_that_mean_nothing(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        MergeConfig(**fields)
    assert next(iter(fields)) in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "8", '{"r": {"r": 8}}', '{"r": -1}', '{"r": [8, "x"]}'])
def test_bad_json(text: str) -> None:
    with pytest.raises(ConfigError):
        MergeConfig.from_json(text)


def test_a_new_schedule_replaces_the_old_form() -> None:
    assert MergeConfig.create(MergeConfig(flops=0.5), r=8) == MergeConfig(r=8)
    assert MergeConfig.create(MergeConfig(r=8), prop_attn=False) == MergeConfig(r=8, prop_attn=False)
    with pytest.raises(ConfigError, match="must be a MergeConfig"):
        MergeConfig.create(8)  # type: ignore[arg-type]


@pytest.mark.parametrize("key", ["cls", "config", "preset", "self", ""])
def test_a_file_holds_fields_alone(key: str) -> None:
    with pytest.raises(UnknownFieldError, match="is no field"):
        MergeConfig.from_json(json.dumps({"r": 8, key: 1}))


@pytest.mark.parametrize(
    "value",
    [{1}, [{1}], ([1], {2}), bytearray(b"x"), torch.ones(2), np.ones(2), {"deep": [torch.ones(1)]}, torch.tensor(3)],
    ids=str,
)
def test_options_hold_nothing_that_could_change(value: object) -> None:
    with pytest.raises(ConfigError, match="use numbers, text and lists"):
        MergeConfig(options={"value": value})


class Pair(NamedTuple):
    """A tuple with names."""

    first: object
    second: int


def test_options_keep_what_cannot_change() -> None:
    given = {
        "a": np.float32(2),
        "b": np.int64(3),
        "c": Pair(1, 2),
        "d": Pair([1], 2),
        "e": torch.Size((2, 3)),
        "f": None,
    }
    config = MergeConfig(options=given)
    assert config.options == given
    assert [type(value) for value in config.options.values()] == [type(value) for value in given.values()]
    assert config.options["d"].first == [1]
    assert hash(config) == hash(MergeConfig(options=given))


def test_options_are_copies_however_deep() -> None:
    inner = [1]
    config = MergeConfig(r=1, options={"value": (inner, {"a": inner})})
    inner.append(2)
    assert config.options["value"] == ([1], {"a": [1]})
    with pytest.raises(TypeError, match="cannot be changed"):
        config.options["value"][0].append(2)
    assert hash(config) == hash(MergeConfig(r=1, options={"value": ([1], {"a": [1]})}))
    assert json.loads(config.to_json())["options"] == {"value": [[1], {"a": [1]}]}
    deep: list[object] = []
    for _ in range(900):
        deep = [deep]
    with pytest.raises(ConfigError, match="deep"):
        MergeConfig(options={"value": deep})


def test_huge_numbers_are_refused_in_a_sentence() -> None:
    for fields in (
        {"r": 10**5000},
        {"keep": 10**5000},
        {"flops": 10**5000},
        {"r": (10**5000, 0)},
        {"speedup": 10**5000},
    ):
        with pytest.raises(ConfigError):
            MergeConfig(**fields)


def test_a_preset_with_another_matcher_leaves_what_only_its_own_obeys() -> None:
    config = MergeConfig.create(preset="accurate", matcher="kmeans", r=8)
    assert (config.matcher, config.options, config.partition, config.combine) == ("kmeans", {}, "alternating", "norm")
    same = MergeConfig.create(preset="accurate", matcher="informed", r=8)
    assert same == MergeConfig.create(preset="accurate", r=8)
