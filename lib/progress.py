"""What is shown while something long runs, no wider than the terminal. Called by lib/scoring.py and
lib/training.py."""

import os
import shutil
import sys
import time

import numpy as np

from lib.report import counted

PIPE, TERMINAL = 10.0, 0.1  # seconds between lines in a pipe, between changes on a terminal


def columns(stream):
    """Width of the terminal that `stream` writes to, 0 in a pipe or a file."""
    if not stream.isatty():
        return 0
    try:  # of this stream, since the other ones may be piped
        return os.get_terminal_size(stream.fileno()).columns or 80
    except OSError:
        return shutil.get_terminal_size().columns


def fitting(parts, width, spare=()):
    """Parts of a line, joined. While it does not fit in `width` columns (0 = any), the parts at the
    indices `spare` are left out, one after another."""
    kept = dict(enumerate(parts))
    for i in spare:
        if width and len('  '.join(kept.values())) >= width:
            del kept[i]
    line = '  '.join(kept.values())
    return line[: width - 1] if width else line


def clock(seconds):
    return f'{int(seconds) // 60}:{int(seconds) % 60:02d}'


class Progress:
    """How far an evaluation is, on stderr: a line that is rewritten and cleared on a terminal, a
    line every 10 s in a pipe.

    lengths (n,): tokens of the texts, in the order in which they are read.  part: this pass over
    the texts and how many there are, (0, 1) if it is the only one."""

    def __init__(self, lengths, part=(0, 1)):
        self.work, self.part = np.cumsum(lengths), part
        self.start = self.shown = time.monotonic()

    def __call__(self, done):
        """So many texts are done."""
        now, width, (i, parts) = time.monotonic(), columns(sys.stderr), self.part
        finished = done == len(self.work)
        if now - self.shown < (TERMINAL if width else PIPE) and not finished:
            return
        left = (now - self.start) * ((parts - i) * self.work[-1] / self.work[done - 1] - 1)
        text = f'pass {i + 1} of {parts}: ' * (parts > 1)
        text += f'{done:,} of {counted(len(self.work), "text")}, {clock(left)} left'
        text = '' if finished else fitting([text], width)
        if width:
            print('\r\033[K' + text, end='', file=sys.stderr, flush=True)
        elif text:
            print(text, file=sys.stderr, flush=True)
        self.shown = now
