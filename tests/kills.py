"""Runs that are killed (SIGKILL) anywhere and resumed: `python test_all.py --kills N`."""

import contextlib
import json
import os
import random
import shutil
import signal
import sys

import torch

import train_cls
import train_gen
from lib.cli import exit_code
from lib.files import UserError
from tests.helpers import FLAGS, METHODS, TINY, needs_fork, records, tmp, topics, tree

NANO = '--model nano --scratch --n_head 2 --n_embd 16 --max_samples 30'.split()
KILLS = {}
for method in METHODS:
    depth = ['--n_layer', '2' if method == 'last' else '1']
    flags = [*TINY[:2], *NANO, *depth, *FLAGS[method]]
    KILLS[f'train_cls {method}'] = (train_cls.main, flags)
for flags in ('--lora --posterior_steps 4', '--full', '--prefix', '--pretrain'):
    rows = ['--data', 'TOPICS', *NANO, '--n_layer', '1', '--block_size', '64']
    KILLS[f'train_gen {flags}'] = (train_gen.main, [*rows, *flags.split()])
STEPS = '--batch_size 4 --grad_accum 2 --max_steps 9 --eval_every 2 --dtype fp32'.split()
WRITING = ('write_atomic', 'promote', 'save_best', 'save_resume')


def in_a_child(fn, kill_at=0):
    """Run fn() in a forked process of one thread, killed (SIGKILL) in its kill_at-th function call
    (0 = never). -> (exit status, [calls in which it wrote files, number of calls])"""
    read, write_end = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write_end)
        with os.fdopen(read) as f:
            said = f.read()
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), json.loads(said or '[[], 0]')
    code = 70
    try:
        torch.set_num_threads(1)  # a forked process has lost the threads of OpenMP
        signal.alarm(120)
        calls, writing = [0], []

        def tick(frame, event, arg):
            if event in ('call', 'c_call'):
                calls[0] += 1
                if calls[0] == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                if event == 'call' and frame.f_code.co_name in WRITING:
                    writing.append(calls[0])

        null = open(os.devnull, 'w')
        with contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
            sys.setprofile(tick)
            try:
                code = exit_code(fn())
            except UserError as e:
                code, writing = 2, [str(e)]
            sys.setprofile(None)
        os.write(write_end, json.dumps([writing, calls[0]]).encode())
    finally:
        os._exit(code)


def kill_and_resume(name, kills, seed):
    """A run is killed `kills` times, each time somewhere else (every other time while it writes
    files), and resumed until it is done. It ends with the files of a run that was never killed. ->
    number of kills that struck"""
    needs_fork()
    main, flags = KILLS[name]
    rng, out = random.Random(f'{name} {seed}'), os.path.join(tmp(), 'run')
    flags = [topics() if f == 'TOPICS' else f for f in flags] + STEPS

    def start():
        return main([*flags, '--out', out])

    def resume():
        return main(['--resume', '--out', out])

    code, (writing, calls) = in_a_child(start)
    assert code == 0, (name, code, writing)

    def result():
        files, speeds = tree(out), ('examples_per_s', 'tokens_per_s')
        log = [{k: v for k, v in r.items() if k not in speeds} for r in records(out)]
        del files['log.jsonl']
        return files, log

    want, struck = result(), 0
    for kill in range(kills):
        shutil.rmtree(out)
        code, killed_at = None, []
        for again in range(20):
            # the first attempt is killed, then every other resumption, ever later; then it may end
            at = 0
            if again <= 2 and (kill + again) % 2:
                at = rng.randrange(1, calls)
            elif again <= 2:
                at = rng.choice(writing) + rng.randrange(60)
            code, (said, _) = in_a_child(start if code is None else resume, at)
            if code == -signal.SIGKILL:
                struck += 1
                killed_at.append(at)
            elif code == 2:  # killed before there was anything to resume, or when all was done
                done = os.path.isfile(os.path.join(out, 'eval_results.json'))
                done = done or 'pretrain' in name and 'language model' in said[0]
                nothing = 'no resume.pt' in said[0] or 'no run.json' in said[0]
                assert done or nothing, (name, seed, killed_at, said)
                if done:
                    break
                code = None
            else:
                assert code == 0, (name, seed, killed_at, code, said)
                break
        a, b = want[0], result()[0]
        different = [k for k in {*a, *b} if a.get(k) != b.get(k)]
        assert result() == want, (name, seed, killed_at, different)
    return struck


def kill_long(n):
    """--kills N: as often as asked, for every method."""
    for name in KILLS:
        struck = kill_and_resume(name, n, seed=1)
        print(f'{name}: {n} runs, killed {struck} times, each ended bitwise as if never killed')


def main(words):
    """`python test_all.py --kills N` -> exit code"""
    kill_long(int(words[0]))
    return 0
