"""The same classifier run by ONNX Runtime and by OpenVINO, and the same language models by
CTranslate2, for bench.py. What these packages read is made from bench.py's base model and kept in
the cache. Each is imported only where it runs. Called by bench.py.

Their texts come in batches like ours: of like length, as many as fit 512 tokens. args: bench.py's
flags. side: package and precision, as 'onnxruntime int8'."""

import math
import os
import shutil
import sys
import tempfile

import numpy as np
import torch

import data
from lib import cli, files, tokens
from lib.files import UserError
from lib.measure import CLASSES, timed
from lib.peers import END
from lib.workload import agnews_texts, checked, texts_of, tokens_of
from model import GPT

BATCH = 512  # tokens of a batch with its pads, as in lib/scoring.py on a CPU
# largest difference from the plain model's numbers, as a fraction of their largest
CLOSE = dict(fp32=1e-3, bf16=0.1, int8=0.3)
LABELS = 2
MAKE = """import sys
sys.path.insert(0, sys.argv[1])
from lib import onnxpeers
onnxpeers.make(*sys.argv[2:])"""


def theirs(args, folder, side):
    """The task of bench.py with the base model in `folder` -> as lib/peers.py's functions."""
    engine, dtype = side.split()
    if args.task == 'gen':
        return theirs_gen(args, ctranslate2(made('ctranslate2', folder), dtype))
    opened = dict(onnxruntime=onnxruntime, openvino=openvino)[engine]
    made_by = 'int8' if dtype == 'int8' else 'onnx'
    model = lambda: opened(made(made_by, folder), dtype)  # noqa: E731
    return theirs_predict(args, model) if args.task == 'predict' else theirs_eval(args, model())


def theirs_eval(args, model):
    rows, batches = tokens_of(texts_of(args)[0], args.length), []
    run = lambda: logits_of(model, rows, batches)  # noqa: E731
    run()  # warm-up: memory and kernels of all widths
    return [timed(run, batches, args.device)], rows.lengths


def theirs_predict(args, opened):
    """The model is opened and reads the file; token ids come from tiktoken, as ours do."""
    batches = []

    def run():
        model = opened()
        with open(os.path.join(args.shared, 'texts.txt'), encoding='utf-8') as f:
            rows = tokens_of(f.read().splitlines())
        probs = torch.from_numpy(logits_of(model, rows, batches)).softmax(-1)
        files.write_json(os.path.join(args.shared, 'answers'), probs.tolist())

    opened()  # the check of its numbers, and the files of the disk
    return [timed(run, batches, args.device)], tokens_of(texts_of(args)[0]).lengths


def theirs_gen(args, models):
    """A language model per class reads every text, as the other peers do."""
    rows, batches = tokens_of(agnews_texts(args)), []

    def run(rows):
        for part, ids, n in in_batches(rows, 1):
            batches.append((len(n), int(n.sum()), ids.size))
            for model in models:
                logprobs(model, [rows[i] for i in part])

    run(tokens.Tokens(rows.flat[: rows.starts[8]], rows.starts[:9]))  # warm-up
    return [timed(lambda: run(rows), batches, args.device)], rows.lengths


def in_batches(rows, extra=0):
    """Yield (index of the texts, ids (B, T) padded with END, lengths (B,)), longest texts first.
    extra: tokens that are added to each text."""
    order, start = np.argsort(-rows.lengths, kind='stable'), 0
    while start < len(order):
        width = int(rows.lengths[order[start]])
        part = order[start : start + max(1, BATCH // (width + extra))]
        ids, n = data.collate(rows, part, width, 'first', END)
        yield part, ids.numpy(), n.numpy()
        start += len(part)


def logits_of(model, rows, batches):
    """model(ids, lengths) on every text -> logits (N, K), in their order."""
    out = np.empty((len(rows), LABELS), np.float32)
    for part, ids, n in in_batches(rows):
        batches.append((len(n), int(n.sum()), ids.size))
        out[part] = model(ids, n)
    return out


def compare(found, wanted, dtype, name):
    """Raise UserError where a peer's numbers are not those of the plain model."""
    off = float(np.abs(found - wanted).max() / np.abs(wanted).max())
    if not off <= CLOSE[dtype]:
        raise UserError(f'{name} computes something else: {off:.2g} of the plain model apart')


# --- what the packages open ---


def onnxruntime(folder, dtype):
    """-> model(ids, lengths), numpy in and out"""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    path, cpu = os.path.join(folder, 'model.onnx'), ['CPUExecutionProvider']
    session = ort.InferenceSession(path, options, providers=cpu)
    return probed(lambda ids, n: session.run(None, dict(ids=ids, n=n))[0], folder, dtype)


def openvino(folder, dtype):
    """-> model(ids, lengths), numpy in and out"""
    import openvino as ov

    precision = dict(fp32='f32', bf16='bf16')[dtype]
    settings = dict(INFERENCE_NUM_THREADS=torch.get_num_threads(), PERFORMANCE_HINT='LATENCY')
    settings.update(INFERENCE_PRECISION_HINT=precision)
    model = ov.Core().compile_model(os.path.join(folder, 'model.onnx'), 'CPU', settings)
    return probed(lambda ids, n: model(dict(ids=ids, n=n))[0], folder, dtype)


def ctranslate2(folder, dtype):
    """-> [a language model per class]"""
    import ctranslate2 as ct2

    kind = dict(fp32='float32', int8='int8')[dtype]
    how = dict(device='cpu', compute_type=kind, intra_threads=torch.get_num_threads())
    models = [ct2.Generator(folder, inter_threads=1, **how) for _ in range(CLASSES)]
    probe = np.load(os.path.join(folder, 'probe.npz'))
    rows = [row[:n] for row, n in zip(probe['ids'], probe['n'])]
    compare(logprobs(models[0], rows), probe['wanted'], dtype, 'CTranslate2')
    return models


def logprobs(model, rows):
    """Texts as ids -> log P of each with its <|endoftext|>, nats"""
    words = [[name_of(END), *map(name_of, row), name_of(END)] for row in rows]
    found = model.score_batch(words, max_batch_size=0)
    return np.array([sum(one.log_probs) for one in found])


def name_of(token):
    """The word that stands for a token in a converted model."""
    return f't{int(token)}'


def probed(model, folder, dtype):
    """The model, after its logits of a few texts were compared with the plain model's."""
    probe = np.load(os.path.join(folder, 'probe.npz'))
    compare(model(probe['ids'], probe['n']), probe['wanted'], dtype, 'the exported model')
    return model


# --- making it ---


def made(kind, folder):
    """Folder with the base model in `folder` as these packages read it; made once, in a process
    of its own, so that its memory is not counted."""
    name = f'{os.path.basename(folder)}-{kind}-torch{torch.__version__}'
    place = files.cached(f'bench/{name}')
    if not os.path.isdir(place):
        command = [sys.executable, '-c', MAKE, cli.TOP, kind, folder, place]
        checked(command, f'making {kind} of the model')
    return place


def make(kind, folder, place):
    os.makedirs(os.path.dirname(place), exist_ok=True)
    with tempfile.TemporaryDirectory(dir=os.path.dirname(place)) as temporary:
        new = os.path.join(temporary, 'new')
        os.makedirs(new)
        dict(onnx=make_onnx, int8=make_int8, ctranslate2=make_ctranslate2)[kind](folder, new)
        os.replace(new, place)


def probe_of(model):
    """A few texts -> ids (B, T), lengths (B,)"""
    draw = torch.Generator().manual_seed(0)
    n = torch.tensor([21, 15, 2, 7, 1])
    ids = torch.randint(0, model.cfg.vocab_size - 1, (len(n), int(n.max())), generator=draw)
    return torch.where(torch.arange(ids.shape[1]) < n[:, None], ids, END), n


class Exported(torch.nn.Module):
    """GPT.classify in operations that an exporter can trace with any shape."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, n):
        h = self.model.hidden(ids)
        last = (n - 1)[:, None, None].expand(-1, 1, h.shape[2])
        return self.model.score(h.gather(1, last).squeeze(1))


class MLP(torch.nn.Module):
    """model.MLP with GELU spelled as transformers does: ONNX Runtime knows that pattern and
    computes it in one kernel."""

    def __init__(self, mlp):
        super().__init__()
        self.c_fc, self.c_proj = mlp.c_fc, mlp.c_proj

    def forward(self, x):
        x = self.c_fc(x)
        inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))
        return self.c_proj(0.5 * x * (1.0 + torch.tanh(inner)))


@torch.no_grad()
def make_onnx(folder, new):
    """model.onnx, and in probe.npz a few texts with the plain model's logits"""
    torch.manual_seed(0)  # of the head
    model = GPT.from_pretrained(folder, num_labels=LABELS, new_head=True).eval()
    ids, n = probe_of(model)
    np.savez(os.path.join(new, 'probe.npz'), ids=ids, n=n, wanted=model.classify(ids, n))
    for block in model.h:
        block.mlp = MLP(block.mlp)
    axes = dict(ids={0: 'texts', 1: 'tokens'}, n={0: 'texts'}, logits={0: 'texts'})
    names = dict(input_names=['ids', 'n'], output_names=['logits'], dynamic_axes=axes)
    path = os.path.join(new, 'model.onnx')
    torch.onnx.export(Exported(model), (ids, n), path, opset_version=17, dynamo=False, **names)


def make_int8(folder, new):
    from onnxruntime.quantization import QuantType, quantize_dynamic

    exact, name = made('onnx', folder), 'model.onnx'
    paths = (os.path.join(place, name) for place in (exact, new))
    quantize_dynamic(*paths, weight_type=QuantType.QInt8)
    shutil.copy(os.path.join(exact, 'probe.npz'), new)


@torch.no_grad()
def make_ctranslate2(folder, new):
    """The language model, whose words stand for token ids, and in probe.npz a few texts with the
    plain model's log P"""
    from ctranslate2.converters import TransformersConverter

    model = GPT.from_pretrained(folder).eval()
    ids, n = probe_of(model)
    wanted = model.token_logprobs(ids, n, torch.ones(len(n), dtype=torch.bool)).sum(1)
    words = {name_of(i): i for i in range(model.cfg.vocab_size)}

    class Words:
        """Stands in for a tokenizer, of which the converter wants the vocabulary alone."""

        unk_token = bos_token = eos_token = name_of(END)

        def get_vocab(self):
            return words

    class Converter(TransformersConverter):
        def load_tokenizer(self, *args, **kwargs):
            return Words()

    Converter(folder).convert(new, force=True)
    np.savez(os.path.join(new, 'probe.npz'), ids=ids, n=n, wanted=wanted)
