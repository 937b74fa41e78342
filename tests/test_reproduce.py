"""docs/reproduce.py, with runs that only write their result."""

import json
import os
import subprocess

import train_cls
import train_gen
from docs import reproduce
from lib.files import UserError, read_json
from tests.helpers import patched, raises, script, tmp, write


class Trained:
    """subprocess.run that notes the command, and leaves a result as training does."""

    def __init__(self, code=0):
        self.commands, self.returncode = [], code

    def __call__(self, command):
        self.commands.append(command[1:])
        out = command[command.index('--out') + 1]
        os.makedirs(out, exist_ok=True)
        accuracy = 0.9 + 0.001 * len(self.commands)
        write('eval_results.json', json.dumps(dict(accuracy=accuracy)), out)
        return self


def test_reproduce_keeps_what_is_there():
    out, runs = tmp(), Trained()
    with patched(subprocess, 'run', runs):
        code, text, err = script(reproduce.main, ['--data', 'sms', '--out', out])
        assert not code and len(runs.commands) == 5 * 3 + 1, (err, len(runs.commands))
        again = script(reproduce.main, ['--data', 'sms', '--out', out])
    for path, *argv in runs.commands:
        (train_gen if path.endswith('gen.py') else train_cls).parse(argv)
    assert len(runs.commands) == 16 and again[1].endswith('| - |\n') and again[1] in text
    assert '| sms | last block | `train_cls --balance --last 1' in text
    assert '| 90.20 +- 0.25 (90.10, 90.20, 90.30) | 98.33 rasbt |' in text, text
    assert len(read_json(os.path.join(out, 'results.json'))) == 6


def test_reproduce_resumes_and_stops_at_an_error():
    out = tmp()
    run = os.path.join(out, 'sst2-full-1337')
    os.makedirs(run)
    write('resume.pt', '', run)
    with patched(subprocess, 'run', runs := Trained()):
        script(reproduce.main, ['--data', 'sst2', '--seeds', '1337', '--out', out])
    assert runs.commands[0][1:] == ['--resume', '--out', run], runs.commands[0]
    with patched(subprocess, 'run', Trained(code=2)):
        argv = ['--data', 'sms', '--out', tmp()]
        raises(UserError, reproduce.main, argv, match='exit code 2')


def test_reproduce_flags_are_those_of_the_scripts():
    """All command lines are accepted, those of --trial as well, and flags have their values."""
    for data, _, command, _ in reproduce.ROWS:
        name, *flags = command.split()
        for own in (flags, reproduce.small(flags)):
            argv = ['--data', data, '--model', 'gpt2', *own, '--out', tmp()]
            args = (train_cls if name == 'train_cls' else train_gen).parse(argv)[0]
            assert args.data == data and (args.scratch == ('--scratch' in own))
