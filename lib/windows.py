"""Long texts read whole, in overlapping windows: functions in the place of those of lib/scoring.py.
Called by lib/runs.py (--windows)."""

import numpy as np
import torch

import data
from lib import scoring
from lib.tokens import Tokens


def spans(length, size):
    """[(start, stop)] of the windows of a text: of at most `size` tokens, each half a window or
    less after the one before; the last ends with the text."""
    last = max(0, length - size)
    starts = [*range(0, last, max(1, size // 2)), last]
    return [(start, min(start + size, length)) for start in starts]


def cut(tokens, size):
    """Tokens -> Tokens of the windows of all texts; the text of each window, (W,); its spans and
    those of the window before it in its text, (W, 2) each, (0, 0) before the first."""
    each = [spans(n, size) for n in tokens.lengths.tolist()]
    owner = np.repeat(np.arange(len(tokens)), [len(windows) for windows in each])  # (W,)
    here = np.array([span for windows in each for span in windows])
    before = np.array([span for windows in each for span in [(0, 0), *windows[:-1]]])
    rows = [tokens[i][a:b] for i, (a, b) in zip(owner, here)]
    return Tokens(np.concatenate(rows), np.cumsum([0, *map(len, rows)])), owner, here, before


def class_logits(model, tokens, max_length, *where, **options):
    """The mean over the windows of a text of log P(class | window), (N, K) float32 numpy; of a text
    with one window its logits. The arguments are those of scoring.class_logits."""
    windows, owner, _, _ = cut(tokens, max_length)
    logits = scoring.class_logits(model, windows, max_length, *where, **options)  # (W, K)
    logprobs = torch.from_numpy(logits).double().log_softmax(1).numpy()
    count = np.bincount(owner)  # (N,)
    alone = count[owner] == 1
    logprobs[alone] = logits[alone]
    return (summed(logprobs, owner) / count[:, None]).astype(np.float32)


def text_logprobs(model, tokens, max_length, keep, device, dtype, context=(), **options):
    """log P(text) of whole texts, (N, 1) or (N, K) float32 numpy, nats. A window fills the model's
    positions, and a later one scores only the tokens that those before it did not reach: each
    token is scored once, after all the text before it or half a window and more. The arguments are
    those of scoring.text_logprobs; max_length and keep are ignored."""
    taken = 1 + len(context) + (0 if model.prompt is None else model.prompt.shape[-2])
    size, k = model.cfg.block_size - taken, model.classes or 1
    windows, owner, here, before = cut(tokens, size)
    end = scoring.ends_here(model.end, tokens, np.arange(len(tokens)), tokens.lengths.max())  # (N,)
    ends = torch.from_numpy(here[:, 1] == tokens.lengths[owner]) & end[owner]  # (W,)
    first = torch.from_numpy(np.maximum(0, before[:, 1] - here[:, 0]))  # (W,)

    def fn(ids, n, index):
        batch_ends, batch_first = (data.to_device(t[index], device) for t in (ends, first))
        return model.logprob(ids, n, batch_ends, context, batch_first).view(len(ids), k)

    where = size, 'first', device, dtype
    parts = scoring.in_batches(fn, model, windows, *where, copies=k, **options)  # (W, K)
    return summed(parts, owner).astype(np.float32)


def summed(rows, owner):
    """Rows (W, K), the text of each (W,), ascending -> sums per text (N, K) float64."""
    return np.add.reduceat(rows, np.searchsorted(owner, np.arange(owner[-1] + 1)), dtype=float)
