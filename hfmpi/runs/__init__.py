"""One training run: the way in, the loop, its records and messages, its timing, and what stops it."""
