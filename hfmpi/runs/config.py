"""The options of a run; one declaration defines the type, rules, default and help of each option."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, NamedTuple

from hfmpi.backends import BACKENDS, DTYPES, PRECISIONS, create
from hfmpi.backends.numpy import NumpyBackend
from hfmpi.errors import UserError
from hfmpi.networks.architecture import INITIALISATIONS, PAPER_PARAMETERS, Architecture
from hfmpi.networks.cells import CELLS, VARIANTS
from hfmpi.objective.transport import TRANSPORTS
from hfmpi.optim.presets import PRESETS, Preset, preset
from hfmpi.settings import Rule, at_least, at_most, check, declared, within

__all__ = ["CHANGEABLE", "FORMER_NAMES", "NETWORK", "OF_TEXT", "OPTIONS", "OTHER_WORDS", "Config", "Option"]

PREFERENCES = "none", "passes", "seconds"
"""The values of `prefer` (hfmpi.runs.choice)."""

KEPT = "best", "last"
"""The values of `keep`; if it is empty, the task decides."""

FORMER_NAMES = {"warmup": "burn_in"}
"""Names of options in files and commands of earlier versions, which are still read."""

OTHER_WORDS = {
    "batch_size": "gradient_batch",
    "epochs": "max_steps",
    "max_epochs": "max_steps",
    "max_iter": "max_steps",
    "num_steps": "max_steps",
    "steps": "max_steps",
    "time_limit": "max_seconds",
    "method": "optimizer",
    "random_state": "seed",
    "precision": "dtype",
    "train": "data",
    "lr": "settings={'rate': ...}",
    "learning_rate": "settings={'rate': ...}",
    "weight_decay": "settings={'decay': ...}",
} | {
    name: f"settings={{{name!r}: ...}}"
    for name in ("damping", "decay", "momentum", "rate", "schedule", "threshold")
}
"""The options of `hfmpi.train` for which other libraries have these names."""


class Option(NamedTuple):
    """How the command line presents a field of `Config`.

    Attributes
    ----------
    help : str
    without : str
        The default that the help shows, if the value 0 means that the option is not set.
    choices : tuple of str
        Words that the option accepts; they are checked by the code that uses the option.
    least : int or None
        Smallest number on the command line: 1 if 0 means that the option is not set.
    unit : str
        The unit of the number; a SIZE may have a unit such as GiB.
    changeable : bool
        Whether a resumed run accepts a new value; all other options determine what the run computes.
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
    """Options of a run by their command-line names; `settings` holds those of the optimizer.

    A field declares everything about an option: its type, the rules for its value, its default and its help.
    0 means that an option is not set: other options determine it, or there is no limit.
    """

    model: Annotated[str, Option("Recurrent cell.", choices=tuple(CELLS))] = "mlstm"
    variant: Annotated[str, Option("Variant of gated cells.", choices=VARIANTS)] = "standard"
    hidden: Annotated[Whole, Option("Number of hidden units.", "from --parameters", least=1)] = 0
    parameters: Annotated[
        Whole, Option("Number of parameters; the nearest possible size is used.", "the paper's", least=1)
    ] = 0
    layers: Annotated[Whole, at_least(1), at_most(1000), Option("Number of stacked cells.", least=1)] = 1
    initialisation: Annotated[
        str, Option("Initial parameters; krause-lstm works with lstm and mlstm.", choices=INITIALISATIONS)
    ] = "krause"
    forget_bias: Annotated[Number, Option("Initial forget bias of gated cells.", least=None)] = 0.0
    optimizer: Annotated[str, Option("Preset of an optimizer.", choices=tuple(PRESETS))] = "muon-small"
    prefer: Annotated[
        str,
        Rule("must be passes or seconds, not {!r}", PREFERENCES.__contains__),
        Option(
            "Choose the optimizer with the fewest sequential passes, or the fewest seconds on these ranks.",
            choices=PREFERENCES,
        ),
    ] = "none"
    gradient_batch: Annotated[Whole, Option("Sequences per gradient.", "the preset's", least=1)] = 0
    curvature_batch: Annotated[Whole, Option("Sequences per curvature product.", "the preset's", least=1)] = 0
    sequence_length: Annotated[Whole, at_least(1), Option("Scored characters per sequence.", least=1)] = 200
    burn_in: Annotated[Whole, Option("Characters that are read before the scored ones.")] = 0
    input_noise: Annotated[
        Number,
        within("[0, 1)"),
        Option("Share of the training characters that every step replaces by random characters of the text."),
    ] = 0.0
    dropout: Annotated[
        Number,
        within("[0, 1)"),
        Option(
            "Probability that a hidden unit is dropped, for a sequence in a step, where the next layer or "
            "the output layer reads it."
        ),
    ] = 0.0
    max_steps: Annotated[Whole, Option("Maximum number of steps in total.", "no limit", changeable=True)] = 0
    max_seconds: Annotated[
        Number,
        NOT_NEGATIVE,
        Option("Maximum training time in total, in seconds.", "no limit", changeable=True),
    ] = 0.0
    checkpoint_every: Annotated[
        Whole, Option("Steps between checkpoints.", "an epoch", unit="STEPS", changeable=True)
    ] = 0
    evaluate_every: Annotated[
        Whole, Option("Steps between validations.", "an epoch", unit="STEPS", changeable=True)
    ] = 0
    check_every: Annotated[
        Whole,
        Option(
            "Steps between comparisons of theta across ranks.",
            "at checkpoints",
            unit="STEPS",
            changeable=True,
        ),
    ] = 0
    max_rejections: Annotated[
        Whole,
        Option("Maximum number of rejected steps in a row; 0: no limit.", unit="STEPS", changeable=True),
    ] = 20
    keep: Annotated[
        str,
        Rule("must be best or last, not {!r}", ("", *KEPT).__contains__),
        Option(
            "Parameters that evaluate and sample use: those of the lowest validation loss, or the last ones.",
            "best",
            choices=KEPT,
            changeable=True,
        ),
    ] = ""
    patience: Annotated[
        Whole,
        Option(
            "Stop after this many validations in a row without a lower validation loss; 0: no limit.",
            "no limit",
            unit="VALIDATIONS",
            changeable=True,
        ),
    ] = 0
    seed: Annotated[Whole, Option("Seed of initialisation and batches.")] = 0
    backend: Annotated[str, Option("Array library.", choices=BACKENDS, changeable=True)] = "auto"
    dtype: Annotated[
        str,
        Rule("must be float32 or float64, not {!r}", DTYPES.__contains__),
        Option("Precision of vectors.", choices=DTYPES),
    ] = "float32"
    micro_batch: Annotated[
        Whole,
        Option(
            "Maximum number of sequences that a rank processes at a time.",
            "32; 1024 on a GPU",
            least=1,
            changeable=True,
        ),
    ] = 0
    memory_budget: Annotated[
        Whole,
        Option(
            "Memory in which a rank stores a linearisation, such as 2GiB; the part that does not fit is "
            "recomputed for every product.",
            "half of its share of the free memory",
            unit="SIZE",
            changeable=True,
        ),
    ] = 0
    slices: Annotated[
        Whole,
        Option(
            "Sum every batch in this many fixed parts, a power of two: slower, but results are identical bit "
            "for bit on every number of ranks that divides it.",
            "off",
        ),
    ] = 0
    transport: Annotated[
        str,
        Option(
            "How GPUs exchange vectors; cuda: through a CUDA-aware MPI.", choices=TRANSPORTS, changeable=True
        ),
    ] = "auto"
    matmul_precision: Annotated[
        str, Option("Precision of float32 products on a GPU.", choices=PRECISIONS, changeable=True)
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
        """Return the architecture of the network for a vocabulary of this size."""
        network = Architecture(
            self.model, self.hidden or 1, vocabulary, vocabulary, self.layers, self.variant
        )
        return network if self.hidden else network.of_size(self.parameters or PAPER_PARAMETERS[self.model])

    def preset(self) -> Preset:
        """Return the optimizer with its settings and batch sizes."""
        chosen = preset(self.optimizer, **self.settings)
        if self.curvature_batch and not chosen.curvature_batch:
            raise UserError(
                f"optimizer {self.optimizer} has no curvature batch: omit the curvature batch, or use an "
                "optimizer that has one, such as shf"
            )
        return replace(
            chosen,
            gradient_batch=self.gradient_batch or chosen.gradient_batch,
            curvature_batch=self.curvature_batch or chosen.curvature_batch,
        )

    def in_effect(self) -> dict[str, Any]:
        """Return all options and settings by name; the preset determines those that are not set."""
        chosen = self.preset()
        options = {name: getattr(self, name) for name in OPTIONS}
        batches = {"gradient_batch": chosen.gradient_batch, "curvature_batch": chosen.curvature_batch}
        return options | batches | vars(chosen.optimizer)

    def make_backend(self, local_rank: int = 0) -> NumpyBackend:
        """Create the backend of the rank with number `local_rank` on its node."""
        return create(self.backend, self.dtype, local_rank, self.matmul_precision)


OPTIONS = {
    name: (kind, option)
    for name, (kind, more) in declared(Config).items()
    for option in more
    if isinstance(option, Option)
}
"""Type and `Option` of each field that is an option, by name."""

CHANGEABLE = frozenset(name for name, (_, option) in OPTIONS.items() if option.changeable)
"""Options for which a resumed run accepts new values."""

OF_TEXT = frozenset((
    "prefer", "model", "variant", "hidden", "parameters", "layers", "initialisation", "forget_bias",
    "sequence_length", "burn_in", "input_noise", "dropout", "backend", "dtype", "matmul_precision",
))  # fmt: skip
"""Options of a network on a text; `hfmpi.train` lacks them, because its arguments are a model and data."""

NETWORK = "model", "variant", "layers", "initialisation", "forget_bias", "dtype"
"""Options, apart from the size of the network, that must match the parameters."""
