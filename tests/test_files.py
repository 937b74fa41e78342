"""lib/files.py: atomic writes, locks, full disks."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import torch

import lib.files
import train_cls
import train_gen
from lib.files import UserError, read_bytes, read_json, write_atomic, write_json
from lib.resume import save_resume
from lib.tensors import save_safetensors
from tests.helpers import (
    SHAPE,
    TINY,
    TOP,
    fresh_cache,
    patched,
    raises,
    script,
    skip,
    tmp,
    topics,
    tree,
    write,
)


def test_write_atomic():
    path = os.path.join(tmp(), 'a', 'b.json')
    write_json(path, {'ä': [1, 2.5, None]})
    assert read_json(path) == {'ä': [1, 2.5, None]}

    def dies(f):
        f.write(b'half')
        raise KeyboardInterrupt

    raises(KeyboardInterrupt, write_atomic, path, dies)
    assert read_json(path) == {'ä': [1, 2.5, None]}
    assert os.listdir(os.path.dirname(path)) == ['b.json']
    write_atomic(path, lambda f: f.write(b'[1'))
    raises(UserError, read_json, path, match='not valid JSON')
    raises(UserError, read_json, path + 'x', match='cannot read')
    raises(UserError, write_atomic, os.path.join(path, 'c'), 'x', match='cannot write')


def test_each_rank_writes_its_cache():
    """Rank 0 alone writes the run, wherever it lies; what every rank needs, each of them writes."""
    with fresh_cache() as cache, patched(lib.files, 'WRITES', False):
        for folder in (f'{cache}-runs', os.path.join(cache, 'x'), tmp()):
            path = os.path.join(folder, 'x.json')
            write_json(path, [1])
            assert not os.path.exists(path), path
            write_atomic(path, '[1]', every_rank=True)
            assert read_json(path) == [1]


def test_links_and_pipes_are_written_to():
    folder = tmp()
    link, pipe = os.path.join(folder, 'link'), os.path.join(folder, 'pipe')
    target = write('target.txt', 'old', folder)
    os.symlink('target.txt', link)
    write_atomic(link, 'new')
    assert os.path.islink(link) and read_bytes(target) == b'new'
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_atomic(pipe, 'text')
    assert os.read(reader, 10) == b'text' and not os.path.isfile(pipe)
    os.close(reader)
    near, far = os.pipe()  # without a path of its own
    write_atomic(f'/dev/fd/{far}', 'text')
    assert os.read(near, 10) == b'text'
    os.close(near), os.close(far)


def test_threads_write_one_file():
    path, failed = os.path.join(tmp(), 'f.json'), []

    def writes(value):
        try:
            for _ in range(100):
                write_atomic(path, value)
        except OSError as e:
            failed.append(e)

    threads = [threading.Thread(target=writes, args=(str(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and read_bytes(path) in (b'0', b'1', b'2', b'3')


def test_only_own_leftovers_go():
    """A run that is refused leaves --out as it is. An accepted one removes what an interrupted
    write of its own left there, and nothing of anybody else's."""
    for main, flags in (
        (train_cls.main, [*TINY, '--head', '--max_steps', '1']),
        (train_gen.main, ['--data', topics(), *SHAPE, '--max_steps', '2']),
    ):
        out = tmp()
        os.makedirs(os.path.join(out, 'notes', 'deep'))
        theirs = ('draft.tmp', 'notes/draft.tmp', 'notes/deep/run.json.99999999.tmp', 'x.y.tmp')
        own = ('run.json.99999999.tmp', 'log.jsonl.99999999.tmp')
        for name in (*theirs, *own):
            write(name, 'x', out)
        write('run.json', '{}', out)
        raises(UserError, main, [*flags, '--out', out], match='already holds a run')
        assert set(theirs) | set(own) | {'run.json'} <= set(tree(out)), tree(out)
        os.remove(os.path.join(out, 'run.json'))
        assert not script(main, [*flags, '--out', out])[0]
        left = set(tree(out))
        assert set(theirs) <= left, left
        if main == train_cls.main:  # the folder of train_gen.py may be shared by several processes
            assert not set(own) & left, left


def test_two_runs_with_one_folder():
    """The second is refused while the first lives, even one that was killed and is resumed."""
    out = os.path.join(tmp(), 'run')
    one_class = ['--data', topics(), *SHAPE, '--class_id', '0', '--out', out]
    for main, work, flags in (
        (train_cls.main, out, [*TINY, '--out', out]),
        (train_gen.main, os.path.join(out, 'animals.part'), one_class),
    ):
        shutil.rmtree(out, ignore_errors=True)
        os.makedirs(work)
        code = 'import sys\nfrom lib import files\n'
        code += f'files.claim({work!r})\nprint("held", flush=True)\nsys.stdin.read()'
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        with subprocess.Popen([sys.executable, '-c', code], cwd=TOP, **pipes) as p:
            assert p.stdout.readline() == 'held\n'
            raises(UserError, main, [*flags, '--max_steps', '2'], match='in use by another process')
            p.kill()
        assert not script(main, [*flags, '--max_steps', '2'])[0]  # a dead process holds nothing


@contextlib.contextmanager
def files_of_at_most(size):
    """As on a full disk: no file can grow beyond so many bytes."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_full_disk():
    """A file that cannot be written is an error that names it, and the old file stays."""
    if os.name != 'posix':
        skip('needs resource limits')
    folder = tmp()
    path = os.path.join(folder, 'x.json')
    write_json(path, dict(old=1))
    with files_of_at_most(1000):
        raises(UserError, write_json, path, ['new'] * 1000, match='cannot write')
        big, file = dict(x=torch.zeros(1000)), os.path.join(folder, 'm.safetensors')
        raises(UserError, save_safetensors, file, big, match='m.safetensors')
        opt, scaler = torch.optim.SGD([torch.zeros(1)]), torch.amp.GradScaler('cpu', enabled=False)
        model = torch.nn.Linear(1000, 1)
        state = folder, SimpleNamespace(), 1, None, model, opt, scaler
        raises(UserError, save_resume, *state, match='resume.pt')
    assert os.listdir(folder) == ['x.json'] and read_json(path) == dict(old=1)
    out = os.path.join(tmp(), 'run')
    with files_of_at_most(20000):
        flags = [*TINY, '--full', '--max_steps', '3', '--out', out]
        raises(UserError, train_cls.main, flags, match='cannot write')
    left = os.listdir(out)
    assert not any(name.endswith(('.tmp', '.safetensors')) for name in left), left
    code = script(train_cls.main, ['--resume', '--out', out])[0]  # space was made
    assert not code and os.path.isfile(os.path.join(out, 'eval_results.json'))
