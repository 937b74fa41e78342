"""Generative against discriminative, from scratch: the experiments of docs/results.md.

    python docs/experiments.py --data sms sst2 agnews imdb --seeds 1 2 3

Few rows, flipped labels, a spurious token, another prior, dropped tokens. Every number goes to
docs/results/experiments.json as it comes, and is not computed again: an interrupted call goes on.
The rows that validate and test are the same for every seed; the seed draws training rows and
weights. `train_cls.py --full` and `train_gen.py --full` start from random weights, the two with
LoRA on top of a language model of the same shape, which `train_gen.py --pretrain` made of all
training texts without their labels."""

import contextlib
import io
import os
import shutil
import subprocess
import sys
import tempfile

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if TOP not in sys.path:
    sys.path.insert(0, TOP)

import numpy as np

import data
import train_cls
import train_gen
from lib import cli, files
from lib.measure import machine
from lib.metrics import run_metrics
from lib.runs import open_run
from lib.tokens import tokenize, tokenizer
from lib.workload import write_rows

SIZES = 8, 32, 128, 512, None  # training rows per class; None: all
STEPS = {8: 60, 32: 100, 128: 200, 512: 400, None: 800}  # of 16 rows
MIDDLE = 512  # rows per class of the experiments that are not about their number
TESTED, VALIDATED, LENGTH = 500, 200, 32  # rows at most, rows at most, tokens per text
TOKEN, STRENGTH = 'zebra', 0.95  # in front of so many texts of one class, else of the other
METHODS = {
    'discriminative': (train_cls, '--full --lr 1e-3'),
    'generative': (train_gen, '--full --lr 2e-3'),
    'discriminative, LoRA': (train_cls, '--lora --lr 3e-3'),
    'generative, LoRA': (train_gen, '--lora --lr 6e-3'),
    # goes on with a run of the one above
    'generative, LoRA, posterior': (train_gen, '--resume --posterior_steps 50'),
    # is the rate of the small models too high for large ones?
    'discriminative, lr 3e-4': (train_cls, '--full --lr 3e-4'),
}
USUAL = list(METHODS)[:-1]


class Rows:
    """Texts and their classes."""

    def __init__(self, texts, y):
        self.texts, self.y = list(texts), np.asarray(y)

    def __getitem__(self, index):
        return Rows([self.texts[i] for i in index], self.y[index])


def some(rows, n, seed):
    """At most n random rows."""
    order = np.random.RandomState(seed).permutation(len(rows.y))
    return rows[np.sort(order[:n])]


def per_class(rows, n, seed):
    """At most n rows of each class; all of them if n is None."""
    order = np.random.RandomState(seed).permutation(len(rows.y))
    chosen = [i for c in np.unique(rows.y) for i in order[rows.y[order] == c][:n]]
    return rows[np.sort(chosen)]


def flipped(rows, share, k, seed):
    """A share of the labels replaced by another one."""
    rng, y = np.random.RandomState(seed), rows.y.copy()
    wrong = rng.permutation(len(y))[: round(share * len(y))]
    y[wrong] = (y[wrong] + rng.randint(1, k, len(wrong))) % k
    return Rows(rows.texts, y)


def spurious(rows, share, seed):
    """TOKEN in front of a share of class 1, and of the other share of class 0."""
    draw = np.random.RandomState(seed).random_sample(len(rows.y))
    has = draw < np.where(rows.y == 1, share, 1 - share)
    return Rows([f'{TOKEN} {t}' if h else t for t, h in zip(rows.texts, has)], rows.y)


def dropped(rows, share, enc, seed):
    """Texts that lost a share of their tokens, before they are cut; at least one token stays. A
    model reads what is left as text, whose tokens can be others."""
    rng, texts = np.random.RandomState(seed), []
    for ids in tokenize(enc, rows.texts):
        kept = ids[rng.random_sample(len(ids)) >= share]
        texts.append(enc.decode((kept if len(kept) else ids[:1]).tolist()))
    return Rows(texts, rows.y)


class Study:
    """One data set and one shape: trains runs in a folder, notes accuracies in a file."""

    def __init__(self, name, shape, path, folder):
        self.name, self.path, self.folder = name, path, folder
        self.rows = files.read_json(path)['rows'] if os.path.isfile(path) else []  # noted so far
        self.latest = None, None  # rows and folder of the last run of 'generative, LoRA'
        self.shape = '{}x{}'.format(*shape)
        heads = max(1, shape[1] // 64)
        sizes = (
            f'--n_layer {shape[0]} --n_embd {shape[1]} --n_head {heads} --block_size {LENGTH + 2}'
        )
        self.new = f'--model gpt2 --scratch {sizes}'.split()
        ds = data.load(name)
        self.labels = ds.labels
        self.train = Rows(ds.train.texts, ds.train.y)
        self.val = some(Rows(ds.val.texts, ds.val.y), VALIDATED, 0)
        self.test = some(Rows(ds.test.texts, ds.test.y), TESTED, 0)
        self.enc = tokenizer('gpt2')
        commit = ['git', '-C', TOP, 'rev-parse', '--short', 'HEAD']
        self.commit = subprocess.run(commit, capture_output=True, text=True).stdout.strip()

    def noted(self, **key):
        """-> the rows with this key, one or none"""
        key = dict(data=self.name, shape=self.shape, **key)
        return [row for row in self.rows if all(row.get(k) == v for k, v in key.items())]

    def note(self, accuracy, **key):
        old, key = self.noted(**key), dict(data=self.name, shape=self.shape, **key)
        new = dict(key, commit=self.commit, accuracy=round(float(accuracy), 4))
        self.rows = [row for row in self.rows if row not in old] + [new]
        found = dict(command='python docs/experiments.py', machine=machine())
        files.write_json(self.path, dict(found, rows=self.rows))
        print(*key.values(), new['accuracy'], flush=True)

    def fit(self, method, train, steps, seed):
        """Train on rows -> opened run."""
        script, flags = METHODS[method]
        if '--resume' in flags:
            if self.latest[0] is not train:
                self.fit('generative, LoRA', train, steps, seed)
            out = self.latest[1]
            self.call(script, [*flags.split(), '--out', out])
            return open_run(out)
        where = tempfile.mkdtemp(dir=self.folder)
        for split, rows in dict(train=train, val=self.val, test=self.val[np.arange(20)]).items():
            labels = [self.labels[c] for c in rows.y]
            write_rows(os.path.join(where, f'{split}.csv'), rows.texts, labels)
        out = os.path.join(where, 'run')
        model = ['--model', self.language_model()] if '--lora' in flags else self.new
        argv = ['--data', where, '--text_col', 'text', '--label_col', 'label', *model]
        argv += [*flags.split(), '--max_steps', str(steps), '--max_length', str(LENGTH)]
        argv += ['--eval_every', '100000']
        self.call(script, [*argv, '--seed', str(seed), '--schedule', 'cosine', '--out', out])
        if method == 'generative, LoRA':
            self.latest = train, out
        return open_run(out)

    def language_model(self):
        """The folder of the base model of the LoRA methods, trained when it is first asked for."""
        base = files.cached(f'experiments/{self.name}-{self.shape}-{LENGTH}')
        if not os.path.isdir(base):
            texts, part = os.path.join(self.folder, 'texts.txt'), base + '.part'
            shutil.rmtree(part, ignore_errors=True)  # of an interrupted call
            write_texts(texts, self.train.texts)
            argv = ['--pretrain', '--data', texts, *self.new, '--max_length', str(LENGTH)]
            argv += '--epochs 2 --batch_size 32 --lr 2e-3 --schedule cosine'.split()
            self.call(train_gen, [*argv, '--out', part])
            os.replace(part, base)
        return base

    @staticmethod
    def call(script, argv):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            finished(script.main([*argv, '--log_every', '100000']))

    def probs(self, run, rows):
        """-> probabilities (N, K) of an opened run on rows, accuracy"""
        m, probs = run_metrics(run, run.logits(rows.texts), rows.y, self.labels)
        return probs, m['accuracy']

    # --- the experiments ---

    def few_rows(self, seed, methods):
        for n in SIZES:
            train = per_class(self.train, n, seed)
            key = dict(experiment='rows', condition=n or 'all', seed=seed)
            for method in ('naive Bayes', 'TF-IDF + logistic regression', *methods):
                if not self.noted(**key, method=method):
                    if method == 'naive Bayes':
                        accuracy = naive_bayes(train, self.test, len(self.labels), self.enc)
                    elif method.startswith('TF-IDF'):
                        accuracy = linear(train, self.test)
                    else:
                        run = self.fit(method, train, STEPS[n], seed)
                        if n == MIDDLE and ',' not in method:
                            prior = np.bincount(train.y) / len(train.y)
                            self.other_tests(run, dict(seed=seed, method=method), prior)
                        accuracy = self.probs(run, self.test)[1]
                    if accuracy is not None:
                        self.note(accuracy, **key, method=method)

    def unclean(self, seed, methods):
        """Training on rows with flipped labels, or with a spurious token."""
        clean = per_class(self.train, MIDDLE, seed)
        k = len(self.labels)
        for method in methods:
            key = dict(method=method, seed=seed)
            for share in (0.2, 0.4):
                train = flipped(clean, share, k, seed)
                self.trained('noise', key, train, {share: self.test})
            if k == 2:
                same, turned = (spurious(self.test, s, 0) for s in (STRENGTH, 1 - STRENGTH))
                train = spurious(clean, STRENGTH, seed)
                self.trained('spurious', key, train, dict(same=same, turned=turned))

    def trained(self, experiment, key, train, tests):
        """Train once, score on all tests {condition: rows}."""
        keys = {c: dict(experiment=experiment, condition=c, **key) for c in tests}
        if not all(self.noted(**k) for k in keys.values()):
            run = self.fit(key['method'], train, STEPS[MIDDLE], key['seed'])
            for condition, test in tests.items():
                self.note(self.probs(run, test)[1], **keys[condition])

    def other_tests(self, run, key, prior):
        """What a run that was trained on clean rows does on other test rows: with the spurious
        token (predicted), with classes at 90 : 10, without some of the tokens.
        prior (K,): of its training rows."""
        if len(self.labels) == 2:
            order = [run.labels.index(label) for label in self.labels]
            logits = run.logits(self.test.texts)[:, order]  # tau would shrink the margins
            margin = (logits[:, 1] - logits[:, 0]) * np.where(self.test.y == 1, 1, -1)  # nats
            nats = np.log(STRENGTH / (1 - STRENGTH))
            right = STRENGTH * (margin > nats) + (1 - STRENGTH) * (margin > -nats)
            self.note(right.mean(), **key, experiment='spurious', condition='turned, predicted')
        rng, y = np.random.RandomState(0), self.test.y
        one = rng.permutation(np.flatnonzero(y == 0))
        others = rng.permutation(np.flatnonzero(y != 0))
        n = min(len(one), 9 * len(others))
        rows = self.test[np.concatenate((one[:n], others[: max(1, n // 9)]))]
        new = np.bincount(rows.y, minlength=len(prior)) / len(rows.y)
        probs, accuracy = self.probs(run, rows)
        self.note(accuracy, **key, experiment='prior', condition='as trained')
        moved = (probs * new / prior).argmax(1)
        self.note((moved == rows.y).mean(), **key, experiment='prior', condition='moved')
        for share in (0.0, 0.1, 0.3, 0.5):
            rows = dropped(self.test, share, self.enc, 0) if share else self.test
            self.note(self.probs(run, rows)[1], **key, experiment='drop', condition=share)


def finished(results):
    """What main() of a script returned; an exit code, that of Ctrl-C, ends this program too."""
    if code := cli.exit_code(results):
        sys.exit(code)
    return results


def write_texts(path, texts):
    """A file of texts for --pretrain, one in each line."""
    files.write_atomic(path, ''.join(f'{" ".join(text.split())}\n' for text in texts))


def naive_bayes(train, test, k, enc):
    """Test accuracy of multinomial naive Bayes with add-one smoothing over the tokens that the
    models read."""
    counts = np.ones((k, enc.n_vocab))
    for y, ids in zip(train.y, tokenize(enc, train.texts)):
        np.add.at(counts[y], ids[:LENGTH], 1)
    log_p = np.log(counts / counts.sum(1, keepdims=True))  # (K, V)
    log_prior = np.log(np.bincount(train.y, minlength=k) / len(train.y))
    scores = [log_p[:, ids[:LENGTH]].sum(1) + log_prior for ids in tokenize(enc, test.texts)]
    return float((np.argmax(scores, 1) == test.y).mean())


def linear(train, test):
    """Test accuracy of logistic regression over TF-IDF of words and pairs of whole texts; None
    without scikit-learn."""
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        return None
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    model = LogisticRegression(C=10, max_iter=1000)
    model.fit(words.fit_transform(train.texts), train.y)
    return float((model.predict(words.transform(test.texts)) == test.y).mean())


def main(argv=None):
    p = cli.Parser(description=__doc__, prog='experiments.py')
    add = p.add_argument
    add('--data', nargs='+', default=['sms', 'sst2', 'agnews'], help='data sets')
    shape = dict(nargs=2, type=int, default=[1, 64], metavar=('LAYERS', 'WIDTH'))
    add('--shape', **shape, help='of all models')
    add('--seeds', nargs='+', type=int, default=[1, 2, 3], help='one run for each')
    add('--methods', nargs='+', choices=METHODS, default=USUAL, help='trained classifiers')
    results = os.path.join(TOP, 'docs', 'results', 'experiments.json')
    add('--json', default=results, metavar='FILE', help='where the numbers are, and go to')
    args, _ = p.parse(argv)
    for name in args.data:
        with tempfile.TemporaryDirectory() as folder:
            study = Study(name, args.shape, args.json, folder)
            for seed in args.seeds:
                study.few_rows(seed, args.methods)
                study.unclean(seed, [m for m in args.methods if ',' not in m])


if __name__ == '__main__':
    cli.run(main)
