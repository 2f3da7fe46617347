"""The page of a run: its curves, times, settings and a sample in one HTML file that loads nothing."""
