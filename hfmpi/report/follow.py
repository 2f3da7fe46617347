"""Rewrite a page while its runs continue."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from hfmpi.errors import UserError
from hfmpi.files.atomic import replace
from hfmpi.report.contents import Contents, read, stamp
from hfmpi.report.page import page

__all__ = ["follow"]

REST = 4.0
"""Seconds of pause for each second that a page took, so that the cores remain available to the runs."""


def follow(folders: Sequence[Path], out: Path, every: float, report: Callable[[str], object]) -> bool:
    """Rewrite the page of some runs until all are done, or until Ctrl-C.

    The last page does not reload itself.

    Parameters
    ----------
    folders : sequence of Path
    out : Path
    every : float
        Seconds between two pages; a page is rewritten only if a run has changed.
    report : callable
        Called with the reason if a page cannot be written, once for each reason; writing is retried.

    Returns
    -------
    bool
        Whether all runs are done.

    Raises
    ------
    UserError
        If the first page cannot be written.
    """
    written, runs, reported = None, list[Contents](), ""
    try:
        while True:
            start, current = time.monotonic(), [stamp(folder) for folder in folders]
            if current != written:
                try:
                    runs = read(folders)
                    done = all(run.done is not None for run in runs)
                    replace(out, page(runs, None if done else every))
                    written, reported = current, ""
                    if done:
                        return True
                except UserError as error:
                    if written is None:
                        raise
                    if reported != str(error):
                        reported = str(error)
                        report(reported)
            time.sleep(max(every, REST * (time.monotonic() - start)))
    except KeyboardInterrupt:
        if not runs:  # interrupted before the first page
            raise
        replace(out, page(runs))
        return False
