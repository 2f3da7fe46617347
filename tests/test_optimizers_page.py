"""The settings of optimizers, declared once: the page, the help of the command, docstrings and messages."""

import importlib.util
import re
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import hfmpi
from hfmpi.cli.main import cli
from hfmpi.errors import did_you_mean
from hfmpi.optim.presets import BASES, PRESETS
from hfmpi.settings import table

DOCS = Path(__file__).parents[1] / "docs"


def test_the_page_has_the_tables_of_the_code():
    about = importlib.util.spec_from_file_location("optimizer_tables", DOCS / "optimizer_tables.py")
    tables = importlib.util.module_from_spec(about)
    about.loader.exec_module(tables)
    assert tables.PAGE.read_text() == tables.written(), "python docs/optimizer_tables.py writes the page"
    assert "\noptimizers\n" in (DOCS / "index.md").read_text()


def test_the_example_of_the_page_runs():
    (program,) = re.findall(r"```python\n(.*?)```", (DOCS / "optimizers.md").read_text(), re.DOTALL)
    results = []
    exec(
        re.sub(r"(?m)^(hfmpi\.train\(.*)\)$", r"results.append(\1, quiet=True))", program),
        {"results": results},
    )
    by_name, by_object, by_preset = (result.theta for result in results)
    np.testing.assert_array_equal(by_name, by_preset)
    assert not np.array_equal(by_name, by_object)


@pytest.mark.parametrize("kind", BASES, ids=lambda kind: kind.__name__)
def test_every_setting_has_a_meaning(kind):
    settings = table(kind)
    assert {setting.name for setting in settings} == {field.name for field in fields(kind)}
    for setting in settings:
        assert setting.meaning.text.endswith("."), setting.name
        assert "\n" not in setting.meaning.text
        assert f"\n{setting.name} : {setting.type.__name__}, default {setting.default!r}\n" in kind.__doc__
    # The settings that a class declares itself come first.
    assert settings[0].name == next(name for name in kind.__annotations__ if not name.startswith("_"))


def without_spaces(text):
    return "".join(text.split())


@pytest.mark.parametrize("name", PRESETS)
def test_the_command_prints_the_table(name):
    shown = CliRunner().invoke(cli, ["train", "--optimizer", name, "--set", "help"], catch_exceptions=False)
    assert shown.exit_code == 0
    text, preset = without_spaces(shown.output), PRESETS[name]
    assert (
        f"Settingsof{name}({type(preset.optimizer).__name__};gradientbatch{preset.gradient_batch:,}" in text
    )
    assert preset.purpose
    assert without_spaces(preset.purpose) in text
    for setting in table(type(preset.optimizer)):
        value = getattr(preset.optimizer, setting.name)
        written = re.search(rf"(?m)^  {setting.name}=(\S+)", shown.output).group(1)
        if isinstance(value, (str, bool)):
            assert written == str(value).lower()
        else:
            assert float(written) == pytest.approx(value, rel=1e-3)
        assert without_spaces(setting.meaning.text) in text
        for word in filter(None, (setting.meaning.torch, setting.meaning.optax)):
            assert without_spaces(word) in text


def test_the_table_has_the_values_of_the_options(tmp_path):
    (tmp_path / "options.toml").write_text('optimizer = "lm"\n[settings]\ndamping = 0.25\n')
    shown = CliRunner().invoke(cli, ["train", "--config", str(tmp_path / "options.toml"), "--set", "help"])
    assert "damping=0.25 " in shown.output
    shown = CliRunner().invoke(cli, ["train", "--set", "help"])
    assert "Settings of muon-small (Muon; gradient batch 32)" in shown.output


@pytest.mark.parametrize(("arguments", "words"), [
    (["--optimizer", "Adam", "--set", "help"], "no optimizer 'Adam' (did you mean adam?); choose one"),
    (["--optimizer", "sopa", "--set", "help"], "no optimizer 'sopa' (did you mean soap?); choose one"),
    (["x.h5", "--set", "lr"], "--set needs NAME=VALUE, not 'lr': `hfmpi train --optimizer NAME --set"),
    ([], "Missing argument 'DATA.h5'"),
])  # fmt: skip
def test_what_the_command_answers(arguments, words, tmp_path):
    (tmp_path / "x.h5").touch()
    arguments = [str(tmp_path / word) if word == "x.h5" else word for word in arguments]
    result = CliRunner().invoke(cli, ["train", *arguments])
    assert result.exit_code != 0
    assert words in (str(result.exception) + result.output)


def test_values_get_the_word_that_was_meant():
    for make, words in (
        (lambda: hfmpi.Adam(schedule="Cosine"), r"constant, inverse-root, cosine \(did you mean cosine\?\)$"),
        (lambda: hfmpi.HessianFree(preconditioner="diag"), r"'none' \(did you mean diagonal\?\)$"),
        (lambda: hfmpi.GradientDescent("normalized"), r"rms-normalised \(did you mean normalised\?\)$"),
        (lambda: hfmpi.Subspace(row_kind="x"), "must be scores or sketch$"),
    ):
        with pytest.raises(ValueError, match=words):
            make()


def test_names_and_words():
    assert did_you_mean("Bern-Ouli", ["bernoulli"]) == " (did you mean bernoulli?)"
    assert did_you_mean("LR", ["rate"], {"lr": "rate"}) == " (did you mean rate?)"
    assert did_you_mean("rate", ["rate"], {"rate": "other"}) == " (did you mean rate?)"
    assert did_you_mean("xyz", ["rate"], {"lr": "rate"}) == did_you_mean(3, ["3"]) == ""
