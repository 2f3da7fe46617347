"""The table of an optimizer's settings, which `hfmpi train --set help` prints."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import Any

import click

from hfmpi.runs.merge import merge
from hfmpi.settings import Meaning, table

__all__ = ["settings_help"]

WIDEST = 110


def settings_help(options: Mapping[str, Any]) -> str:
    """Return the table of the optimizer that these options choose, with the values in effect."""
    config = merge(options)
    preset = config.preset()
    optimizer = preset.optimizer
    batches = f"gradient batch {preset.gradient_batch:,}"
    if preset.curvature_batch:
        batches += f", curvature batch {preset.curvature_batch:,}"
    width = min(WIDEST, shutil.get_terminal_size().columns)
    formatter = click.HelpFormatter(width=width, max_width=width)
    formatter.write_text(
        f"Settings of {config.optimizer} ({type(optimizer).__name__}; {batches}). {preset.purpose}"
    )
    formatter.write_text("Change a setting with --set NAME=VALUE.")
    formatter.write_paragraph()
    rows = [
        (f"{setting.name}={_notation(getattr(optimizer, setting.name))}", _explanation(setting.meaning))
        for setting in table(type(optimizer))
    ]
    with formatter.indentation():
        formatter.write_dl(rows)
    return formatter.getvalue()


def _explanation(meaning: Meaning) -> str:
    libraries = (("torch.optim", meaning.torch), ("optax", meaning.optax))
    words = "; ".join(f"{library}: {word}" for library, word in libraries if word)
    return f"{meaning.sentences} [{words}]" if words else meaning.sentences


def _notation(value: object) -> str:
    """Return a value in the notation of the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.4g}" if isinstance(value, float) else str(value)
