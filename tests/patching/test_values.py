"""Values that mean nothing, wherever one can be given: each is refused in a sentence, and nothing has changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tokenmerge
from tests.helpers.tiny import images_for, tiny
from tokenmerge import ConfigError, InputError
from tokenmerge.config import FIELDS


def _odd() -> list[Any]:
    """What people give where a number, a name or a list belongs, though it is neither."""
    return [np.arange(3), torch.arange(3), 10**400, object(), {1, 2}, b"x", [[]], -99]


@pytest.mark.parametrize("value", _odd(), ids=lambda value: type(value).__name__)
def test_odd_values_are_refused_everywhere_in_a_sentence(value: Any) -> None:
    """Arrays compare to anything, and a number may be too large for a float."""
    model = tiny("vit_tiny_patch16_224")
    images = images_for(model)
    handle = tokenmerge.patch(model, r=3, trace=True)
    plan = tokenmerge.bipartite_matching(torch.randn(2, 6, 4), 2)
    tokens = torch.randn(2, 6, 4)
    with torch.no_grad():
        features = model.forward_features(images)
    asks: list[Callable[[], Any]] = [
        *(lambda name=name: handle.update(**{name: value}) for name in FIELDS if name not in ("options", "r")),
        lambda: handle.update(options={"iterations": value}, matcher="kmeans"),
        lambda: handle.update(options={"token_weight": value}, matcher="informed"),
        lambda: handle.update(options={"linkage": value}, matcher="agglomerative"),
        lambda: handle.update(options={"pruned": [value] * 3}, matcher="diffrate"),
        lambda: tokenmerge.bipartite_matching(tokens, 2, 0, value),
        lambda: tokenmerge.bipartite_matching(tokens, 2, grid=value, partition="checkerboard"),
        lambda: plan.merge(value),
        lambda: plan.merge(tokens, size=value),
        lambda: plan.compose(value),
        lambda: plan.unmerge(value),
        lambda: handle.tune(images, forms=value),
        lambda: handle.tune(images, rounds=value),
        lambda: handle.trace.regions(value),
        lambda: handle.trace.regions((96, 96), block=value),
        lambda: handle.trace.plot(images[0], block=value),
        lambda: handle.trace.plot(images[0], view=value),
        lambda: handle.trace.to_grid(features, value),
        lambda: tokenmerge.get_method(value),
        lambda: tokenmerge.register_method(value),
        lambda: tokenmerge.vit_cost(embed_dim=value, depth=3),
        lambda: tokenmerge.vit_cost(embed_dim=48, depth=3, patch_size=value),
        lambda: tokenmerge.vit_cost(embed_dim=48, depth=3, mlp_ratio=value),
        lambda: tokenmerge.vit_cost(embed_dim=48, depth=3).total(value),
        lambda: tokenmerge.calibrate(tiny("vit_tiny_patch16_224"), [images], r=3, matcher=value),
    ]
    before = handle.config
    for number, ask in enumerate(asks):
        with pytest.raises(tokenmerge.TokenMergeError) as caught:
            print(f"{number} of the list takes {value!r:.60} and gives {ask()!r:.60}")
        assert len(str(caught.value)) < 1000
    assert handle.config == before


def test_what_cannot_be_calibrated_is_said() -> None:
    model = tiny("vit_tiny_patch16_224")
    images = images_for(model)
    for batches in (None, 5, "images"):
        with pytest.raises(InputError, match="batches"):
            tokenmerge.calibrate(model, batches, r=3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="not finite while calibrating"):
        tokenmerge.calibrate(model, [images, images * torch.nan], r=3)
    with pytest.raises(ConfigError, match="'kmeans' cannot be calibrated"):
        tokenmerge.calibrate(model, [images], r=3, matcher="kmeans")
    assert not tokenmerge.is_patched(model)


def test_presets_and_configs_are_constants() -> None:
    with pytest.raises(TypeError, match="cannot be changed"):
        tokenmerge.PRESETS["paper"]["metric"] = "q"  # type: ignore[index]
    configs = {tokenmerge.MergeConfig(r=[1, 2]), tokenmerge.MergeConfig(r=[1, 2]), tokenmerge.MergeConfig(r=3)}
    assert len(configs) == 2
    accurate = tokenmerge.MergeConfig.create(preset="accurate", r=3)
    assert hash(accurate) == hash(tokenmerge.MergeConfig.from_json(accurate.to_json()))


def test_nested_json_holds_no_schedule(tmp_path: Path) -> None:
    for number, text in enumerate(("[" * 100_000, "[]", '{"a": []}')):
        file = tmp_path / f"{number}.json"
        file.write_text(text)
        with pytest.raises(InputError, match="schedule"):
            tokenmerge.diffrate_schedule(file, 0, "x")  # type: ignore[arg-type]
