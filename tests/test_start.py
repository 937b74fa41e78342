"""lib/start.py: how OpenMP's threads wait."""

import os
import signal
import subprocess
import sys

from lib import start
from tests.helpers import TOP, environment, patched, tmp, write

FREE = dict.fromkeys((*start.WAITING, 'OMP_NUM_THREADS'))  # none of them set


def called(name):
    """The environment's OMP_WAIT_POLICY after start.script(name)."""
    before = signal.getsignal(signal.SIGINT)
    try:
        start.script(name)
        return os.environ.get('OMP_WAIT_POLICY')
    finally:
        signal.signal(signal.SIGINT, before)


def test_threads_sleep_on_a_busy_machine():
    """Only in a script, only beside other processes, never over the user's own choice."""
    for busy in (False, True):
        with patched(start, 'crowded', lambda busy=busy: busy):
            with environment(**FREE):
                assert called('lib.x') is None
                assert called('__main__') == ('passive' if busy else None)
            for name in start.WAITING:
                with environment(**{**FREE, name: '7'}):
                    assert called('__main__') == ('7' if name == 'OMP_WAIT_POLICY' else None)


def test_crowded():
    """Ready processes and our threads are more than the cores; nothing is known elsewhere."""

    def told(text, **variables):
        with environment(**{**FREE, **variables}):
            return start.crowded(write('loadavg', text, tmp()), looks=2)

    alone, one, many = (f'0.10 0.20 0.30 {n}/150 4711\n' for n in (1, 2, 9))
    with patched(os, 'cpu_count', lambda: 2), patched(os, 'sched_getaffinity', lambda _: {0, 1}):
        assert not told(alone) and told(one) and told(many)
        assert not told(one, OMP_NUM_THREADS='1') and told(many, OMP_NUM_THREADS='1')
        assert told(one, OMP_NUM_THREADS='2,1') and told(one, OMP_NUM_THREADS='64')
        assert not told('') and not told('a b c d')
        assert not start.crowded(os.path.join(tmp(), 'none'))
    with patched(os, 'cpu_count', lambda: 64), patched(os, 'sched_getaffinity', lambda _: {0, 1}):
        assert not told(many)  # there is room on the other cores


def test_torch_reads_what_a_script_sets():
    """It is in time for OpenMP, which reads the environment as torch is imported."""
    code = 'import os, sys; sys.path.insert(0, sys.argv[1]); from lib import start\n'
    code += 'start.crowded = lambda: True; start.script(__name__); import torch'
    env = {k: v for k, v in os.environ.items() if k not in FREE}
    env['OMP_DISPLAY_ENV'] = 'verbose'
    how = dict(capture_output=True, text=True, env=env, check=True)
    said = subprocess.run([sys.executable, '-c', code, TOP], **how).stderr
    if 'GOMP_SPINCOUNT' in said:  # GNU's OpenMP
        assert "GOMP_SPINCOUNT = '0'" in said, said
