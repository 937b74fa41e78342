"""lib/ranks.py: several processes by torchrun."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np

import lib.ranks
import predict
from lib.files import UserError, read_json
from lib.ranks import rank_part
from lib.resume import load_resume
from lib.tensors import load_safetensors
from tests.helpers import (
    SCRATCH,
    TINY,
    TOP,
    generate,
    over_base,
    patched,
    raises,
    records,
    script,
    skip,
    table,
    tmp,
    train,
    tree,
    write,
)


def test_shares_of_a_step():
    """Ranks split the rows of a step; one without rows takes one with weight 0."""
    with patched(lib.ranks, 'world_size', lambda: 3):
        for n in (7, 2, 1):
            shares = []
            for i in range(3):
                with patched(lib.ranks, 'rank', lambda i=i: i):
                    shares.append(rank_part(np.arange(n)))
            assert sorted(r for rows, counts in shares if counts for r in rows) == list(range(n))
            assert [counts for _, counts in shares] == [3.0] * min(n, 3) + [0.0] * (3 - min(n, 3))
            assert all(len(rows) for rows, _ in shares)


def test_only_lost_connections_are_told_as_such():
    """Another error of NCCL or gloo keeps its own words: nobody should look for a lost process."""
    with patched(lib.ranks.time, 'sleep', lambda seconds: None):
        for text in (
            '[gloo/transport/tcp/pair.cc:525] Connection closed by peer [127.0.0.1]:3245',
            'NCCL error: remote process exited or there was a network error, NCCL version 2.27',
            '[Rank 1] Watchdog caught collective operation timeout: NCCL operation timed out',
        ):
            err = script(lambda argv: lib.ranks.report(RuntimeError(text), 0), [])
            assert err[0] == 2 and 'rank 0 has lost another process' in err[2], (text, err)
        for text in (
            'NCCL error in: ProcessGroupNCCL.cpp:94, unhandled cuda error, NCCL version 2.27',
            'NCCL error: invalid usage (run with NCCL_DEBUG=WARN for details)',
            'Expected all tensors to be on the same device',
        ):
            raises(RuntimeError, lib.ranks.report, RuntimeError(text), 0, match=text)
    assert script(lambda argv: lib.ranks.report(UserError('no such file'), 0), [])[0] == 2


def torchrun(n, name, *argv, wait=True):
    """A script in n processes of one machine -> (exit code, stdout, stderr), or the running
    Popen."""
    command = '-m torch.distributed.run --standalone --nproc_per_node'.split()
    command = [sys.executable, *command, str(n), os.path.join(TOP, name), *map(str, argv)]
    try:
        with socket.create_server(('127.0.0.1', 0)) as s:
            socket.create_connection(s.getsockname(), 1).close()
    except OSError as e:
        skip(f'no loopback ({e})')
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    p = subprocess.Popen(command, env=env, **pipes)
    return p if not wait else (lambda said: (p.returncode, *said))(p.communicate(timeout=180))


def close_runs(a, b, weights=1e-5, stray=0):
    """The losses and validation figures of two runs agree to 1e-5, half of their saved weights to
    1e-6 and all to `weights` of the largest; `stray` numbers of a tensor to ten times that."""
    others = ('_per_s', 'lr', 'pad_share')
    assert len(records(a)) == len(records(b))
    for x, y in zip(records(a), records(b)):
        assert x.keys() == y.keys(), (x, y)
        for k, v in x.items():
            same = v == y[k] if isinstance(v, (str, int)) else abs(v - y[k]) < 1e-5
            assert same or k.endswith(others), (x, y)
    files = [path for path in tree(a) if path.endswith('.safetensors')]
    assert files == [path for path in tree(b) if path.endswith('.safetensors')]
    for path in files:
        x, y = (load_safetensors(os.path.join(out, path)) for out in (a, b))
        for n in x:
            largest = max(1, float(x[n].abs().max()))
            away = (x[n] - y[n]).abs() / largest
            assert away.median() < 1e-6 and away.max() < 10 * weights, (path, n, away.max())
            assert (away >= weights).sum() <= stray, (path, n, away.max())


def test_distributed_classifier():
    """3 processes give the run of one, with steps whose rows do not divide evenly and one step that
    leaves two of them without a row. They evaluate and predict in order; one process prints."""
    rows = table(43).splitlines()  # 7 steps an epoch of 6 rows, the last of 1
    flags = ['--data', write('train.csv', '\n'.join(rows) + '\n'), *SCRATCH]
    flags += ['--val', write('val.csv', table(17)), '--test', write('test.csv', table(11))]
    flags += '--device cpu --dtype fp32 --dropout 0 --batch_size 3 --grad_accum 2'.split()
    flags += '--max_steps 20 --eval_every 7 --log_every 1 --lr 3e-3'.split()
    one, _ = train(*flags)
    out = os.path.join(tmp(), 'run')
    code, text, err = torchrun(3, 'train_cls.py', *flags, '--out', out)
    assert code == 0, err
    close_runs(one, out)
    # its loss and its validation, once
    assert text.count('step 20/20') == 2 and text.count('saved in') == 1, text
    texts = [f'{"very " * (i * 7 % 31)}number {i}\n' for i in range(50)]
    flags = ['--file', write('texts.txt', ''.join(texts)), '--json']
    flags += '--dtype fp32 --device cpu'.split()
    want = script(predict.main, [one, *flags])[1].splitlines()
    code, text, err = torchrun(3, 'predict.py', out, *flags)
    got = text.splitlines()
    assert code == 0 and len(got) == 50, err
    for a, b in zip(map(json.loads, want), map(json.loads, got)):
        assert a['text'] == b['text']
        assert all(abs(a['probs'][k] - b['probs'][k]) < 1e-5 for k in a['probs'])


def test_distributed_generative():
    """2 processes give the run of one: classes one after another, then the posterior, on
    batches of tokens."""
    flags = over_base(*'--device cpu --dropout 0 --batch_tokens 150 --max_steps 20'.split())
    # small steps: Adam's first ones blow up what differs in tiny gradients
    flags += '--posterior_steps 6 --posterior_lr 1e-4 --log_every 1 --grad_accum 2'.split()
    one, _ = generate(*flags)
    out = os.path.join(tmp(), 'run')
    code, text, err = torchrun(2, 'train_gen.py', *flags, '--out', out)
    assert code == 0, err
    close_runs(one, out, weights=1e-4, stray=1)
    a, b = (read_json(os.path.join(folder, 'eval_results.json')) for folder in (one, out))
    assert abs(a['nll'] - b['nll']) < 1e-4 and a['accuracy'] == b['accuracy']


def worker_pids(parent):
    """The processes that torchrun, process `parent`, has started, by rank."""
    if not os.path.isdir('/proc'):
        skip('no /proc here')
    found = {}
    for pid in filter(str.isdigit, os.listdir('/proc')):
        try:
            with open(f'/proc/{pid}/stat') as f:
                if int(f.read().rpartition(')')[2].split()[1]) != parent:
                    continue
            with open(f'/proc/{pid}/environ') as f:
                found[int(re.search(r'\0RANK=(\d+)', '\0' + f.read())[1])] = int(pid)
        except (OSError, TypeError):
            continue
    return found


def test_distributed_death_and_signal():
    """If a rank is killed, the others end within a minute; SIGTERM to torchrun saves. Both continue
    in one process and end like the run that was never stopped."""
    flags = [*TINY, *'--full --device cpu --dtype fp32 --batch_size 8 --max_steps 80'.split()]
    flags += '--eval_every 40 --log_every 1'.split()
    whole = None
    for how in ('kill', 'term'):
        out = os.path.join(tmp(), 'run')
        p = torchrun(2, 'train_cls.py', *flags, '--out', out, wait=False)
        log = os.path.join(out, 'log.jsonl')
        while p.poll() is None and not (os.path.isfile(log) and len(records(out)) > 5):
            time.sleep(0.05)
        t0 = time.time()
        if how == 'kill':
            os.kill(worker_pids(p.pid)[1], signal.SIGKILL)
        else:
            os.kill(p.pid, signal.SIGTERM)
        _, err = p.communicate(timeout=60)
        assert p.returncode != 0 and time.time() - t0 < 60, (how, err)
        assert how == 'term' or 'rank 0 has lost another process' in err or 'SIGKILL' in err, err
        at = load_resume(out)['step']
        assert at < 80 and (how == 'kill' or at > 0), (how, at, err)
        train('--resume', out=out)
        whole = whole or train(*flags)[0]
        close_runs(whole, out)
