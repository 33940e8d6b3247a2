"""`Handle.tune`: what is chosen, what is recorded, and what may use a record. Times are made up where they decide."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokenmerge
from tests.helpers.tiny import images_for, tiny
from tests.helpers.towers import BY_NAME
from tokenmerge import Tuning
from tokenmerge.errors import ConfigError, InputError, PatchError
from tokenmerge.flops import vit_cost
from tokenmerge.ops import native
from tokenmerge.ops.timing import Spread
from tokenmerge.patching.tuning import run
from tokenmerge.patching.tuning.judge import Judge, Verdict
from tokenmerge.patching.tuning.measure import ASKED, NONE, confirmed, fastest, pays
from tokenmerge.patching.tuning.schedules import alternatives
from tokenmerge.schedule import cut

QUICK: dict[str, Any] = {"forms": ["mask"], "backends": ["torch"]}
"""All others take seconds in Triton's interpreter."""
Times = Callable[[Any], float]


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> Callable[[Times], None]:
    """Lets a function of the settings in force decide how long a pass takes."""

    def decide(seconds: Times) -> None:
        def in_turns(call: Any, use: Any, count: int, device: Any, rounds: int) -> list[list[float]]:
            found = []
            for which in range(count):
                use(which)
                call()
                found.append([seconds(tuner[0].record.settings)] * rounds)
            return found

        monkeypatch.setattr(run, "in_turns", in_turns)

    tuner: list[Any] = []
    own = run.Tuner.__init__

    def note(self: Any, *args: Any) -> None:
        tuner[:] = [self]
        own(self, *args)

    monkeypatch.setattr(run.Tuner, "__init__", note)
    return decide


def merged(settings: Any) -> tuple[int, ...]:
    return tuple(settings.schedule)


# --- the rules ---------------------------------------------------------------------------------------------


def test_what_counts_as_faster() -> None:
    assert pays(Spread(1.01, 1.03, 1.05))
    assert not pays(Spread(1.0, 1.03, 1.05))  # too seldom
    assert not pays(Spread(1.01, 1.015, 1.05))  # too little
    assert fastest([[1.0] * 5, [0.99] * 5, [0.995] * 5], 0) == 0
    assert fastest([[1.0] * 5, [0.9] * 5, [0.8] * 5], 0) == 2
    assert fastest([[0.8] * 5, [0.9] * 5], 1) == 0


def test_a_lucky_schedule_must_prove_itself() -> None:
    times = {NONE: [1.0] * 5, ASKED: [0.95] * 5, "lucky": [0.5] * 5, "good": [0.8] * 5}
    truth = {NONE: 1.0, ASKED: 0.95, "lucky": 1.1, "good": 0.8}
    asked: list[str] = []

    def again(names: Sequence[str]) -> list[list[float]]:
        asked.append(names[1])
        return [[truth[name]] * 5 for name in names]

    assert confirmed(times, again)[0] == "good"
    assert asked == ["lucky", "good"]
    truth.update(good=1.2, **{ASKED: 1.0})
    name, gain = confirmed(times, again)
    assert name == NONE
    assert gain.p50 == pytest.approx(2.0), "the best that was measured"


def test_the_asked_schedule_stays_unless_another_is_faster() -> None:
    times = {NONE: [1.0] * 5, ASKED: [0.8] * 5, "other": [0.79] * 5}
    assert confirmed(times, lambda names: [[1.0] * 5, [0.8] * 5])[0] == ASKED


@pytest.mark.parametrize("schedule", [(13,) * 12, (16, 8, 4, 2), (5, 0, 0, 9, 1), (7,), (0, 3)])
def test_alternatives_leave_as_many_tokens(schedule: tuple[int, ...]) -> None:
    cost = vit_cost(embed_dim=192, depth=len(schedule))
    schedule = cut(schedule, cost.tokens, cost.protected, cost.most)
    for early in (False, True):
        for name, other in alternatives(schedule, cost, early).items():
            assert sum(other) == sum(schedule)
            assert cut(other, cost.tokens, cost.protected, cost.most) == other, name
            if name.endswith("late"):
                assert all(a >= b for a, b in zip(cost.counts(other), cost.counts(schedule), strict=True))
        assert schedule not in alternatives(schedule, cost, early).values()
    assert not any(name.endswith("early") for name in alternatives(schedule, cost, early=False))


# --- attention and backend ---------------------------------------------------------------------------------


def test_running_choices_do_not_change_results() -> None:
    model = tiny("deit_tiny_patch16_224")
    images = images_for(model)
    handle = tokenmerge.patch(model, r=5)
    with torch.no_grad():
        wanted = model(images)
        tuning = handle.tune(images, rounds=2)
        torch.testing.assert_close(model(images), wanted, atol=2e-5, rtol=2e-5)
    assert set(tuning.chosen) == {"attention", "backend"}
    assert handle.config.attention == tuning.chosen["attention"]
    assert handle.config.backend == tuning.chosen["backend"]
    assert handle.schedule == (5, 5, 5)
    kinds = {one.what for one in tuning.tried}
    assert kinds == {"attention", "backend"}
    assert tuning.words in " ".join(str(handle.summary()).split()) or tuning.words == handle.summary().tuned


def test_the_fastest_form_and_backend_are_chosen(made_up: Any) -> None:
    model = tiny("deit_tiny_patch16_224")
    handle = tokenmerge.patch(model, r=5)
    made_up(lambda s: 1.0 - 0.1 * (s.config.attention == "math") - 0.2 * (s.config.backend == "torch"))
    tuning = handle.tune(images_for(model), rounds=3)
    assert tuning.chosen == {"attention": "math", "backend": "torch"}
    assert (handle.config.attention, handle.config.backend) == ("math", "torch")
    # what is in use stays where nothing is faster by more than noise
    handle.update(attention="auto", backend="auto")
    made_up(lambda s: 1.0 - 0.01 * (s.config.attention == "math"))
    chosen = handle.tune(images_for(model), rounds=3).chosen
    assert chosen == {"attention": "mask", "backend": "torch" if native.refusal() else "c"}


def test_what_cannot_run_is_recorded_with_the_reason() -> None:
    model = tiny("deit_tiny_patch16_224")
    tuning = tokenmerge.patch(model, r=5).tune(images_for(model), rounds=1)
    if torch.cuda.is_available():
        pytest.skip("everything runs on a GPU")
    reasons = {one.choice: one.reason for one in tuning.tried if one.seconds is None}
    assert "needs a CUDA device" in reasons["flex"]
    assert all(len(line) <= 80 for line in str(tuning).splitlines())
    assert "does not run here" in str(tuning)


def test_given_choices_must_run() -> None:
    model = tiny("deit_tiny_patch16_224")
    images = images_for(model)
    handle = tokenmerge.patch(model, r=5)
    assert handle.tune(images, backends=["torch"], forms=["math"], rounds=1).chosen == {
        "attention": "math",
        "backend": "torch",
    }
    before = handle.config
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="flex"):
            handle.tune(images, forms=["mask", "flex"], rounds=1)
    with pytest.raises(ConfigError, match="must be one of"):
        handle.tune(images, backends=["numpy"], rounds=1)
    assert handle.config == before


@pytest.mark.parametrize(
    "wrong",
    [
        {"rounds": 0},
        {"forms": []},
        {"backends": "torch"},
        {"schedule": "yes"},
        {"call": 3},
        {"judge": torch.zeros(1, 3, 96, 96)},
        {"load": 3},
        {"schedule": True, "judge": []},
        {"schedule": True, "judge": 3},
        {"schedule": True, "judge": "images"},
        {"schedule": True, "judge": torch.zeros(0, 3, 96, 96)},
        {"schedule": True, "judge": (torch.zeros(2, 3, 96, 96), torch.tensor([1]))},
        {"schedule": True, "judge": (torch.zeros(2, 3, 96, 96), torch.tensor([[1], [2]]))},
        {"schedule": True, "judge": [[[[torch.zeros(2, 3, 96, 96)]]]]},
    ],
)
def test_bad_wishes_change_nothing(wrong: dict[str, Any]) -> None:
    model = tiny("deit_tiny_patch16_224")
    handle = tokenmerge.patch(model, r=5)
    before = handle.config
    with pytest.raises(InputError):
        handle.tune(images_for(model), **{"rounds": 1, **QUICK, **wrong})
    assert handle.config == before
    assert handle.summary().tuned is None


def test_a_model_that_merges_nothing_is_not_tuned() -> None:
    model = tiny("deit_tiny_patch16_224")
    with pytest.raises(InputError, match="nothing to tune"):
        tokenmerge.patch(model, r=0).tune(images_for(model))


def test_a_call_that_runs_another_model_is_refused() -> None:
    model = tiny("deit_tiny_patch16_224")
    other = copy.deepcopy(model)
    handle = tokenmerge.patch(model, r=5)
    with pytest.raises(InputError, match="blocks did not run"):
        handle.tune(images_for(model), call=other, rounds=1)


# --- schedules ---------------------------------------------------------------------------------------------


def test_a_model_that_merging_slows_down_merges_nothing(made_up: Any) -> None:
    model = tiny("deit_tiny_patch16_224")
    images = images_for(model)
    dense = copy.deepcopy(model)
    handle = tokenmerge.patch(model, r=5)
    made_up(lambda s: 1.0 + 0.1 * s.merges)
    tuning = handle.tune(images, schedule=True, rounds=3, **QUICK)
    assert tuning.chosen["r"] == 0
    assert handle.schedule == (0, 0, 0)
    assert "no merging, because nothing was 1.02x as fast" in str(handle.summary().tuned)
    assert all(len(line) <= 80 for line in str(handle.summary()).splitlines())
    with torch.no_grad():
        assert torch.equal(model(images), dense(images))


def test_the_fastest_schedule_is_chosen_and_its_flops_are_said(made_up: Any) -> None:
    model = tiny("deit_tiny_patch16_224")
    handle = tokenmerge.patch(model, r=5)
    asked = handle.summary().flops_ratio
    made_up(lambda s: 1.0 - 0.1 * (sum(one > 0 for one in merged(s)) == 2) - 0.05 * s.merges)
    tuning = handle.tune(images_for(model), schedule=True, rounds=3, **QUICK)
    assert tuning.chosen["r"] == [0, 10, 5] == list(handle.schedule)
    assert f"FLOPs ÷ {handle.summary().flops_ratio:.2f} instead of ÷ {asked:.2f}" in tuning.words
    tried = {one.choice: one for one in tuning.tried if one.what == "schedule"}
    assert set(tried) == {NONE, ASKED, "every 2nd block, late", "every 3rd block, late"}
    assert tried[ASKED].r == (5, 5, 5)
    assert tried[ASKED].flops_ratio == pytest.approx(asked)
    assert tried[NONE].flops_ratio == 1.0
    assert tried["every 2nd block, late"].speedup is not None


def test_the_asked_schedule_keeps_its_form(made_up: Any) -> None:
    model = tiny("deit_tiny_patch16_224")
    handle = tokenmerge.patch(model, speedup=1.2)
    made_up(lambda s: 1.0 - 0.3 * s.merges)
    assert "r" not in handle.tune(images_for(model), schedule=True, rounds=3, **QUICK).chosen
    assert handle.config.speedup == 1.2


def test_schedules_are_for_the_tokens_that_were_seen(made_up: Any) -> None:
    model = tiny("vit_tiny_patch16_224", dynamic_img_size=True)
    handle = tokenmerge.patch(model, keep=0.8)
    made_up(lambda s: 1.0 - 0.1 * (s.config.r is not None and s.merges))
    images = torch.randn(1, 3, 128, 64)  # 32 patches, and not the 36 of the model's own size
    tuning = handle.tune(images, schedule=True, rounds=3, **QUICK)
    assert tuning.tokens == 33
    asked = next(one for one in tuning.tried if one.choice == ASKED)
    assert asked.r is not None
    assert sum(asked.r) == sum(tuning.chosen["r"])
    assert tuning.inputs == ("[1, 3, 128, 64] torch.float32",)


def test_the_judge_refuses_what_moves_predictions_more(made_up: Any) -> None:
    torch.manual_seed(3)
    model = tiny("deit_tiny_patch16_224")
    images = images_for(model)
    handle = tokenmerge.patch(model, r=8)
    fast = lambda s: 1.0 - 0.2 * s.merges - 0.1 * (merged(s)[0] > 8)  # noqa: E731  # early schedules are the fastest
    made_up(fast)
    tuning = handle.tune(images, schedule=True, judge=images, rounds=3, **QUICK)
    tried = {one.choice: one for one in tuning.tried if one.what == "schedule"}
    limit = tried[ASKED].moved
    assert limit is not None
    assert tried[NONE].moved == pytest.approx(0.0, abs=1e-6)
    early = [one for name, one in tried.items() if name.endswith("early")]
    assert early
    for one in early:
        assert one.moved is not None
        assert bool(one.reason) == (one.moved > limit)
    chosen = tuple(handle.schedule)
    assert next(one for one in tried.values() if one.r == chosen).moved <= limit  # type: ignore[operator]


def test_labels_count_as_well(made_up: Any) -> None:
    model = tiny("deit_tiny_patch16_224")
    images = images_for(model)
    with torch.no_grad():
        labels = model(images).argmax(dim=1)
    handle = tokenmerge.patch(model, r=8)
    made_up(lambda s: 1.0 - 0.2 * s.merges)
    for judge in ((images, labels), [(images[:1], labels[:1]), (images[1:], labels[1:])]):
        tuning = handle.tune(images, schedule=True, judge=judge, rounds=3, **QUICK)
        tried = {one.choice: one for one in tuning.tried if one.what == "schedule"}
        assert tried[NONE].correct == len(images)
        handle.update(r=8)


def test_a_verdict_with_fewer_correct_labels_is_refused() -> None:
    asked = Verdict(0.5, 10)
    assert asked.objection(Verdict(0.5, 10)) == asked.objection(Verdict(0.1, 11)) == ""
    assert "moves predictions" in asked.objection(Verdict(0.6, 12))
    assert "fewer images" in asked.objection(Verdict(0.1, 9))
    assert asked.objection(Verdict(float("nan"), 10))
    assert Verdict(0.5, None).objection(Verdict(0.4, None)) == ""


def test_the_judge_needs_logits() -> None:
    model = tiny("deit_tiny_patch16_224", num_classes=0, global_pool="")
    images = images_for(model)
    with pytest.raises(InputError, match=r"returned \(2, 37, 48\), but schedules are judged by logits"):
        tokenmerge.patch(model, r=5).tune(images, schedule=True, judge=images, rounds=1, **QUICK)
    with pytest.raises(InputError, match="give a batch of images"):
        Judge(model, [])


def test_classifiers_of_transformers_are_timed_whole() -> None:
    model = BY_NAME["ViTForImageClassification"].build() if "ViTForImageClassification" in BY_NAME else None
    if model is None:
        from transformers import ViTConfig, ViTForImageClassification

        config = ViTConfig(
            hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=96, image_size=96
        )
        model = ViTForImageClassification(config).eval()
    pixels = torch.randn(2, 3, 96, 96)
    handle = tokenmerge.patch(model, r=4)
    tuning = handle.tune(pixel_values=pixels, schedule=True, judge={"pixel_values": pixels}, rounds=1, **QUICK)
    assert any(one.moved is not None for one in tuning.tried)


def test_matchers_with_schedules_of_their_own_are_not_moved() -> None:
    model = tiny("deit_tiny_patch16_224")
    handle = tokenmerge.patch(model, r=5, matcher="diffrate", options={"pruned": [0.1, 0.2, 0.3]})
    with pytest.raises(InputError, match="use schedule=False"):
        handle.tune(images_for(model), schedule=True, rounds=1, **QUICK)


# --- records -----------------------------------------------------------------------------------------------


def tuned(**fields: Any) -> tuple[nn.Module, Any, Tuning, Tensor]:
    model = tiny("deit_tiny_patch16_224")
    images = images_for(model)
    handle = tokenmerge.patch(model, r=5)
    return model, handle, handle.tune(images, rounds=1, **QUICK, **fields), images


def test_a_record_loads_in_another_process_and_gives_the_same_schedule(made_up: Any, tmp_path: Path) -> None:
    made_up(lambda s: 1.0 - 0.1 * (sum(one > 0 for one in merged(s)) == 2) - 0.05 * s.merges)
    _, handle, tuning, _ = tuned(schedule=True)
    tuning.save(tmp_path / "tuning.json")
    code = f"""
import torch, tokenmerge
from tests.helpers.tiny import images_for, tiny
torch.set_num_threads({torch.get_num_threads()})
model = tiny("deit_tiny_patch16_224")
handle = tokenmerge.patch(model, r=5)
handle.tune(images_for(model), load={str(tmp_path / "tuning.json")!r}, schedule=True)
print(handle.schedule, handle.config.attention, handle.config.backend)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code], capture_output=True, text=True, check=False
    )
    if "which is not what runs here" not in done.stderr:
        assert done.stdout.strip() == f"{handle.schedule} {handle.config.attention} {handle.config.backend}", (
            done.stderr
        )
    assert Tuning.load(tmp_path / "tuning.json") == tuning


def test_a_record_of_something_else_is_refused(tmp_path: Path) -> None:
    _, handle, tuning, images = tuned()
    path = tmp_path / "tuning.json"
    tuning.save(path)
    handle.update(r=5, attention="auto", backend="auto")
    assert handle.tune(load=path) == tuning  # without inputs there is nothing to compare
    assert handle.tune(load=path) == tuning  # once more changes nothing
    assert handle.summary().tuned == tuning.words
    with pytest.raises(InputError, match=r"is for inputs .*\[2, 3, 96, 96\].*but .*\[1, 3, 96, 96\]"):
        handle.tune(images[:1], load=path)
    handle.update(r=6)
    assert handle.summary().tuned is None
    with pytest.raises(InputError, match=r"is for config \{'r': 5\}, but \{'r': 6\}"):
        handle.tune(images, load=path)
    handle.update(r=5)
    with pytest.raises(InputError, match="chose no schedule"):
        handle.tune(images, load=path, schedule=True)
    for fields, said in (
        ({"depth": 2}, "is for blocks 3, but 2"),
        ({"embed_dim": 96}, "is for flops"),
        ({"patch_size": 8}, "is for flops"),
    ):
        other = tokenmerge.patch(tiny("deit_tiny_patch16_224", **fields), r=5)
        with pytest.raises(InputError, match=said):
            other.tune(images, load=path)
    half = tokenmerge.patch(tiny("deit_tiny_patch16_224").bfloat16(), r=5)
    with pytest.raises(InputError, match=r"is for dtype torch.float32, but torch.bfloat16"):
        half.tune(load=path)
    with pytest.raises(InputError, match="forms was given with load"):
        handle.tune(load=path, forms=["mask"])


def test_a_backend_that_does_not_run_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenmerge.patching.tuning import run as tuner

    _, handle, tuning, images = tuned()
    handle.update(attention="auto", backend="auto")
    monkeypatch.setattr(tuner, "backend_refusals", lambda backend, target: ["no C compiler was found"])
    with pytest.raises(ConfigError, match=r"chose backend 'torch', which does not run here \(no C compiler"):
        handle.tune(images, load=tuning)
    assert handle.config.backend == "auto"


def test_other_hardware_is_a_warning() -> None:
    _, handle, tuning, images = tuned()
    other = dataclasses.replace(tuning, processor="Abacus", threads=99)
    handle.update(attention="auto", backend="auto")
    with pytest.warns(UserWarning, match="processor Abacus, threads 99, which is not what runs here"):
        assert handle.tune(images, load=other) is other


def test_other_settings_may_run_differently(tmp_path: Path) -> None:
    _, handle, tuning, images = tuned()
    handle.update(
        attention="math", backend="torch", trace=True
    )  # these are what a tuning chooses, and what it does not concern
    handle.tune(images, load=tuning)
    assert handle.config.attention == tuning.chosen["attention"]
    assert handle.config.trace is True


@pytest.mark.parametrize(
    "change",
    [
        lambda found: found.pop("chosen"),
        lambda found: found.update(more=1),
        lambda found: found.update(chosen={"matcher": "kmeans"}),
        lambda found: found.update(chosen=[]),
        lambda found: found["chosen"].update(r=0),
        lambda found: found["chosen"].update(r=10**9),
        lambda found: found["chosen"].update(keep=0.5),
        lambda found: found["chosen"].update(attention="flex"),
        lambda found: found.update(tried=[]),
        lambda found: found.update(rounds=0),
        lambda found: found.update(tokens=-1),
        lambda found: found["tried"][0].update(r=[float("inf")]),
        lambda found: found["tried"][0].update(r="123"),
        lambda found: found["tried"][0].update(choice=3),
        lambda found: found["tried"][0].update(moved=True),
        lambda found: found["tried"][0].update(moved=10**400),
        lambda found: found.update(inputs=[1]),
        lambda found: found.update(versions={}),
        lambda found: found.update(blocks="3"),
        lambda found: found.update(blocks=True),
        lambda found: found["tried"].append(3),
        lambda found: found["tried"][0].update(what="color"),
        lambda found: found["tried"][-1].update(seconds={"p50": 1}),
        lambda found: found["tried"][-1].update(flops_ratio="much"),
        lambda found: found.pop("tokenmerge_tuning"),
        lambda found: found.update(tokenmerge_tuning=2),
        lambda found: found.update(tokenmerge_tuning=True),
    ],
)
def test_damaged_records_are_refused(change: Any) -> None:
    _, _, tuning, _ = tuned()
    found = json.loads(tuning.to_json())
    change(found)
    with pytest.raises(InputError, match="a record of a tuning"):
        Tuning.from_json(json.dumps(found))


@pytest.mark.parametrize("text", ["", "[1]", "nothing", "{}", "[" * 100_000])
def test_other_texts_are_no_records(text: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a record of a tuning"):
        Tuning.from_json(text)
    (tmp_path / "file").write_bytes(b"\xff\xfe\x00")
    for unread in (tmp_path / "file", tmp_path / "none", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            Tuning.load(unread)
    _, _, tuning, _ = tuned()
    wrong: tuple[Any, ...] = (tmp_path, "a\0b", None, tmp_path / ("x" * 300))
    for path in wrong:
        with pytest.raises(InputError, match="cannot be written"):
            tuning.save(path)
        with pytest.raises(InputError, match="cannot be read"):
            Tuning.load(path)


def test_copies_are_tuned_and_removed_ones_are_not() -> None:
    model, handle, tuning, images = tuned()
    again = tokenmerge.handle_of(copy.deepcopy(model))
    assert again.summary().tuned == tuning.words
    handle.remove()
    with pytest.raises(PatchError):
        handle.tune(images)


def test_a_schedule_in_force_loads_again(made_up: Any) -> None:
    made_up(lambda s: 1.0 + 0.1 * s.merges)
    _, handle, tuning, images = tuned(schedule=True)
    assert handle.schedule == (0, 0, 0)
    assert handle.tune(images, load=tuning, schedule=True) is tuning
    handle.update(r=0)
    with pytest.raises(InputError, match="is for config"):
        handle.tune(images, load=tuning)
