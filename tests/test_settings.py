"""Settings and options: each is declared once, and checks, help, completion and files follow from it."""

import math
import os
import re
import subprocess
import sys
from dataclasses import asdict, dataclass, fields
from typing import Annotated

import click
import pytest
from click.testing import CliRunner

from hfmpi.cli.main import cli
from hfmpi.cli.train import train
from hfmpi.cli.values import BANDWIDTH, LATENCY, Number, PathName, Quantity, parse_settings
from hfmpi.errors import UserError
from hfmpi.files.numbers import is_amount, is_drawable
from hfmpi.optim import Adam, GradientDescent, HessianFree
from hfmpi.optim.presets import PRESETS
from hfmpi.runs.config import CHANGEABLE, OPTIONS, Config
from hfmpi.runs.merge import from_toml, merge, to_toml
from hfmpi.settings import Rule, at_least, check, converted, within


@dataclass(frozen=True)
class Some:
    size: Annotated[int, at_least(3)] = 3
    part: Annotated[
        float, within("(0, 1]"), Rule("must not be {}, which is too neat", lambda x: x != 0.5)
    ] = 1.0
    name: str = "a"


@pytest.mark.parametrize(("settings", "sentence"), [
    (Some(size=2), "size must be at least 3"),
    (Some(part=0.0), "part must lie in (0, 1]"),
    (Some(part=1.001), "part must lie in (0, 1]"),
    (Some(part=math.nan), "part must lie in (0, 1]"),
    (Some(part=0.5), "part must not be 0.5, which is too neat"),
])  # fmt: skip
def test_a_value_that_breaks_a_rule_is_named(settings, sentence):
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}$"):
        check(settings)
    check(Some())


def test_types_come_from_the_annotations():
    def take(**given):
        return converted(Some, given, "entry {} of it", "there is no {}; there are {}")

    found = take(size=5, part=1, name="b")
    assert found == {"size": 5, "part": 1.0, "name": "b"}
    assert type(found["part"]) is float
    for given, sentence in (
        ({"sise": 5}, "there is no 'sise' (did you mean size?); there are size, part, name"),
        ({"size": 5.0}, "entry size of it must be of type int, not 5.0"),
        ({"size": True}, "entry size of it must be of type int, not True"),
        ({"part": "1"}, "entry part of it must be of type float, not '1'"),
        ({"part": 10**400}, f"entry part of it must be of type float, not {10**400}"),
        ({"name": None}, "entry name of it must be of type str, not None"),
    ):
        with pytest.raises(UserError) as caught:
            take(**given)
        assert str(caught.value) == sentence


@pytest.mark.parametrize(("kind", "changes", "sentence"), [
    (HessianFree, {"damping": -1.0}, "damping must not be negative"),
    (HessianFree, {"damping_factor": 0.0}, "damping_factor must lie in (0, 1]"),
    (
        HessianFree,
        {"damping_minimum": 1e11},
        "damping_minimum, 1e+11, must not exceed damping_maximum, 1e+10",
    ),
    (HessianFree, {"cg_max_steps": 0}, "cg_max_steps must be at least 1"),
    (HessianFree, {"keep_ratio": math.inf}, "keep_ratio must be at least 1 and finite"),
    (HessianFree, {"warm_start_growth": 0.0}, "warm_start_growth must be positive"),
    (HessianFree, {"preconditioner": "full"}, "preconditioner must be 'auto', 'diagonal' or 'none'"),
    (HessianFree, {"line_search_sufficient": 1.0}, "line_search_sufficient must lie in [0, 1)"),
    (GradientDescent, {"rule": "fast"}, "rule must be one of clip, normalised, rms-normalised"),
    (GradientDescent, {"floor": 3.0}, "floor must lie between 0 and rate, 2, not 3"),
    (Adam, {"beta2": 1.0}, "beta2 must lie in [0, 1)"),
    (Adam, {"epsilon": 0.0}, "epsilon must be positive"),
])  # fmt: skip
def test_sentences_of_optimizers(kind, changes, sentence):
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}$"):
        kind(**changes)


# Options of a run ------------------------------------------------------------------------------


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"layers": 0}, "layers must be at least 1"),
    ({"layers": 10**6}, "layers must be at most 1,000"),
    ({"sequence_length": 0}, "sequence_length must be at least 1"),
    ({"burn_in": -1}, "burn_in must not be negative, it is -1"),
    ({"max_seconds": -0.5}, "max_seconds must not be negative, it is -0.5"),
    ({"max_seconds": math.inf}, "max_seconds must be a finite number"),
    ({"forget_bias": -math.inf}, "forget_bias must be a finite number"),
    ({"seed": 2**63}, "seed must be below 2**63"),
    ({"dtype": "half"}, "dtype must be float32 or float64, not 'half'"),
])  # fmt: skip
def test_sentences_of_a_configuration(changes, sentence):
    with pytest.raises(UserError) as caught:
        Config(**changes)
    assert str(caught.value) == sentence


def test_a_field_is_all_that_there_is_to_an_option():
    names = [field.name for field in fields(Config)]
    assert [*OPTIONS, "settings"] == names
    by_name = {param.name: param for param in train.params}
    help = " ".join(CliRunner().invoke(train, ["--help"]).output.split())
    for name, (kind, option) in OPTIONS.items():
        default = getattr(Config(), name)
        assert type(default) is kind
        assert by_name[name].opts == [f"--{name.replace('_', '-')}"]
        assert f"{option.help} [default: {option.without or default}]" in help
        assert not option.choices or f"--{name.replace('_', '-')} [{'|'.join(option.choices)}]" in help
        assert not option.choices or default in option.choices or option.without in option.choices
        if option.least == 1:  # 0 cannot be passed, because it means that the option is not set
            with pytest.raises(click.BadParameter, match="0 is less than 1"):
                by_name[name].type.convert("0", None, None)


SHF = {"optimizer": "shf"}


def test_what_a_resumed_run_may_be_given_anew():
    assert sorted(CHANGEABLE) == [
        "backend", "check_every", "checkpoint_every", "evaluate_every", "keep", "matmul_precision",
        "max_rejections", "max_seconds", "max_steps", "memory_budget", "micro_batch", "patience", "transport",
    ]  # fmt: skip


@pytest.mark.parametrize(("stored", "given"), [
    ({}, {"gradient_batch": 32, "settings": {"rate": 0.2}}),
    (SHF, {"curvature_batch": 32, "settings": {"damping": 0.1, "cg_max_steps": 15}}),
    (SHF | {"gradient_batch": 320, "curvature_batch": 32}, {"gradient_batch": 0, "curvature_batch": 0}),
    (SHF | {"settings": {"damping": 0.5, "cg_max_steps": 3}}, {"settings": {"cg_max_steps": 3}}),
    ({"optimizer": "sgd"}, {"gradient_batch": 32, "settings": {"rate": 2}}),
    ({"model": "lstm"}, {"model": "lstm", "seed": 0, "layers": 1}),
])  # fmt: skip
def test_a_run_goes_on_with_the_values_that_it_has_given_by_name(stored, given):
    assert merge(given, stored) == Config(**stored)
    assert merge(given | {"max_steps": 9}, stored) == Config(**stored, max_steps=9)


@pytest.mark.parametrize(("stored", "given", "sentence"), [
    ({}, {"gradient_batch": 33}, "gradient_batch = 32, not 33"),
    ({"gradient_batch": 64}, {"gradient_batch": 0}, "gradient_batch = 64, not 32"),
    (SHF | {"settings": {"damping": 0.5}}, {"settings": {"damping": 0.1}}, "damping = 0.5, not 0.1"),
    (SHF, {"settings": {"cg_max_steps": 16}}, "cg_max_steps = 15, not 16"),
    (SHF | {"settings": {"cg_max_steps": 3}}, {"settings": {"rate": 2.0}, "optimizer": "sgd"},
     "optimizer = 'shf', not 'sgd'"),
    ({}, {"model": "lstm"}, "model = 'mlstm', not 'lstm'"),
])  # fmt: skip
def test_a_run_does_not_go_on_with_other_values(stored, given, sentence):
    with pytest.raises(UserError) as caught:
        merge(given, stored)
    assert str(caught.value) == f"this run has {sentence}: use a different --out for a new run"


@pytest.mark.parametrize("optimizer", PRESETS)
def test_what_is_in_effect_has_a_name_of_its_own(optimizer):
    config = Config(optimizer=optimizer)
    settings = vars(config.preset().optimizer)
    assert not OPTIONS.keys() & settings.keys()
    assert config.in_effect().keys() == OPTIONS.keys() | settings.keys()


def test_a_configuration_is_read_back(tmp_path):
    config = Config(
        hidden=7, forget_bias=-1e-7, settings={"damping": 1e22, "rule": "clip", "line_search": True}
    )
    text = to_toml(asdict(config))
    assert text.startswith('model = "mlstm"\nvariant = "standard"\nhidden = 7\nparameters = 0\nlayers = 1\n')
    assert text.endswith('\n\n[settings]\ndamping = 1e+22\nrule = "clip"\nline_search = true\n')
    (tmp_path / "options.toml").write_text(text)
    assert merge(from_toml(tmp_path / "options.toml")) == config
    assert to_toml(asdict(Config())).endswith('matmul_precision = "float32"\n\n[settings]\n')


def test_the_former_name_of_an_option_is_read():
    assert merge({"warmup": 3}).burn_in == 3
    assert merge({}, {"warmup": 3}).burn_in == 3
    for both in ({"warmup": 3, "burn_in": 4}, {"burn_in": 4, "warmup": 3}):
        assert merge(both).burn_in == 4
    with pytest.raises(UserError, match=r"^option burn_in must be of type int, not 'long'$"):
        merge({"warmup": "long"})
    for word in ("--warmup", "--burn-in"):
        assert train.make_context("train", ["x.h5", word, "3"]).params["burn_in"] == 3
    assert "warmup" not in CliRunner().invoke(train, ["--help"]).output


# What is written on a command line -------------------------------------------------------------


def parameters(command, words=()):
    """Return every parameter of a command and its subcommands, with the words that call the command."""
    yield from ((words, command, param) for param in command.params)
    if isinstance(command, click.Group):
        for name in command.list_commands(click.Context(command)):
            yield from parameters(command.get_command(click.Context(command), name), (*words, name))


PARAMETERS = [
    pytest.param(command, param, id=" ".join([*words, param.opts[0]]))
    for words, command, param in parameters(cli)
    if not getattr(param, "is_flag", False)
]


@pytest.mark.parametrize(("command", "param"), PARAMETERS)
def test_no_parameter_takes_an_empty_path_or_a_number_that_is_none(command, param):
    numbers = ["", "nan", "inf", "-inf", "1e400"]
    match param.type:
        case PathName() | click.Choice():
            bad = [""]
        case Number(kind=kind):
            bad = numbers + ["1.5", str(10**30), "9" * 400, "9" * 5000] * (kind is int)
        case Quantity():
            bad = numbers
        case _:  # free text, or values that are checked at their use
            option = param.opts[0].removeprefix("--").replace("-", "_")
            assert option in ("prime", "set", "unknown") or OPTIONS[option][1].choices
            bad = []
    for value in bad:
        words = [value] if isinstance(param, click.Argument) else [param.opts[0], value]
        with pytest.raises(click.BadParameter) as caught:
            command.make_context(command.name, words)
        assert caught.value.param is param
        assert "\n" not in caught.value.format_message()


def test_the_parameters_of_all_commands_are_seen():
    names = {test.id for test in PARAMETERS}
    some = "train data", "train --stall-timeout", "plot --out", "bench step --data", "speedup --latency"
    assert names > {*some, "prepare paths", "evaluate run", "sample --temperature", "train --resume"}


@pytest.mark.parametrize(("number", "text", "said"), [
    (Number(int, 1), "0", "0 is less than 1"),
    (Number(int), "many", "'many' is not a whole number"),
    (Number(int), "9223372036854775808", "9223372036854775808 is more than 9,223,372,036,854,775,807"),
    (Number(float, 0, 10**9), "1e12", "1e12 is more than 1,000,000,000"),
    (Number(float, 0), "-1", "-1 is less than 0"),
    (Number(float), "nan", "'nan' is not a finite number"),
])  # fmt: skip
def test_what_is_no_number(number, text, said):
    with pytest.raises(click.BadParameter, match=f"^{re.escape(said)}$"):
        number.convert(text, None, None)


def test_numbers():
    assert Number(int, 0).convert("9223372036854775807", None, None) == 2**63 - 1
    assert Number(float).convert("-1e-3", None, None) == -1e-3


@pytest.mark.parametrize(("quantity", "text", "value"), [
    (LATENCY, "2us", 2e-6), (LATENCY, "1.5 ms", 1.5e-3), (LATENCY, "3", 3.0), (LATENCY, "20ns", 20 * 1e-9),
    (BANDWIDTH, "10GB/s", 1e10), (BANDWIDTH, "8Gbit/s", 1e9), (BANDWIDTH, "5e8", 5e8),
])  # fmt: skip
def test_quantities(quantity, text, value):
    assert quantity.convert(text, None, None) == value


@pytest.mark.parametrize("text", ["", "0", "-1us", "us", "2 fortnights", "2US", "nan", "inf", "1e400s"])
def test_what_is_no_latency(text):
    with pytest.raises(click.BadParameter, match=f"{text!r} is not a latency such as 2us"):
        LATENCY.convert(text, None, None)


def test_settings_have_the_types_that_they_are_written_in():
    pairs = "a=true", "b=-3", "c=1e-3", "d=clip", "e=", "f=x=y"
    found = parse_settings(pairs)
    assert found == {"a": True, "b": -3, "c": 0.001, "d": "clip", "e": "", "f": "x=y"}
    assert [type(value) for value in found.values()] == [bool, int, float, str, str, str]


COMPLETING = """
import atexit, sys
heavy = ("mpi4py", "numba", "cupy", "h5py")
atexit.register(lambda: print([name for name in heavy if name in sys.modules], file=sys.stderr))
sys.argv = ["hfmpi"]
from hfmpi.cli.main import entry
entry()
"""


@pytest.mark.parametrize(("words", "expected"), [
    ("hfmpi t", ["train"]),
    ("hfmpi train --mic", ["--micro-batch"]),
    ("hfmpi train small.h5 --model m", ["mrnn", "mlstm"]),
    ("hfmpi bench step --optimizer b", ["bgd", "bhf", "bhf-short", "bhf-squares"]),
    ("hfmpi evaluate --backend nu", ["numpy", "numba"]),
])  # fmt: skip
def test_a_shell_completes_commands_options_and_choices(words, expected):
    asked = {"_HFMPI_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    done = subprocess.run(
        [sys.executable, "-c", COMPLETING], env=os.environ | asked, capture_output=True, text=True, timeout=60
    )
    assert [line.split(",")[1] for line in done.stdout.splitlines()] == expected
    assert done.stderr == "[]\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_can_be_told_how(shell):
    done = subprocess.run(
        [sys.executable, "-c", COMPLETING],
        env=os.environ | {"_HFMPI_COMPLETE": f"{shell}_source"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert f"_HFMPI_COMPLETE={shell}_complete" in done.stdout


# Numbers in files ------------------------------------------------------------------------------


def test_amounts():
    assert all(map(is_amount, (0, 3, 0.0, 1e-300, 2**53 - 1)))
    assert not any(
        map(is_amount, (-1, -1e-9, 2**53, 1e16, 10**400, math.nan, math.inf, True, "3", None, [3]))
    )
    assert is_amount(1e300, math.inf)
    assert not is_amount(math.inf, math.inf)


def test_what_can_be_drawn():
    assert all(map(is_drawable, (None, 0, -3, 1e99)))
    assert not any(map(is_drawable, (1e101, 10**400, -math.inf, math.nan, True, "")))
