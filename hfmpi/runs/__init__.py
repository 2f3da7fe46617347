"""One training run: configuration, loop, checkpoint, history, stop signals."""
