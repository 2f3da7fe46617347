"""A page that is written anew while its runs go on."""

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
"""Seconds of rest for each that a page took: the cores are the runs'."""


def follow(folders: Sequence[Path], out: Path, every: float, tell: Callable[[str], object]) -> bool:
    """Write the page of some runs again and again until all are done, or until Ctrl-C.

    The last page does not load itself anew.

    Parameters
    ----------
    folders : sequence of Path
    out : Path
    every : float
        Seconds from one page to the next, where anything has changed.
    tell : callable
        Is told why a page could not be written, once; it is tried again.

    Returns
    -------
    bool
        Whether all runs are done.

    Raises
    ------
    UserError
        If not even the first page can be written.
    """
    seen, runs, said = None, list[Contents](), ""
    try:
        while True:
            began, now = time.monotonic(), [stamp(folder) for folder in folders]
            if now != seen:
                try:
                    runs = read(folders)
                    done = all(run.done is not None for run in runs)
                    replace(out, page(runs, None if done else every))
                    seen, said = now, ""
                    if done:
                        return True
                except UserError as error:
                    if seen is None:
                        raise
                    if said != str(error):
                        said = str(error)
                        tell(said)
            time.sleep(max(every, REST * (time.monotonic() - began)))
    except KeyboardInterrupt:
        if not runs:  # and so no page
            raise
        replace(out, page(runs))
        return False
