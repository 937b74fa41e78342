"""The demo: synthetic reviews that data.py offers without a network, and `nano`, a small language
model of them, which lib/checkpoints.py loads.

A clause is good or bad by its adjective unless a negation turns it around; if two clauses disagree,
the main one decides. Words after the bar never appear in the labelled train split. The unlabelled
text has them next to words that give them away ("warm and radiant"), so only a model that has read
it can know them."""

import atexit
import functools
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile

from lib import files
from lib.files import UserError

VERSION = 1  # raise it when words or grammar change: a cached `nano` has learned the old ones
NANO_STEPS = 1600  # of its training; a minute or more on two cores
NANO_FLAGS = '--pretrain --data demo --model nano --scratch --batch_size 16 --lr 3e-3'
NANO_FLAGS += ' --schedule cosine --seed 0 --log_every 400'
THINGS = 'song plot cast ending garden hotel script museum market voyage dinner lecture hall '
THINGS += 'painting journey staff menu dance poem campsite beach tower ferry concert'
PEOPLE = (
    'my sister, an old friend, the guide, our host, everyone, the reporter, his aunt, a visitor'
)
TIMES = 'on monday, last week, this time, at first sight, in the end, after the break, at noon'
WORDS = {
    'good': 'warm bright clever charming lively honest graceful witty fresh tender lovely splendid'
    ' | radiant superb',
    'bad': 'dull clumsy bland tedious shallow dreary messy stale bitter grim feeble noisy'
    ' | dismal awful',
    'thing': f'{THINGS} | kitchen bakery library village',
    'how': 'very really truly utterly simply | deeply remarkably',
    'who': f'{PEOPLE} | the baker, a neighbour',
    'when': f'{TIMES} | that evening, in may',
}
# kind of word -> its seen words, its new words
WORDS = {k: [w.split(', ' if ',' in v else None) for w in v.split(' | ')] for k, v in WORDS.items()}
NEGATED = 'not {other}, not at all {other}, hardly {other}, far from {other}, anything but {other}'
JUDGED = [*9 * ['{same}', '{how} {same}'], *7 * ['{same} and {same}'], '{same} rather than {other}']
JUDGED += [*NEGATED.split(', '), 'neither {other} nor {other}']
CLAUSES = ['the {thing} was {judged}', 'the {thing} felt {judged}']
CLAUSES += ['{who} found the {thing} {judged}', '{who} called the {thing} {judged}']
SENTENCES = [
    *3 * ['{main}'],
    *5 * ['{when} {main}'],
    *8 * ['{main} and {main}'],
    '{side} but {main}',
]
SENTENCES += [
    '{side}, yet {main}',
    'although {side}, {main}',
    'despite the {other} {thing}, {main}',
]
# fraction of new words per draw: at 0.03 about 3 % of the test rows depend on a new adjective; the
# other kinds decide nothing
NEW_AT_TEST = dict(good=0.03, bad=0.03, thing=0.15, how=0.15, who=0.15, when=0.15)
NEW_UNLABELLED = dict.fromkeys(WORDS, 0.25)


def sentence(rng, good, new):
    """One sentence with the label `good` (bool). new: {kind of word: fraction of new words}"""
    used = set()

    def pick(options):
        # rng.random() is the one draw that is the same in every Python version
        return options[int(rng.random() * len(options))]

    def word(kind):
        w = pick(WORDS[kind][rng.random() < new.get(kind, 0)])
        if w in used:  # the same garden is not both grim and lovely
            return word(kind)
        used.add(w)
        return w

    def fill(template, good):
        kinds = dict(zip(('same', 'other'), ('good', 'bad') if good else ('bad', 'good')))

        def slot(match):
            name = match[1]
            if name in ('main', 'side'):
                return fill(pick(CLAUSES), good == (name == 'main'))
            if name == 'judged':
                return fill(pick(JUDGED), good)
            return word(kinds.get(name, name))

        return re.sub(r'\{(\w+)\}', slot, template)

    return fill(pick(SENTENCES), good)


def labelled():
    """{'train': 4,000 rows, 'val': 500, 'test': 1,000}, balanced, no text twice; always the same.
    A row is (text, label)."""
    rng, seen, rows = random.Random(1), set(), {}
    for split, n in dict(train=4000, val=500, test=1000).items():
        rows[split] = []
        while len(rows[split]) < n:
            good = len(rows[split]) % 2 == 1
            text = sentence(rng, good, {} if split == 'train' else NEW_AT_TEST)
            if text not in seen:
                seen.add(text)
                rows[split].append((text, 'positive' if good else 'negative'))
    return rows


def unlabelled(n=20000):
    """n sentences of the same grammar with all its words and no labels, for a language model."""
    rng = random.Random(2)
    return [sentence(rng, rng.random() < 0.5, NEW_UNLABELLED) for _ in range(n)]


@functools.lru_cache(None)
def passing_folder():
    """A folder for what the cache cannot keep: removed when this process ends."""
    folder = tempfile.mkdtemp(prefix='nanocls-')
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def nano_folder():
    """The folder of `nano`: trained with train_gen.py --pretrain the first time it is needed, then
    kept in the cache, or for this process alone if the cache cannot be written."""
    name = f'nano-{VERSION}'
    folder = files.cached(os.path.join('models', name))
    if os.path.isdir(folder):
        return folder
    with files.optional():
        return train_nano(folder)
    folder = os.path.join(passing_folder(), name)
    if os.path.isdir(folder):
        return folder
    return train_nano(folder, 'for this run alone', NANOCLS_CACHE=passing_folder())


def train_nano(folder, kept=None, **variables):
    """In a process of its own, so that the caller keeps its seed and its state. -> folder"""
    parent = os.path.dirname(folder)
    files.make_folder(parent)
    try:
        temp = tempfile.TemporaryDirectory(dir=parent)
    except OSError as e:
        raise files.cannot_write(parent, e) from None
    kept = kept or f'kept in {folder}'
    print(f"nano: training the demo's language model once ({kept})", flush=True)
    with temp:
        made = os.path.join(temp.name, 'nano')
        top = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        command = [sys.executable, os.path.join(top, 'train_gen.py'), *NANO_FLAGS.split()]
        steps = str(NANO_STEPS)
        command += ['--max_steps', steps, '--eval_every', steps, '--out', made]
        torchrun = ('RANK', 'WORLD_SIZE', 'MASTER_ADDR')  # it is not one of the ranks
        env = {name: value for name, value in os.environ.items() if name not in torchrun}
        env.update(variables)
        # in a session of its own: Ctrl-C is for this process, which ends that one
        options = dict(stdout=subprocess.PIPE, text=True, env=env, start_new_session=True)
        with subprocess.Popen(command, **options) as p:
            try:
                for line in p.stdout:
                    if line.startswith('step'):
                        print(f'nano: {line}', end='', flush=True)
            except BaseException:
                p.kill()
                raise
        if p.returncode:
            why = 'could not be trained; the lines above say why'
            raise UserError(f"nano, the demo's language model, {why}")
        try:
            os.rename(made, folder)
        except OSError:  # another process was faster
            if not os.path.isdir(folder):
                raise
    return folder
