"""A number per token: what it does for the decision. Called by `predict.py --explain`."""

import html

import numpy as np

from lib.tokens import Tokens, tokenize


def explain(run, text, calibrated=False, best=None):
    """-> [(token, number)]: what each token contributes to the class `best` (default the predicted
    one) against its runner-up. Tokens beyond --max_length have no influence and get no number.

    Generative runs: log P(token | tokens before, class) - log P(token | tokens before, runner-up)
    in nats, after a first entry for the prior; the numbers sum exactly to the margin. With
    `calibrated`, of the calibrated rule: tokens divided by tau, prior and bias in the first entry.
    Discriminative runs: how much the lead (a difference of logits) shrinks without that token (Li
    et al. 2016, arXiv 1612.08220): one forward pass per token, exact for every method; negative =
    the token speaks against the prediction."""
    if run.kind == 'gen':
        ids, terms = run.token_logprobs(text)  # (n,), (n, K) nats
        prior = run.log_prior  # (K,)
        if calibrated:
            terms, prior = terms / run.tau, prior + run.bias
        best, second = first_two(terms.sum(0) + prior, best)
        numbers = (terms[:, best] - terms[:, second]).tolist()
        return [('P(class)', float(prior[best] - prior[second])), *readable(run.enc, ids, numbers)]
    limit = run.args['max_length']
    ids = tokenize(run.enc, [text], cache=False)[0]
    ids = ids[:limit] if run.args['keep'] == 'first' else ids[-limit:]
    empty = np.array([run.model.end], ids.dtype)
    without = [np.delete(ids, i) if len(ids) > 1 else empty for i in range(len(ids))]
    rows = [ids, *without]
    tokens = Tokens(np.concatenate(rows), np.cumsum([0] + [len(row) for row in rows]))
    logits = run.logits_of(tokens)  # (1 + T, K)
    best, second = first_two(logits[0], best)
    lead = logits[:, best] - logits[:, second]  # (1 + T,) over the runner-up of the full text
    return readable(run.enc, ids, (lead[0] - lead[1:]).tolist())


def first_two(scores, best=None):
    """Scores (K,) -> the class `best` (default the largest) and the best of the others."""
    best = int(scores.argmax()) if best is None else int(best)
    return best, int(np.where(np.arange(len(scores)) == best, -np.inf, scores).argmax())


def readable(enc, ids, numbers):
    """[(text, number)] of token ids and their numbers. Joins tokens that make a character only
    together, and adds up their numbers."""
    out, raw, total = [], b'', 0.0
    for i, (t, number) in enumerate(zip(ids, numbers)):
        raw, total = raw + enc.decode_single_token_bytes(int(t)), total + number
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            if i + 1 < len(ids) and len(raw) < 16:  # longer: these bytes are no text at all
                continue
            text = raw.decode('utf-8', 'replace')
        out.append((text, total))
        raw, total = b'', 0.0
    return out


def painted(pieces):
    """Tokens for a terminal: green supports the prediction, red contradicts it, a stronger colour
    is a larger number."""
    top = max(abs(v) for _, v in pieces) or 1.0
    out = []
    for token, v in pieces:
        level = int(3 * abs(v) / top + 0.5)  # 0..3: the dark half of the 6 x 6 x 6 colour cube
        colour = 16 + 6 * level if v > 0 else 16 + 36 * level
        out.append(f'\033[48;5;{colour}m\033[97m{token}\033[0m' if level else token)
    return ''.join(out)


def paragraph(label, probability, pieces):
    """The same as a paragraph of HTML; hover over a token to see its number."""
    top = max(abs(v) for _, v in pieces) or 1.0
    spans = []
    for token, v in pieces:
        colour = f'rgba({"0,140,60" if v > 0 else "210,30,30"},{0.75 * abs(v) / top:.2f})'
        style = f'title="{v:+.3f}" style="background:{colour}"'
        spans.append(f'<span {style}>{html.escape(token)}</span>')
    return f'<p><b>{html.escape(label)}</b> {probability:.4f}<br>{"".join(spans)}</p>\n'


PAGE = """<!doctype html>
<meta charset="utf-8"><title>{title}</title>
<style>body {{ font: 16px/1.7 sans-serif; max-width: 50em; margin: 2em auto }}
span {{ white-space: pre-wrap; border-radius: 3px }}</style>
<p>Green supports the predicted class, red its runner-up; hover over a token to see its number.</p>
{body}"""
