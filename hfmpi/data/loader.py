"""The data set of a PyTorch DataLoader; a loader that would change the examples is refused."""

from __future__ import annotations

from typing import Any

from hfmpi.errors import UserError

__all__ = ["LOADER_NOTE", "dataset_of", "is_loader"]

LOADER_NOTE = (
    "only the DataLoader's data set is used, not its batch size, shuffling and sampler, because hfmpi draws "
    "the batches"
)

REMEDY = "pass only its data set, loader.dataset, so that hfmpi draws the batches"


def is_loader(data: Any) -> bool:
    """Return whether data is a PyTorch DataLoader or has the same attributes."""
    return all(hasattr(data, name) for name in ("dataset", "collate_fn", "sampler", "__iter__"))


def dataset_of(loader: Any) -> Any:
    """Return the data set of a DataLoader.

    Raises
    ------
    UserError
        If the loader would change the data by a user-defined collate_fn, sampler or batch sampler, or if its
        data set cannot be indexed.
    """
    if is_iterable(loader.dataset):
        raise UserError(f"the DataLoader's data set is an IterableDataset: {ITERABLE}")
    if getattr(loader, "batch_size", None) is None:
        raise UserError(
            f"the DataLoader has no batch size, so that its batch sampler or its data set would form the "
            f"batches: {REMEDY}"
        )
    collate = loader.collate_fn
    if getattr(collate, "__name__", "") != "default_collate" or not _of_torch(collate):
        name = getattr(collate, "__name__", type(collate).__name__)
        raise UserError(
            f"the DataLoader's collate_fn ({name}) may change the examples, but hfmpi does not call it: "
            "apply its changes in the data set"
        )
    sampler = loader.sampler
    default = type(sampler).__name__ in ("SequentialSampler", "RandomSampler") and _of_torch(type(sampler))
    drawn = getattr(sampler, "replacement", False) or getattr(sampler, "num_samples", None) not in (
        None,
        len(loader.dataset),
    )
    if not default or drawn:
        raise UserError(
            f"the DataLoader's sampler ({type(sampler).__name__}) would select the examples: {REMEDY}, and "
            "use weights of examples instead of a sampler"
        )
    batches = getattr(loader, "batch_sampler", None)
    if batches is not None and not (type(batches).__name__ == "BatchSampler" and _of_torch(type(batches))):
        raise UserError(
            f"the DataLoader's batch sampler ({type(batches).__name__}) would form the batches: {REMEDY}"
        )
    return loader.dataset


ITERABLE = "it cannot be indexed, but hfmpi draws batches by index; convert it to a map-style data set"


def is_iterable(dataset: Any) -> bool:
    """Return whether a data set is a PyTorch IterableDataset."""
    return any(kind.__name__ == "IterableDataset" and _of_torch(kind) for kind in type(dataset).__mro__)


def _of_torch(part: Any) -> bool:
    return str(getattr(part, "__module__", "")).startswith("torch.utils.data")
