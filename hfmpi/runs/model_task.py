"""The task of `hfmpi.train`: any model on any data."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from hfmpi.backends.base import Array
from hfmpi.data.augmented import Augmented
from hfmpi.data.batches import Cases, global_indices, spread
from hfmpi.data.digest import digest_of, sample_digest_of
from hfmpi.data.examples import Examples
from hfmpi.data.user_data import as_cases
from hfmpi.errors import UserError, did_you_mean, shown
from hfmpi.files.checkpoint import Checkpoint
from hfmpi.files.history import NATS
from hfmpi.measure.spans import EVALUATE
from hfmpi.models.base import (
    Blocks,
    DataChecks,
    KroneckerFactors,
    Model,
    StructuralDamping,
    Trials,
    has_rows,
    has_squared_gradients,
    with_scoring,
)
from hfmpi.models.batch import NotFinite, check_finite
from hfmpi.networks.network import Network
from hfmpi.objective.data_parallel import DataParallel, Unscored
from hfmpi.optim.presets import named
from hfmpi.parallel.communicator import digest
from hfmpi.parallel.failure import together
from hfmpi.runs import checks, metric
from hfmpi.runs.best import LOSS, Watch
from hfmpi.runs.config import OF_TEXT, OTHER_WORDS, Config
from hfmpi.runs.fitting import fitted
from hfmpi.runs.restore import check_parameters
from hfmpi.runs.session import PROGRAM
from hfmpi.runs.task import DifferentRun, Task

__all__ = ["ModelTask", "checked_options"]

TRIED = 8
"""Number of examples on which a model is tried before a run."""

CHECKED = 32
"""Number of examples, from the first to the last one, on which a model checks itself before a run."""

LARGEST = float(np.finfo(np.float32).max)
"""The maximum loss at the start, in every precision: the message of a float32 gradient contains the loss."""

ARGUMENTS = (
    "data",
    "valid",
    "out",
    "resume",
    "metric",
    "callback",
    "watch",
    "quiet",
    "threads",
    "stall_timeout",
)
"""The arguments of `hfmpi.train` that are not options, as suggestions for a misspelled name."""

WORDS_OF_ARGUMENTS = {
    "validation": "valid",
    "validation_data": "valid",
    "valid_data": "valid",
    "val_data": "valid",
    "metrics": "metric",
    "callbacks": "callback",
    "monitor": "watch",
    "verbose": "quiet",
    "early_stopping": "patience",
    "early_stopping_patience": "patience",
    "ckpt_path": "resume",
}
"""Names that other libraries have for these arguments, and for `patience`."""

CLOSE = 1e-2
"""Relative difference up to which two losses of one model count as equal, also on different processors."""


@dataclass(frozen=True, kw_only=True)
class ModelTask(Task):
    """A user-supplied model and data; created by `of`."""

    @classmethod
    def of(
        cls,
        model: Any,
        train: Any,
        valid: Any,
        measure: Any,
        config: Config,
        watch: object = LOSS.name,
        memory: int | None = None,
    ) -> ModelTask:
        """Check the arguments of `hfmpi.train`, and determine the batch sizes and what the run returns.

        `memory` is the argument of `as_cases`.

        Raises
        ------
        UserError
            If they cannot be used for training.
        """
        if not isinstance(model, Model) or isinstance(model, type):
            raise UserError(
                f"model must be a model such as an hfmpi.TorchModel, hfmpi.JaxModel or hfmpi.Network, "
                f"not {shown(model)}"
            )
        metrics = metric.checked_metrics(measure)
        if metrics and valid is None:
            raise UserError("a metric needs validation data: pass valid too")
        watched = Watch.parse(watch, metrics)
        config = replace(config, keep=config.keep or "last")
        if valid is None and (config.keep == "best" or config.patience):
            option = "patience" if config.patience else "keep='best'"
            raise UserError(f"{option} needs validation data: pass valid too")
        if train is None:
            raise UserError("data must not be None: pass the training examples")
        if isinstance(valid, Augmented):
            raise UserError(
                "valid: validation examples cannot be augmented: pass them without hfmpi.Augmented"
            )
        notes = list[str]()
        train_set = _cases("data", train, model, memory, notes)
        valid_set = None if valid is None else _cases("valid", valid, model, memory, notes)
        config, reduced = fitted(config, train_set.count, PROGRAM)
        notes += reduced
        _check_optimizer(config, model, train_set)
        return cls(
            config=config,
            model=model,
            train_set=train_set,
            valid_set=valid_set,
            keys=NATS,
            title=f"{_name(model)}, {model.size:,} parameters",
            noun="examples",
            identity={
                "model": _model_digest(model),
                "cases": digest_of(train_set),
                "cases_sample": sample_digest_of(train_set),
                "valid_cases": "" if valid_set is None else digest_of(valid_set),
                "valid_cases_sample": "" if valid_set is None else sample_digest_of(valid_set),
            },
            metrics=metrics,
            watch=watched,
            notes=tuple(notes),
        )

    def cases(self, step: int) -> Cases:
        """Return the training examples, with the augmentation of this step if there is any."""
        cases = self.train_set
        return cases.at(self.config.seed, step) if isinstance(cases, Augmented) else cases

    @property
    def options(self) -> dict[str, Any]:
        """Return the options without those of a network on a text."""
        return {name: value for name, value in super().options.items() if name not in OF_TEXT}

    def compared(self, theta: np.ndarray, step: int) -> dict[str, Any]:
        """Return what must be equal on all ranks at the start, by the error sentence for ranks {}."""
        seed = "than the other ranks: if it is random, use the same seed on all ranks"
        data = {name: value for name, value in self.identity.items() if name != "model"}
        return {
            f"rank {{}} has a different model {seed}": [self.identity["model"], digest(theta)],
            f"rank {{}} has different data {seed}": data,
            "rank {} has different options or checkpoint files than the other ranks": [self.options, step],
            "rank {} has different metrics or a different watch than the other ranks": [
                [*self.metrics],
                str(self.watch),
            ],
        }

    def check(self, checkpoint: Checkpoint | None) -> None:
        """Check the data, and that the model works on a few examples and fits the checkpoint."""
        model, count = self.model, self.train_set.count
        if checkpoint is None:
            theta = model.initial(self.config.seed).astype(model.backend.dtype)
        else:
            self._check_form(checkpoint)
            theta = checkpoint.theta
        self._check_data(lambda cases: check_finite(cases.targets, cases.mask))
        if isinstance(self.train_set, Augmented):
            self.train_set.check(np.array(spread(count, TRIED)))
        indices = np.array(spread(count, CHECKED))
        try:
            if isinstance(model, Trials):
                model.check(theta, self.train_set.take(indices))
            if checkpoint is None:
                loss = self._loss(model.backend.to_device(theta))
                if not math.isfinite(loss):
                    raise NotFinite(loss)
        except NotFinite as error:
            raise _explained(
                error, self.train_set, np.union1d(indices, np.arange(min(TRIED, count)))
            ) from None
        if isinstance(model, DataChecks):
            self._check_data(lambda cases: model.check_data(cases.inputs, cases.targets, cases.mask))
        self._try_metric(theta)

    def _check_data(self, check: Callable[[Examples], None]) -> None:
        """Check all examples; those that are read by index are checked when they are read.

        An error names the data set.
        """
        checks.examples(self.train_set, check, "data")
        if self.valid_set is not None:
            checks.examples(self.valid_set, check, "valid")

    def compare(self, checkpoint: Checkpoint, resumes: bool) -> str:
        """Return "" if the checkpoint's run has the same training examples; see `Task.compare`."""
        self._check_form(checkpoint)
        for name, words in (
            ("cases", "training"),
            ("valid_cases", "validation"),
        ):
            if resumes and not self._has_data(checkpoint.meta, name):
                raise DifferentRun(f"belongs to a run with different {words} examples")
        same, known = self._has_data(checkpoint.meta, "cases"), checkpoint.meta.get("tried")
        loss = self._loss(self.model.backend.to_device(checkpoint.theta))
        if (
            same
            and known is not None
            and not (isinstance(known, float) and math.isclose(loss, known, rel_tol=CLOSE, abs_tol=1e-6))
        ):
            raise DifferentRun(
                f"belongs to a run of a different model: the loss of its parameters on the first examples is "
                f"{loss:.6g} with this model, and was {known} when it was saved"
            )
        if not math.isfinite(loss):
            raise _explained(NotFinite(loss), self.train_set, np.arange(min(TRIED, self.train_set.count)))
        return "" if same else "was trained on different examples"

    def continuing(self, checkpoint: Checkpoint) -> ModelTask:
        """Return the task with the digests of the checkpoint: all checkpoints of a run have the same ones."""
        stored = {name: value for name, value in checkpoint.meta.items() if name in self.identity}
        return replace(self, identity={**self.identity, **stored})

    def _has_data(self, meta: Mapping[str, Any], name: str) -> bool:
        """Return whether the run of a checkpoint had the same data, or the same sample of it."""
        mine, sample = self.identity, f"{name}_sample"
        if meta.get(name) == mine[name]:
            return True
        sampled = mine[name] == mine[sample] or meta.get(name) == meta.get(sample)
        return bool(sampled and meta.get(sample) == mine[sample])

    def _check_form(self, checkpoint: Checkpoint) -> None:
        if checkpoint.meta.get("model") != self.identity["model"]:
            raise DifferentRun("belongs to a run of a different model")
        check_parameters(checkpoint, self.model.size, self.model.backend.dtype)

    def try_out(self, owner: DataParallel, theta: Array) -> None:
        """Check that all ranks compute the same loss, and that the loss of the first batch fits a message."""
        config, comm = self.config, owner.communicator
        losses = comm.agree(comm.gather(self._loss(theta))) or []
        strays = [
            rank for rank, loss in enumerate(losses) if not math.isclose(loss, losses[0], rel_tol=CLOSE)
        ]
        if strays:
            *others, last = "0", *map(str, strays)
            raise UserError(
                f"ranks {', '.join(others)} and {last} compute different losses for the same parameters: "
                "seed the model identically on all ranks"
            )
        if self.valid_set is not None:
            self._try_valid(owner, self.valid_set, theta)
        batch = global_indices(config.seed, 0, config.gradient_batch, self.train_set.count)
        risk = owner.on(self.train_set, batch)
        local = together(comm, lambda: owner.local.losses([theta], risk.shard, EVALUATE))
        message = np.append(local, 0.0)
        owner.sum(message, owner.host)
        mean = float(message[0]) / risk.scored
        if not math.isfinite(mean):
            raise _explained(NotFinite(mean), self.train_set, batch)
        if mean > LARGEST:
            raise UserError(
                f"the loss of the first batch is {mean:.3g}, larger than the maximum of {LARGEST:.3g}: "
                "scale inputs and targets to about 1"
            )

    def _try_valid(self, owner: DataParallel, cases: Cases, theta: Array) -> None:
        """Check on all ranks that the validation loss and the metrics can be computed."""
        try:
            loss = owner.on(cases, np.arange(cases.count), span=EVALUATE).loss(theta)
            means = metric.means(self.metrics, owner, cases, theta)
        except Unscored:
            raise UserError(
                "valid: no output of the validation examples is scored: check mask and weights"
            ) from None
        except UserError as error:
            said = str(error).removeprefix("valid: ")
            raise UserError(f"valid: {said}") from None
        if not math.isfinite(loss):
            at = _not_finite(cases, np.arange(cases.count))
            cause = "check inputs and targets of the validation examples" if at is None else _cause(at)
            raise UserError(f"valid: the loss is not finite ({loss}): {cause}")
        for name, mean in means.items():
            if not math.isfinite(mean):
                called = "the metric" if name == metric.SINGLE else f"the metric {name}"
                raise UserError(f"{called} of the validation examples is not finite ({mean})")

    def meta(self, theta: Array) -> dict[str, Any]:
        """Return the digests, the loss of theta on a few examples, and the title of the model in a report."""
        return {**self.identity, "tried": self._loss(theta), "title": _name(self.model)}

    def _loss(self, theta: Array) -> float:
        """Return the mean loss on the first examples, computed by this rank alone."""
        indices = np.arange(min(TRIED, self.train_set.count))
        loss = self.model.loss(theta, self.train_set.take(indices))
        return float(loss) / (self.train_set.scored(indices) or 1)

    def _try_metric(self, theta: np.ndarray) -> None:
        if self.metrics and self.valid_set is not None:
            indices = np.arange(min(TRIED, self.valid_set.count))
            metric.sums(
                self.metrics, self.model, self.valid_set, indices, self.model.backend.to_device(theta)
            )


def checked_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of `hfmpi.train` that are not None.

    Raises
    ------
    UserError
        If an option is unknown, or belongs to a network on a text.
    """
    known = [field.name for field in fields(Config) if field.name not in OF_TEXT]
    for name in options:
        if name in OF_TEXT:
            raise UserError(f"{name} is not an option of hfmpi.train: it belongs to the model or the data")
        if name not in known:
            meant = did_you_mean(name, [*known, *ARGUMENTS], OTHER_WORDS | WORDS_OF_ARGUMENTS)
            raise UserError(f"unknown option {name!r}{meant}; the options are {', '.join(known)}")
    if not isinstance(options.get("optimizer"), str | None):
        named(options["optimizer"])  # refuses what is not an optimizer
    return {name: value for name, value in options.items() if value is not None}


def _cases(name: str, given: Any, model: Model, memory: int | None, notes: list[str]) -> Cases:
    """Return a data set in the form that the model accepts, and add a note on how it is read."""
    make = getattr(model, "examples", Examples)
    try:
        cases = as_cases(given, make, memory, lambda sentence: notes.append(f"{name}: {sentence}"))
        return with_scoring(model, cases)
    except UserError as error:
        said = str(error)
        raise UserError(said if said.startswith(f"{name} ") else f"{name}: {said}") from None


def _check_optimizer(config: Config, model: Model, cases: Cases) -> None:
    """Check that the model and the batches have what the optimizer needs."""
    chosen = config.preset()
    needs, kind = chosen.optimizer.needs, type(model).__name__
    if needs.same_batch:
        redrawn = "hfmpi.Augmented" if isinstance(cases, Augmented) else ""
        checks.same_batch(config.optimizer, chosen.gradient_batch, cases.count, "gradient_batch", redrawn)
    if needs.blocks and not isinstance(model, Blocks):
        raise UserError(
            f"{kind} does not define the matrices of theta (blocks): use a different optimizer, such as adam"
        )
    if needs.kronecker_factors and not isinstance(model, KroneckerFactors):
        raise UserError(
            f"{kind} has no Kronecker factors: use settings={{'directions': 'gradient'}}, or a different "
            "optimizer"
        )
    if needs.sketch and not needs.rows and not has_rows(model):
        raise UserError(
            f"{kind} has no rows of examples, from which {config.optimizer} estimates the curvature: use "
            "settings={'curvature_segments': 0} and curvature_batch=128, or a different optimizer"
        )
    if needs.rows and not has_rows(model):
        raise UserError(
            f"{kind} has no rows of examples, which {config.optimizer} needs: use a different optimizer, "
            "such as bhf-short"
        )
    if needs.squared_gradients and not has_squared_gradients(model):
        raise UserError(f"{kind} has no squared gradients: use settings={{'preconditioner': 'auto'}}")
    if needs.structural_damping and not isinstance(model, StructuralDamping):
        raise UserError(f"{kind} has no structural damping: use settings={{'structural_damping': 0}}")


def _name(model: Model) -> str:
    if not isinstance(model, Network):
        return type(model).__name__
    network = model.architecture
    return f"{network.name}, {f'{network.layers} x ' if network.layers > 1 else ''}{network.hidden:,} units"


def _explained(error: NotFinite, cases: Cases, indices: np.ndarray) -> UserError:
    """Return an error that names the first of these examples with inputs that are not finite, if any."""
    at = _not_finite(cases, indices)
    return (
        error
        if at is None
        else UserError(f"the loss is not finite at the start ({error.loss}): {_cause(at)}")
    )


def _not_finite(cases: Cases, indices: np.ndarray) -> int | None:
    """Return the first of these examples with inputs that are not finite, if there is one."""
    for part in np.array_split(indices, -(-len(indices) // CHECKED)):
        inputs = getattr(cases.take(part), "inputs", ())
        arrays = [np.asarray(x) for x in (inputs if isinstance(inputs, tuple) else (inputs,))]
        for k, index in enumerate(part):
            if any(x.dtype.kind == "f" and not np.isfinite(x[k]).all() for x in arrays):
                return int(index)
    return None


def _cause(example: int) -> str:
    return (
        f"the inputs of example {example:,} are not finite; correct them or remove the example, because a "
        "mask hides only targets"
    )


def _model_digest(model: Model) -> str:
    """Return a digest of the structure of a model, without its parameters."""
    blocks = [list(block) for block in model.blocks] if isinstance(model, Blocks) else []
    output_loss = getattr(model, "output_loss", None)
    parameters = getattr(output_loss, "form", "")
    loss = type(output_loss).__name__ + (parameters if isinstance(parameters, str) else "")
    architecture = repr(model.architecture) if isinstance(model, Network) else ""
    form = [type(model).__name__, model.size, model.backend.dtype.name, blocks, loss, architecture]
    return hashlib.sha256(json.dumps(form).encode()).hexdigest()
