"""What several test files share: a folder of their own, small models, small trained runs.

Import this before anything that reads the environment: it points the cache into a fresh folder.
Nothing here needs a network. `python test_all.py` sets $NANOCLS_TEST_ROOT, so that the folders of
its workers lie in one that it removes."""

import atexit
import contextlib
import copy
import csv
import functools
import gc
import http.server
import io
import json
import os
import random
import shutil
import signal
import socket
import tarfile
import tempfile
import threading
import unittest

import numpy as np
import torch
import torch._dynamo  # the first optimizer would import it
import torch.nn.functional as F

import eval as evaluation  # not `eval`, which is Python's own
import lora
import train_cls
import train_gen
from lib import checkpoints, demo, matrices, workload
from lib.cli import exit_code
from lib.files import hash_file, read_json, write_json
from lib.metrics import softmax
from lib.runs import open_run
from lib.tables import read_table
from lib.tensors import load_safetensors, save_safetensors
from model import GPT, Config

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # where the scripts are
ROOT = tempfile.mkdtemp(prefix='nanocls-test-', dir=os.environ.get('NANOCLS_TEST_ROOT'))
atexit.register(shutil.rmtree, ROOT, ignore_errors=True)
os.environ['NANOCLS_CACHE'] = os.path.join(ROOT, 'cache')  # never the user's own
os.environ.setdefault('HF_HUB_OFFLINE', '1')  # transformers must not ask the network either
torch.set_num_threads(1)  # two threads that wait for each other are slower on matrices this small
os.fsync = lambda descriptor: None  # no test cuts the power, and a busy disk makes it slow
gc.collect(), gc.freeze()  # so that collections do not go through all that was imported
CPU = torch.device('cpu')


class Stop(Exception):
    """Raised to end a script at a chosen place."""


def skip(reason):
    raise unittest.SkipTest(reason)


def needs_fork():
    if not hasattr(os, 'fork'):
        skip('this system has no fork()')


def stop_here(*a, **k):
    raise Stop


def tmp():
    """A fresh folder."""
    return tempfile.mkdtemp(dir=ROOT)


def raises(error, fn, *a, match='', **k):
    """fn(*a, **k) must raise `error` with `match` in its message, which is returned."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            fn(*a, **k)
    except error as e:
        assert match in str(e), f'{match!r} is not in {e!s}'
        assert '\n' not in str(e), 'more than one line'
        return str(e)
    raise AssertionError(f'no {error.__name__} from {fn.__name__}{a}')


@contextlib.contextmanager
def patched(owner, name, value):
    """owner.name is value inside."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def environment(**change):
    """Environment variables changed inside; None = not set."""
    before = {k: os.environ.get(k) for k in change}

    def put(values):
        for k, v in values.items():
            os.environ.pop(k, None) if v is None else os.environ.__setitem__(k, v)

    put(change)
    try:
        yield
    finally:
        put(before)


@contextlib.contextmanager
def fresh_cache():
    folder = tmp()
    with environment(NANOCLS_CACHE=folder):
        yield folder


def real_data(*parts):
    """The folder of real data, or a visible skip."""
    folder = os.environ.get('NANOCLS_DATA')
    if not folder or not os.path.isdir(os.path.join(folder, *parts)):
        skip(f'$NANOCLS_DATA holds no {"/".join(parts)}')
    return folder


def write(name, content, folder=None):
    path = os.path.join(folder or tmp(), name)
    with open(path, 'wb') as f:
        f.write(content if isinstance(content, bytes) else content.encode())
    return path


def table(n=20, labels=('no', 'yes'), sep=','):
    return 'text,label\n'.replace(',', sep) + ''.join(
        f'text number {i}{sep}{labels[i % len(labels)]}\n' for i in range(n)
    )


def quiet(fn, *a, **kw):
    """Calls fn without its progress lines. -> its value"""
    with contextlib.redirect_stderr(io.StringIO()):
        return fn(*a, **kw)


def tiny_imdb(path, reviews=40):
    with tarfile.open(path, 'w:gz') as tar:
        for split in ('train', 'test'):
            for i in reversed(range(reviews)):  # not in the order of the names
                for kind in ('neg', 'pos'):
                    raw = f'{split} review {i}<br /><br />it is {kind}'.encode()
                    info = tarfile.TarInfo(f'aclImdb/{split}/{kind}/{i}_7.txt')
                    info.size = len(raw)
                    tar.addfile(info, io.BytesIO(raw))
        evil = tarfile.TarInfo('../../evil.txt')
        tar.addfile(evil)


@contextlib.contextmanager
def server(files):
    """A web server on this machine; files: path -> bytes, or function(handler). Yields (address,
    list of (path, Range))."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers.get('Range')))
            what = files.get(self.path)
            if what is None:
                self.send_error(404)
            elif callable(what):
                what(self)
            else:
                answer(self, what)

        do_HEAD = do_GET

        def log_message(self, *a):
            pass

    s = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    try:
        socket.create_connection(s.server_address, timeout=5).close()
    except OSError as e:  # not even the loopback interface is up
        s.server_close()
        skip(f'no server can be reached on this machine: {e}')
    threading.Thread(target=s.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True).start()
    try:
        with environment(no_proxy='127.0.0.1', NO_PROXY='127.0.0.1'):
            yield f'http://127.0.0.1:{s.server_port}', asked
    finally:
        s.shutdown()
        s.server_close()


def answer(h, body, ranges=True, stop=None, headers=()):
    """Send body, from where the client asked; stop: break the connection after so many bytes."""
    start = 0
    if ranges and h.headers.get('Range'):
        start = int(h.headers['Range'][6:].split('-')[0])
        h.send_response(206 if start < len(body) else 416)
        h.send_header(
            'Content-Range',
            f'bytes {start}-{len(body) - 1}/{len(body)}'
            if start < len(body)
            else f'bytes */{len(body)}',
        )
    else:
        h.send_response(200)
    for k, v in headers:
        h.send_header(k, v)
    h.send_header('Content-Length', str(len(body) - start))
    h.end_headers()
    if h.command == 'GET':
        h.wfile.write(body[start:][:stop])


def run_eval(argv):
    """eval.main(argv) -> (stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        evaluation.main(argv)
    return out.getvalue(), err.getvalue()


@contextlib.contextmanager
def newborn(*kinds):
    """Yields a function -> the types of what is alive, is one of `kinds` and was made inside."""

    def alive():
        gc.collect()
        return [o for o in gc.get_objects() if issubclass(type(o), kinds)]

    before = alive()  # holds them, so that their ids are not used again
    known = set(map(id, before))
    yield lambda: [type(o).__name__ for o in alive() if id(o) not in known]


def dump(value, lines=False):
    """value as a JSON file (one item per line with lines=True; str and bytes as they are) -> its
    path."""
    path = os.path.join(tmp(), 'file.json')
    if lines:
        value = '\n'.join(json.dumps(item) for item in value) + '\n'
    elif not isinstance(value, (str, bytes)):
        value = json.dumps(value)
    with open(path, 'wb') as f:
        f.write(value if isinstance(value, bytes) else value.encode())
    return path


def close(a, b, tol=1e-12):
    return np.allclose(a, b, rtol=tol, atol=tol)


# --- small models ---

ALL = ['c_attn', 'attn.c_proj', 'c_fc', 'mlp.c_proj']  # the layers that --lora wraps
SMALL = Config(n_layer=3, n_head=4, n_embd=64, block_size=256, vocab_size=257)


METHODS = dict(lora=dict(r=4, targets=ALL), head={}, last=dict(last=2), full={})
METHODS.update(adapter=dict(bottleneck=8), prompt=dict(prompt=5))


def formula_model(cfg=SMALL, num_labels=3):
    """A GPT whose weights are a formula, the same on every machine and in every version of
    torch."""
    model = GPT(cfg, num_labels)
    with torch.no_grad():
        for k, (name, p) in enumerate(sorted(model.named_parameters())):
            wave = torch.arange(p.numel(), dtype=torch.float64) * 12.9898 + k
            wave = torch.sin(wave) * 43758.5453
            noise = (2 * (wave - wave.floor()) - 1).view(p.shape)  # looks uniform in -1 .. 1
            norm = 'ln_' in name and name.endswith('weight')
            p.copy_(1 + 0.1 * noise if norm else 0.3 * noise)
    return model.eval()


def ragged(vocab, lengths=(7, 1, 30, 12), pad=None, extra=0, seed=0):
    """ids (B, max + extra) right-padded with `pad` (random ids when None), lengths (B,)."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab - 1, (len(lengths), max(lengths) + extra), generator=g)
    if pad is not None:
        for row, n in zip(ids, lengths):
            row[n:] = pad
    return ids, torch.tensor(lengths)


def far(a, b):
    """Largest difference, relative to the largest value."""
    return float(((a - b).abs().max() / b.abs().max()).detach())


def stirred(model, seed=0):
    """What training would have moved: trainable tensors that start at zero get random values."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad and not p.any():
                p.normal_(0, 0.05, generator=g)
    return model.eval()


def hf_models(folder, cfg, num_labels=3, seed=0):
    """Random GPT-2s of that shape written by transformers' save_pretrained -> (classifier, its
    folder, language model, its folder)."""
    names = 'GPT2Config', 'GPT2ForSequenceClassification', 'GPT2LMHeadModel'
    GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel = hugging_face(*names)
    torch.manual_seed(seed)
    shape = dict(n_embd=cfg.n_embd, n_layer=cfg.n_layer, n_head=cfg.n_head)
    shape.update(vocab_size=cfg.vocab_size, n_positions=cfg.block_size, num_labels=num_labels)
    ends = {f'{name}_token_id': cfg.vocab_size - 1 for name in ('pad', 'bos', 'eos')}
    config = GPT2Config(**shape, **ends)
    out = []
    for cls, name in ((GPT2ForSequenceClassification, 'cls'), (GPT2LMHeadModel, 'lm')):
        model = cls(config).eval()
        model.save_pretrained(os.path.join(folder, name))
        out += [model, os.path.join(folder, name)]
    return out


def save_raw(folder, tensors, name='model.safetensors', config=True):
    os.makedirs(folder, exist_ok=True)
    if name.endswith('.bin'):
        torch.save(tensors, os.path.join(folder, name))
    else:
        save_safetensors(os.path.join(folder, name), tensors)
    if config:
        shape = dict(vocab_size=257, n_positions=256, n_embd=64, n_layer=3, n_head=4)
        write_json(os.path.join(folder, 'config.json'), dict(model_type='gpt2', **shape))
    return folder


def save_hf(folder, model, labels=None, state=None):
    """A model as a folder of transformers."""
    checkpoints.save_hf(folder, model.cfg, state or model.state_dict(), labels)


def lm_logits(model, ids):
    """ids (B, T) int64 -> next-token logits (B, T, V) float32, or (K B, T, V) with K classes."""
    h = model.hidden(ids)
    dtype = torch.promote_types(h.dtype, torch.float32)
    return F.linear(h.to(dtype), model.wte.weight.to(dtype))


# --- the training scripts on small data ---


ROWS, _ = demo.labelled()
demo.labelled = lambda: {split: list(rows) for split, rows in ROWS.items()}  # not made again


def small_demo(rows=(('train', 240), ('val', 60), ('test', 100))):
    """A folder with the first rows of the demo."""
    folder = os.path.join(tmp(), 'demo')
    os.mkdir(folder)
    for split, n in rows:
        workload.write_rows(os.path.join(folder, f'{split}.csv'), *zip(*ROWS[split][:n]))
    return folder


SCRATCH = '--model nano --scratch --n_layer 2 --n_head 2 --n_embd 32'.split()
TINY = ['--data', small_demo(), *SCRATCH, '--quick']
FLAGS = dict(lora=['--lora'], head=['--head'], last=['--last', '1'], full=['--full'])
FLAGS.update(adapter=['--adapter', '--bottleneck', '4'], prompt=['--prompt', '3'])


def script(main, argv):
    """main(argv) with its output captured -> (exit code, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = exit_code(main([str(a) for a in argv]))
    return code, out.getvalue(), err.getvalue()


def train(*argv, out=None):
    out = out or os.path.join(tmp(), 'run')
    code, text, _ = script(train_cls.main, [*argv, '--out', out])
    assert not code, code
    return out, text


@functools.lru_cache(None)
def tiny_run(method):
    """One small trained run per method, shared by the tests that only read it."""
    return train(*TINY, *FLAGS[method], '--dtype', 'fp32')[0]


def records(out):
    with open(os.path.join(out, 'log.jsonl'), encoding='utf-8') as f:
        return [json.loads(line) for line in f]


def losses_of(out):
    return [r['loss'] for r in records(out) if 'loss' in r]


def imbalanced(n=60):
    """A small CSV of one class in four, with texts of very different lengths."""
    path, rng = os.path.join(tmp(), 'rows.csv'), random.Random(0)
    with open(path, 'w', newline='', encoding='utf-8') as f:
        w = csv.writer(f)
        w.writerow(['text', 'label'])
        for i in range(n):
            word, label = ('good', 'rare') if i % 4 == 0 else ('bad', 'common')
            w.writerow([f'{word} {i} ' * rng.randint(1, 9), label])
    return path


def hugging_face(*names):
    """Classes of transformers and PEFT by name, or a visible skip."""
    try:
        import peft
        import transformers
    except ImportError:
        skip('transformers or peft is not installed')
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    found = [getattr(peft, name, None) or getattr(transformers, name) for name in names]
    return found if len(found) > 1 else found[0]


def their_probs(theirs, enc, texts, end=256):
    """Probabilities (N, K) of a transformers or PEFT classifier, a text at a time; the empty text
    is one <|endoftext|>."""
    rows = [torch.tensor([enc.encode_ordinary(text) or [end]]) for text in texts]
    with torch.no_grad():
        return torch.cat([theirs(ids).logits for ids in rows]).softmax(1).numpy()


def probs_of(run, texts):
    return softmax(run.logits(texts))


def assert_same(run, theirs, what):
    """An opened run and a model of transformers or PEFT: the same probabilities and the same label
    names."""
    gap = np.abs(probs_of(run, THEIR_TEXTS) - their_probs(theirs, run.enc, THEIR_TEXTS)).max()
    assert gap < 1e-5, (what, gap)
    names = theirs.config.id2label
    assert names == dict(enumerate(run.labels)), (what, names, run.labels)


THEIR_TEXTS = ['the song was warm', 'not at all dull, but the garden felt messy', 'x', '']


@functools.lru_cache(None)
def three_classes():
    return write('three.csv', table(90, ('news', 'spam', 'ham')))


@functools.lru_cache(None)
def their_folders():
    """(folder of a classifier with three classes, folder of a language model) as transformers saves
    them; random weights."""
    folder = tmp()
    hf_models(folder, SMALL)
    for name in ('cls', 'lm'):  # one that answers more than one third for everything
        path = os.path.join(folder, name, 'model.safetensors')
        louder = ('wte.weight', 'score.weight')
        tensors = load_safetensors(path).items()
        save_safetensors(path, {n: t * 5 if n.endswith(louder) else t.clone() for n, t in tensors})
    return os.path.join(folder, 'cls'), os.path.join(folder, 'lm')


def their_adapter(kind='LoraConfig', half=False, names=None, base=None, **options):
    """A folder with an adapter that PEFT wrote on top of a transformers model; what would start at
    zero is random."""
    Classifier, get_peft_model, Config = hugging_face(
        'AutoModelForSequenceClassification', 'get_peft_model', kind
    )
    torch.manual_seed(0)
    classes = dict(id2label=dict(enumerate(names))) if names else dict(num_labels=3)
    model = Classifier.from_pretrained(base or their_folders()[1], pad_token_id=256, **classes)
    model = get_peft_model(model, Config(**{'task_type': 'SEQ_CLS', **options}))
    for p in model.parameters():
        if p.requires_grad:
            p.data.normal_(0, 0.3)
    folder = tmp()
    (model.half() if half else model).save_pretrained(folder)
    return folder


TOPICS = dict(
    animals='cat dog horse bird fish goose',
    colours='red green blue brown white pink',
    numbers='one two three four five six',
)


SHAPE = [*SCRATCH, '--block_size', '96', '--dtype', 'fp32']
GEN = dict(
    lora=['--lora', '--r', '4'],
    full=['--full'],
    prefix=['--prefix'],
    zero_shot=['--zero_shot'],
    direct=['--zero_shot', '--direct'],
    posterior=['--lora', '--r', '4', '--posterior_steps', '6'],
)


@functools.lru_cache(None)
def topics(labels=('animals', 'numbers'), sizes=(160, 80, 80)):
    """A csv whose classes use different words, 1 to 9 of them per text."""
    rng, rows = random.Random(0), ['text,label']
    for label, size in zip(labels, sizes):
        words, texts = TOPICS[label].split(), set()
        while len(texts) < size:
            texts.add(' '.join(rng.choice(words) for _ in range(rng.randint(2, 9) if texts else 1)))
        rows += [f'{text},{label}' for text in sorted(texts)]
    return write('topics.csv', '\n'.join(rows) + '\n')


def generate(*argv, out=None):
    """train_gen.py on those flags -> (run folder, what it printed)."""
    out = out or os.path.join(tmp(), 'run')
    code, text, _ = script(train_gen.main, [*argv, '--out', out])
    assert not code, code
    return out, text


@functools.lru_cache(None)
def pretrained():
    """A small language model that has read the topics: a run of --pretrain on a file of lines."""
    lines = [text for text, _ in read_table(topics(tuple(TOPICS)))[0]]
    path = write('lines.txt', '\n'.join(lines) + '\n')
    steps = ['--max_steps', '150', '--lr', '1e-2']
    return generate('--pretrain', '--data', path, *SHAPE, *steps)[0]


@functools.lru_cache(None)
def gen_run(method):
    """One trained run per method on top of that model, shared by the tests that only read it."""
    steps = ['--max_steps', 120 if method == 'prefix' else 40, '--lr', '1e-2']
    return generate(*over_base(*GEN[method], *([] if 'zero' in GEN[method][0] else steps)))[0]


def opened(method):
    return open_run(gen_run(method), 'cpu', 'fp32')


def tree(folder):
    """{path in the folder: sha256} of all files."""
    paths = [os.path.join(at, name) for at, _, names in os.walk(folder) for name in names]
    return {os.path.relpath(path, folder): hash_file(path) for path in paths}


class Unpacked:
    """Packed (lib/matrices.py) by plain products in float64: with it formulas are tested on any
    CPU."""

    dtype, slope, joins = torch.float64, False, True

    def __init__(self, W, bias=None, backward=True):
        self.W = W.detach().to(self.dtype)
        self.bias = None if bias is None else bias.detach().to(self.dtype)

    def product(self, x, gelu=False):
        y = F.linear(x, self.W.t(), self.bias)
        return F.gelu(y, approximate='tanh') if gelu else y

    def gradient(self, g):
        return g @ self.W.t()

    @staticmethod
    def gelu(x):
        return F.gelu(x, approximate='tanh')


class Unpacked32(Unpacked):
    """Packed32 in this way: with the slope of GELU."""

    slope = True
    gelu_slope = staticmethod(matrices.gelu_slope)


def class_model(kind, cfg=SMALL, classes=3):
    """A formula model with the given axis: plain, K LoRA updates or K prompts."""
    torch.manual_seed(3)  # classes that differ by half a nat and more
    model = formula_model(cfg, 0).requires_grad_(False)
    if kind in ('lora', 'top'):
        top = 1 if kind == 'top' else None
        lora.add_lora(model, 4, 8.0, 0.1, ALL, classes=classes, top=top)
    if kind == 'prompt':
        lora.add_prompt(model, 2, classes=classes)
        model.prompt.data.mul_(3)  # so that the classes differ by more than a rounding
    return stirred(model)


def one_by_one(model, ids, whole, context=(), first=0):
    """log P(ids) as its definition says, in float64: one prefix at a time, a log-softmax over the
    vocabulary for the next token."""
    model, total = copy.deepcopy(model).double(), 0.0
    seen, rest = [model.end, *context, *ids[:first]], [*ids[first:]] + [model.end] * whole
    with torch.no_grad():
        for t in rest:
            total += float(lm_logits(model, torch.tensor([seen]))[0, -1].log_softmax(0)[t])
            seen.append(t)
    return total


QUICKLY = '--max_steps 8 --batch_size 4 --lr 1e-2 --eval_every 2 --trunk_dropout 0.1 --r 4'.split()


def over_base(*argv):
    """Flags of a short run on the topics, on top of the small pretrained model."""
    return ['--data', topics(), '--model', pretrained(), '--dtype', 'fp32', *argv]


@functools.lru_cache(None)
def joint():
    """Two classes trained in one run, to compare others with; copy it before changing it."""
    return generate(*over_base(*QUICKLY))[0]


def copied(folder):
    out = os.path.join(tmp(), 'copy')
    shutil.copytree(folder, out)
    return out


def weights(out):
    """sha256 of every file of weights of a run."""
    return {name: digest for name, digest in tree(out).items() if name.endswith('.safetensors')}


@contextlib.contextmanager
def interrupted_at(call):
    """Ctrl-C in the call-th forward pass of training."""
    calls, real = [], GPT.logprob

    def logprob(self, *a, **k):
        if torch.is_grad_enabled():
            calls.append(1)
            if len(calls) == call:
                os.kill(os.getpid(), signal.SIGINT)
        return real(self, *a, **k)

    with patched(GPT, 'logprob', logprob):
        yield


def same_run(out, whole):
    """Two runs have the same weights, predictions and steps, and no other files."""
    assert weights(out) == weights(whole)
    assert sorted(tree(out)) == sorted(tree(whole)), sorted(tree(out))
    for name in ('eval_results.json', 'val_preds.json'):
        if os.path.exists(os.path.join(whole, name)):
            assert read_json(os.path.join(out, name)) == read_json(os.path.join(whole, name)), name
    steps, wanted = (
        [(r['step'], r.get('class'), r.get('val_loss')) for r in records(x)] for x in (out, whole)
    )
    assert steps == wanted, (steps, wanted)


class Killed(BaseException):
    """Raised where a kill strikes: nothing after it runs."""


@contextlib.contextmanager
def killed(owner, name, call, after=False):
    """The call-th call of owner.name is the last thing that happens; without `after` it does not
    happen any more."""
    calls, real = [], getattr(owner, name)

    def fn(*a, **k):
        calls.append(1)
        if len(calls) != call:
            return real(*a, **k)
        if after:
            real(*a, **k)
        raise Killed

    with patched(owner, name, fn):
        yield
