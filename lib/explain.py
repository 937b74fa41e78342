"""A number per word: what it does for the decision. Called by predict.py, lib/page.py and
lib/answers.py."""

import html
import os
import unicodedata

import numpy as np

import data
from lib.files import UserError
from lib.tokens import Tokens, tokenize


def explain(run, text, best=None):
    """-> label of the runner-up, [(word, number)]: what each word contributes to the class `best`
    (default the predicted one) against its runner-up. Tokens beyond --max_length have no influence
    and get no number.

    Generative runs: log P(word | text before, class) - log P(word | text before, runner-up) in
    nats, after a first entry for the prior; the numbers sum exactly to the margin of the rule that
    decides. If that is the calibrated one, words are divided by tau, and prior and bias are in the
    first entry. Raises UserError where an edit made it a rule of which that is not true.
    Discriminative runs: how much the lead (a difference of logits) shrinks without that word (Li et
    al. 2016, arXiv 1612.08220): one forward pass per word, exact for every method; negative = the
    word speaks against the prediction."""
    if run.kind == 'gen':
        ids, terms = run.token_logprobs(text)  # (n,), (n, K) nats
        prior = run.log_prior  # (K,)
        if run.rule == 'calibrated':
            terms, prior = terms / run.tau, prior + run.bias
        scores = terms.sum(0) + prior  # (K,)
        check_sums(run, text, scores)
        best, second = first_two(scores, best)
        numbers = terms[:, best] - terms[:, second]  # (n,)
        first = ('P(class)', float(prior[best] - prior[second]))
        pieces = [(word, float(numbers[a:b].sum())) for word, a, b in words(run.enc, ids)]
        return run.labels[second], [first, *pieces]
    whole, cut = tokenize(run.enc, [text], cache=False), (run.args['max_length'], run.args['keep'])
    ids = data.collate(whole, [0], *cut, run.model.end)[0][0].numpy().astype(np.uint16)
    spans = words(run.enc, ids)
    empty = np.array([run.model.end], ids.dtype)
    without = [np.delete(ids, slice(a, b)) for _, a, b in spans]
    rows = [ids, *(row if len(row) else empty for row in without)]
    tokens = Tokens(np.concatenate(rows), np.cumsum([0] + [len(row) for row in rows]))
    logits = run.logits_of(tokens)  # (1 + W, K)
    best, second = first_two(logits[0], best)
    lead = logits[:, best] - logits[:, second]  # (1 + W,) over the runner-up of the full text
    shrinks = (lead[0] - lead[1:]).tolist()
    return run.labels[second], [(word, v) for (word, *_), v in zip(spans, shrinks)]


def check_sums(run, text, scores):
    """Raise UserError if what decides about a text is not, up to a constant, `scores` (K,)."""
    logits = run.logits([text])
    if np.ptp(run.ruled(logits)[0] - scores) > 1e-3 * np.abs(logits).max() + 0.01:
        advice = 'logprob, logprobs_of or calibrated was edited, token_logprobs was not'
        raise UserError(f'the log-probabilities of the words do not sum to what decides: {advice}')


def first_two(scores, best):
    """Scores (K,) -> the class `best` (None: the largest) and the best of the others."""
    best = int(scores.argmax()) if best is None else int(best)
    return best, int(np.where(np.arange(len(scores)) == best, -np.inf, scores).argmax())


def words(enc, ids):
    """[(word, start, stop)] of token ids: GPT-2's pieces and single bytes joined to words, numbers
    and runs of punctuation, each with the white space before it."""
    out = []
    for piece, start, stop in characters(enc, ids):
        special = stop == len(ids) and ids[-1] == enc.eot_token
        if out and not special and joins(out[-1][0], piece):
            piece, start = out[-1][0] + piece, out.pop()[1]
        out.append((piece, start, stop))
    return out


def joins(word, piece):
    """Does a piece go on with the word before it?"""
    if word.isspace() or piece.isspace():
        return word.isspace()
    kinds = [kind(word[-1]), kind(piece[0])]
    return kinds[0] == kinds[1] != 'alone'


def kind(character):
    """'letter' of what words are made of, 'alone' of what ends one, 'other': punctuation."""
    if ord(character) >= 0x2E80 or character.isspace():  # Chinese puts no space between words
        return 'alone'
    letter = unicodedata.category(character)[0] in 'LMN' or character in "_'\u2019"
    return 'letter' if letter else 'other'


def characters(enc, ids):
    """[(text, start, stop)] of token ids: joins tokens that make a character only together."""
    out, raw, start = [], b'', 0
    for i, t in enumerate(ids):
        raw += enc.decode_single_token_bytes(int(t))
        try:
            text = raw.decode()
        except UnicodeDecodeError as e:
            if i + 1 < len(ids) and e.reason == 'unexpected end of data':  # more may follow
                continue
            text = raw.decode('utf-8', 'replace')
        out.append((text, start, i + 1))
        raw, start = b'', i + 1
    return out


def coloured():
    """May a terminal be painted? (https://no-color.org)"""
    return not (os.environ.get('NO_COLOR') or os.environ.get('TERM') == 'dumb')


def painted(pieces):
    """Words for a terminal: green supports the prediction, red contradicts it, a stronger colour
    is a larger number."""
    top = max(abs(v) for _, v in pieces) or 1.0
    out = []
    for token, v in pieces:
        level = int(3 * abs(v) / top + 0.5)  # 0..3: the dark half of the 6 x 6 x 6 colour cube
        colour = 16 + 6 * level if v > 0 else 16 + 36 * level
        out.append(f'\033[48;5;{colour}m\033[97m{token}\033[0m' if level else token)
    return ''.join(out)


def paragraph(record):
    """The same as a paragraph of HTML; hover over a word to see its number. record: see
    lib/answers.py."""
    pieces, label, p = record['explain'], record['label'], max(record['probs'].values())
    top = max(abs(v) for _, v in pieces) or 1.0
    spans = []
    for token, v in pieces:
        colour = f'rgba({"0,140,60" if v > 0 else "210,30,30"},{0.75 * abs(v) / top:.2f})'
        style = f'title="{v:+.3f}" style="background:{colour}"'
        spans.append(f'<span {style}>{html.escape(token)}</span>')
    head = f'<b>{html.escape(label or "-")}</b> {p:.4f} against {html.escape(record["runner_up"])}'
    return f'<p>{head}<br>{"".join(spans)}</p>\n'


LEGEND = 'Green supports the predicted class, red its runner-up; '
LEGEND += 'hover over a word to see its number.'
PAGE = """<!doctype html>
<meta charset="utf-8"><title>{title}</title>
<style>body {{ font: 16px/1.7 sans-serif; max-width: 50em; margin: 2em auto }}
span {{ white-space: pre-wrap; border-radius: 3px }}</style>
<p>{legend}</p>
{body}"""
