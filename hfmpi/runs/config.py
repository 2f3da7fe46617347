"""Everything that decides a run, from defaults, a TOML file and the command line, checked in one place."""

from __future__ import annotations

import json
import math
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from hfmpi.backends import create
from hfmpi.backends.base import Backend
from hfmpi.errors import UserError
from hfmpi.files.atomic import open_regular
from hfmpi.models.cells import PAPER_PARAMETERS, Cell
from hfmpi.optim.presets import Preset, preset

__all__ = ["Config", "from_toml", "merge", "to_toml"]

CHANGEABLE = frozenset(
    {
        "max_steps",
        "max_seconds",
        "checkpoint_every",
        "evaluate_every",
        "check_every",
        "max_rejections",
        "backend",
        "micro_batch",
        "memory_budget",
        "transport",
        "matmul_precision",
    }
)
"""Options that a resumed run may be given anew; all others belong to what it computes."""


MOST_TOML = 2**20
"""Bytes of a configuration file; one of a run has about 700."""


@dataclass(frozen=True)
class Config:
    """Options of a run by their command-line names. 0 means: decided from the others, or no limit.

    Attributes
    ----------
    model, variant, hidden, parameters, initialisation, forget_bias
        The cell (hfmpi.models.cells); `hidden` wins over `parameters`, and without both the paper's budget
        is taken.
    optimizer, settings
        Preset and changes to its settings (hfmpi.optim.presets).
    gradient_batch, curvature_batch : int
        Sequences; 0: the preset's.
    sequence_length, warmup : int
        Scored characters of a sequence, and characters read before them.
    max_steps, max_seconds
        The run is done when one is reached; both count from the first start. 0: no limit.
    checkpoint_every, evaluate_every : int
        Steps; 0: once per epoch.
    check_every : int
        Steps between comparisons of theta across ranks; 0: at checkpoints.
    max_rejections : int
        The run stops with an error after so many rejected steps in a row; 0: never.
    seed, backend, dtype, micro_batch
        `micro_batch`: most sequences a rank works on at a time; 0: what suits the backend.
    slices : int
        Fixed parts of every global batch, so that theta does not depend on the number of ranks; 0: off.
    memory_budget : int
        Bytes that a rank may keep of a linearisation between products; 0: half of its share of the memory
        that is free when the run starts.
    """

    model: str = "mlstm"
    variant: str = "standard"
    hidden: int = 0
    parameters: int = 0
    initialisation: str = "krause"
    forget_bias: float = 0.0
    optimizer: str = "shf"
    gradient_batch: int = 0
    curvature_batch: int = 0
    sequence_length: int = 200
    warmup: int = 0
    max_steps: int = 0
    max_seconds: float = 0.0
    checkpoint_every: int = 0
    evaluate_every: int = 0
    check_every: int = 0
    max_rejections: int = 20
    seed: int = 0
    backend: str = "auto"
    dtype: str = "float32"
    micro_batch: int = 0
    memory_budget: int = 0
    slices: int = 0
    transport: str = "auto"
    matmul_precision: str = "float32"
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{f.name} must be a finite number")
            if isinstance(value, int) and abs(value) >= 2**63:
                raise UserError(f"{f.name} must be below 2**63")
            if f.name != "forget_bias" and isinstance(value, (int, float)) and value < 0:
                raise UserError(f"{f.name} must not be negative, it is {value}")
        for name, value in self.settings.items():
            if isinstance(value, (int, float)) and not abs(value) <= sys.float_info.max:
                raise UserError(f"setting {name} must be a finite number")
        if self.sequence_length < 1:
            raise UserError("sequence_length must be at least 1")
        if self.dtype not in ("float32", "float64"):
            raise UserError(f"dtype must be float32 or float64, not {self.dtype!r}")

    def cell(self, vocabulary: int) -> Cell:
        """Give the cell at its size for a vocabulary."""
        if self.hidden:
            return Cell(self.model, self.hidden, vocabulary, self.variant)
        probe = Cell(self.model, 1, vocabulary, self.variant)
        budget = self.parameters or PAPER_PARAMETERS[probe.name]
        return Cell.of_size(self.model, budget, vocabulary, self.variant)

    def preset(self) -> Preset:
        """Give the optimizer with its settings and batch sizes."""
        chosen = preset(self.optimizer, **self.settings)
        curvature = chosen.curvature_batch and (self.curvature_batch or chosen.curvature_batch)
        if self.curvature_batch and not chosen.curvature_batch:
            raise UserError(f"optimizer {self.optimizer} has no curvature batch")
        gradient = self.gradient_batch or chosen.gradient_batch
        if curvature > gradient:
            raise UserError(
                f"a curvature batch of {curvature:,} sequences cannot be drawn "
                f"from a gradient batch of {gradient:,}"
            )
        return replace(chosen, gradient_batch=gradient, curvature_batch=curvature)

    def make_backend(self, local_rank: int = 0) -> Backend:
        """Make the backend of the rank that is the `local_rank`-th of its node."""
        return create(self.backend, self.dtype, local_rank, self.matmul_precision)


def merge(given: Mapping[str, Any], stored: Mapping[str, Any] | None = None) -> Config:
    """Make a configuration from what a user gave; when a run resumes, the rest is what it had.

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
    for name, value in values.items():
        if name in CHANGEABLE | {"hidden", "parameters"} or value == getattr(base, name):
            continue
        raise UserError(
            f"this run has {name} = {getattr(base, name)!r}, not {value!r}; give another --out for a new run"
        )
    return replace(base, **values)


def _checked(options: Mapping[str, Any]) -> dict[str, Any]:
    """Give options with the types that they must have, or a UserError."""
    known = {f.name: type(getattr(Config(), f.name)) for f in fields(Config)}
    if not isinstance(options, Mapping):
        raise UserError("the checkpoint holds no options of a run")
    values: dict[str, Any] = {}
    for name, value in options.items():
        if name not in known:
            raise UserError(f"unknown option {name!r}; the options are {', '.join(known)}")
        if known[name] is float and type(value) is int and abs(value) < 2**53:
            value = float(value)
        if type(value) is not known[name]:
            raise UserError(f"option {name} must be of type {known[name].__name__}, not {value!r}")
        values[name] = value
    return values


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


def to_toml(config: Config) -> str:
    """Write a configuration so that `from_toml` reads it back."""
    values = asdict(config)
    settings = values.pop("settings")
    lines = [f"{name} = {json.dumps(value)}" for name, value in values.items()]
    lines += ["", "[settings]", *(f"{name} = {json.dumps(value)}" for name, value in settings.items())]
    return "\n".join(lines) + "\n"
