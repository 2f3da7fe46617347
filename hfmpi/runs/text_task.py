"""The task of `hfmpi train`: a recurrent network on the text of a corpus file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from hfmpi.data.batches import Cases, Sequences
from hfmpi.data.corpus import Corpus
from hfmpi.data.noise import Noisy
from hfmpi.files.checkpoint import Checkpoint
from hfmpi.files.history import BITS
from hfmpi.networks.network import Network
from hfmpi.runs import checks
from hfmpi.runs.config import Config
from hfmpi.runs.restore import check_model
from hfmpi.runs.task import Task

__all__ = ["TextTask"]

NOISED = "training losses are those with input noise, validation losses are without"


@dataclass(frozen=True, kw_only=True)
class TextTask(Task):
    """A network on a text; made by `read`."""

    model: Network
    train_set: Sequences
    valid_set: Sequences
    corpus: Corpus

    @classmethod
    def read(cls, config: Config, data: Path, local_rank: int) -> TextTask:
        """Read the corpus, on every rank, and make the network.

        Raises
        ------
        UserError
            If the corpus cannot be read or does not suffice for the options.
        """
        corpus = Corpus.read(data)
        about = config.architecture(corpus.vocabulary)
        # The size is settled now: the budget has served, and a resumed run must not ask again.
        config = replace(config, hidden=about.hidden, parameters=0)
        preset, lengths = config.preset(), (config.sequence_length, config.burn_in)
        batches = preset.gradient_batch, preset.curvature_batch
        checks.enough_text(data, len(corpus.train), len(corpus.valid), *lengths, *batches)
        network = Network(
            about,
            config.make_backend(local_rank),
            initialisation=config.initialisation,
            forget_bias=config.forget_bias,
        )
        variant = "" if config.variant == "standard" else f" ({config.variant})"
        return cls(
            config=config,
            model=network,
            train_set=Sequences(corpus.train, *lengths),
            valid_set=Sequences(corpus.valid, *lengths),
            keys=BITS,
            title=f"{config.model}{variant}, {config.hidden:,} units, {network.size:,} parameters",
            noun="sequences",
            identity={
                "vocabulary": list(corpus.symbols),
                "data": str(data.resolve()),
                "corpus": corpus.digest,
            },
            corpus=corpus,
            notes=(NOISED,) if config.input_noise else (),
        )

    def check(self, found: Checkpoint | None) -> None:
        """Raise a UserError if the checkpoint is of another alphabet or size, or the memory too small."""
        if found is not None:
            check_model(found, self.corpus.symbols, self.model.size, self.model.backend.dtype)
        checks.enough_memory(self.model.architecture)

    def cases(self, step: int) -> Cases:
        """Give the training sequences, with the noise of this step where there is to be some."""
        share = self.config.input_noise
        return Noisy(self.train_set, share, self.config.seed, step) if share else self.train_set

    def linearisation_bytes(self, cases: int) -> int:
        """Give what the tape of so many sequences takes."""
        config, needs = self.config, self.config.preset().optimizer.needs
        return self.model.tape_bytes(config.burn_in + config.sequence_length, cases, needs.structural_damping)
