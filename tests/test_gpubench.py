"""lib/gpubench.py: bench.py --gpu."""

import os
import sys
import time
import unittest.mock
from types import SimpleNamespace

import torch

import bench
from lib import gpubench, workload
from lib.files import UserError, read_json
from lib.gpubench import Case, Row, cases, command_of, measure, tables, take_turns
from tests.helpers import TOP, patched, raises, script, tmp
from tests.test_bench import in_this_process, little_bench


def figures(speed, **ratios):
    """What bench.py writes."""
    rows = dict(nanocls=dict(examples_per_s=speed, memory_mib=2000.0, share_of_matmul=0.25))
    for peer, ratio in ratios.items():
        rows[f'Hugging Face {peer}'] = dict(examples_per_s=speed / ratio, memory_mib=4000.0)
    halves = dict.fromkeys(ratios, 0.5)
    return dict(rows=rows, ratio=ratios, memory_ratio=halves, matmul_gflops=600e3)


def test_gpubench_without_a_gpu():
    with patched(torch.cuda, 'is_available', lambda: False):
        raises(UserError, bench.main, ['--gpu'], match='needs a GPU')
        raises(UserError, bench.main, ['--gpu', '--model', 'gpt2-xl'], match='needs a GPU')


def test_gpubench_asks_for_what_bench_has():
    """Every row is a command that bench.py accepts, in bfloat16 on CUDA; the tasks come with their
    peers, --cuda_graphs and --compile without."""
    found = {case.name: bench.parse(command_of(case, 'gpt2')) for case in cases()}
    for name, args in found.items():
        bench.check(args)
        assert (args.device, args.dtype, args.model) == ('cuda', 'bf16', 'gpt2'), name
        assert bool(args.against) != ('--' in name) and args.repeats == 1, name
    assert {args.task for args in found.values()} == {*gpubench.TASKS}
    for task in gpubench.TRAINED:
        assert found[f'{task} --compile'].extra == '--compile'
        assert found[f'{task} --cuda_graphs'].task == task


def test_gpubench_turns():
    """Rows are measured once, then those with peers again, while there is time; one that fails
    says why, and the others go on."""
    rows = [Row(Case('a', ['x'], True)), Row(Case('b', ['y'], False)), Row(Case('c', ['z'], True))]
    asked, now = [], [0.0]

    def one(flags, seconds):
        asked.append((flags[0], seconds))
        now[0] += 30
        if flags[0] == 'y':
            raise UserError('out of memory')
        return figures(100.0 + len(asked), half=2.0)

    with patched(gpubench, 'measure', one), patched(time, 'monotonic', lambda: now[0]):
        _, text, _ = script(lambda argv: take_turns(rows, 'gpt2', 150.0), [])
    assert [name for name, _ in asked] == ['x', 'y', 'z', 'x']  # 30 s are left, 36 are needed
    assert [seconds for _, seconds in asked] == [150, 120, 90, 60]
    assert [len(row.turns) for row in rows] == [2, 0, 1] and rows[1].why == 'out of memory'
    assert rows[0].speed() == 102.5 and rows[0].speed('half') == 51.25
    assert 'b: out of memory (30 s)' in text and 'a: turn 2, 102.5 examples/s' in text

    def ours_alone(flags, seconds):
        now[0] += 1
        if '--against' in flags:
            raise UserError('no transformers here')
        return figures(7.0)

    with patched(gpubench, 'measure', ours_alone), patched(time, 'monotonic', lambda: now[0]):
        lone = Row(Case('a', ['x'], True))
        script(lambda argv: take_turns([lone], 'gpt2', now[0] + 90), [])
    assert lone.speed() == 7.0 and lone.why == 'no transformers here' and len(lone.turns) == 1
    without = figures(9.0)
    without['rows']['Hugging Face half'] = dict(missing='peft is not installed')
    with patched(gpubench, 'measure', lambda *a: without):
        one_turn = Row(Case('a', ['x'], False))
        script(lambda argv: take_turns([one_turn], 'gpt2', time.monotonic() + 90), [])
    assert one_turn.why == 'Trainer + PEFT, --bf16: peft is not installed'
    assert one_turn.speed() == 9.0 and one_turn.speed('half') is None
    late = [Row(Case('a', ['x'], True))]
    take_turns(late, 'gpt2', time.monotonic() + 5)
    assert late[0].why == 'no time left' and not late[0].turns


def test_gpubench_tables():
    rows = [Row(case) for case in cases()]
    for i, row in enumerate(rows):
        peers = dict(half=3.0, best=2.0) if row.case.peers else {}
        row.turns, row.why = [figures(1000.0 + i, **peers)], ''
    lost = next(row for row in rows if row.case.name == 'lora --compile')
    lost.turns, lost.why = [], 'no compiler'
    alone = next(row for row in rows if row.case.name == 'gen')
    alone.turns = [figures(50.0)]  # its peers failed
    text = '\n'.join(tables(rows, 66000))
    line = '| lora | 1,000 examples/s | 25 % | **3.00** x 333 | **2.00** x 500 | 2,000 MiB (0.50) |'
    assert f'{line} 66 s |' in text, text
    assert '| gen | 50 examples/s | 25 % |  |  | 2,000 MiB |  |' in text, text
    assert '| lora | 1,000 examples/s, 2,000 MiB | 1,006 examples/s, 2,000 MiB |  |' in text, text
    assert text.endswith('lora --compile: no compiler')
    assert len({line.count('|') for line in text.split('\n\n')[0].splitlines()}) == 1


def test_gpubench_ends_what_takes_too_long():
    def command(code):
        return patched(workload, 'sys', SimpleNamespace(executable=code))

    folder = tmp()
    for name, text in (
        ('slow', '#!/bin/sh\nexec sleep 60\n'),
        ('wrong', '#!/bin/sh\necho "error: no such GPU" >&2\nexit 2\n'),
    ):
        path = os.path.join(folder, name)
        with open(path, 'w') as f:
            f.write(text)
        os.chmod(path, 0o755)
        with command(path):
            start, match = time.time(), 'no such GPU' if name == 'wrong' else 'not done within 1 s'
            raises(UserError, measure, ['--task', 'lora'], 1.0, match=match)
            assert time.time() - start < 30


def test_gpubench_on_a_little_model():
    """The whole command, with the CPU in the place of a GPU, a model of two blocks, few texts, and
    two of the rows, without peers."""
    measured = []
    path, found = (os.path.join(tmp(), name) for name in ('figures.json', 'found.json'))

    def here(flags, seconds):
        assert 0 < seconds <= gpubench.SECONDS
        task, rest = flags[1], flags[2 : flags.index('--device')]
        chosen = (task, rest) in (('lora', ['--extra=--compile']), ('eval', ['--rows', '10000']))
        if not chosen or task in measured:  # eval comes again, since time is left
            raise UserError('left out of this test')
        measured.append(task)
        flags = ['--task', task, '--model', 'distilgpt2', *'--device cpu --dtype fp32'.split()]
        flags += ['--rows', '20'] if task == 'eval' else ['--steps', '4', '--batch_size', '2']
        command = [sys.executable, os.path.join(TOP, 'bench.py'), *flags, '--repeats', '1']
        assert not in_this_process([*command, '--json', found]).returncode
        return read_json(found)

    gpu = dict(is_available=lambda: True, get_device_name=lambda: 'a CPU')
    with little_bench(), unittest.mock.patch.multiple(torch.cuda, **gpu):
        none = patched(torch.accelerator, 'current_accelerator', lambda **k: None)  # AdamW asks
        with patched(gpubench, 'measure', here), none:
            argv = ['--gpu', '--model', 'distilgpt2', '--json', path]
            code, text, _ = script(bench.main, argv)
    assert not code and 'distilgpt2, bfloat16, a CPU, torch' in text, text
    rows = read_json(path)['rows']
    assert rows['lora'] == dict(turns=[], why='left out of this test'), rows
    assert len(rows['eval']['turns']) == 1, rows
    for name in ('eval', 'lora --compile'):
        speed = rows[name]['turns'][0]['rows']['nanocls']['examples_per_s']
        assert text.count(f'{speed:,.0f} examples/s') >= 1, (name, text)
