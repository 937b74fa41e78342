"""lib/init.py: train_cls.py goes on from a finished run."""

import functools
import os
import shutil

import numpy as np

import train_cls
from lib import rundata
from lib.files import UserError, read_json
from lib.runs import open_run
from lib.tables import read_table
from model import GPT, Head
from tests.helpers import (
    FLAGS,
    SCRATCH,
    TOPICS,
    gen_run,
    patched,
    raises,
    script,
    tmp,
    topics,
    train,
)

STEPS = '--max_steps 6 --batch_size 8 --lr 1e-2 --dtype fp32'.split()
STILL = '--max_steps 1 --batch_size 8 --lr 1e-30 --dtype fp32'.split()  # moves no weight
TEXTS = ['one two', 'cat dog', 'red red red one', 'x', '']


@functools.lru_cache(None)
def first(method):
    return train('--data', topics(), *SCRATCH, *FLAGS[method], *STEPS)[0]


def others():
    """Rows of which one class is known to the first run, and another is new."""
    return topics(('colours', 'numbers'))


def test_init_goes_on_with_model_and_head():
    """Of every method: before it learns, the new run gives the old label the old logits, whatever
    its place in the head; a new label has a row, an old one without rows has none."""
    for method in FLAGS:
        path = first(method)
        out, text = train('--init', path, '--data', others(), *STILL)
        old, new = open_run(path, 'cpu', 'fp32'), open_run(out, 'cpu', 'fp32')
        assert (old.labels, new.labels) == (['animals', 'numbers'], ['colours', 'numbers'])
        a, b = old.logits(TEXTS), new.logits(TEXTS)
        assert np.abs(a[:, 1] - b[:, 1]).max() < 1e-6 * np.abs(a).max(), method
        assert np.abs(a[:, 0] - b[:, 0]).max() > 1e-3, method
        assert 'new in the head: colours' in text
        assert 'dropped from the head, as no row has it: animals' in text
        was, now = (read_json(os.path.join(x, 'run.json')) for x in (path, out))
        for name in ('r', 'alpha', 'targets', 'top', 'bottleneck', 'last', 'prompt', 'max_length'):
            assert was['args'][name] == now['args'][name], (method, name)
        assert now['method'] == method
    base = os.path.join(first('lora'), 'base')  # the new run does not need the first one
    copy = os.path.join(tmp(), 'copy')
    shutil.copytree(first('lora'), copy)
    out, _ = train('--init', copy, '--data', others(), *STILL)
    shutil.rmtree(copy)
    open_run(out, 'cpu', 'fp32')
    assert os.path.isdir(base)


def test_init_takes_a_bias_of_the_head_along():
    """Of an edit: each label has its own, whatever its place."""
    init = GPT.__init__

    def start(self, cfg, num_labels=0):
        init(self, cfg, num_labels)
        if num_labels:
            self.score = Head(cfg.n_embd, num_labels)  # with a bias

    with patched(GPT, '__init__', start):
        path, _ = train('--data', topics(), *SCRATCH, '--full', *STEPS)
        out, _ = train('--init', path, '--data', others(), *STILL)
        old, new = (open_run(x, 'cpu', 'fp32').model.score.bias.tolist() for x in (path, out))
    assert new[1] == old[1] and abs(new[0]) < 1e-9 < abs(old[1]), (old, new)


def test_init_refuses_other_labels_for_a_head_of_another_name():
    init = GPT.__init__

    def start(self, cfg, num_labels=0):
        init(self, cfg, num_labels)
        if num_labels:
            del self.score
            self.top = Head(cfg.n_embd, num_labels)

    def classify(self, ids, lengths):
        return self.top(self.pool(self.hidden(ids), lengths))

    with patched(GPT, '__init__', start), patched(GPT, 'classify', classify):
        path, _ = train('--data', topics(), *SCRATCH, '--full', *STEPS)
        raises(UserError, train, '--init', path, '--data', others(), *STILL, match='no row per')


def test_init_knows_what_the_first_run_saw():
    """eval.py counts the texts that the first run was trained on, and training says so."""
    path, rows = first('lora'), read_table(topics())[0]
    out, text = train('--init', path, '--data', topics(tuple(TOPICS)), '--test', topics(), *STILL)
    assert 'test texts: the results may be optimistic' in text, text
    seen = [rundata.seen(x, [text for text, _ in rows]) for x in (path, out)]
    assert seen[0].sum() > 100 and seen[1][seen[0]].all()


def test_init_refuses_another_model():
    path, rows = first('lora'), ['--data', others()]
    raises(UserError, train, '--init', path, match='needs --data')
    raises(UserError, train, '--init', path, *rows, '--r', '3', match='has 8, and --init goes on')
    raises(UserError, train, '--init', path, *rows, '--full', match='was trained with --lora')
    raises(UserError, train, '--init', path, *rows, '--model', 'gpt2', match='--model cannot')
    raises(UserError, train, '--init', gen_run('lora'), *rows, match='is generative')
    raises(UserError, train, '--init', tmp(), *rows, match='is not a run folder')
    last = first('last')
    raises(UserError, train, '--init', last, *rows, '--last', '2', match='has 1')
    script(train_cls.main, ['--init', path, *rows, '--lora', *STILL, '--out', f'{tmp()}/run'])


def test_a_dropped_head_is_named():
    """--model with a classifier's folder, whose head is not used."""
    path = first('full')
    _, text = train('--model', path, '--data', topics(), *STILL)
    assert f'the class head of {path} is not used; --init {path} would keep it' in text
    _, text = train('--init', path, '--data', topics(), *STILL)
    assert 'is not used' not in text
