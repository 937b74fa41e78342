"""Trained runs, opened to classify texts. Called by predict.py, eval.py, bench.py, both train
scripts, lib/export.py and lib/repeat.py.

Shapes in the comments: N texts, K classes, V vocabulary."""

import math
import sys
from collections import namedtuple

import numpy as np
import torch

import data
import lora
from lib import cli, fast, int8, scoring, shipped, windows
from lib.base import STAYS, base_of, data_dir_of
from lib.classes import class_folder
from lib.device import autocast, pick_device, place
from lib.files import UserError
from lib.matrices import packing
from lib.metrics import softmax
from lib.peft import apart, load_peft
from lib.report import counted
from lib.runfolder import info_of, load_cls, precision
from lib.tokens import cut_note, listed, tokenize, tokenizer, tokenizer_name
from lib.versions import edited
from model import GPT

NEUTRAL = ['N/A', '', '[MASK]']  # content-free texts, as in the paper on contextual calibration
How = namedtuple('How', 'device dtype reason data_dir plain base', defaults=[None])  # to open a run


def open_run(path, device='auto', dtype='auto', data_dir=None, plain=False, base=None):
    """Open a finished run, or a classifier that transformers or PEFT wrote. -> Run or GenRun

    data_dir: where to look for base model and tokenizer (default: where the run found them,
    $NANOCLS_DATA, the cache, the network).  plain: without lib/fast.py.  base: the folder of the
    base model, if it is no longer where the run found it.  Raises UserError if the folder holds
    neither, or its base model is gone or is another one."""
    info = info_of(path, base)
    if edited(info):
        other = 'other code (model.py, lora.py, or what reads texts)'
        print(f'note: {path} was trained with {other} and now runs with this', file=sys.stderr)
    if base and info['method'] not in STAYS:
        raise UserError(f'{path} holds all of its weights: --base does nothing')
    how = How(*pick_device(device, dtype), data_dir, plain, base)
    if how.dtype == torch.int8:
        int8.check(plain)
    if info['kind'] == 'gen':
        run = open_gen(path, info, how)
    else:
        run = Run(path, info, load_cls(path, info, data_dir, base), how)
    return int8.quantize(run) if how.dtype == torch.int8 else run


def open_to_score(path, info, args):
    """The same for eval.py (args: its flags): a run whose final test was in float32 is opened in
    float32, and --base is for those of several runs that have a base model."""
    exact = args.dtype == 'auto' and precision(path, info) == 'float32'
    base = args.base if info['method'] in STAYS or len(args.run) == 1 else None
    dtype = 'fp32' if exact else args.dtype
    return open_run(path, args.device, dtype, args.data_dir, args.plain, base)


def open_gen(path, info, how):
    method, labels, answers = info['method'], info['labels'], None
    folders = [class_folder(path, info, label) for label in labels if method != 'zero_shot']
    base = base_of(path, info, how.data_dir, how.base) if method != 'full' else None
    if method == 'full':
        passes = [(GPT.from_pretrained(folder), ()) for folder in folders]
    elif method == 'lora' and apart(folders):  # by an edit
        passes = [(GPT.from_pretrained(base, new_head=True), ()) for _ in folders]
        for folder, (model, _) in zip(folders, passes):
            load_peft(folder, model)
    elif method == 'zero_shot':
        model = GPT.from_pretrained(base)
        enc = encoding(model, info, how.data_dir)
        prompts = {label: enc.encode_ordinary(info['prompts'][label]) for label in labels}
        answers = prompts if info['args']['direct'] else None
        passes = [(model, () if answers else prompts[label]) for label in labels]
    else:
        model = GPT.from_pretrained(base)
        load_peft(folders, model, len(labels), info['args'].get('r'))
        passes = [(model, ())]
    return GenRun(path, info, passes, answers, how)


def encoding(model, info, data_dir):
    return tokenizer(tokenizer_name(model.cfg.vocab_size), data_dir_of(info, 'gpt2_bpe', data_dir))


def prepare(model, how):
    """Make a loaded model ready to classify: merge its LoRA, freeze it, move it, make it fast. For
    int8 leave it plain: open_run does the rest, when the run has been read in float32."""
    if how.dtype == torch.int8:
        return place(model.requires_grad_(False), how.device, torch.float32).eval()
    folds = not how.plain and packing(how.device, how.dtype)  # speed_up merges as it packs
    if not (model.classes or folds or shipped.edited(model.h)):
        lora.merge(model)
    place(model.requires_grad_(False), how.device, how.dtype)
    if not how.plain:
        fast.speed_up(model, how.device, how.dtype)
    return model.eval()


class Run:
    """A trained classifier, ready for texts: .info (run.json), .kind, .labels, .args (its flags),
    .model, .enc, .device, .dtype, .reason.

    .windows: True reads long texts whole, in overlapping windows, instead of max_length tokens."""

    kind = 'cls'
    answers = rule = None
    windows = False

    def __init__(self, path, info, model, how, front=0):
        """front: positions that are neither a text's nor the model's own prompt."""
        self.path, self.info, self.labels, self.args = path, info, info['labels'], info['args']
        taken = front + (0 if model.prompt is None else model.prompt.shape[-2])
        length, room = self.args['max_length'], model.cfg.block_size - taken
        if self.kind == 'gen' and length > room:
            problem = f'max_length {length} does not fit, the model has room for'
            raise UserError(f'{path}/run.json: {problem} {counted(room, "token")} of a text')
        length = min(length or room, room)  # None in a folder from elsewhere
        self.args['max_length'] = model.pad_to = length
        model.pooling = self.args.get('pool', 'last')
        self.device, self.dtype, self.reason = how.device, how.dtype, how.reason
        self.model = prepare(model, how)
        self.enc = encoding(model, info, how.data_dir)

    @property
    def settings(self):
        """Arguments of the functions of lib/scoring.py after the tokens."""
        return self.args['max_length'], self.args['keep'], self.device, self.dtype

    @property
    def scorer(self):
        """The module whose functions read the texts."""
        return windows if self.windows else scoring

    def logits(self, texts, progress=False, cache=False):
        """texts: list of str -> logits (N, K) float32 numpy, in order; of a discriminative run the
        largest is the predicted class, of a generative one see probs(). cache: keep their token ids
        on disk. Raises TypeError for what is no list of str."""
        return self.logits_of(tokenize(self.enc, listed(texts), cache=cache), progress)

    def notes(self, texts):
        """What to say of the texts before they are scored: that many of their tokens are cut."""
        lengths = tokenize(self.enc, texts).lengths
        return [] if self.windows else cut_note(lengths, self.args['max_length'])

    def logits_of(self, tokens, progress=False):
        """The same for Tokens."""
        if not len(tokens):
            return np.empty((0, len(self.labels)), np.float32)
        return self.scorer.class_logits(self.model, tokens, *self.settings, progress=progress)

    def predict(self, texts):
        """texts: list of str -> [(label, its probability)], in order."""
        probs = self.probs(self.logits(texts))
        return [(self.labels[k], float(p[k])) for p, k in zip(probs, probs.argmax(1))]

    def probs(self, logits):
        """Logits (N, K) -> probabilities (N, K) float64; the largest decides."""
        return softmax(logits)


class GenRun(Run):
    """A generative classifier: logits = log P(text | class) + log P(class), in nats.

    .rule: what label, probabilities and explanations follow: 'calibrated' (.tau, .bias), or
    'bayes', the softmax of the logits.

    .passes: pairs (model, context) that read the texts one after another and whose columns together
    are the classes: one model with a class axis (lora, prefix), a model per class (full), one model
    behind each class's prompt (zero_shot).  .answers: {class: ids} scored after the text instead;
    .neutral (K,), their log P after content-free texts, is then subtracted."""

    kind = 'gen'

    def __init__(self, path, info, passes, answers, how):
        others = [context for _, context in passes] + list((answers or {}).values())
        super().__init__(path, info, passes[0][0], how, front=1 + max(map(len, others)))
        for model, _ in passes[1:]:
            if model is not self.model:
                prepare(model, how)
        self.passes, self.answers = passes, answers
        self.log_prior = np.log([info['prior'][label] for label in self.labels], dtype=np.float32)
        self.decide_by(info)
        if answers:  # contextual calibration (Zhao et al. 2021, arXiv 2102.09690)
            self.neutral = np.zeros(len(self.labels), np.float32)
            neutral = self.logprobs_of(tokenize(self.enc, NEUTRAL, cache=False))
            p = neutral - np.logaddexp.reduce(neutral, axis=1, keepdims=True)  # (texts, K)
            self.neutral = np.logaddexp.reduce(p, axis=0) - np.float32(np.log(len(p)))

    def decide_by(self, info):
        """Take rule, tau and biases from the contents of run.json; without them, Bayes' rule."""
        c = info.get('calibration') or dict(tau=1.0, bias=dict.fromkeys(self.labels, 0.0))
        self.tau, self.rule = c['tau'], info.get('rule', 'bayes')
        self.bias = np.array([c['bias'][label] for label in self.labels], np.float32)

    def logprobs_of(self, tokens, progress=False):
        """Tokens -> log P(text | class) (N, K) float32 numpy, nats; with .answers,
        log P(answer of the class | text) - .neutral."""
        if not len(tokens):
            return np.empty((0, len(self.labels)), np.float32)
        if self.answers and self.windows:
            raise UserError('--windows: a --direct run scores classes after a text, in one window')
        score, passes, neutral = self.scorer.text_logprobs, self.passes, 0.0
        if self.answers:
            passes = [(self.model, self.answers[label]) for label in self.labels]
            score, neutral = scoring.answer_logprobs, self.neutral
        columns = []  # (N, 1) or (N, K) of each pass
        for i, (model, ids) in enumerate(passes):
            part = progress and (i, len(passes))
            columns.append(score(model, tokens, *self.settings, ids, progress=part))
        return np.concatenate(columns, axis=1) - neutral

    def logits_of(self, tokens, progress=False):
        """Tokens -> log P(text | class) + log P(class), (N, K): Bayes' rule up to a constant."""
        return self.logprobs_of(tokens, progress) + self.log_prior

    def probs(self, logits):
        return softmax(self.ruled(logits))

    def ruled(self, logits):
        """Logits (N, K) by the rule of the run: the largest decides."""
        return self.calibrated(logits) if self.rule == 'calibrated' else logits

    def calibrated(self, logits):
        """Logits (N, K) -> log P(text | class) / tau + log P(class) + b_class, the logits of
        probabilities that are calibrated on the validation rows."""
        return (logits - self.log_prior) / self.tau + self.log_prior + self.bias

    def nats_per_token(self, tokens, logits):
        """Log-likelihood of each text under the mixture of all classes, divided by its tokens (N,):
        how similar it is to the training texts."""
        limit = tokens.lengths.max() if self.windows else self.args['max_length']
        lengths = scoring.scored_lengths(self.model.end, tokens, limit)
        return np.logaddexp.reduce(logits, axis=1) / lengths

    def likelihood_quantile(self, q):
        """The nats_per_token below which a fraction q of the validation texts lies."""
        quantiles = self.info.get('likelihood_quantiles')
        if not quantiles:
            how = cli.command('train_gen.py', '--resume', '--out', self.path)
            advice = f'finish its training: {how}'
            raise UserError(f'{self.path} holds no likelihoods to compare with; {advice}')
        return float(np.interp(q, np.linspace(0, 1, 101), quantiles))

    @torch.no_grad()
    def token_logprobs(self, text):
        """text -> its tokens (ids; <|endoftext|> last where that is scored), and log p of each
        under each class (n, K) float32 nats"""
        tokens, length = tokenize(self.enc, [text], cache=False), self.args['max_length']
        ids, n = data.collate(tokens, [0], length, self.args['keep'], self.model.end, self.device)
        ends = scoring.ends_here(self.model.end, tokens, [0], length).to(self.device)
        columns = []
        for model, context in self.passes:
            with autocast(self.device, self.dtype):
                logprobs = model.token_logprobs(ids, n, ends, context)  # (1, n + 1), (K, 1, n + 1)
            columns.append(logprobs.view(model.classes or 1, -1))
        out = torch.cat(columns).t()[: int(n + ends)].cpu().numpy()
        return [*ids[0].tolist(), self.model.end][: len(out)], out

    @torch.no_grad()
    def sample(self, label, max_length, temperature=1.0, top_k=0, seed=0):
        """Generate a text of a class, token by token, until <|endoftext|> or max_length tokens.
        temperature divides the logits; top_k: choose among so many tokens, 0 = all."""
        c, generator = self.labels.index(label), torch.Generator().manual_seed(seed)
        model, context = self.passes[0 if self.model.classes else c]
        ids = [model.end, *context]
        start = len(ids)
        while len(ids) - start < min(max_length, model.cfg.block_size - start):
            with autocast(self.device, self.dtype):
                h = model.hidden(torch.tensor([ids], device=self.device))  # (1 or K, T, C)
            logits = model.next_logits(h[c if model.classes else 0, -1:])[0].cpu()  # (V,)
            logits = (logits.double() - logits.max()) / temperature
            if top_k:
                least = logits.topk(min(top_k, len(logits))).values[-1]
                logits[logits < least] = -math.inf
            ids.append(int(torch.multinomial(logits.softmax(0), 1, generator=generator)))
            if ids[-1] == model.end:
                return self.enc.decode(ids[start:-1], errors='replace')
        return self.enc.decode(ids[start:], errors='replace')
