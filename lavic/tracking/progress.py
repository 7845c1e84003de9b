"""Progress of long work on standard error: a bar in a terminal, a plain line every few seconds in a log."""

from __future__ import annotations

import shutil
import sys
import threading
from typing import TextIO

from tqdm import tqdm

_TERMINAL_S, _LOG_S = 0.5, 5.0
"""Seconds between two updates of the bar, and between two lines of a log."""
_LINE = "{n_fmt}/{total_fmt}{unit} ({percentage:.0f}%), {rate_fmt}, {remaining} left{postfix}"


def progress_bar(total: int, unit: str, desc: str = "", *, initial: int = 0, shown: bool = True) -> ProgressBar:
    """A progress bar, as a context manager: call `update(n)` for every n units of work done.

    The unit is in the plural (`photos`, `steps`); `initial` units were done by an earlier run and do not count for the
    rate. With `shown=False`, for ranks other than 0, nothing is written.
    """
    terminal = sys.stderr.isatty()
    # 80 x 24 where the terminal reports no size; tqdm would write nothing there.
    columns, rows = shutil.get_terminal_size()
    return ProgressBar(
        total=total,
        unit=f" {unit}",
        desc=desc,
        initial=initial,
        disable=not shown,
        file=sys.stderr if terminal else _LogFile(sys.stderr),
        bar_format=None if terminal else "{desc}: " + _LINE if desc else _LINE,
        mininterval=_TERMINAL_S if terminal else _LOG_S,
        miniters=1,
        delay=0 if terminal else _LOG_S,
        ncols=columns if terminal else None,
        nrows=rows if terminal else None,
    )


class ProgressBar(tqdm):
    """A bar of `tqdm` that starts no thread and no process, and that writes at least its last line."""

    monitor_interval = 0
    _lock = threading.RLock()

    def close(self) -> None:
        """Writes the last state and ends the line."""
        if not self.disable:
            # tqdm would write nothing for a bar that was not drawn yet.
            self.delay, self.last_print_t = 0, self.start_t
        super().close()


class _LogFile:
    """Makes whole lines of what is meant to overwrite a line of a terminal."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> None:
        if line := text.strip("\r\n "):
            self._file.write(f"{line}\n")

    def flush(self) -> None:
        self._file.flush()
