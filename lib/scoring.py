"""Evaluation: a model on many texts, in batches of like length. Called by both train scripts,
bench.py, lib/runs.py, lib/windows.py, lib/frozen.py and lib/versions.py."""

import numpy as np
import torch

import data
from lib import ranks
from lib.device import autocast
from lib.files import UserError
from lib.progress import Progress
from lib.report import counted

CACHED = 256 * 768  # float32 numbers of a layer's output that a CPU keeps in its cache


@torch.no_grad()
def in_batches(fn, model, tokens, max_length, keep, device, dtype, progress=False, copies=1):
    """fn(ids (B, T), lengths (B,), index (B,)) -> (B, K) on every text of `tokens` (Tokens)
    -> (N, K) float32 numpy, in their order.

    Longest texts first, so that out of memory shows on the first batch and hardly any padding is
    needed. copies: how often each text is read. The model is in evaluation mode meanwhile. Ranks
    share the texts. progress: show it; (i, n) for pass i of n."""
    batch_tokens = tokens_at_once(model, device, dtype, copies)
    lengths = np.minimum(tokens.lengths, max_length)
    order = np.argsort(-lengths, kind='stable')
    own = order[ranks.rank() :: ranks.world_size()]  # this rank's texts
    was_training = model.training
    model.eval()
    for buffer in model.buffers() if ranks.world_size() > 1 else ():
        torch.distributed.broadcast(buffer, 0)  # a BatchNorm has seen other rows in each rank
    outputs, start = [], 0
    shown = progress and ranks.rank() == 0
    show = Progress(lengths[own], (0, 1) if progress is True else progress) if shown else None
    try:
        while start < len(own):
            longest = int(lengths[own[start]])
            index = own[start : start + max(1, batch_tokens // (copies * longest))]
            ids, n = data.collate(tokens, index, max_length, keep, model.end, device)
            try:
                with autocast(device, dtype):
                    outputs.append(fn(ids, n, index).float())
            except torch.OutOfMemoryError:
                if len(index) == 1:
                    what = f'out of memory with a single text of {counted(longest, "token")}'
                    advice = 'try a smaller --max_length or another --device'
                    raise UserError(f'{what}; {advice}') from None
                batch_tokens //= 2  # the results do not depend on it
                continue
            start += len(index)
            if show:
                show(start)
    finally:
        model.train(was_training)
    found = gathered(torch.cat(outputs).cpu().numpy() if outputs else None, order)
    if not np.isfinite(found).all():
        raise UserError('the model gives numbers that are not finite: lower --lr, or --dtype fp32')
    return found


def tokens_at_once(model, device, dtype, copies):
    """The size of a batch, in tokens, that fits a CPU's cache or fills a GPU."""
    if device.type != 'cpu':
        return 65536
    cached = max(256, CACHED // model.cfg.n_embd) * min(copies, 3)
    return 2 * cached if dtype == torch.bfloat16 else max(cached, 1024)  # docs/speed.md


def gathered(own, order):
    """Each rank's rows (n, K) -> all of them (N, K), in the order of the texts."""
    parts = [own]
    if ranks.world_size() > 1:
        parts = [None] * ranks.world_size()
        torch.distributed.all_gather_object(parts, own)
    out = np.empty((len(order), parts[0].shape[1]), np.float32)
    for i, rows in enumerate(parts):
        if rows is not None:
            out[order[i :: len(parts)]] = rows
    return out


def class_logits(model, tokens, *where, net=None, states=None, **options):
    """Logits (N, K) float32 numpy of every text of `tokens`, in their order. where: max_length,
    keep, device, dtype.  net, states: of lib/frozen.py, for a model whose blocks are cached."""
    # an average of its weights, say, or a second validation set
    if net is None or net.model is not model or states.tokens is not tokens:
        net, states = model, None

    def fn(ids, n, index):
        return net(ids, n, states.read(index, ids.shape[1])) if states else net(ids, n)

    return in_batches(fn, model, tokens, *where, **options)


def text_logprobs(model, tokens, max_length, keep, device, dtype, context=(), **options):
    """log P(text) (N, 1), or (N, K) of a model with K classes, float32 numpy, nats, of every
    text of `tokens`, in their order. context: see GPT.token_logprobs."""
    k = model.classes or 1

    def fn(ids, n, index):
        ends = data.to_device(ends_here(model.end, tokens, index, max_length), device)
        return model.logprob(ids, n, ends, context).view(len(ids), k)

    return in_batches(fn, model, tokens, max_length, keep, device, dtype, copies=k, **options)


def answer_logprobs(model, tokens, max_length, keep, device, dtype, answer, **options):
    """log P(answer | text) (N, 1) float32 numpy, nats: the ids `answer` follow every text of
    `tokens` and only they are scored."""
    scored = torch.tensor(answer, device=device)  # (A,)

    def fn(ids, n, index):
        rows = torch.cat((ids, ids.new_zeros(len(ids), len(answer))), 1)
        place = n[:, None] + torch.arange(len(answer), device=device)  # (B, A)
        rows.scatter_(1, place, scored.expand(len(ids), -1))
        ends = torch.zeros_like(n, dtype=torch.bool)
        return model.logprob(rows, n + len(answer), ends, first=n)[:, None]

    return in_batches(fn, model, tokens, max_length, keep, device, dtype, **options)


def ends_here(end, tokens, index, max_length):
    """Which of the rows index (B,) are scored with the <|endoftext|> (id `end`) after them -> (B,)
    bool: those that were not cut. The empty text is one <|endoftext|> already: its probability is
    that of ending at once."""
    index = np.asarray(index)
    whole = tokens.lengths[index] <= max_length
    return torch.from_numpy(whole & (tokens.flat[tokens.starts[index]] != end))


def scored_lengths(end, tokens, max_length):
    """Number of scored tokens of each text, with its <|endoftext|> -> (N,) int64 numpy."""
    ends = ends_here(end, tokens, np.arange(len(tokens)), max_length)
    return np.minimum(tokens.lengths, max_length) + ends.numpy()
