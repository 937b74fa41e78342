"""lib/progress.py: what long evaluations and training show, in a pipe and on terminals of any
width."""

import contextlib
import io
import os
import sys
import threading
import time
from types import SimpleNamespace

import lib.progress
import lib.scoring
import train_cls
import train_gen
from lib.progress import Progress, clock, fitting
from lib.training import Log
from tests.helpers import SHAPE, TINY, opened, patched, script, skip, tmp, topics, train, write

WORDS = ['step 800/800', 'loss 0.0005', 'lr 4.0e-06', '126.3 examples/s', '7651 tokens/s']
WORDS += ['padding 0.7 %', '0:00 left']


@contextlib.contextmanager
def terminal(columns, name='stdout'):
    """sys.stdout or sys.stderr is a terminal of that width -> a list that gets what it shows."""
    try:
        import fcntl
        import struct
        import termios
    except ImportError:
        skip('this system has no pseudo-terminals')
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack('HHHH', 24, columns, 0, 0))
    shown = []

    def read():
        with contextlib.suppress(OSError):
            while piece := os.read(master, 65536):
                shown.append(piece.decode())

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    stream = os.fdopen(slave, 'w')
    try:
        with patched(sys, name, stream):
            yield shown
    finally:
        stream.close()
        thread.join(5)
        os.close(master)


def lines(shown):
    """What a terminal was sent -> its lines, also those that were rewritten."""
    return ''.join(shown).replace('\r\n', '\n').replace('\r\033[K', '\n').split('\n')


def test_parts_of_a_line_fit():
    whole, spare = '  '.join(WORDS), (5, 4, 2, 3)
    assert fitting(WORDS, 0, spare) == fitting(WORDS, 99, spare) == whole and len(whole) > 90
    for width in range(12, 130):
        line = fitting(WORDS, width, spare)
        assert len(line) < width and line.startswith('step 800/8'), (width, line)
        assert width < 40 or line.endswith('0:00 left') and 'loss 0.0005' in line, (width, line)
    assert 'padding' not in fitting(WORDS, 90, spare) and 'lr' in fitting(WORDS, 90, spare)
    assert [clock(s) for s in (0, 59.9, 61, 3600)] == ['0:00', '0:59', '1:01', '60:00']


def test_training_lines_fit_the_terminal():
    """Below 98 columns a rewritten line would break, and each rewriting would add a line."""
    for width in (40, 80, 120):
        with terminal(width) as shown:
            log = Log(tmp(), SimpleNamespace(max_steps=800), [])
            numbers = dict(loss=0.5, lr=1e-3, examples_per_s=126.3, tokens_per_s=7651.0)
            log.write(0.5, step=700, pad_share=0.1, **numbers)
            log.write(step=800, val_loss=0.1, val_accuracy=0.9)
            log.write(step=800, loss=0.1, norm=2.5)  # of an edit
        found = [line for line in lines(shown) if line]
        assert len(found) == 3 and found[0].endswith('0:50 left'), found
        assert len(found[0]) < width and ('padding 10.0 %' in found[0]) == (width == 120), found
        assert 'val_accuracy 0.9000' in found[1], found
    text = train(*TINY, '--head', '--max_steps', '3', '--log_every', '1')[1]
    assert text.count('tokens/s  padding ') == 3  # a pipe gets all of it


def test_progress_in_a_pipe():
    """A line every 10 s, with what is left by the tokens that were read; nothing at the end."""
    now, err = [0.0], io.StringIO()
    with patched(time, 'monotonic', lambda: now[0]), contextlib.redirect_stderr(err):
        show = Progress([30] * 1000 + [10] * 4000)  # 70,000 tokens
        for second in range(1, 24):
            now[0] = float(second)
            show(100 * second)
        now[0] = 100.0
        show(5000)
        show = Progress([10, 10], (1, 4))  # the second of four passes
        now[0] = 111.0
        show(1)
    said = err.getvalue().split('\n')
    assert said[0] == '1,000 of 5,000 texts, 0:13 left', said
    assert said[1] == '2,000 of 5,000 texts, 0:15 left', said
    assert said[2] == 'pass 2 of 4: 1 of 2 texts, 0:55 left' and said[3:] == [''], said


def test_progress_of_a_generative_run():
    """Each pass over the texts says which one it is."""
    texts, err = ['red green', 'one two', 'three'] * 60, io.StringIO()
    with patched(lib.scoring, 'CACHED', 0):  # several batches
        with patched(lib.progress, 'PIPE', 0.0), contextlib.redirect_stderr(err):
            want = opened('full').logits(texts, progress=True)
        assert (opened('full').logits(texts) == want).all()
    said = err.getvalue()
    assert 'pass 1 of 2: ' in said and 'pass 2 of 2: ' in said, said


def test_progress_on_a_terminal():
    """One line, rewritten, narrower than the terminal, and cleared at the end."""
    with patched(lib.progress, 'TERMINAL', 0.0):
        for width in (20, 80):
            with terminal(width, 'stderr') as shown:
                show = Progress([5] * 2000)
                for done in (500, 1000, 2000):
                    time.sleep(0.01)
                    show(done)
            text = ''.join(shown)
            assert '\n' not in text and text.endswith('\r\033[K'), repr(text)
            assert max(map(len, lines(shown))) < width, lines(shown)
            assert '1,000 of 2,000 text' in text, repr(text)


def test_validation_in_training_shows_progress():
    rows = ''.join(f'red green blue {i},animals\none two three {i},numbers\n' for i in range(66))
    flags = ['--data', topics(), '--val', write('val.csv', 'text,label\n' + rows), *SHAPE]
    flags += '--full --max_steps 2 --eval_every 2'.split()
    for main in (train_cls.main, train_gen.main):
        with patched(lib.scoring, 'CACHED', 0), patched(lib.progress, 'PIPE', 0.0):
            said = script(main, [*flags, '--out', os.path.join(tmp(), 'run')])[2]
        assert ' of 132 texts, ' in said, said
