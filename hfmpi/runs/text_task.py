"""The task of `hfmpi train`: a recurrent network on the text of a corpus file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from hfmpi.data.batches import Cases, Sequences
from hfmpi.data.corpus import Corpus, loss_unit
from hfmpi.data.dropout import Dropout
from hfmpi.data.noise import Noisy
from hfmpi.files.checkpoint import Checkpoint
from hfmpi.files.history import BITS
from hfmpi.networks.network import Network
from hfmpi.runs import checks
from hfmpi.runs.config import Config
from hfmpi.runs.fitting import fitted
from hfmpi.runs.restore import check_model
from hfmpi.runs.session import COMMAND
from hfmpi.runs.task import DifferentRun, Task

__all__ = ["TextTask"]

Choose = Callable[[Config, int, int], tuple[Config, str]]
"""Options, D, number of training sequences -> options with an optimizer, and a note with the reason."""

NOISED = "training losses are computed with {}, validation losses without"


@dataclass(frozen=True, kw_only=True)
class TextTask(Task):
    """A network on a text; created by `read`."""

    model: Network
    train_set: Sequences
    valid_set: Sequences
    corpus: Corpus
    data: Path

    @classmethod
    def read(cls, config: Config, data: Path, local_rank: int, choose: Choose | None = None) -> TextTask:
        """Read the corpus, on every rank, and create the network for it.

        `choose` chooses the optimizer from the options, and the numbers of parameters and training sequences.

        Raises
        ------
        UserError
            If the corpus cannot be read, or is too short for the options.
        """
        corpus = Corpus.read(data)
        architecture = config.architecture(corpus.vocabulary)
        # The number of hidden units replaces --parameters, so that a resumed run does not derive it again.
        config = replace(config, hidden=architecture.hidden, parameters=0, keep=config.keep or "best")
        lengths = config.sequence_length, config.burn_in
        changes = {"input noise": config.input_noise, "dropout": config.dropout}
        changed = [name for name, share in changes.items() if share]
        notes = [NOISED.format(" and ".join(changed))] * bool(changed)
        if choose is not None:
            checks.enough_text(data, len(corpus.train), len(corpus.valid), *lengths, 1, 0)
            count = Sequences(corpus.train, *lengths).count
            config, note = choose(config, architecture.layout.size, count)
            notes.append(note)
        most = len(corpus.train) // config.sequence_length
        batches = config.gradient_batch or min(config.preset().gradient_batch, most), config.curvature_batch
        checks.enough_text(data, len(corpus.train), len(corpus.valid), *lengths, *batches)
        train_set = Sequences(corpus.train, *lengths)
        smaller, reduced = fitted(config, train_set.count, COMMAND)
        if reduced:
            config, notes = smaller, notes + reduced
        if config.preset().optimizer.needs.same_batch:
            redrawn = "--input-noise" if config.input_noise else "--dropout" if config.dropout else ""
            gradient, count = config.preset().gradient_batch, train_set.count
            checks.same_batch(config.optimizer, gradient, count, COMMAND.gradient_batch, redrawn)
        network = Network(
            architecture,
            config.make_backend(local_rank),
            initialisation=config.initialisation,
            forget_bias=config.forget_bias,
        )
        variant = "" if config.variant == "standard" else f" ({config.variant})"
        return cls(
            config=config,
            model=network,
            train_set=train_set,
            valid_set=Sequences(corpus.valid, *lengths),
            keys=BITS,
            title=f"{config.model}{variant}, {config.hidden:,} units, {network.size:,} parameters",
            noun="sequences",
            unit=loss_unit(corpus.symbols),
            identity={
                "vocabulary": list(corpus.symbols),
                "data": str(data.resolve()),
                "corpus": corpus.digest,
            },
            corpus=corpus,
            data=data,
            notes=tuple(notes),
        )

    def check(self, checkpoint: Checkpoint | None) -> None:
        """Check the symbols and the size of the checkpoint, and that there is enough memory."""
        if checkpoint is not None:
            check_model(checkpoint, self.corpus.symbols, self.model.size, self.model.backend.dtype)
        checks.enough_memory(self.model.architecture)

    def compare(self, checkpoint: Checkpoint, resumes: bool) -> str:
        """Return "" if the checkpoint's run was trained on the same corpus; see `Task.compare`."""
        check_model(checkpoint, self.corpus.symbols, self.model.size, self.model.backend.dtype)
        if checkpoint.meta.get("corpus") == self.corpus.digest:
            return ""
        difference = f"was trained on different data than {self.data}"
        if resumes:
            raise DifferentRun(difference)
        return difference

    def cases(self, step: int) -> Cases:
        """Return the training sequences, with the noise and the dropout of this step if there is any."""
        config = self.config
        cases: Cases = self.train_set
        if config.input_noise:
            cases = Noisy(self.train_set, config.input_noise, config.seed, step)
        if config.dropout:
            cases = Dropout(cases, config.dropout, config.layers, config.hidden, config.seed, step)
        return cases

    def linearisation_bytes(self, cases: int) -> int:
        """Return the size of the tape of this many sequences."""
        config, needs = self.config, self.config.preset().optimizer.needs
        steps = config.burn_in + config.sequence_length
        return self.model.tape_bytes(steps, cases, needs.structural_damping, dropout=config.dropout > 0)
