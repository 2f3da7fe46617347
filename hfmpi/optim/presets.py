"""Presets: named optimizers with the batch sizes that they are meant for, and the sources of constants."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

from hfmpi.errors import UserError, did_you_mean, shown
from hfmpi.optim.adam import Adam
from hfmpi.optim.base import Optimizer
from hfmpi.optim.gradient_descent import GradientDescent
from hfmpi.optim.hessian_free import HessianFree
from hfmpi.optim.lbfgs import LBFGS
from hfmpi.optim.lm import LM
from hfmpi.optim.muon import Muon
from hfmpi.optim.soap import SOAP
from hfmpi.optim.soap_muon import SOAPMuon
from hfmpi.optim.subspace import Subspace
from hfmpi.settings import converted

__all__ = ["BASES", "PRESETS", "Named", "Preset", "named", "preset"]


@dataclass(frozen=True)
class Preset:
    """An optimizer with the batch sizes that it is meant for.

    Attributes
    ----------
    optimizer : Optimizer
    gradient_batch, curvature_batch : int
        Number of examples, or of sequences of a text. The curvature batch of a first-order method is 0.
    purpose : str
        One sentence that describes the use of the preset.

    Examples
    --------
    >>> chosen = hfmpi.preset("bhf-short", damping=0.1)  # doctest: +SKIP
    >>> result = hfmpi.train(model, data, optimizer=chosen, max_steps=100)  # doctest: +SKIP
    """

    optimizer: Optimizer[Any]
    gradient_batch: int
    curvature_batch: int = 0
    purpose: str = field(default="", compare=False)


# The rule, and the step length for LSTM, are from Krause's released code (2016), which may differ from the
# paper. The code's step length for mLSTM, 10, diverges here (docs/results/kjv.md).
_KRAUSE = GradientDescent("rms-normalised", rate=2.0)

# For a large batch. The rates and the schedule performed best on small recurrent networks; those of the
# author are for transformers.
_MUON = Muon(rate=0.3, momentum=0.9, vector_rate=0.03, schedule="inverse-root")

PRESETS = {
    # The batch sizes of sgd, bgd, shf and bhf are from Krause et al. (2015).
    "sgd": Preset(_KRAUSE, 32, purpose="The baseline of the paper: normalised steps on small batches."),
    "bgd": Preset(_KRAUSE, 3500, purpose="The same steps as sgd on large batches, for many ranks."),
    # Settings of Kiros (2013) except two: his 5 iterations and his factor 0.99 are for feed-forward networks.
    # 15 iterations with the factor 0.9 reached 2.8 bits/char at 0.6 times the cost of 5 iterations with 0.95
    # (docs/results/kjv.md).
    "shf": Preset(
        HessianFree(
            damping=0.1,
            damping_factor=0.9,
            cg_max_steps=15,
            cg_tolerance=0.0,
            keep_ratio=1.0,
            warm_start=0.5,
            warm_start_growth=1.01,
            warm_start_maximum=0.99,
            step_scale_decay=0.998,
        ),
        320,
        32,
        "Hessian-free on small batches with the settings of Kiros (2013), except two.",
    ),
    # Settings of Martens (2010), the defaults of HessianFree.
    "bhf": Preset(
        HessianFree(cg_refresh=10),
        14_000,
        3_500,
        "Hessian-free on large batches with the settings of Martens (2010): up to 250 iterations per step.",
    ),
    # 10 iterations, where Martens allows 250: with warm starts the next step continues the solve. The initial
    # lambda is small enough that the first steps already make progress (docs/results/better.md).
    "bhf-short": Preset(
        HessianFree(damping=0.01, cg_max_steps=10),
        14_000,
        3_500,
        "Hessian-free with short solves, on large batches: for models without Kronecker factors or rows.",
    ),
    # For least squares in float64, such as regression and residuals of differential equations: lambda must be
    # able to follow a risk that falls by many orders of magnitude. Neither more CG iterations nor more
    # precise ones helped (docs/results/least-squares.md).
    "bhf-squares": Preset(
        HessianFree(damping=1e-3, damping_factor=0.5, damping_minimum=1e-16, preconditioner="none"),
        14_000,
        14_000,
        "Hessian-free for least squares in float64, if the matrix of lm would be too large.",
    ),
    # Settings of Kingma and Ba (2015); the batch size of sgd.
    "adam": Preset(Adam(threshold=1.0), 32, purpose="The usual baseline, with clipped gradients."),
    # SOAP is meant for large batches; the rate and the schedule were chosen as for Muon. With the authors'
    # epsilon of 1e-8, rounding errors of float32 count as gradients in the first updates.
    "soap": Preset(
        SOAP(rate=0.1, beta1=0.9, epsilon=1e-6, refresh=2, schedule="inverse-root"),
        3500,
        purpose="First-order steps on large batches, with Adam in the eigenbasis of every matrix's factors.",
    ),
    "muon": Preset(_MUON, 3500, purpose="First-order steps on large batches, orthogonalised for matrices."),
    # The settings of soap, but the eigenvectors are recomputed in every step.
    "soap-muon": Preset(
        SOAPMuon(rate=0.15, beta1=0.9, epsilon=1e-6, schedule="inverse-root"),
        3500,
        purpose="First-order steps on large batches: soap, orthogonalised for the hidden matrices.",
    ),
    # With the batch size of sgd it has the lowest validation loss after a few minutes on a few cores
    # (docs/results/clock.md).
    "muon-small": Preset(
        replace(_MUON, rate=0.2, averaging=0.999),
        32,
        purpose="The default: the lowest validation loss after a few minutes on a few cores.",
    ),
    # For problems with few residuals or few parameters; the gradient uses the full training set.
    "lm": Preset(
        LM(),
        14_000,
        purpose="Exact Gauss-Newton steps for few residuals or few parameters, as in scientific networks.",
    ),
    # The gradient uses the full training set, so that the next gradient also returns the risk after the step.
    # The model is estimated from a sketch: 3,072 rows for about 150 directions do as well as rows of all
    # sequences, for any size of the data (docs/results/fewest-passes.md).
    "subspace": Preset(
        Subspace(memory=6, curvature_segments=6),
        14_000,
        512,
        "The fewest sequential passes on large batches, for many ranks.",
    ),
    # The directions are not cut into parts: nine instead of 150, for which 768 rows are many. Of all presets
    # of Subspace this one takes the least work in addition to the gradient (docs/results/clock.md).
    "subspace-whole": Preset(
        Subspace(memory=6, cut=False, curvature_segments=3),
        14_000,
        256,
        "subspace with directions that are not cut into parts: the least work in addition to the gradient.",
    ),
    # For networks whose rows of all sequences fit into memory. These settings needed the fewest passes on
    # small recurrent networks (docs/results/fewest-passes.md). With a model from a sketch a step takes 3
    # passes instead of 5; the sketch has rows of all sequences, because it needs many rows.
    "subspace-rows": Preset(
        Subspace(
            "kfac+rows",
            memory=12,
            segments=6,
            row_damping=1e-5,
            row_dampings=4,
            row_iterates=2,
            curvature_segments=3,
        ),
        14_000,
        14_000,
        "The fewest passes of all presets, if the rows of all examples fit into memory.",
    ),
    # The gradient uses the full training set, because L-BFGS needs the same batch in every step.
    "lbfgs": Preset(
        LBFGS(), 14_000, purpose="Needs only gradients, on the full data: for small and scientific networks."
    ),
}
"""Presets by name."""

BASES: dict[type, str] = {
    Adam: "adam",
    GradientDescent: "sgd",
    HessianFree: "bhf",
    LBFGS: "lbfgs",
    LM: "lm",
    Muon: "muon",
    SOAP: "soap",
    SOAPMuon: "soap-muon",
    Subspace: "subspace",
}
"""The preset from which an optimizer object of each class takes its name and batch sizes."""

OTHER_NAMES = {
    "AdamW": "adam with the setting decay",
    "NAdam": "adam",
    "RMSprop": "sgd",
    "GradientDescent": "sgd",
    "HessianFree": "bhf-short",
    "HF": "bhf-short",
    "L-BFGS": "lbfgs",
    "Levenberg-Marquardt": "lm",
    "Gauss-Newton": "lm",
    "ENGD": "lm",
    "natural gradient": "subspace",
    "K-FAC": "subspace",
    "KFAC": "subspace",
    "Shampoo": "soap",
}
"""The closest preset for names that other libraries use; error messages suggest it."""

FRAMEWORKS = {"torch": "PyTorch", "optax": "optax", "jax": "JAX", "flax": "flax"}


def preset(name: str, /, **changes: Any) -> Preset:
    """Return the preset of this name, with some settings of its optimizer changed.

    Parameters
    ----------
    name : str
        One of PRESETS.
    **changes
        Settings of the optimizer: fields of its dataclass.

    Raises
    ------
    UserError
        If the name or a setting is unknown, or a value is out of range.
    """
    if name not in PRESETS:
        raise UserError(
            f"there is no optimizer {name!r}{did_you_mean(name, PRESETS, OTHER_NAMES)}; choose one of "
            f"{', '.join(PRESETS)}"
        )
    chosen = PRESETS[name]
    noun, unknown = f"setting {{}} of {name}", f"optimizer {name} has no setting {{}}; it has {{}}"
    changes = converted(type(chosen.optimizer), changes, noun, unknown)
    try:
        return replace(chosen, optimizer=replace(chosen.optimizer, **changes))
    except ValueError as error:
        raise UserError(f"optimizer {name}: {error}") from None


class Named(NamedTuple):
    """An optimizer as a configuration describes it.

    Attributes
    ----------
    name : str
        The name of a preset.
    settings : dict
        The settings that differ from those of the preset.
    batches : dict of str to int
        gradient_batch and curvature_batch, if they differ from those of the preset.
    """

    name: str
    settings: dict[str, Any]
    batches: dict[str, int]


def named(optimizer: Any, preferred: str = "") -> Named:
    """Return the name of a preset for an optimizer or a preset, and the settings that differ from it.

    An optimizer takes the name and batch sizes of its class from `BASES`. A preset keeps its batch sizes.

    Parameters
    ----------
    optimizer : Optimizer or Preset
    preferred : str
        The name to return if it belongs to a preset of the same class.

    Raises
    ------
    UserError
        If the object is neither an optimizer nor a preset.
    """
    chosen = optimizer.optimizer if isinstance(optimizer, Preset) else optimizer
    kind = type(chosen)
    if kind not in BASES:
        of = FRAMEWORKS.get((kind if kind is not type else chosen).__module__.partition(".")[0])
        raise UserError(
            "optimizer must be a name such as 'bhf-short', an object such as hfmpi.Adam(rate=0.001), or one "
            f"that hfmpi.preset returns, not {shown(chosen)}{f' of {of}' if of else ''}"
        )
    names = [name for name, known in PRESETS.items() if type(known.optimizer) is kind]
    if preferred in names:
        names = [preferred]
    elif not isinstance(optimizer, Preset):
        names = [BASES[kind]]

    def described(name: str) -> Named:
        return Named(name, _different(chosen, name), _different_batches(optimizer, name))

    return min(map(described, names), key=lambda found: (len(found.batches), len(found.settings)))


def _different(optimizer: Optimizer[Any], name: str) -> dict[str, Any]:
    """Return the settings of an optimizer that differ from those of a preset of its class."""
    base = PRESETS[name].optimizer
    values = {setting.name: getattr(optimizer, setting.name) for setting in fields(optimizer)}
    return {name: value for name, value in values.items() if value != getattr(base, name)}


def _different_batches(optimizer: Any, name: str) -> dict[str, int]:
    """Return the batch sizes that differ from those of a preset; an optimizer has no batch sizes."""
    if not isinstance(optimizer, Preset):
        return {}
    sizes = {batch: getattr(optimizer, batch) for batch in ("gradient_batch", "curvature_batch")}
    return {batch: size for batch, size in sizes.items() if size != getattr(PRESETS[name], batch)}
