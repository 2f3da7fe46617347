"""Named optimizers with the batch sizes that they are meant for; every constant names its source."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from hfmpi.errors import UserError
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

__all__ = ["PRESETS", "Preset", "preset"]


@dataclass(frozen=True)
class Preset:
    """An optimizer, and the sequences in its gradient and curvature batch (0: first order)."""

    optimizer: Optimizer[Any]
    gradient_batch: int
    curvature_batch: int = 0


# Rule, and length for LSTM: Krause's released code (2016), which may differ from the paper; its 10 for mLSTM
# diverges here (docs/results/kjv.md).
_KRAUSE = GradientDescent("rms-normalised", rate=2.0)

# For a large batch. Its rates and schedule are those that did best on small recurrent networks; the authors'
# are for transformers.
_MUON = Muon(rate=0.3, momentum=0.9, vector_rate=0.03, schedule="inverse-root")

PRESETS = {
    # Batches of sgd, bgd, shf and bhf: Krause et al. (2015).
    "sgd": Preset(_KRAUSE, 32),
    "bgd": Preset(_KRAUSE, 3500),
    # Settings: Kiros (2013), except two: his 5 iterations and factor 0.99 are for feed-forward networks. With
    # 15 and 0.9 a loss of 2.8 bits/char took 0.6 of the cost that it took with 5 and 0.95
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
    ),
    # Settings: Martens (2010), the defaults of HessianFree.
    "bhf": Preset(HessianFree(cg_refresh=10), 14_000, 3_500),
    # 10 iterations where Martens has up to 250: warm starts continue what one step leaves undone. The first
    # lambda is one with which the first steps count (docs/results/better.md).
    "bhf-short": Preset(HessianFree(damping=0.01, cg_max_steps=10), 14_000, 3_500),
    # For least squares in float64, such as regression and residuals of differential equations: lambda has to
    # follow a risk that falls by many orders of magnitude. More or more precise CG iterations did not help
    # (docs/results/least-squares.md).
    "bhf-squares": Preset(
        HessianFree(damping=1e-3, damping_factor=0.5, damping_minimum=1e-16, preconditioner="none"),
        14_000,
        14_000,
    ),
    # Kingma and Ba (2015); the batch of sgd.
    "adam": Preset(Adam(threshold=1.0), 32),
    # SOAP is meant for large batches; rate and schedule as for Muon. With the authors' epsilon of 1e-8 single
    # precision takes rounding for gradients at first.
    "soap": Preset(SOAP(rate=0.1, beta1=0.9, epsilon=1e-6, refresh=2, schedule="inverse-root"), 3500),
    "muon": Preset(_MUON, 3500),
    # Settings of soap, with new eigenvectors at every step.
    "soap-muon": Preset(SOAPMuon(rate=0.15, beta1=0.9, epsilon=1e-6, schedule="inverse-root"), 3500),
    # The batch of sgd: the lowest validation loss after minutes on a few cores (docs/results/clock.md).
    "muon-small": Preset(replace(_MUON, rate=0.2, averaging=0.999), 32),
    # For problems with few residuals or few parameters; the gradient is on the whole training set.
    "lm": Preset(LM(), 14_000),
    # The gradient is on the whole training set, so that the next gradient comes with the risk after the step.
    # The model comes from a sketch: 3,072 rows for some 150 directions do as well as rows of all sequences,
    # whatever the size of the data (docs/results/fewest-passes.md).
    "subspace": Preset(Subspace(memory=6, curvature_segments=6), 14_000, 512),
    # Whole directions, nine in place of 150, for which 768 rows are many: the least work beside the gradient
    # (docs/results/clock.md).
    "subspace-whole": Preset(Subspace(memory=6, cut=False, curvature_segments=3), 14_000, 256),
    # For networks whose rows of all sequences fit into memory. The settings are those that needed the fewest
    # passes on small recurrent networks (docs/results/fewest-passes.md). With the model from a sketch a step
    # takes 3 passes in place of 5; its rows are of all sequences, because they have to be many.
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
    ),
    # The gradient is on the whole training set, because L-BFGS needs the same batch in every step.
    "lbfgs": Preset(LBFGS(), 14_000),
}
"""Presets by name."""


def preset(name: str, /, **changes: Any) -> Preset:
    """Return a preset by name, with single settings of its optimizer changed.

    Parameters
    ----------
    name : str
        One of PRESETS.
    **changes
        Settings of the optimizer, by the names of its dataclass.

    Raises
    ------
    UserError
        For an unknown name or setting, or a value out of range.
    """
    if name not in PRESETS:
        raise UserError(f"there is no optimizer {name!r}; choose one of {', '.join(PRESETS)}")
    chosen = PRESETS[name]
    noun, unknown = f"setting {{}} of {name}", f"optimizer {name} has no setting {{}}; it has {{}}"
    changes = converted(type(chosen.optimizer), changes, noun, unknown)
    try:
        return replace(chosen, optimizer=replace(chosen.optimizer, **changes))
    except ValueError as error:
        raise UserError(f"optimizer {name}: {error}") from None
