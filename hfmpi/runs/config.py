"""Everything that decides a run, from defaults, a TOML file and the command line, checked in one place."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tomli_w

from hfmpi.backends import BACKENDS, DTYPES, PRECISIONS, create
from hfmpi.backends.numpy import NumpyBackend
from hfmpi.errors import UserError
from hfmpi.files.atomic import open_regular
from hfmpi.networks.architecture import INITIALISATIONS, PAPER_PARAMETERS, Architecture
from hfmpi.networks.cells import CELLS, VARIANTS
from hfmpi.objective.transport import TRANSPORTS
from hfmpi.optim.presets import PRESETS, Preset, preset
from hfmpi.settings import Rule, at_least, at_most, check, converted, declared, within

__all__ = [
    "CHANGEABLE",
    "FORMER_NAMES",
    "OF_TEXT",
    "OPTIONS",
    "Config",
    "Option",
    "from_toml",
    "merge",
    "started",
    "to_toml",
]

MOST_TOML = 2**20
"""Bytes of a configuration file; one of a run has about 700."""

FORMER_NAMES = {"warmup": "burn_in"}
"""Names of options in files and commands of earlier versions, which are still read."""


class Option(NamedTuple):
    """What the command line makes of a field of `Config`.

    Attributes
    ----------
    help : str
    without : str
        What is taken without the option, where the default is a 0 that leaves it open.
    choices : tuple of str
        Words that it can be; whether it is one of them is checked where it is used.
    least : int or None
        Of a number on the command line: 1 where a 0 means that the option was not given.
    unit : str
        What a number counts; a SIZE may have a unit such as GiB.
    changeable : bool
        Whether a run that goes on may be given it anew; all else belongs to what the run computes.
    """

    help: str
    without: str = ""
    choices: tuple[str, ...] = ()
    least: int | None = 0
    unit: str = ""
    changeable: bool = False

    def __repr__(self) -> str:
        return self.help


NOT_NEGATIVE = Rule("must not be negative, it is {}", lambda x: x >= 0)
Whole = Annotated[int, Rule("must be below 2**63", lambda n: abs(n) < 2**63), NOT_NEGATIVE]
Number = Annotated[float, Rule("must be a finite number", lambda x: abs(x) <= sys.float_info.max)]


@dataclass(frozen=True)
class Config:
    """Options of a run by their command-line names, optimizer settings apart, in `settings`.

    A field is all that there is to an option: its type, the rules for its value, its default, its help. 0
    leaves an option open: it is decided from others, or there is no limit.
    """

    model: Annotated[str, Option("The cell.", choices=tuple(CELLS))] = "mlstm"
    variant: Annotated[str, Option("Of gated cells.", choices=VARIANTS)] = "standard"
    hidden: Annotated[Whole, Option("Hidden units.", "from --parameters", least=1)] = 0
    parameters: Annotated[Whole, Option("Budget; picks the nearest size.", "the paper's", least=1)] = 0
    layers: Annotated[Whole, at_least(1), at_most(1000), Option("Cells on top of one another.", least=1)] = 1
    initialisation: Annotated[
        str, Option("Of the parameters; krause-lstm is for lstm and mlstm.", choices=INITIALISATIONS)
    ] = "krause"
    forget_bias: Annotated[Number, Option("Of gated cells at the start.", least=None)] = 0.0
    optimizer: Annotated[str, Option("Preset of settings.", choices=tuple(PRESETS))] = "muon-small"
    gradient_batch: Annotated[Whole, Option("Sequences per gradient.", "the preset's", least=1)] = 0
    curvature_batch: Annotated[Whole, Option("Sequences per curvature product.", "the preset's", least=1)] = 0
    sequence_length: Annotated[Whole, at_least(1), Option("Scored characters of a sequence.", least=1)] = 200
    burn_in: Annotated[Whole, Option("Characters read before those.")] = 0
    input_noise: Annotated[
        Number,
        within("[0, 1)"),
        Option("Share of the characters read in training that others of the text replace, anew every step."),
    ] = 0.0
    max_steps: Annotated[Whole, Option("Done after so many steps in all.", "no limit", changeable=True)] = 0
    max_seconds: Annotated[
        Number, NOT_NEGATIVE, Option("Done after so much training time in all.", "no limit", changeable=True)
    ] = 0.0
    checkpoint_every: Annotated[
        Whole, Option("Write a checkpoint.", "an epoch", unit="STEPS", changeable=True)
    ] = 0
    evaluate_every: Annotated[
        Whole, Option("Compute the validation loss.", "an epoch", unit="STEPS", changeable=True)
    ] = 0
    check_every: Annotated[
        Whole, Option("Compare theta across ranks.", "at checkpoints", unit="STEPS", changeable=True)
    ] = 0
    max_rejections: Annotated[
        Whole, Option("Stop after so many rejected steps in a row; 0: never.", unit="STEPS", changeable=True)
    ] = 20
    seed: Annotated[Whole, Option("Of initialisation and batches.")] = 0
    backend: Annotated[str, Option("Of the arrays.", choices=BACKENDS, changeable=True)] = "auto"
    dtype: Annotated[
        str,
        Rule("must be float32 or float64, not {!r}", DTYPES.__contains__),
        Option("Of vectors.", choices=DTYPES),
    ] = "float32"
    micro_batch: Annotated[
        Whole, Option("Most sequences at a time on a rank.", "32; 1024 on a GPU", least=1, changeable=True)
    ] = 0
    memory_budget: Annotated[
        Whole,
        Option(
            "What a rank may keep of a linearisation, such as 2GiB; the rest is computed anew for every "
            "product.",
            "half of its share of the free memory",
            unit="SIZE",
            changeable=True,
        ),
    ] = 0
    slices: Annotated[
        Whole,
        Option(
            "Sum every batch in so many fixed parts, a power of two: the same bits on any number of ranks "
            "that divides it, more slowly.",
            "off",
        ),
    ] = 0
    transport: Annotated[
        str,
        Option("Vectors between GPUs; cuda: a CUDA-aware MPI.", choices=TRANSPORTS, changeable=True),
    ] = "auto"
    matmul_precision: Annotated[
        str, Option("Of float32 products on a GPU.", choices=PRECISIONS, changeable=True)
    ] = "float32"
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            check(self)
        except ValueError as error:
            raise UserError(str(error)) from None
        for name, value in self.settings.items():
            if isinstance(value, (int, float)) and not abs(value) <= sys.float_info.max:
                raise UserError(f"setting {name} must be a finite number")

    def architecture(self, vocabulary: int) -> Architecture:
        """Give the network at its size for a vocabulary."""
        about = Architecture(self.model, self.hidden or 1, vocabulary, vocabulary, self.layers, self.variant)
        return about if self.hidden else about.of_size(self.parameters or PAPER_PARAMETERS[self.model])

    def preset(self) -> Preset:
        """Give the optimizer with its settings and batch sizes."""
        chosen = preset(self.optimizer, **self.settings)
        if self.curvature_batch and not chosen.curvature_batch:
            raise UserError(
                f"optimizer {self.optimizer} has no curvature batch; name one that has, such as shf"
            )
        return replace(
            chosen,
            gradient_batch=self.gradient_batch or chosen.gradient_batch,
            curvature_batch=self.curvature_batch or chosen.curvature_batch,
        )

    def in_effect(self) -> dict[str, Any]:
        """Give all options and settings by name, those of the preset where none are given."""
        chosen = self.preset()
        options = {name: getattr(self, name) for name in OPTIONS}
        batches = {"gradient_batch": chosen.gradient_batch, "curvature_batch": chosen.curvature_batch}
        return options | batches | vars(chosen.optimizer)

    def make_backend(self, local_rank: int = 0) -> NumpyBackend:
        """Make the backend of the rank that is the `local_rank`-th of its node."""
        return create(self.backend, self.dtype, local_rank, self.matmul_precision)


# By the name of each field that is an option of its own: its type, and what the command line makes of it.
OPTIONS = {
    name: (kind, option)
    for name, (kind, more) in declared(Config).items()
    for option in more
    if isinstance(option, Option)
}

CHANGEABLE = frozenset(name for name, (_, option) in OPTIONS.items() if option.changeable)
"""Options that a resumed run may be given anew."""

OF_TEXT = frozenset((
    "model", "variant", "hidden", "parameters", "layers", "initialisation", "forget_bias",
    "sequence_length", "burn_in", "input_noise", "backend", "dtype", "matmul_precision",
))  # fmt: skip
"""Options of the network on a text; `hfmpi.train`, which is given a model and cases, has them not."""
NETWORK = "model", "variant", "layers", "initialisation", "forget_bias", "dtype"
"""Options, beside its size, that parameters belong to."""


def merge(given: Mapping[str, Any], stored: Mapping[str, Any] | None = None, out: str = "--out") -> Config:
    """Make a configuration from what a user gave; when a run resumes, the rest is what it had.

    `out` is what a user calls the option for the folder.

    Raises
    ------
    UserError
        For unknown options, wrong types or values, and for an option that would change what a stored run
        computes.
    """
    values = _checked(given)
    if stored is None:
        return Config(**values)
    base = Config(**_checked(stored))
    if "hidden" in values or "parameters" in values:  # either may name the size; compare what comes out
        values = {"hidden": 0, "parameters": 0} | values
    changes = {name: value for name, value in values.items() if name in CHANGEABLE | {"hidden", "parameters"}}
    if values.get("optimizer", base.optimizer) != base.optimizer:
        raise _another("optimizer", base.optimizer, values["optimizer"], out)
    settings = base.settings | values.get("settings", {})
    had, asked = base.in_effect(), replace(base, **values | {"settings": settings}).in_effect()
    for name, value in asked.items():
        if name not in changes and value != had[name]:
            raise _another(name, had[name], value, out)
    return replace(base, **changes)


def started(given: Mapping[str, Any], stored: Any) -> Config:
    """Make the configuration of a new run that starts from another: what was given, else what that one had.

    Where another preset is asked for, its settings and batch sizes take the place of the other one's.

    Raises
    ------
    UserError
        For unknown options, wrong types or values, another network, and where `stored` are no options. The
        network's size is left to be compared with the parameters.
    """
    values, base = _checked(given), Config(**_checked(stored))
    for name in NETWORK:
        had, asked = getattr(base, name), values.get(name, getattr(base, name))
        if asked != had:
            raise UserError(
                f"the run to start from has {name} = {had!r}, not {asked!r}: its network cannot be changed"
            )
    if "hidden" in values or "parameters" in values:
        values = {"hidden": 0, "parameters": 0} | values
    if values.get("optimizer", base.optimizer) != base.optimizer:
        base = replace(base, settings={}, gradient_batch=0, curvature_batch=0)
    return replace(base, **values | {"settings": base.settings | values.get("settings", {})})


def _another(name: str, had: Any, asked: Any, out: str) -> UserError:
    return UserError(f"this run has {name} = {had!r}, not {asked!r}; give another {out} for a new run")


def _checked(options: Mapping[str, Any]) -> dict[str, Any]:
    """Give options by their names of today and with the types that they must have, or a UserError."""
    if not isinstance(options, Mapping):
        raise UserError("the checkpoint holds no options of a run")
    former = {name: options[old] for old, name in FORMER_NAMES.items() if old in options}
    current = {name: value for name, value in options.items() if name not in FORMER_NAMES}
    return converted(Config, former | current, "option {}", "unknown option {}; the options are {}")


def from_toml(path: Path) -> dict[str, Any]:
    """Read options from a TOML file: names with underscores, optimizer settings in the table `settings`.

    Raises
    ------
    UserError
        If the file cannot be read or is not TOML. Unknown names are found by `merge`.
    """
    with open_regular(path) as file:
        content = file.read(MOST_TOML + 1)
    try:
        if len(content) > MOST_TOML:
            raise ValueError(f"it is longer than {MOST_TOML:,} bytes")
        return tomllib.loads(content.decode())
    except (ValueError, RecursionError) as error:  # TOML and UTF-8 errors, and numbers of too many digits
        raise UserError(f"{path} is not a TOML file: {error}") from None


def to_toml(options: Mapping[str, Any]) -> str:
    """Write options so that `from_toml` reads them back."""
    return tomli_w.dumps(options)
