"""The hinge between a model on one device and an optimizer that knows none: the mean risk over all ranks."""
