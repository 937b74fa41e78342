"""Ctrl-C while a script imports, which takes seconds. Called by every script, before it imports
anything else."""

import os
import signal


def end_quietly(*_):
    """Handler of Ctrl-C while a script imports. The exception KeyboardInterrupt would not do: what
    it meets half imported turns it into others."""
    os.write(2, b'interrupted\n')
    os._exit(130)  # 128 + SIGINT, as shells report it


def script(name):
    """Call as script(__name__) before torch is imported (seconds): until run(), Ctrl-C ends the
    script with one word. Does nothing in a module that is imported."""
    if name == '__main__' and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_quietly)
