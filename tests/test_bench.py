"""bench.py."""

import contextlib
import functools
import importlib.machinery
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import types
import unittest.mock
import warnings
from types import SimpleNamespace

import torch

import bench
import data
import lib.tokens
import lib.training
import predict
import train_cls
from lib import device, measure, onnxpeers, runs, sides, workload
from lib.files import UserError, cache_dir, make_folder, read_json
from lib.measure import CLASSES, flops
from lib.peers import ANSWER
from lib.tokens import tokenizer
from lib.training import Log
from model import GPT, SHAPES, Config
from tests.helpers import (
    TOP,
    environment,
    fresh_cache,
    hugging_face,
    lm_logits,
    patched,
    raises,
    real_data,
    script,
    skip,
    tmp,
    write,
)


@contextlib.contextmanager
def little_world():
    """A cache and data sets of a few rows under the published names, and a little GPT-2 under one
    of its names. -> the data folder"""
    folder = tmp()
    bpe = os.path.join(real_data('gpt2_bpe'), 'gpt2_bpe')
    shutil.copytree(bpe, os.path.join(folder, 'gpt2_bpe'))
    line = dict(sst2='a {1} film {0}\t{2}\n', sms_spam='{3}\tcall {1} {0}\n')
    line.update(ag_news_csv='"{4}","{1} {0}","news"\n')
    for name, file, n in (
        ('sst2', 'train.tsv', 60),
        ('sst2', 'dev.tsv', 8),
        ('sms_spam', 'SMSSpamCollection', 80),
        ('ag_news_csv', 'train.csv', 80),
        ('ag_news_csv', 'test.csv', 40),
    ):
        os.makedirs(os.path.join(folder, name), exist_ok=True)
        k, rows = 4 if name == 'ag_news_csv' else 2, []
        for i in range(n):
            word = ('dull', 'fine', 'red', 'blue')[i % k]  # each tells its class
            row = f'{file} {i}', word, i % 2, ('ham', 'spam')[i % 2], 1 + i % 4
            rows.append(line[name].format(*row))
        write(os.path.join(name, file), ''.join(rows), folder)
    little = unittest.mock.patch.dict(SHAPES, distilgpt2=Config(2, 2, 32))
    with fresh_cache(), environment(NANOCLS_DATA=folder), little:
        yield folder


def in_this_process(command, **kw):
    """subprocess.run of bench.py, without the seconds that an interpreter needs for torch."""
    if command[1] == '-c':
        if command[2] == onnxpeers.MAKE:
            with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter('ignore')  # of the exporter
                onnxpeers.make(*command[4:])
        if command[2] == ANSWER:
            with patched(sys, 'argv', command[2:]):
                text = script(lambda code: exec(code[0], {}), [command[2]])[1]
            assert len(json.loads(text)[0]) == 2, text
        return SimpleNamespace(returncode=0, stdout='', stderr='')
    scripts = {'bench.py': bench, 'train_cls.py': train_cls, 'predict.py': predict}
    main = scripts[os.path.basename(command[1])].main
    assert command[0] == sys.executable and os.path.isabs(command[1])
    code, out, err = script(main, command[2:])
    return SimpleNamespace(returncode=code or 0, stdout=out, stderr=err)


LITTLE = '--model distilgpt2 --device cpu --dtype fp32 --batch_size 2 --repeats 1'.split()


def bench_of(task, *flags):
    """bench.py on a little shape -> (what it printed, the figures it wrote)"""
    path = os.path.join(tmp(), 'figures.json')
    text = script(bench.main, ['--task', task, *LITTLE, *flags, '--json', path])[1]
    found = read_json(path)
    assert (found['task'], found['model']) == (task, 'distilgpt2')
    assert found['dtype'] in ('fp32', ['fp32', 'int8'])
    assert found['matmul_gflops'] == 50.0
    return text, found


@contextlib.contextmanager
def little_bench():
    """Where bench.py can be run without waiting."""
    here = patched(subprocess, 'run', in_this_process)
    once = patched(lib.tokens, 'tokenizer', functools.cache(tokenizer))
    with little_world(), here, once, patched(measure, 'matmul_rate', lambda *a: 50.0):
        yield


def test_bench_ours():
    """Every task without peers: consistent figures, and nothing stays patched."""
    before = Log, data.collate
    with little_bench():
        for task, *flags in (
            ['lora'],
            ['full'],
            ['last'],
            ['head'],
            ['adapter', '--against', 'hf'],
            ['eval', '--rows', '20'],
            ['predict', '--rows', '20'],
            ['gen', '--rows', '6', '--top', '1'],
            ['startup'],
        ):
            flags += ['--steps', '6'] if task in bench.METHODS else []
            text, found = bench_of(task, *flags)
            row = found['rows']['nanocls']
            assert found['ratio'] == {} and ('no peer' in text) == (task == 'adapter'), (task, text)
            if task == 'startup':
                assert row['seconds'] > 0
                assert list(found['rows']) == ['nanocls', 'import torch, numpy']
                assert 'import torch, numpy' in text
                continue
            assert row['blocks'] == (bench.EPOCHS - 1 if task in bench.METHODS else 1), (task, row)
            assert 1 < row['tokens_per_s'] / row['examples_per_s'] < 12, (task, row)
            assert 0 <= row['pad_share'] < 0.5 and row['memory_mib'] > 50, (task, row)
            assert row['share_of_matmul'] == row['gflops'] / 50, (task, row, text)
            assert f'{row["examples_per_s"]:.1f} examples/s' in text, (task, row, text)
        assert len(os.listdir(os.path.join(cache_dir(), 'bench'))) == 1  # one base for all
    assert (Log, data.collate) == before


def test_bench_leaves_the_first_epoch_out():
    """Blocks are epochs without the first one, with as many rows as the steps take; nothing is
    evaluated. --extra reaches train_cls.py."""
    records = []

    def main(argv):
        args = train_cls.parse(argv)[0]
        assert args.gradient_checkpointing == (args.method == 'lora')
        make_folder(args.out)
        log = lib.training.Log(args.out, SimpleNamespace(args=args, max_steps=args.max_steps), [])
        for step in range(args.log_every, args.max_steps + 1, args.log_every):
            records.append((args.max_samples, args.max_steps, args.log_every, step))
            speeds = dict(examples_per_s=float(step), tokens_per_s=10.0 * step, pad_share=0.25)
            log.write(step=step, loss=1.0, lr=0.1, **speeds)
        raise AssertionError('the evaluation')

    with little_bench(), patched(train_cls, 'main', main):
        epochs = bench.EPOCHS
        for task in ('lora', 'head'):
            records.clear()
            extra = ['--extra=--gradient_checkpointing'] * (task == 'lora')
            row = bench_of(task, '--steps', '5', *extra)[1]['rows']['nanocls']
            assert records == [(5, 5 * epochs, 5, 5 * i) for i in range(1, epochs + 1)], records
            assert row['blocks'] == epochs - 1, row
            assert row['examples_per_s'] == 5 * (epochs + 2) / 2 and row['pad_share'] == 0.25, row
    with little_bench(), patched(train_cls, 'main', lambda argv: None):
        argv = ['--task', 'lora', *LITTLE, '--steps', '5']
        raises(UserError, bench.main, argv, match=f'without logging step {5 * epochs}')


def test_bench_takes_turns():
    """Both peers of every task on a small shape: figures of all sides, and the ratios."""
    hugging_face('LoraConfig')  # or a visible skip
    names = ['nanocls', *(f'Hugging Face {peer}' for peer in bench.PEERS)]
    with little_bench():
        for task, *flags in (
            ['lora'],
            ['full'],
            ['last'],
            ['head'],
            ['eval', '--rows', '20'],
            ['predict', '--rows', '20'],
            ['gen', '--rows', '6'],
            ['startup'],
        ):
            flags += ['--steps', '6'] if task in bench.METHODS else []
            text, found = bench_of(task, *flags, '--against', 'hf')
            rows = found['rows']
            assert [name for name in rows if name != 'import torch, numpy'] == names, (task, rows)
            for peer in bench.PEERS:
                mine, row = rows['nanocls'], rows[f'Hugging Face {peer}']
                if peer == 'half' and task != 'gen' and not device.bf16_pays():
                    assert row['missing'] == 'this CPU is not faster in bfloat16', (task, row)
                    continue
                if task == 'startup':
                    ratio = row['seconds'] / mine['seconds']
                else:
                    ratio = mine['tokens_per_s'] / row['tokens_per_s']
                assert found['ratio'][peer] == ratio, (task, text)
                assert f'against {peer}: {ratio:.2f} times as fast' in text, (task, text)
                if task != 'startup':
                    memory = mine['memory_mib'] / row['memory_mib']
                    assert found['memory_ratio'][peer] == memory, (task, row)
                    assert row['gflops'] > 0, (task, row)
                if task in ('eval', 'gen', 'predict'):  # the same texts
                    lengths = [r['tokens_per_s'] / r['examples_per_s'] for r in (row, mine)]
                    assert abs(lengths[0] - lengths[1]) < 2.01, (task, rows)


def test_bench_peers_batches():
    """`default` pads random batches, `best` batches of like length; dropout and precision are as
    promised."""
    Trainer = hugging_face('Trainer')
    seen, init = [], Trainer.__init__

    def watched(self, model, args, **k):
        batches = args.train_sampling_strategy, args.per_device_train_batch_size
        seen.append((*batches, args.bf16, model.config.resid_pdrop))
        init(self, model, args, **k)

    with little_bench(), patched(Trainer, '__init__', watched):
        rows = ''.join(f'{"fine " * (1 + 37 * i % 40)}film {i}\t{i % 2}\n' for i in range(240))
        write(os.path.join('sst2', 'train.tsv'), rows, os.environ['NANOCLS_DATA'])
        flags = '--steps 20 --dtype fp32 --against hf --batch_size 4'.split()
        found = bench_of('head', *flags)[1]['rows']
        random = [('random', 4, False, 0.1)] * (1 + device.bf16_pays())  # default, half
        assert seen == [*random, ('group_by_length', 4, False, 0.0)], seen
        default, best = (found[f'Hugging Face {peer}']['pad_share'] for peer in ('default', 'best'))
        assert default > 0.25 > 2 * best, (default, best)
    args = SimpleNamespace(hf_dtype=None, dtype='bf16')
    assert [bench.precision(args, peer) for peer in bench.PEERS] == ['fp32', 'bf16', 'bf16']
    assert bench.precision(SimpleNamespace(hf_dtype='bf16', dtype='fp32'), 'default') == 'bf16'


def test_bench_length():
    """All texts have the given number of tokens, on both sides; one step is enough."""
    with little_bench():
        rows = ''.join(f'a fine film {i} \t{i % 2}\n' for i in range(300))
        write(os.path.join('sst2', 'train.tsv'), rows, os.environ['NANOCLS_DATA'])
        for task, steps in (('lora', 1), ('last', 3)):
            row = bench_of(task, '--steps', str(steps), '--length', '16')[1]['rows']['nanocls']
            assert row['pad_share'] == 0, row
            assert abs(row['tokens_per_s'] / row['examples_per_s'] - 16) < 1e-6, row
        texts = workload.texts_of_length(50, 20)
        enc = tokenizer('gpt2')
        assert len(set(texts)) == 20 and {len(enc.encode_ordinary(text)) for text in texts} == {50}
        raises(UserError, workload.texts_of_length, 16, 1000, match='lower it')
        for flags, words in (
            (['--task', 'gen', '--length', '16'], '--length does nothing'),
            (['--length', '2000'], 'positions'),
            (['--rows', '5'], '--rows does nothing'),
            (['--top', '2'], '--top does nothing'),
            (['--split', 'validation'], '--split does nothing'),
            (['--hf', 'default'], '--hf does nothing'),
            (['--task', 'eval', '--extra=--plain'], '--extra does nothing'),
        ):
            raises(UserError, bench.main, LITTLE + flags, match=words)
    failed = SimpleNamespace(returncode=2, stdout='', stderr='error:\nno luck')
    with little_world(), patched(subprocess, 'run', lambda *a, **k: failed):
        raises(UserError, bench.main, LITTLE, match='nanocls failed: error: no luck')


def test_bench_flops():
    """The formula agrees with torch's own count of a forward pass, and the tasks with one
    another."""
    from torch.utils.flop_counter import FlopCounterMode

    cfg = Config(3, 4, 32, 64, 300)
    model = GPT(cfg, 2).init_weights()

    def counted(n, run):
        """Without attention, whose kernel is counted whole, though half of it is masked."""
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            run(torch.zeros(1, n, dtype=torch.long), torch.tensor([n]))
        counts = counter.get_flop_counts()['Global'].items()
        return sum(c for op, c in counts if 'attention' not in str(op))

    def score(ids, lengths):
        everywhere = torch.ones_like(ids, dtype=torch.bool)
        return model.next_logprobs(model.hidden(ids), ids, everywhere)

    C, L = cfg.n_embd, cfg.n_layer
    for n in (1, 7, 40):
        pairs = 4 * C * ((L - 1) * n * (n + 1) / 2 + n)  # 2 for the score and 2 for the sum, each C
        head = 2 * C * 2
        # the plain model computes the last block at all positions; one is enough, of all but K, V
        last_block = (24 * C * C - 4 * C * C) * (n - 1)
        plain = counted(n, model.classify) - last_block - head + pairs
        assert flops('head', cfg, [n]) == plain, n
        T = n + 1  # <|endoftext|> in front; the one behind is a target only
        scored = counted(T, score) + 4 * C * L * T * (T + 1) / 2
        gen, top = flops('gen', cfg, [n]), flops('gen', cfg, [n], top=1)
        assert gen == CLASSES * scored, n
        assert flops('gen', cfg, [n], top=3) == gen > top
        shared = (24 * C * C * T + 2 * C * T * (T + 1)) * (L - 1) * (CLASSES - 1)
        assert gen - top == shared, n
        forward = flops('eval', cfg, [n])
        assert forward == flops('head', cfg, [n]) == flops('predict', cfg, [n])
        assert flops('full', cfg, [n]) == 3 * forward
        assert flops('lora', cfg, [n]) == 2 * forward + pairs == flops('adapter', cfg, [n])
        block = 4 * C * C * n + 20 * C * C + 4 * C * n
        assert flops('last', cfg, [n]) == forward + 2 * block, n
    assert flops('lora', cfg, [7, 40]) == flops('lora', cfg, [7]) + flops('lora', cfg, [40])
    assert measure.matmul_rate('cpu', torch.float32, 64) > 0.01


def test_bench_memory():
    """The peak is that of the process, and stays after the memory was freed."""
    code = """
import bench
before = bench.peak_memory("cpu")
x = bench.torch.ones(100 * 2**18)
del x
print(before, bench.peak_memory("cpu"))"""
    how = dict(stdout=subprocess.PIPE, text=True, check=True, cwd=TOP)
    before, after = map(float, subprocess.run([sys.executable, '-c', code], **how).stdout.split())
    assert before < 2000 and 90 < after - before < 150, (before, after)


# --- ONNX Runtime, OpenVINO, CTranslate2 ---


class Session:
    """Stands in for a package that runs an exported model: it runs the module that was saved."""

    made, wrong = [], 0.0

    def __init__(self, path, *settings, **more):
        Session.made.append((path, settings))
        self.model = torch.load(path, weights_only=False)

    def run(self, _, inputs):
        with torch.no_grad():
            logits = self.model(*(torch.as_tensor(inputs[name]) for name in ('ids', 'n')))
        return [logits.numpy() + Session.wrong]

    def __call__(self, inputs):
        return self.run(None, inputs)


class Generator:
    """Stands in for CTranslate2: scores with the plain model in the folder that it was given."""

    def __init__(self, folder, **settings):
        assert settings['intra_threads'] == torch.get_num_threads()
        with open(os.path.join(folder, 'base.txt'), encoding='utf-8') as f:
            self.model = GPT.from_pretrained(f.read())

    def score_batch(self, rows, max_batch_size):
        for words in rows:
            ids = torch.tensor([[int(word[1:]) for word in words]])
            with torch.no_grad():
                logits = lm_logits(self.model, ids[:, :-1]).log_softmax(-1)
            found = logits[0].gather(1, ids[0, 1:, None]).squeeze(1)
            yield SimpleNamespace(log_probs=found.tolist())


def package(name, **content):
    """A module that can be imported inside patch.dict(sys.modules)."""
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__dict__.update(content)
    return module


@contextlib.contextmanager
def importable(modules):
    """Those modules in sys.modules; patch.dict would drop what is imported meanwhile as well."""
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, module in before.items():
            sys.modules.pop(name)
            sys.modules.update({name: module} if module else {})


@contextlib.contextmanager
def stand_ins():
    """Packages in the place of those that may not be installed, and torch's exporter writes the
    module itself. -> what was asked of them"""
    asked, Session.made, Session.wrong = [], [], 0.0

    def export(model, inputs, path, **settings):
        asked.append(settings)
        torch.save(model, path)

    def quantize_dynamic(old, new, weight_type):
        asked.append(weight_type)
        shutil.copy(old, new)

    class Converter:
        def __init__(self, folder):
            self.folder = folder

        def convert(self, new, force):
            vocabulary = self.load_tokenizer(None, self.folder).get_vocab()
            assert vocabulary['t50256'] == 50256 == len(vocabulary) - 1
            write('base.txt', self.folder, new)

    options = dict(SessionOptions=SimpleNamespace, InferenceSession=Session)
    core = SimpleNamespace(compile_model=Session)
    found = dict(
        onnx=package('onnx'),
        onnxruntime=package('onnxruntime', **options),
        openvino=package('openvino', Core=lambda: core),
        ctranslate2=package('ctranslate2', Generator=Generator),
        transformers=package('transformers'),
    )
    more = {
        'onnxruntime.quantization': package(
            'q', QuantType=SimpleNamespace(QInt8='QInt8'), quantize_dynamic=quantize_dynamic
        ),
        'ctranslate2.converters': package('c', TransformersConverter=Converter),
    }
    with importable({**found, **more}), patched(torch.onnx, 'export', export):
        yield asked


def no_package(*names):
    """importlib.util.find_spec that does not find them."""
    real = importlib.util.find_spec
    return patched(importlib.util, 'find_spec', lambda n: None if n in names else real(n))


def bf16(pays):
    return patched(device, 'bf16_pays', lambda: pays)


def test_bench_engines():
    """The export that ONNX Runtime and OpenVINO read, and CTranslate2's models: rows of their own,
    float32 first, batches of like length; made once."""
    with little_bench(), stand_ins() as asked, bf16(True):
        for task in ('eval', 'predict'):
            flags = ['--rows', '20', '--against', 'onnxruntime', 'openvino', '--dtype', 'fp32']
            text, found = bench_of(task, *flags)
            names = 'nanocls', 'onnxruntime fp32', 'openvino fp32', 'openvino bf16'
            assert list(found['rows']) == [*names, 'onnxruntime int8'], found['rows']
            mine = found['rows']['nanocls']
            for name in list(found['rows'])[1:]:
                row = found['rows'][name]
                assert row['precision'] == name.split()[1] and row['gflops'] > 0, row
                assert row['pad_share'] < 0.1, row
                lengths = [r['tokens_per_s'] / r['examples_per_s'] for r in (row, mine)]
                assert abs(lengths[0] - lengths[1]) < 1e-3, (name, lengths)
                assert f'against {name}: {found["ratio"][name]:.2f} times' in text, text
            assert found['cpu'] and isinstance(found['instructions'], list)
            assert text.startswith(f'{found["cpu"]} ('), text
        assert [a if a == 'QInt8' else (a['opset_version'], a['dynamo']) for a in asked] == [
            (17, False),
            'QInt8',
        ], asked
        precisions = {how[1]['INFERENCE_PRECISION_HINT'] for _, how in Session.made if len(how) > 1}
        assert precisions == {'f32', 'bf16'}, Session.made
        options = [how[0] for _, how in Session.made if len(how) == 1]
        assert {o.intra_op_num_threads for o in options} == {torch.get_num_threads()}
        found = bench_of('gen', '--rows', '8', '--against', 'ctranslate2')[1]['rows']
        assert list(found) == ['nanocls', 'ctranslate2 fp32', 'ctranslate2 int8'], found
        assert found['ctranslate2 int8']['tokens_per_s'] > 0, found


def test_bench_engines_installed():
    """The same with the packages themselves, where they are installed."""
    some = [n for n in ('onnxruntime', 'openvino') if importlib.util.find_spec(n)]
    if not some or not importlib.util.find_spec('onnx'):
        skip('neither onnxruntime nor openvino is installed')
    with little_bench():
        text, found = bench_of('eval', '--rows', '20', '--against', *some)
        for name in some:
            assert found['rows'][f'{name} fp32'].get('gflops', 0) > 0, text


def test_bench_says_why():
    """A peer that is not installed, computes something else or fails is a row that says why; a
    side of ours that fails is an error, unless another one of ours is measured."""
    flags = ['--rows', '20', '--against', 'onnxruntime', 'openvino', 'hf', '--hf', 'default']
    gone = no_package('openvino', 'transformers')

    def open_run(*where):
        if where[-1] == 'int8':
            raise UserError('no int8 here')
        return real(*where)

    real = runs.open_run
    refuses = patched(runs, 'open_run', open_run)
    with little_bench(), stand_ins(), bf16(False), gone, refuses:
        Session.wrong = 3.0
        text, found = bench_of('eval', *flags, '--dtype', 'fp32', 'int8')
        rows = {name: row.get('missing', '') for name, row in found['rows'].items()}
        assert rows['nanocls fp32'] == '' and 'int8' in rows['nanocls int8'], rows
        assert 'computes something else' in rows['onnxruntime fp32'], rows
        assert rows['openvino fp32'] == 'openvino is not installed', rows
        assert rows['openvino bf16'] == 'this CPU is not faster in bfloat16', rows
        assert rows['Hugging Face default'] == 'transformers is not installed', rows
        assert text.count('openvino fp32  not measured: openvino is not installed') == 2, text
        assert found['ratio'] == {} and found['dtype'] == ['fp32', 'int8'], found
        argv = [*LITTLE, '--task', 'eval', '--rows', '20', '--dtype', 'int8']
        raises(UserError, bench.main, argv, match='no int8 here')
        argv = [*LITTLE, '--task', 'gen', '--dtype', 'fp32', 'int8']
        raises(UserError, bench.main, argv, match='--dtype int8 is not for --task gen')
        argv = [*LITTLE, '--task', 'gen', '--against', 'openvino']
        raises(UserError, bench.main, argv, match='--against openvino is for --task eval')


def test_bench_without_bf16():
    """On a CPU without bfloat16: no peer and no product in bfloat16, float32 by default."""
    rates = []

    def rate(device, dtype, size=None):
        rates.append(dtype)
        return 50.0

    with little_bench(), patched(measure, 'matmul_rate', rate), bf16(False), stand_ins():
        args = bench.parse(['--task', 'eval', '--against', 'all', '--device', 'cpu'])
        assert args.dtypes == ['fp32'], args
        with importable(dict(peft=package('peft'))):
            every = {side.name: side for side in sides.sides(args)}
        why = 'this CPU is not faster in bfloat16'
        assert {n for n, s in every.items() if s.missing == why} == {
            'Hugging Face half',
            'openvino bf16',
        }, every
        assert {s.precision for s in every.values() if not s.missing} == {'fp32', 'int8'}
        asked = bench.parse(['--dtype', 'bf16', '--hf_dtype', 'bf16', '--against', 'hf'])
        asked.device = 'cpu'
        assert [s.missing for s in sides.sides(asked)][1:] == [why] * 3
        bench_of('eval', '--rows', '20')
        assert set(rates) == {torch.float32}, rates
    with bf16(True):
        args = bench.parse(['--device', 'cpu', '--dtype', 'int8', 'bf16', 'fp32'])
        assert args.dtypes == ['fp32', 'bf16', 'int8']
        assert [sides.rated(args, d) for d in args.dtypes] == ['fp32', 'bf16', 'bf16']


def test_bench_fits_the_time():
    """Texts and steps are reduced to what --minutes hold, then turns; who gives --rows, --steps or
    --repeats gets them."""

    def planned(*flags):
        args = bench.parse(['--device', 'cpu', *flags])
        bench.check(args)
        if args.fits:
            sides.fit(args, sides.sides(args))
        return args

    world = little_world()
    with world, patched(measure, 'matmul_rate', lambda *a: 1e6), bf16(False):
        eval_, lora = ['--task', 'eval'], ['--task', 'lora']
        assert (planned(*eval_).rows, planned(*lora).steps) == (3000, bench.STEPS)
        assert planned(*eval_).seconds == 900 and planned(*eval_, '--quick').seconds == 180
        assert (planned(*eval_).repeats, planned(*eval_, '--quick').repeats) == (2, 1)
    with little_world(), patched(measure, 'matmul_rate', lambda *a: 50.0), bf16(False):
        full, quick, few = (planned(*eval_, *f).rows for f in ([], ['--quick'], ['--minutes', '1']))
        assert 3000 > full > quick > few > 16, (full, quick, few)
        assert bench.STEPS > planned(*lora).steps > planned(*lora, '--minutes', '2').steps >= 4
        assert planned(*eval_, '--rows', '2000').rows == 2000
        assert planned(*eval_, '--repeats', '3').rows == 3000
        assert planned(*eval_, '--repeats', '3', '--minutes', '1').rows < 3000
    with little_bench():
        flags = ['--rows', '20', '--repeats', '3', '--minutes', '0.0001']
        text, found = bench_of('eval', *flags)
        assert 'the time is up after turn 1 of 3' in text and text.count('turn 2,') == 0, text
        assert found['rows']['nanocls']['blocks'] == 1, found
    slow = patched(subprocess, 'run', lambda *a, timeout, **k: expired(timeout))
    with slow:
        raises(UserError, workload.checked, ['x'], 'a peer', 40, match='did not end within 40 s')


def expired(seconds):
    raise subprocess.TimeoutExpired('x', seconds)


def test_bench_names_the_cpu():
    """Its name and its instruction sets, of x86 and of ARM; no such file elsewhere."""
    text = 'processor : 0\nmodel name\t: A CPU\nflags\t\t: fpu avx2 avx512_vnni amx_tile foo\n'
    path = write('cpuinfo', text, tmp())
    assert measure.cpu(path) == ('A CPU', ['avx2', 'avx512_vnni', 'amx_tile'])
    path = write('cpuinfo', 'processor : 0\nFeatures : fp asimd i8mm\n', tmp())
    assert measure.cpu(path)[1] == ['asimd', 'i8mm']
    name, found = measure.cpu(os.path.join(tmp(), 'none'))
    assert name and isinstance(found, list)
