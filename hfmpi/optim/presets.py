"""Named optimizers with the batch sizes they are meant for; every constant names its source."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from hfmpi.errors import UserError
from hfmpi.optim.adam import Adam
from hfmpi.optim.base import Optimizer
from hfmpi.optim.gradient_descent import GradientDescent
from hfmpi.optim.hessian_free import HessianFree
from hfmpi.optim.muon import Muon
from hfmpi.optim.soap import SOAP
from hfmpi.optim.subspace import Subspace
from hfmpi.settings import converted

__all__ = ["PRESETS", "Preset", "preset"]

PRESETS = ("sgd", "bgd", "shf", "bhf", "bhf-short", "adam", "soap", "muon", "muon-small", "subspace")


_MUON = Muon(rate=0.3, momentum=0.9, vector_rate=0.03, schedule="inverse-root")
"""On a large batch; its rates and schedule are those that did best on small recurrent networks, where the
authors' are for transformers."""


@dataclass(frozen=True)
class Preset:
    """An optimizer, and sequences in its gradient and curvature batch (0: first order)."""

    optimizer: Optimizer[Any]
    gradient_batch: int
    curvature_batch: int = 0


def preset(name: str, /, **changes: Any) -> Preset:
    """Give a preset by name, with single settings of its optimizer changed.

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
    chosen = _preset(name)
    noun, unknown = f"setting {{}} of {name}", f"optimizer {name} has no setting {{}}; it has {{}}"
    changes = converted(type(chosen.optimizer), changes, noun, unknown)
    try:
        return replace(chosen, optimizer=replace(chosen.optimizer, **changes))
    except ValueError as error:
        raise UserError(f"optimizer {name}: {error}") from None


def _preset(name: str) -> Preset:
    if name == "adam":  # Kingma and Ba (2015); batch of sgd
        return Preset(Adam(), 32)
    if name == "soap":  # large batches are what it is for; rate and schedule as for Muon
        # With the authors' epsilon of 1e-8 single precision takes rounding for gradients at first.
        return Preset(SOAP(rate=0.1, beta1=0.9, epsilon=1e-6, refresh=2, schedule="inverse-root"), 3500)
    if name == "muon":
        return Preset(_MUON, 3500)
    if name == "muon-small":
        # The batch of sgd: the lowest validation loss after minutes on few cores (docs/results/clock.md).
        return Preset(replace(_MUON, rate=0.2, averaging=0.999), 32)
    if name == "subspace":
        # The gradient on the whole training set, so that its risk is the step's. The curvature batch has to
        # tell some hundred directions apart, whatever the size of the data.
        return Preset(Subspace(), 14_000, 128)
    if name in ("sgd", "bgd"):
        # Batches: Krause et al. (2015). Rule, and length for LSTM: Krause's released code (2016), which need
        # not be what the paper did; its 10 for mLSTM diverges here (docs/results/kjv.md).
        return Preset(
            GradientDescent("rms-normalised", rate=2.0),
            32 if name == "sgd" else 3500,
        )
    if name == "shf":
        # Batches: Krause et al. (2015). Everything else: Kiros (2013), but for two: his 5 iterations and
        # factor 0.99 are for feed-forward networks. With 15 and 0.9 a loss of 2.8 bits/char took 0.6 of the
        # cost that it took with 5 and 0.95 (docs/results/kjv.md).
        return Preset(
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
        )
    # Batches: Krause et al. (2015); everything else: Martens (2010), the defaults of HessianFree.
    batches = 14_000, 3_500
    if name == "bhf-short":
        # 10 iterations where Martens has up to 250: warm starts carry on what one step leaves undone. And a
        # first lambda at which the first steps count (docs/results/better.md).
        return Preset(HessianFree(damping=0.01, cg_max_steps=10), *batches)
    return Preset(HessianFree(cg_refresh=10), *batches)
