"""What has to happen before torch is imported, which takes seconds: Ctrl-C ends the script, and
OpenMP's threads learn how to wait. Called by every script, before it imports anything else."""

import os
import signal
import time

WAITING = ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT', 'KMP_BLOCKTIME')  # the user's own choice


def end_quietly(*_):
    """Handler of Ctrl-C while a script imports. The exception KeyboardInterrupt would not do: what
    it meets half imported turns it into others."""
    os.write(2, b'interrupted\n')
    os._exit(130)  # 128 + SIGINT, as shells report it


def crowded(path='/proc/loadavg', looks=8):
    """Do other processes want cores that our threads would take? Yes if at each of several looks,
    2 ms apart, the processes that are ready to run and our threads are more than the cores. Only
    Linux tells; elsewhere no."""
    cores = os.cpu_count() or 1
    ours = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else cores
    threads = os.environ.get('OMP_NUM_THREADS', '')
    ours = min(ours, int(threads)) if threads.isdecimal() else ours
    for _ in range(looks):
        try:
            with open(path) as f:
                running = int(f.read().split()[3].partition('/')[0])  # this process included
        except (OSError, ValueError, IndexError):
            return False
        if running - 1 + ours <= cores:
            return False
        time.sleep(0.002)
    return True


def script(name):
    """Call as script(__name__) before torch is imported: until run(), Ctrl-C ends the script with
    one word; beside other processes, threads sleep while they wait for each other. Does nothing in
    a module that is imported.

    A thread that spins for one that has lost its core keeps it from coming back: beside one busy
    process on two cores, LoRA training of GPT-2 runs at 12 examples/s so, and at 24 with passive
    waiting. On an idle machine passive waiting costs 15 % (nano's shape: 27 %), so it is
    chosen only where others want the cores as the script starts. OpenMP reads the environment
    once, as torch is imported."""
    if name != '__main__':
        return
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_quietly)
    if not any(choice in os.environ for choice in WAITING) and crowded():
        os.environ['OMP_WAIT_POLICY'] = 'passive'
