"""The data set of a DataLoader of PyTorch, unless the loader changes what its examples are."""

from __future__ import annotations

from typing import Any

from hfmpi.errors import UserError

__all__ = ["LOADER_NOTE", "dataset_of", "is_loader"]

LOADER_NOTE = (
    "the DataLoader's data set is used; its batch size, shuffling and sampler are not: hfmpi draws batches "
    "itself"
)

REMEDY = "give the data set itself, loader.dataset, if that is what you want"


def is_loader(data: Any) -> bool:
    """Return whether data is a DataLoader of PyTorch, or a class of its kind."""
    return all(hasattr(data, name) for name in ("dataset", "collate_fn", "sampler", "__iter__"))


def dataset_of(loader: Any) -> Any:
    """Return the data set of a DataLoader.

    Raises
    ------
    UserError
        If the loader would change the data, by a function that collates examples, a sampler or a batch
        sampler that is not the default; or if its data set has no indices.
    """
    if is_iterable(loader.dataset):
        raise UserError(f"the DataLoader's data set is an IterableDataset: {ITERABLE}")
    if getattr(loader, "batch_size", None) is None:
        raise UserError(
            f"the DataLoader has no batch size: its batch sampler, or the data set, makes the batches, and "
            f"hfmpi draws batches itself; {REMEDY}"
        )
    collate = loader.collate_fn
    if getattr(collate, "__name__", "") != "default_collate" or not _of_torch(collate):
        name = getattr(collate, "__name__", type(collate).__name__)
        raise UserError(
            f"the DataLoader's collate_fn ({name}) would change the examples, and hfmpi does not call it: do "
            "what it does in the data set"
        )
    sampler = loader.sampler
    default = type(sampler).__name__ in ("SequentialSampler", "RandomSampler") and _of_torch(type(sampler))
    drawn = getattr(sampler, "replacement", False) or getattr(sampler, "num_samples", None) not in (
        None,
        len(loader.dataset),
    )
    if not default or drawn:
        raise UserError(
            f"the DataLoader's sampler ({type(sampler).__name__}) chooses examples, and hfmpi draws batches "
            f"itself: {REMEDY}, with weights of examples in place of a sampler"
        )
    batches = getattr(loader, "batch_sampler", None)
    if batches is not None and not (type(batches).__name__ == "BatchSampler" and _of_torch(type(batches))):
        raise UserError(
            f"the DataLoader's batch sampler ({type(batches).__name__}) chooses batches, and hfmpi draws "
            f"them itself: {REMEDY}"
        )
    return loader.dataset


ITERABLE = "it has no indices, and hfmpi draws batches by index; make it a map-style data set"


def is_iterable(dataset: Any) -> bool:
    """Return whether a data set is an IterableDataset of PyTorch."""
    return any(kind.__name__ == "IterableDataset" and _of_torch(kind) for kind in type(dataset).__mro__)


def _of_torch(part: Any) -> bool:
    return str(getattr(part, "__module__", "")).startswith("torch.utils.data")
