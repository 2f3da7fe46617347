"""Figures of runs, and a page of their curves, times, settings and samples in one self-contained file."""
