"""The task of `hfmpi.train`: any model on any cases."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from hfmpi.backends.base import Array
from hfmpi.data.batches import Cases, global_indices
from hfmpi.data.digest import digest_of
from hfmpi.data.user_data import as_cases
from hfmpi.errors import UserError, shown
from hfmpi.files.checkpoint import Checkpoint
from hfmpi.files.history import NATS
from hfmpi.measure.spans import EVALUATE
from hfmpi.models.base import Blocks, KroneckerFactors, Model, SquaredGradients, StructuralDamping
from hfmpi.networks.network import Network
from hfmpi.objective.data_parallel import DataParallel
from hfmpi.parallel.communicator import digest
from hfmpi.parallel.failure import together
from hfmpi.runs import metric
from hfmpi.runs.config import OF_TEXT, Config
from hfmpi.runs.restore import check_parameters
from hfmpi.runs.task import Task

__all__ = ["AnotherRun", "ModelTask", "config_of"]

TRIED = 8
"""Cases on which a model is tried before a run."""

CLOSE = 1e-2
"""Part by which the loss of a few cases may differ when a run goes on, on another processor perhaps."""


class AnotherRun(UserError):
    """The checkpoint is of another run than this; the sentence lacks the name of its folder."""


@dataclass(frozen=True, kw_only=True)
class ModelTask(Task):
    """A model and cases of the user's; made by `of`."""

    @classmethod
    def of(cls, model: Any, train: Any, valid: Any, measure: Any, config: Config) -> ModelTask:
        """Check what a user gave, and settle the options.

        Raises
        ------
        UserError
            If something cannot be trained.
        """
        if not isinstance(model, Model) or isinstance(model, type):
            raise UserError(
                f"model must be a model such as hfmpi.TorchModel, hfmpi.JaxModel or hfmpi.Network makes, "
                f"not {shown(model)}"
            )
        if measure is not None and not callable(measure):
            raise UserError(f"metric must be a function (outputs, targets) -> values, not {shown(measure)}")
        if measure is not None and valid is None:
            raise UserError("a metric is measured on validation cases: give valid too")
        sequences = isinstance(model, Network)
        found = {name: _cases(name, given, sequences) for name, given in (("train", train), ("valid", valid))}
        train_set = found["train"]
        if train_set is None:
            raise UserError("train must be data, not None")
        config, notes = _settled(config, train_set.count)
        _check_optimizer(config, model)
        return cls(
            config=config,
            model=model,
            train_set=train_set,
            valid_set=found["valid"],
            keys=NATS,
            title=f"{_name(model)}, {model.size:,} parameters",
            noun="cases",
            identity={
                "model": _model_digest(model),
                "cases": digest_of(train_set),
                "valid_cases": "" if found["valid"] is None else digest_of(found["valid"]),
            },
            metric=measure,
            notes=tuple(notes),
        )

    @property
    def options(self) -> dict[str, Any]:
        """The options without those of a text."""
        return {name: value for name, value in super().options.items() if name not in OF_TEXT}

    def compared(self, theta: np.ndarray, step: int) -> dict[str, Any]:
        """Give what all ranks must have alike, by the sentence on a rank that has not."""
        seed = "than the other ranks: what is random needs the same seed on all ranks"
        data = {name: value for name, value in self.identity.items() if name != "model"}
        return {
            f"rank {{}} has another model {seed}": [self.identity["model"], digest(theta)],
            f"rank {{}} has other data {seed}": data,
            "rank {} has other options or checkpoint files than the other ranks": [self.options, step],
        }

    def check(self, found: Checkpoint | None) -> None:
        """Try the model on a few cases; raise a UserError if the checkpoint is of another one."""
        if found is None:
            theta = self.model.initial(self.config.seed).astype(self.model.backend.dtype)
            loss = self._loss(self.model.backend.to_device(theta))
            if not math.isfinite(loss):
                raise UserError(_not_finite(loss))
        else:
            self._check_form(found)
            theta = found.theta
        self._try_metric(theta)

    def compare(self, found: Checkpoint, own: bool) -> bool:
        """Say whether the checkpoint's run has the same training cases as this one.

        Raises
        ------
        UserError
            If it is of another model, or where it is this run's own, on other cases.
        """
        self._check_form(found)
        for name, words in (
            ("cases", "on other training cases"),
            ("valid_cases", "with other validation cases"),
        ):
            if own and found.meta.get(name) != self.identity[name]:
                raise AnotherRun(f"is a run {words}")
        same, known = found.meta.get("cases") == self.identity["cases"], found.meta.get("tried")
        loss = self._loss(self.model.backend.to_device(found.theta))
        if same and not (isinstance(known, float) and math.isclose(loss, known, rel_tol=CLOSE, abs_tol=1e-6)):
            raise AnotherRun(
                f"is a run of another model: on the first cases its parameters have a loss of {loss:.6g} in "
                f"this one, and had {known}"
            )
        if not math.isfinite(loss):
            raise UserError(_not_finite(loss))
        return same

    def _check_form(self, found: Checkpoint) -> None:
        if found.meta.get("model") != self.identity["model"]:
            raise AnotherRun("is a run of another model")
        check_parameters(found, self.model.size, self.model.backend.dtype)

    def try_out(self, owner: DataParallel, theta: Array) -> None:
        """Compute losses before anything is written: alike on all ranks, and finite on the first batch."""
        config, comm = self.config, owner.communicator
        losses = comm.agree(comm.gather(self._loss(theta))) or []
        strays = [
            rank for rank, loss in enumerate(losses) if not math.isclose(loss, losses[0], rel_tol=CLOSE)
        ]
        if strays:
            raise UserError(
                f"at the same theta the model of rank {', '.join(map(str, strays))} has another loss than "
                "that of rank 0: what is random in it needs the same seed on all ranks"
            )
        batch = global_indices(config.seed, 0, config.gradient_batch, self.train_set.count)
        risk = owner.on(self.train_set, batch)
        local = together(comm, lambda: owner.local.losses([theta], risk.shard, EVALUATE))
        message = np.append(local, 0.0)
        owner.sum(message, owner.host)
        if not math.isfinite(message[0]):
            raise UserError(_not_finite(message[0]))

    def meta(self, theta: Array) -> dict[str, Any]:
        """Give the digests, the loss of theta on a few cases, and what the model is called in a report."""
        return {**self.identity, "tried": self._loss(theta), "title": _name(self.model)}

    def _loss(self, theta: Array) -> float:
        """Give the mean loss on the first cases, on this rank alone."""
        indices = np.arange(min(TRIED, self.train_set.count))
        loss = self.model.loss(theta, self.train_set.take(indices))
        return float(loss) / max(1, self.train_set.scored(indices))

    def _try_metric(self, theta: np.ndarray) -> None:
        if self.metric is not None and self.valid_set is not None:
            indices = np.arange(min(TRIED, self.valid_set.count))
            metric.sums(self.metric, self.model, self.valid_set, indices, self.model.backend.to_device(theta))


def config_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """Give the options that a user gave, without None.

    Raises
    ------
    UserError
        For unknown options, and those of a text, which a model has not.
    """
    known = [field.name for field in fields(Config) if field.name not in OF_TEXT]
    for name in given:
        if name in OF_TEXT:
            raise UserError(f"{name} is no option of hfmpi.train: model and data have it")
        if name not in known:
            raise UserError(f"unknown option {name!r}; the options are {', '.join(known)}")
    optimizer = given.get("optimizer")
    if not isinstance(optimizer, str | None):
        raise UserError(
            f"optimizer must be a name such as 'bhf-short', with its settings in settings={{...}}, not "
            f"{shown(optimizer)}"
        )
    return {name: value for name, value in given.items() if value is not None}


def _cases(name: str, given: Any, steps: bool) -> Cases | None:
    if given is None:
        return None
    try:
        return as_cases(given, steps)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def _settled(config: Config, count: int) -> tuple[Config, list[str]]:
    """Give the options with their batches, none larger than the data, and what to say of it."""
    chosen, notes = config.preset(), list[str]()
    gradient, curvature = chosen.gradient_batch, chosen.curvature_batch
    if config.gradient_batch > count:
        raise UserError(
            f"gradient_batch can be at most {count:,}, the cases of train, not {config.gradient_batch:,}"
        )
    if gradient > count:
        notes.append(f"gradient_batch is {count:,}, all cases: {config.optimizer} would take {gradient:,}")
        gradient = count
    if config.curvature_batch > gradient:
        raise UserError(
            f"curvature_batch can be at most {gradient:,}, the gradient batch, not {config.curvature_batch:,}"
        )
    if curvature > gradient:
        notes.append(
            f"curvature_batch is {gradient:,}, the gradient batch: {config.optimizer} would take "
            f"{curvature:,}"
        )
        curvature = gradient
    return replace(config, gradient_batch=gradient, curvature_batch=curvature), notes


def _check_optimizer(config: Config, model: Model) -> None:
    """Raise a UserError if the optimizer needs what the model does not have."""
    needs, kind = config.preset().optimizer.needs, type(model).__name__
    if needs.blocks and not isinstance(model, Blocks):
        raise UserError(
            f"{kind} does not name the matrices of theta (blocks): take another optimizer, such as adam"
        )
    if needs.kronecker_factors and not isinstance(model, KroneckerFactors):
        raise UserError(
            f"{kind} has no Kronecker factors: give settings={{'directions': 'gradient'}}, or another "
            "optimizer"
        )
    if needs.squared_gradients and not isinstance(model, SquaredGradients):
        raise UserError(f"{kind} has no squared gradients: give settings={{'preconditioner': 'auto'}}")
    if needs.structural_damping and not isinstance(model, StructuralDamping):
        raise UserError(f"{kind} has no structural damping: give settings={{'structural_damping': 0}}")


def _name(model: Model) -> str:
    if not isinstance(model, Network):
        return type(model).__name__
    about = model.architecture
    return f"{about.name}, {f'{about.layers} x ' if about.layers > 1 else ''}{about.hidden:,} units"


def _not_finite(loss: float) -> str:
    return f"the loss is not finite at the start ({loss}): check parameters, inputs and targets"


def _model_digest(model: Model) -> str:
    """Give a digest of the form of a model; its parameters are not in it."""
    blocks = [list(block) for block in model.blocks] if isinstance(model, Blocks) else []
    loss = type(getattr(model, "output_loss", None)).__name__
    about = repr(model.architecture) if isinstance(model, Network) else ""
    form = [type(model).__name__, model.size, model.backend.dtype.name, blocks, loss, about]
    return hashlib.sha256(json.dumps(form).encode()).hexdigest()
