"""Steps of an optimizer on batches from a user's loop, in one process or on all ranks of mpirun.

The user's program runs on every rank and reads a different part of the data there, as with
DistributedDataParallel. The global batch of a step is the union of the parts that the ranks pass.
"""

from __future__ import annotations

import logging
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from hfmpi.data.batches import Cases, spread
from hfmpi.data.digest import digest_of
from hfmpi.data.user_data import as_cases
from hfmpi.errors import UserError, shown
from hfmpi.facades.batches import GlobalBatch, Shards, curvature_part
from hfmpi.facades.scaled import ScaledModel
from hfmpi.files.checkpoint import Checkpoint, Entry
from hfmpi.frameworks.framework import FrameworkModel
from hfmpi.measure.machine import free_memory
from hfmpi.models.base import with_scoring
from hfmpi.objective.data_parallel import Risk
from hfmpi.objective.transport import Transport, choose
from hfmpi.optim.base import Objectives, Optimizer, StepReport
from hfmpi.optim.first_order import evaluated
from hfmpi.optim.presets import PRESETS, Preset, preset
from hfmpi.parallel.communicator import Communicator
from hfmpi.parallel.placement import place
from hfmpi.runs import checks
from hfmpi.runs.restore import Misfit, entries, restored

__all__ = ["Method", "Progress", "Steps", "method_of"]

CHECKED = 32
"""The number of examples, spread over the first batch, on which the model checks itself."""

REMEDY = "change the examples in your loop, or pass hfmpi.Augmented(cases, function).at(seed, step)"
"""The advice in the error message for a loop that passes `hfmpi.Augmented`."""


class Method(NamedTuple):
    """An optimizer, and the maximum number of examples in its curvature batch.

    Attributes
    ----------
    optimizer : Optimizer
    name : str
        The name that the user passed, or the name of the class.
    curvature_batch : float
        0: the method needs no curvature batch; inf: all examples of the batch.
    """

    optimizer: Optimizer[Any]
    name: str
    curvature_batch: float


class Progress(NamedTuple):
    """The state of a loop that is saved in addition to theta.

    Attributes
    ----------
    steps : int
        The number of steps so far.
    examples : int
        The number of examples in the batches of these steps, over all ranks.
    state : object
        The state of the optimizer.
    """

    steps: int
    examples: int
    state: Any


def method_of(method: Any, settings: Mapping[str, Any]) -> Method:
    """Return the method from the name or the object that the user passed.

    Raises
    ------
    UserError
        If the method or a setting is unknown.
    """
    if isinstance(method, str):
        chosen = preset(method, **settings)
        return Method(chosen.optimizer, method, chosen.curvature_batch)
    if isinstance(method, Preset):
        _no_settings(method.optimizer, settings)
        return Method(method.optimizer, type(method.optimizer).__name__, method.curvature_batch)
    kind = type(method)
    if Optimizer not in kind.__mro__:
        raise UserError(
            f"method must be a name such as 'subspace', or an optimizer such as hfmpi.Subspace(), "
            f"not {shown(method)}"
        )
    _no_settings(method, settings)
    known = [each.curvature_batch for each in PRESETS.values() if type(each.optimizer) is kind]
    return Method(method, kind.__name__, math.inf if any(known) or not known else 0)


def _no_settings(optimizer: Optimizer[Any], settings: Mapping[str, Any]) -> None:
    """Raise a UserError if settings are passed in addition to an optimizer object, which has its settings."""
    for name in settings:
        raise UserError(
            f"{name} cannot be passed here, because the method is an object: set it in the object, "
            f"hfmpi.{type(optimizer).__name__}({name}=...)"
        )


class Steps:
    """Takes the steps of one optimizer; all ranks must make the same calls.

    Parameters
    ----------
    model : FrameworkModel
    method : Method
    communicator : Communicator
    scale : (D,), optional
        The factor of each parameter's step, constant in every block. Default: 1.
    curvature_fraction : float, optional
        The fraction of a batch that is its curvature batch. Default: the method's number of examples.
    same_batch : bool
        Whether every step has the same batch.
    epoch_examples : int
        The number of examples in an epoch, for settings that change per epoch; 0: they do not change.
    micro_batch : int, optional
        As in `hfmpi.DataParallel`.

    Raises
    ------
    UserError
        If the method cannot be used in a loop, or an argument is invalid.
    """

    def __init__(
        self,
        model: FrameworkModel,
        method: Method,
        communicator: Communicator,
        scale: np.ndarray | None = None,
        curvature_fraction: float | None = None,
        same_batch: bool = False,
        epoch_examples: int = 0,
        micro_batch: int | None = None,
    ) -> None:
        needs = method.optimizer.needs
        if needs.structural_damping:
            raise UserError("structural damping works only with hfmpi.Network: set structural_damping=0")
        if not isinstance(same_batch, bool):
            raise UserError(f"same_batch must be True or False, not {shown(same_batch)}")
        if needs.same_batch and not same_batch:
            raise UserError(
                f"{method.name} needs the same batch in every step: pass same_batch=True if your loop passes "
                "the same batch, or use a different method"
            )
        fraction = 1.0 if curvature_fraction is None else curvature_fraction
        if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction <= 1:
            raise UserError(
                f"curvature_fraction must be larger than 0 and at most 1, not {shown(curvature_fraction)}"
            )
        if isinstance(epoch_examples, bool) or not isinstance(epoch_examples, int) or epoch_examples < 0:
            raise UserError(f"epoch_examples must be 0 or a positive integer, not {shown(epoch_examples)}")
        self.model, self.method, self.communicator = model, method, communicator
        self.same_batch, self.fraction = same_batch, fraction
        self._most = math.inf if curvature_fraction is not None else method.curvature_batch
        self.epoch_examples, self._micro_batch = epoch_examples, micro_batch
        self.scale: np.ndarray | None = None
        if scale is not None and (scale != 1).any():
            # With theta = s phi the gradient of phi is s g. So the step of phi is multiplied by s^degree and
            # the step of theta by s^(1 + degree), which must be equal to the scale.
            power = 1 / (1 + method.optimizer.degree)
            self.scale = (scale.astype(np.float64) ** power).astype(model.backend.dtype)
        self._variables = model if self.scale is None else ScaledModel(model, self.scale)
        self._owner = self._shards()
        self._checked, self._batch = False, ""
        self._form = self._digest_of_form()
        self._threads = 0  # this rank's number of threads; 0: not known yet

    def _shards(self, transport: Transport | None = None) -> Shards:
        free = self.model.backend.free_memory() or free_memory(self.communicator.local_size)
        return Shards(self._variables, self.communicator, None, self._micro_batch, free // 2, transport)

    def start(self, theta: np.ndarray) -> Progress:
        """Return the progress before the first step from theta (D,), which is on the host."""
        phi = self.model.backend.to_device(self._phi(theta))
        return Progress(0, 0, self.method.optimizer.init(phi, self.model.blocks))

    def _phi(self, theta: np.ndarray) -> np.ndarray:
        return theta if self.scale is None else theta / self.scale

    def saved(self, progress: Progress) -> dict[str, Entry]:
        """Return the fields of the optimizer's state, numbers and vectors, by name."""
        return entries(progress.state, self.model.backend)

    def restored(self, steps: int, examples: int, saved: Mapping[str, Entry]) -> Progress:
        """Return the progress with an optimizer state that `saved` returned.

        Raises
        ------
        UserError
            If the state belongs to a different method or model.
        """
        backend = self.model.backend
        fresh = self.start(self.model.initial(0).astype(backend.dtype))
        try:
            checkpoint = Checkpoint(np.zeros(0), dict(saved), {})
            return Progress(steps, examples, restored(checkpoint, fresh.state, backend, self.method.name))
        except Misfit:
            raise UserError(
                f"the saved state does not fit {self.method.name} with these settings and "
                f"{self.model.size:,} parameters: use the settings and the model that were saved"
            ) from None

    def step(
        self,
        theta: np.ndarray,
        progress: Progress,
        batch: Callable[[], Any],
        curvature: Callable[[], Any] | None = None,
        factor: Callable[[], float] = lambda: 1.0,
    ) -> tuple[np.ndarray, Progress, StepReport]:
        """Compute one step from theta (D,), which is not changed; collective.

        Parameters
        ----------
        theta : (D,)
            On the host; the same on all ranks.
        progress : Progress
        batch, curvature : callable
            Return this rank's examples of the batch, and of a separate curvature batch if there is one, in a
            form that `hfmpi.train` accepts. An error in them is raised on all ranks.
        factor : callable
            Returns the factor of the learning rates.

        Raises
        ------
        UserError
            On all ranks, if the batch of one rank is invalid, or the ranks hold different parameters.
        Exception
            An exception of the model, on the rank where it occurs; a UserError on the other ranks.
        """
        backend = self.model.backend
        with np.errstate(all="ignore"), self._limited():
            phi = self._phi(theta)
            objectives, count, optimizer = self._objectives(phi, progress, batch, curvature, factor)
            result, state, report = optimizer.step(backend.to_device(phi), progress.state, objectives)
            after = backend.to_host(result)
            if self.scale is not None:
                after = np.where(after == phi, theta, after * self.scale)
        return after, Progress(progress.steps + 1, progress.examples + count, state), report

    def moved(self, progress: Progress) -> Progress:
        """Return the progress after the parameters were changed by something other than the last step."""
        state = progress.state
        values = {field.name: getattr(state, field.name) for field in fields(state)}
        return progress._replace(state=type(state)(**self.method.optimizer.on_other_batches(values)))

    def averaged(self, progress: Progress) -> np.ndarray | None:
        """Return the mean of the iterates (D,), or None if the method does not compute a mean."""
        mean = evaluated(None, progress.state)
        if mean is None:
            return None
        phi = self.model.backend.to_host(mean)
        return phi if self.scale is None else phi * self.scale

    @contextmanager
    def _limited(self) -> Iterator[None]:
        """Limit BLAS and the framework to this rank's share of the cores; collective.

        With one rank nothing is limited. At the end only the framework's number of threads is restored.
        """
        if self.communicator.size == 1:
            yield
            return
        self._threads = self._threads or place(self.communicator).threads
        with self.model.threads(self._threads), _notes(self.communicator.rank):
            yield

    def _at_rate(self, factor: float) -> Optimizer[Any]:
        optimizer = self.method.optimizer
        if factor == 1 or not optimizer.rates:
            return optimizer
        least = float(np.finfo(np.float32).tiny)  # instead of 0, which settings refuse: theta does not change
        changed = {name: max(least, getattr(optimizer, name) * factor) for name in optimizer.rates}
        return replace(optimizer, **changed)

    def _objectives(
        self,
        phi: np.ndarray,
        progress: Progress,
        batch: Callable[[], Any],
        curvature: Callable[[], Any] | None,
        factor: Callable[[], float],
    ) -> tuple[Objectives, int, Optimizer[Any]]:
        """Return a step's objectives, the number of examples of all ranks, and the optimizer at its rate."""
        comm, local, optimizers = self.communicator, list[Cases](), list[Optimizer[Any]]()

        def described() -> np.ndarray:
            """Check this rank's part; return its sizes, values that ranks compare, and one unused number."""
            if phi.dtype != self.model.backend.dtype:
                raise UserError(
                    f"the parameters are {phi.dtype}, but were {self.model.backend.dtype} when the optimizer "
                    "was created: create the optimizer after changing their type"
                )
            optimizers.append(self._at_rate(factor()))
            local.append(self._cases("the batch", batch()))
            changed = self.same_batch and self._is_other(local[0])
            sizes = [*_sizes(local[0]), 0, 0, 0]
            if curvature is not None:
                if not self.method.curvature_batch:
                    raise UserError(
                        f"{self.method.name} does not use a curvature batch: do not pass curvature"
                    )
                local.append(self._cases("the curvature batch", curvature()))
                sizes[3:] = _sizes(local[1])
            if not self._checked:
                self._check(phi, local[0])
            digest, masked = self._digest(phi, progress), getattr(local[0], "mask", 0) is not None
            return np.array([*sizes, *digest, changed, masked, self._form, 0], np.float64)

        # All ranks receive the same numbers, so that they raise the same errors.
        ranks = self._owner.joined(described, [11] * comm.size)
        numbers = np.array(ranks)
        if (others := np.flatnonzero(numbers[:, 10] != numbers[0, 10])).size:
            raise UserError(
                f"rank {', '.join(map(str, others))} has a different method, loss or options than rank 0: "
                "create the optimizer with the same arguments on all ranks"
            )
        if not self._checked:
            transport = choose("auto", comm, self.model.backend)
            self._checked, self._owner = True, self._shards(transport)  # the check chose the micro-batches
        strays = np.flatnonzero((numbers[:, 6:8] != numbers[0, 6:8]).any(axis=1))
        if strays.size:
            raise UserError(
                f"rank {', '.join(map(str, strays))} has different parameters or a different optimizer state "
                "than rank 0: start from the same ones, and make every change on all ranks"
            )
        if numbers[:, 8].any():
            raise UserError(
                f"step {progress.steps + 1:,} has a different batch than the previous step, but same_batch "
                "is True: pass the same batch in every step, or do not set same_batch"
            )
        if (numbers[:, 3] > 0).any() != (numbers[:, 3] > 0).all():
            raise UserError("only some ranks pass a curvature batch: pass it on all ranks or on none")
        whole = self._union(local[0], numbers[:, :3])
        objective, second, shared = self._risk(whole, np.arange(whole.count)), None, False
        if curvature is not None:
            cases = self._union(local[1], numbers[:, 3:6])
            second = self._risk(cases, np.arange(cases.count))
        elif self.method.curvature_batch:
            size = round(min(self._most, max(1, whole.count * self.fraction)))
            if size >= whole.count:
                indices, part = np.arange(whole.count), whole
            else:
                indices = curvature_part(progress.steps, whole.count, size)
                part = self._part(whole, indices, numbers)
            second, shared = self._risk(part, indices), True
            objective.keep(second, np.delete(np.arange(whole.count), indices))
        epoch = progress.examples / self.epoch_examples if self.epoch_examples else 0.0
        return Objectives(objective, second, epoch, shared, self.same_batch), whole.count, optimizers[0]

    def _risk(self, cases: GlobalBatch, indices: np.ndarray) -> Risk:
        return self._owner.on(cases, indices)

    def _cases(self, name: str, batch: Any) -> Cases:
        """Return a rank's examples as `Cases`."""
        try:
            return with_scoring(self.model, as_cases(checks.unaugmented(batch, REMEDY)))
        except UserError as error:
            raise UserError(f"{name}: {error}") from None

    def _is_other(self, cases: Cases) -> bool:
        """Return whether the batch differs from that of the previous step."""
        before, self._batch = self._batch, digest_of(cases)
        return before not in ("", self._batch)

    def _check(self, phi: np.ndarray, cases: Cases) -> None:
        """Check the model on some examples of the first batch."""
        self._variables.check(phi, cases.take(np.array(spread(cases.count, CHECKED))))

    def _digest(self, phi: np.ndarray, progress: Progress) -> tuple[int, int]:
        """Return digests of 32 bits, one of the numbers of the state and one of the parameters."""
        if self.communicator.size == 1:
            return 0, 0
        values = [getattr(progress.state, field.name) for field in fields(progress.state)]
        numbers = [progress.steps, progress.examples, *(v for v in values if isinstance(v, (int, float)))]
        return zlib.crc32(np.array(numbers, np.float64).tobytes()), zlib.crc32(phi.data)

    def _digest_of_form(self) -> int:
        """Return a 32-bit digest of the loss, the method and the options, which must agree on all ranks."""
        loss, scale = self.model.output_loss, self.scale
        about = [
            type(loss).__name__,
            getattr(loss, "form", ""),
            *(getattr(self.model, name, None) for name in ("class_axis", "ignored", "class_weights")),
        ]
        optimizer = self.method.optimizer
        # The repr of an object that is not a dataclass contains its address.
        method = optimizer if is_dataclass(optimizer) else type(optimizer).__name__
        options = method, self._most, self.fraction, self.same_batch, self.epoch_examples
        content = repr([*about, *options, None if scale is None else zlib.crc32(scale.data)])
        return zlib.crc32(content.encode())

    def _union(self, examples: Cases, sizes: np.ndarray) -> GlobalBatch:
        """Return the union of the ranks' examples; `sizes` has a row of `_sizes` for each rank."""
        edges = (0, *np.cumsum(sizes[:, 0]).astype(int).tolist())
        return GlobalBatch(examples, edges, self.communicator.rank, *map(_whole, sizes[:, 1:].sum(axis=0)))

    def _part(self, whole: GlobalBatch, indices: np.ndarray, numbers: np.ndarray) -> GlobalBatch:
        """Return the global batch with the sums for the risk on some of its examples."""
        each = numbers[:, 1] / numbers[:, 0]
        if not numbers[:, 9].any() and (each == each[0]).all():  # the same number of outputs everywhere
            return replace(whole, outputs=len(indices) * int(each[0]), weights=len(indices))
        at = whole.parts(indices)[whole.rank] - whole.edges[whole.rank]
        sums = np.array(_sizes(whole.examples, at)[1:], np.float64)
        self.communicator.sum(sums)
        return replace(whole, outputs=_whole(sums[0]), weights=_whole(sums[1]))


@contextmanager
def _notes(rank: int) -> Iterator[None]:
    """Silence the notes of the models on all ranks but rank 0, unless the program has set up logging."""
    silent, logger = logging.NullHandler(), logging.getLogger("hfmpi")
    if rank:
        logger.addHandler(silent)
    try:
        yield
    finally:
        logger.removeHandler(silent)


def _sizes(cases: Cases, indices: np.ndarray | None = None) -> tuple[int, float, float]:
    """Return the number of (selected) examples and of their scored outputs, and the sum of their weights."""
    at = np.arange(cases.count) if indices is None else indices
    weight = getattr(cases, "weight", len)
    return len(at), cases.scored(at), weight(at)


def _whole(number: float) -> float:
    """Convert a number to an int if it is whole, as counts without weights are."""
    return int(number) if number == int(number) else float(number)
