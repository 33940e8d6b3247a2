"""Lines of the paper that need weights of their own: trained here, each by its method, from the same weights."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

import tokenmerge
from tokenmerge import files
from tokenmerge.errors import InputError
from tokenmerge.patching import model_cost
from tokenmerge.patching.seen import TokensSeen, flops_of, seen_in
from tokenmerge.patching.target import find_target
from tokenmerge.tools.buckets import in_buckets
from tokenmerge.tools.compare.measuring import accuracy, common_of, differences, stamps
from tokenmerge.tools.compare.paper.experiments import Line
from tokenmerge.tools.compare.scoring import Scores, score
from tokenmerge.tools.compare.training import trained_model, training_options
from tokenmerge.tools.compare.turns import over_batches, training_speedups
from tokenmerge.tools.models import load_model
from tokenmerge.tools.report import Report, Row
from tokenmerge.tools.settings import Setting, parse_setting

_TIMED = 4
"""Batches of one round of timing."""
GROUP = "trained"


@dataclasses.dataclass(frozen=True)
class Method:
    """How one method is trained.

    Attributes:
        folder: name of the run's folder.
        fields: fields of `MergeConfig`.
        share: fraction of the tokens that each of three blocks, a quarter, half and three quarters into the network, keeps; `None`
            merges the paper's r in every block.
        before: whether these blocks drop tokens before their attention, which is after the MLP of the block before.
    """

    folder: str
    fields: Mapping[str, Any]
    share: float | None = None
    before: bool = False


_LEARNED = {"place": "after", "prop_attn": True}
METHODS: Mapping[str, Method] = {
    "ToMe, trained here": Method("tome", {"prop_attn": True}),
    "EViT, trained here": Method("evit", {"matcher": "evit", "prop_attn": False}, 0.7),
    "DynamicViT, trained here": Method("dynamicvit", {"matcher": "dynamicvit", **_LEARNED}, 0.7, True),
    "SPViT, trained here": Method("spvit", {"matcher": "spvit", **_LEARNED}, 0.7, True),
    "A-ViT, trained here": Method("avit", {"matcher": "avit", **_LEARNED}),
}
"""The methods by the label of their row. DynamicViT, EViT and SPViT keep 0.7 of the tokens three times, as in their papers; the
schedule of A-ViT is the depth that its training aims at, ToMe's at the same r."""


def setting_for(method: Method, r: int, layers: int) -> Setting:
    """Return the schedule of a method for a model with `layers` blocks, in which ToMe merges r tokens per block."""
    if method.share is None:
        return parse_setting(str(r))
    places = {max(0, part * layers // 4 - method.before) for part in (1, 2, 3)}
    shares = [method.share if layer in places else 1.0 for layer in range(layers)]
    return parse_setting("keep=" + ",".join(f"{share:g}" for share in shares))


def title_of_schedule(setting: Setting) -> str:
    """Return a schedule as tables name it, such as "keep 0.7 in blocks 3, 6, 9"."""
    shares = setting.fields.get("keep")
    if not isinstance(shares, list):
        return setting.title
    places = [str(layer) for layer, share in enumerate(shares) if share != 1]
    return f"keep {min(shares):g} in blocks {', '.join(places)}"


def trained_rows(lines: Sequence[Line], options: Any, images: Any, report: Report) -> list[Row]:
    """Return one row for each line with weights of its own, and with `--train` the rows of all methods as trained here.

    The paper's lines are not measured: `measured` is False, and there is a `reason`. The caller adds their published figures,
    and leaves them out if the run is not the paper's. Rows of what was trained here never get published figures, because
    the training is another one.

    Args:
        lines: the paper's lines.
        options: options of the run: weights, data and device.
        images: the images of the run.
        report: receiver of messages.

    Raises:
        InputError: if the model cannot be trained, or `train_set` names no option of `train`.
    """
    base: Row = {"kind": "trained", "setting": "", "group": GROUP}
    reason = "its paper's own training is not repeated; --train DIR trains and measures it briefly"
    rows: list[Row] = [{"method": line.label, **base, "measured": False, "reason": reason} for line in lines]
    return rows if options.train is None else [*rows, *_train_all(base, options, images, report)]


def _train_all(base: Row, options: Any, images: Any, report: Report) -> list[Row]:
    """Train every method from the weights of the model, and return their rows."""
    if options.model.partition(":")[0] in ("torchvision", "open_clip"):
        raise InputError(
            f"--train was given with {options.model}, but trained lines are saved in the formats of timm and transformers: give a "
            "model of one of them"
        )
    model = load_model(options, head="images")
    layers, tokens = len(find_target(model).blocks), model_cost(model).tokens
    r = max(1, round(13 * 12 * tokens / (layers * 197)))  # the paper's DeiT-S has 12 blocks and 197 tokens
    reference = score(model, images, None)[1]
    found: dict[str, tuple[Any, Setting, Scores, TokensSeen]] = {}
    for label, method in METHODS.items():
        setting = setting_for(method, r, layers)
        report.say(f"{label}, {title_of_schedule(setting)} …")
        _check_start(options, method)
        training = training_options(options, options.output / "trained" / method.folder, setting, method.fields)
        mine = trained_model(training, options)
        with TokensSeen(mine) as seen:  # an image's result does not depend on its batch, so nothing is sorted
            scores = score(mine, images, reference)[0]
        found[label] = mine, setting, scores, seen
    first = next(iter(found.values()))[2]
    base = {**base, "measured": True, **common_of(options, len(reference))}
    rows = [
        {
            **base,
            "method": label,
            "setting": title_of_schedule(one[1]),
            **accuracy(one[2]),
            **differences(one[2], first),
        }
        for label, one in found.items()
    ]
    return _with_cost(rows, model, [(one[0], one[3]) for one in found.values()], images, options)


def _check_start(options: Any, method: Method) -> None:
    """Raise if the run of a method started from other weights under the same name; otherwise note what it starts from."""
    run = options.output / "trained" / method.folder
    record, mine = run.with_suffix(".json"), json.loads(json.dumps(stamps(options)))
    if run.exists():
        before = files.read_json(record, "the record of the weights that the run started from")
        if before != mine:
            raise InputError(
                f"the run in {str(run)!r} started from other weights than {options.model} now has: give another --output, or remove the folder"
            )
        return
    files.make_folder(run.parent, "--output")
    files.write_json(record, mine, "the record of the weights")


def _with_cost(
    rows: list[Row], model: Any, trained: Sequence[tuple[Any, TokensSeen]], images: Any, options: Any
) -> list[Row]:
    """Add GFLOPs and speed, and for methods that go by the images one more row, for batches sorted by their tokens."""
    batches, labels = _some_batches(images)
    timed: list[tuple[Any, list[Tensor]]] = [(model, batches)]
    result: list[Row] = []
    for row, (mine, seen) in zip(rows, trained, strict=True):
        handle = tokenmerge.handle_of(mine)
        result.append({**row, "gflops": seen.mean_flops / 1e9, "config": handle.config.to_json()})
        timed.append((mine, batches))
        if handle.summary().adaptive:
            gflops = flops_of(mine, (batch for batch, _, _ in in_buckets(images, keys=seen.each))) / 1e9
            note = "batches of images that keep similar numbers of tokens"
            result.append({**result[-1], "method": f"{row['method']}; sorted", "gflops": gflops, "note": note})
            keys = seen_in(mine, batches).each
            timed.append((mine, [one for one, _, _ in in_buckets([(b, labels) for b in batches], keys=keys)]))
    if not options.rounds:
        return result
    speeds, rates = over_batches(timed, options.rounds)
    learning = [(model, None), *((mine, tokenmerge.handle_of(mine)) for mine, _ in trained)]
    steps = training_speedups(learning, batches[0], labels, options.rounds)
    by_model = {id(mine): step.p50 for (mine, _), step in zip(learning, steps, strict=True)}
    for row, (mine, _), speed, rate in zip(result, timed[1:], speeds[1:], rates[1:], strict=True):
        row |= {"speedup": speed.p50, "speedup_p20": speed.p20, "speedup_p80": speed.p80}
        row |= {"images_per_second": rate, "training_speedup": by_model[id(mine)]}
    return result


def _some_batches(images: Any) -> tuple[list[Tensor], Tensor]:
    """Return a few full batches, evenly spaced in the data, which are sorted by class, and the labels of the first one."""
    every = max(1, len(images) // (images.batch_size * _TIMED))
    found: list[tuple[Tensor, Tensor]] = []
    for place, batch in enumerate(images):
        if place % every == 0 and len(found) < _TIMED and (not found or len(batch[1]) == len(found[0][1])):
            found.append(batch)
    return [batch for batch, _ in found], found[0][1]
