"""The mean risk over all ranks: it connects a model on one device with an optimizer that knows no devices."""
