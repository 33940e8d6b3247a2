"""Options: one dataclass per command is the source of flags, config files, checks and help."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Run
from tokenmerge.cli import COMMANDS, help
from tokenmerge.cli.flags import all_flags, names_of
from tokenmerge.cli.parsing import parse, unknown
from tokenmerge.errors import InputError
from tokenmerge.tools import bench, compare, eval, train
from tokenmerge.tools.inspect import InspectOptions
from tokenmerge.tools.options import Flag, Options, option, value_of

# a caller may give text for paths and lists for tuples, which the fields then hold
BenchOptions: Any = bench.BenchOptions
CompareOptions: Any = compare.CompareOptions
EvalOptions: Any = eval.EvalOptions
TrainOptions: Any = train.TrainOptions

# every flag of the command before its options became dataclasses
BEFORE = {
    "bench": """
        --json --html --num-classes --img-size --r --prop-attn --preset --matcher --option --metric --heads --distance --partition --combine
        --place --plugin --attention --backend --pretrained --checkpoint --device --dtype --channels-last --batch-size -b --tune
        --tune-schedule --tuning --num-warm-iter --num-bench-iter --statistic --compile --break-even
    """,
    "compare": """
        --json --num-classes --img-size --data --data-dir --workers -j --methods --speedups --paper --output --limit --rounds --r
        --prop-attn --preset --matcher --option --metric --heads --distance --partition --combine --place --plugin --attention --backend
        --pretrained --checkpoint --device --dtype --channels-last --batch-size -b
    """,
    "demo": """
        --json --html --r --prop-attn --preset --matcher --option --metric --heads --distance --partition --combine --place --plugin
        --attention --backend --output --export
    """,
    "eval": """
        --json --html --num-classes --img-size --data --data-dir --workers -j --r --prop-attn --preset --matcher --option --metric --heads
        --distance --partition --combine --place --plugin --attention --backend --pretrained --checkpoint --device --dtype --channels-last
        --batch-size -b --tune --tune-schedule --tuning --class-map --sampling-rate --crop-pct --crop-mode --interpolation --mean --std
        --strict
    """,
    "explore": """
        --num-classes --img-size --r --data --prop-attn --preset --matcher --option --metric --heads --distance --partition --combine
        --place --plugin --attention --backend --pretrained --checkpoint --device --dtype --channels-last --host --port
    """,
    "export": """
        --json --html --num-classes --img-size --r --prop-attn --preset --matcher --option --metric --heads --distance --partition --combine
        --place --plugin --pretrained --checkpoint --device --dtype --channels-last --format --output -o --batch-size -b --tune-schedule
        --opset --no-verify
    """,
    "inspect": """
        --json --html --num-classes --img-size --r --prop-attn --preset --matcher --option --metric --heads --distance --partition --combine
        --place --plugin --attention --backend
    """,
    "search": """
        --json --html --num-classes --img-size --data --data-dir --workers -j --speedup --trials --storage --study --output --calibration
        --holdout --rounds --random --seed --pretrained --checkpoint --device --dtype --channels-last --batch-size -b
    """,
    "train": """
        --json --num-classes --img-size --r --prop-attn --preset --matcher --option --metric --heads --distance --partition --combine
        --place --plugin --attention --backend --pretrained --checkpoint --config -c --data --data-dir --output --r-warmup-epochs
        --r-milestones --eval-r --distill-weight --distill-temp --train-split --val-split --batch-size -b --workers -j --aa --color-jitter
        --reprob --hflip --vflip --train-crop-mode --scale --ratio --train-interpolation --sampling-rate --roll --no-roll --timem --freqm
        --crop-pct --interpolation --mean --std --no-aug --no-no-aug --aug-repeats --mixup --cutmix --mixup-prob --mixup-switch-prob
        --mixup-off-epoch --epochs --opt --lr --lr-base --lr-base-size --weight-decay --layer-decay --momentum --clip-grad --sched
        --warmup-epochs --warmup-lr --min-lr --smoothing --bce-loss --no-bce-loss --drop --drop-path --model-ema --no-model-ema
        --model-ema-decay --model-ema-warmup --no-model-ema-warmup --grad-accum-steps --seed --device --fsdp --no-fsdp --amp --no-amp
        --amp-dtype --grad-checkpointing --no-grad-checkpointing --compile --no-compile --model-kwargs --resume --recovery-interval
        --checkpoint-hist --log-interval --tensorboard --no-tensorboard
    """,
    "visualize": """
        --json --num-classes --img-size --r --prop-attn --preset --matcher --option --metric --heads --distance --partition --combine
        --place --plugin --attention --backend --pretrained --checkpoint --device --dtype --channels-last --layer --view --out --output -o
        --sampling-rate
    """,
}  # fmt: skip


@pytest.mark.parametrize("name", BEFORE)
def test_every_flag_of_before_works_or_names_its_successor(name: str) -> None:
    command = COMMANDS[name]
    names = [one for field, (_, flag) in all_flags(command, command.load()[0]).items() for one in names_of(field, flag)]
    for word in BEFORE[name].split():
        bare = word.replace("--no-", "--") if word.replace("--no-", "--") in names else word
        assert (
            bare in names or "give it as --set" in unknown(word, names) or "has become --set" in unknown(word, names)
        ), word


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_described_once(name: str) -> None:
    options, run = COMMANDS[name].load()
    assert callable(run)
    names = [one for field, (_, flag) in all_flags(COMMANDS[name], options).items() for one in names_of(field, flag)]
    assert len(names) == len(set(names))
    for field in dataclasses.fields(options):
        flag = field.metadata["flag"]
        assert flag.help
        assert not flag.help.endswith(".")
    documented = " ".join(str(cls.__doc__) for cls in options.__mro__)
    absent = [field.name for field in dataclasses.fields(options) if f"{field.name}" not in documented]
    assert not absent


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_a_terminal(run: Run, name: str) -> None:
    code, out, err = run(name, "--help")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    assert len(run("help", name)[1].splitlines()) >= len(out.splitlines()) - 3
    if name == "eval":
        assert len(out.splitlines()) < 45
    groups = [line for line in out.splitlines() if line and not line.startswith(" ")]
    assert len([group for group in groups if group in ("Model", "Data", "Merging", "Measuring", "Output")]) >= 2


def test_a_bare_command_helps_and_a_misspelt_one_is_named(run: Run) -> None:
    code, out, err = run()
    assert (code, err) == (0, "")
    assert all(f"  {name} " in out for name in COMMANDS)
    assert run("--help")[1] == run("help")[1] == out
    for wrong, words in (
        ("visualise", "did you mean visualize?"),
        ("evl", "did you mean eval?"),
        ("zzz", "choose one of demo,"),
    ):
        code, out, err = run(wrong)
        assert (code, out, len(err.splitlines())) == (2, "", 1)
        assert words in err
    assert "did you mean --version?" in run("--verson")[2]
    assert "settings" in run("help")[1]
    assert "combine" in run("help", "settings")[1]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("m --data d --r 8 --bach-size 3", "there is no option '--bach-size': did you mean --batch-size?"),
        ("m --data d --r 8 -b 1.5", "--batch-size: '1.5' was given, but a whole number was expected"),
        ("m --data d --r 8 -b 0", "--batch-size: 0 was given, but a whole number of at least 1 was expected"),
        (
            "m --data d --r 8 --crop-pct 2",
            "--crop-pct: 2.0 was given, but a number of at least 0.1 and of at most 1 was expected",
        ),
        ("m --data d --r 8 --mean 1 2", "--mean needs 3 values"),
        ("m --data d --r 8 --mean nan 0 0", "--mean: nan was given, but a finite number was expected"),
        ("m --data d --r 8 --std 0 1 1", "--std: 0.0 was given, but a number above 0 was expected"),
        ("m --data d --r 8 --dtype float", "did you mean float32?"),
        ("m --data d --r 8 --preset acurate", "did you mean accurate?"),
        ("m --data d --r", "--r needs a value"),
        ("m n --data d --r 8", "'n' stands alone"),
        ("m --r 8", "no data were given: give --data DIR, or --dataset NAME"),
        ("--data d --r 8", "MODEL is missing"),
        ("m --data d --r 8 --checkpoint", "--checkpoint needs a value"),
        ("m --data d --r 8 --metric x", "--metric is a setting: give it as --set metric=VALUE"),
        ("m --data d --r 8 --option iterations=5", "--option has become --set"),
        ("m --data d --r 8 --set metric", "--set: 'metric' was given, but NAME=VALUE was expected"),
    ],
)
def test_what_is_wrong_is_one_sentence(words: str, sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(COMMANDS["eval"], EvalOptions, words.split(), {})
    assert sentence in str(caught.value)


def test_files_of_the_command_line_are_not_written(tmp_path: Path) -> None:
    config, plugin = tmp_path / "a.yaml", tmp_path / "b.py"
    config.write_text("r: 8")
    plugin.write_text("")
    for words in (["--config", config, "--json", config], ["--plugin", plugin, "--html", plugin]):
        with pytest.raises(InputError, match=f"{words[0]} names this file, too"):
            parse(COMMANDS["inspect"], InspectOptions, ["m", *map(str, words)], {})
    made, _ = parse(COMMANDS["inspect"], InspectOptions, ["m", "--config", str(config), "--json", "c.json"], {})
    assert made.json == "c.json"


def test_the_last_one_counts() -> None:
    """A script can append what overrides; lists grow."""
    words = (
        "m --data d --r 0 --r 8 -b 3 --batch-size 4 --set a=1 b=2 --set a=3 --strict --strict --mean 1 2 3 --mean 4 5 6"
    )
    found, _ = parse(COMMANDS["eval"], EvalOptions, words.split(), {})
    assert (found.r, found.batch_size, found.set, found.mean) == (("0", "8"), 4, {"a": 3, "b": 2}, (4, 5, 6))


def test_the_same_options_from_words_a_file_and_python(tmp_path: Path) -> None:
    words = "m --data d --r 0 8 16:-1 -b 3 --set metric=x iterations=5 --mean 0.1 0.2 0.3 --strict --class-map c.txt"
    wanted = EvalOptions(
        model="m", data="d", r=[0, "8", "16:-1"], batch_size=3, set={"metric": "x", "iterations": 5}, mean=(0.1, 0.2, 0.3),
        strict=True, class_map=Path("c.txt"),
    )  # fmt: skip
    found, plugins = parse(COMMANDS["eval"], EvalOptions, words.split(), {})
    assert (found, plugins) == (wanted, [])
    file = tmp_path / "eval.yaml"
    file.write_text(
        "model: m\ndata-dir: d\nr: [0, '8', '16:-1']\nbatch-size: 3\nset: {metric: x, iterations: 5}\nmean: [1e-1, 0.2, 0.3]\n"
        "strict: true\nclass_map: c.txt\n"
    )
    assert parse(COMMANDS["eval"], EvalOptions, ["-c", str(file)], {})[0] == wanted
    assert (
        parse(COMMANDS["eval"], EvalOptions, ["-c", str(file), "-b", "7"], {})[0].batch_size == 7
    )  # the words override
    file.write_text(json.dumps({"model": "m", "data": "d", "r": [8]}))  # JSON is YAML
    assert parse(COMMANDS["eval"], EvalOptions, ["-c", str(file)], {})[0].r == ("8",)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("class_map: {class_path: os.system, init_args: {command: touch ran}}", "a number, a word, or a list"),
        ("r: [{class_path: os.system}]", "a number, a word, or a list"),
        ("set: {metric: {class_path: os.system}}", "a number, a word, or a list"),
        ("class_path: os.system", "is no option of this command"),
        ("plugin: evil.py", "is taken from the command line alone"),
        ("config: other.yaml", "is taken from the command line alone"),
        ("r: !!python/object/apply:os.system ['touch ran']", "config"),
        ("metric: x", "is a setting: write 'set: {metric: VALUE}'"),
        ("batchsize: 3", "did you mean batch_size?"),
        ("batch_size: true", "a whole number was expected"),
        ("strict: 3", "true or false was expected"),
        ("batch_size: 3\nbatch-size: 4", "twice"),
        ("- 3", "holds no names and values"),
    ],
)
def test_a_config_file_sets_values_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text("open('ran', 'w')\n")
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(InputError) as caught:
        parse(COMMANDS["eval"], EvalOptions, ["m", "--data", "d", "--r", "8", "--config", "c.yaml"], {})
    assert words in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "ran").exists()


def test_words_of_a_file_that_look_like_flags_are_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    """A value is data of its option, so `--plugin` in a list loads nothing."""
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    for name, text in (
        ("r", "['8', '--plugin', 'evil.py']"),
        ("class_map", "--plugin=evil.py"),
        ("model", "'--plugin evil.py'"),
    ):
        (tmp_path / "c.yaml").write_text(f"{name}: {text}\n")
        rest = ["m"] if name != "model" else []
        code, _, err = run(
            "eval", *rest, "--data", tmp_path, "--config", tmp_path / "c.yaml", *(["--r", "8"] if name != "r" else [])
        )
        assert code == 2
        assert err.startswith("tokenmerge: ")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: EvalOptions(model="m", data="d", r=[8], batch_size=0), "batch_size=0 was given"),
        (lambda: EvalOptions(model="m", data="d", r=[8], batch_size=True), "a whole number was expected"),
        (lambda: EvalOptions(model="m", data="d", r=[8], mean=(1, 2)), "has 2 values, but 3 were expected"),
        (lambda: EvalOptions(model="m", data="d", r=[8], dtype="half"), "one of float32, bfloat16, float16"),
        (lambda: EvalOptions(model="m", r=[8]), "no data were given"),
        (lambda: EvalOptions(model="a\0b", data="d", r=[8]), "null byte"),
        (lambda: BenchOptions(model="m", r=[8], rounds=0), "rounds=0 was given"),
        (lambda: CompareOptions(data="d", r=[8]), "compare was given no MODEL"),
        (lambda: CompareOptions(model="m", data="d", r=[8], speedups=[2]), "both given"),
        (lambda: TrainOptions(model="m", data="d", output="o", resume=""), "an empty text was given"),
        (lambda: TrainOptions(model="m", data="d", output=""), "an empty text was given"),
        (lambda: TrainOptions(model="m", data="d", output="o", r_milestones=3), "EPOCH=R was expected"),
        (lambda: EvalOptions(model="", data="d"), "an empty text was given"),
        (lambda: EvalOptions(model="m", data="d", set=True), "NAME=VALUE was expected"),
        (lambda: EvalOptions(model="m", data="d", model_kwargs=1.5), "NAME=VALUE was expected"),
        (lambda: TrainOptions(model="m", output="o"), "no data were given"),
        (lambda: TrainOptions(model="m", data="d", output="o", r=[8, 9]), "text or a whole number was expected"),
        (lambda: TrainOptions(model="m", data="d", output="o", mixup=1, batch_size=3), "odd"),
        (lambda: TrainOptions(model="m", data="d", output="o", seed=2**70), "a huge number was given"),
    ],
)
def test_python_gets_the_same_checks(make: Any, words: str) -> None:
    with pytest.raises(InputError) as caught:
        make()
    assert words in str(caught.value)


def test_a_flag_is_added_in_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """One field gives a flag, its help, its key in config files, its check, its place in reports, and the Python argument."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class More(eval.EvalOptions):
        tries: int = option(3, "passes over the data", "measuring", "-t", least=1, metavar="N")

    command = COMMANDS["eval"]
    assert parse(command, More, ["m", "--data", "d", "--r", "8", "-t", "5"], {})[0].tries == 5
    assert "--tries, -t N" in help.page(command, More, full=False)
    assert "passes over the data (3)" in help.page(command, More, full=False)
    with pytest.raises(InputError, match="--tries: 0 was given"):
        parse(command, More, ["m", "--data", "d", "--r", "8", "--tries", "0"], {})
    assert More(model="m", data=Path("d"), r=[8]).as_json()["tries"] == 3


def test_values_of_text() -> None:
    words = {
        "5": 5,
        "0.5": 0.5,
        "true": True,
        "True": True,
        "none": "none",
        "[1, 2]": [1, 2],
        "x": "x",
        "NaN": "NaN",
        "": "",
    }
    assert {text: value_of("x", text) for text in words} == words
    with pytest.raises(InputError):
        value_of("x", "9" * 5000)
    with pytest.raises(InputError):
        value_of("x", "[" * 100_000)


def test_an_option_says_its_type() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class One(Options):
        path: Path | None = option(None, "a file", "data")
        parts: tuple[float, float] = option((0.0, 1.0), "two numbers", "data")

    make: Any = One
    assert make(path="a", parts=[0, 2]) == One(path=Path("a"), parts=(0.0, 2.0))
    assert isinstance(One.__dataclass_fields__["path"].metadata["flag"], Flag)
    for wrong in ({"path": 3}, {"parts": ("a", 1)}, {"parts": 1}, {"parts": None}):
        with pytest.raises(InputError):
            make(**wrong)
