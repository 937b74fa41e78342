"""Classify new text with a trained run.

    python predict.py runs/sst2-lora "a gorgeous, witty film"         texts as arguments
    python predict.py runs/sst2-lora --file in.csv --out out.jsonl --json
    cat texts.txt | python predict.py runs/sst2-lora                  one text per line; on a terminal, a prompt
    python predict.py runs/sst2-gen-lora --sample positive            a generative run writes new text
    python predict.py runs/sst2-lora --export folder                  the merged model, for transformers

RUN may also be a folder that transformers or PEFT wrote.
"""
import html
import itertools
import json
import os
import sys

import data     # first: its excepthook covers the seconds that torch takes to import
import numpy as np

import lora
import model as gpt
from data import UserError
from eval import softmax

CHUNK = 1024        # texts classified together: enough to sort by length and fill batches, little enough for constant memory


def explain(run, text):
    """-> [(token, number)]: what each token does for the predicted class, against the runner-up.

    Generative runs: log P(token | tokens before, class) - log P(token | tokens before, runner-up) in nats, after a first entry for the
    prior; the numbers sum exactly to the margin of the decision.
    Discriminative runs: how much the lead (a difference of logits) shrinks when that token alone is left out (Li et al. 2016, arXiv
    1612.08220): one forward pass per token, exact for every method; negative = the token speaks against the prediction.
    Tokens beyond --max_length play no part and get no number."""
    if run.kind == 'gen':
        ids, terms = run.token_logprobs(text)                           # (n,), (n, K) nats
        best, second = np.argsort(-(terms.sum(0) + run.log_prior))[:2]
        prior = float(run.log_prior[best] - run.log_prior[second])
        return [('P(class)', prior)] + readable(run.enc, ids, (terms[:, best] - terms[:, second]).tolist())
    ids, limit = data.tokenize(run.enc, [text], cache=False)[0], run.args['max_length']
    ids = ids[:limit] if run.args['truncate'] == 'head' else ids[-limit:]
    without = [np.delete(ids, i) if len(ids) > 1 else np.array([run.model.end], ids.dtype) for i in range(len(ids))]
    every = [ids, *without]
    logits = run.logits_of(data.Tokens(np.concatenate(every), np.cumsum([0] + [len(x) for x in every])))     # (1 + T, K)
    best = int(logits[0].argmax())
    others = np.delete(logits, best, axis=1)                            # (1 + T, K - 1)
    lead = logits[:, best] - others[:, int(others[0].argmax())]         # (1 + T,) over the runner-up of the whole text
    return readable(run.enc, ids, (lead[0] - lead[1:]).tolist())


def readable(enc, ids, numbers):
    """[(text, number)] of token ids and their numbers. Tokens that only together make a character are joined, and their numbers added."""
    out, raw, total = [], b'', 0.0
    for i, (t, number) in enumerate(zip(ids, numbers)):
        raw, total = raw + enc.decode_single_token_bytes(int(t)), total + number
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            if i + 1 < len(ids) and len(raw) < 16:                      # longer: no part of a character, but bytes that are no text
                continue
            text = raw.decode('utf-8', 'replace')
        out.append((text, total))
        raw, total = b'', 0.0
    return out


def painted(pieces):
    """Tokens on a terminal: green backs the prediction, red speaks against it, the strength of the colour is the number."""
    top = max(abs(v) for _, v in pieces) or 1.0
    out = []
    for token, v in pieces:
        level = int(3 * abs(v) / top + 0.5)                             # 0..3: the dark half of the 6 x 6 x 6 colour cube
        colour = 16 + 6 * level if v > 0 else 16 + 36 * level
        out.append(f'\033[48;5;{colour}m\033[97m{token}\033[0m' if level else token)
    return ''.join(out)


def paragraph(label, probability, pieces):
    """The same as a paragraph of HTML; the number of a token shows under the pointer."""
    top = max(abs(v) for _, v in pieces) or 1.0
    spans = (f'<span title="{v:+.3f}" style="background:rgba({"0,140,60" if v > 0 else "210,30,30"},{0.75 * abs(v) / top:.2f})">{html.escape(token)}</span>'
             for token, v in pieces)
    return f'<p><b>{html.escape(label)}</b> {probability:.4f}<br>{"".join(spans)}</p>\n'


PAGE = """<!doctype html>
<meta charset="utf-8"><title>{title}</title>
<style>body {{ font: 16px/1.7 sans-serif; max-width: 50em; margin: 2em auto }} span {{ white-space: pre-wrap; border-radius: 3px }}</style>
<p>Green backs the predicted class, red its runner-up; a token's number shows under the pointer.</p>
{body}"""


def answer(run, texts, args, paragraphs):
    """-> one output line (or paragraph) per text, in order; explanations for --html are appended to `paragraphs`."""
    tokens = data.tokenize(run.enc, texts, cache=False)
    logits = run.logits_of(tokens)                                      # (N, K)
    probs = softmax(run.calibrated(logits))
    choice = (logits if run.kind == 'gen' and not args.calibrated else probs).argmax(1)
    likeness = run.nats_per_token(tokens, logits) if run.kind == 'gen' and not run.answers else None
    lowest = run.likelihood_quantile(args.ood_quantile) if args.ood_quantile is not None else None
    for i, (text, p, best) in enumerate(zip(texts, probs, choice)):
        strange = lowest is not None and likeness[i] < lowest
        label = run.labels[best] if not strange and (args.threshold is None or p[best] >= args.threshold) else None
        pieces = explain(run, text) if args.explain else None
        if args.html:
            paragraphs.append(paragraph(label or '-', p[best], pieces))
        if args.json:
            record = dict(text=text, label=label, probs=dict(zip(run.labels, p.tolist())))
            if run.kind == 'gen':
                record['logprobs'] = dict(zip(run.labels, (logits[i] - run.log_prior).tolist()))
            if likeness is not None:
                record['nats_per_token'] = float(likeness[i])
            if pieces is not None:
                record['explain'] = pieces
            yield json.dumps(record, ensure_ascii=False)
            continue
        flat = ' '.join(text.split())
        if sys.stdout.isatty() and not args.out and len(flat) > 100:
            flat = flat[:100] + '...'
        yield f'{label if label is not None else "-"}\t{p[best]:.4f}\t{flat}'
        if pieces is not None and not args.html:
            if sys.stdout.isatty() and not args.out:
                yield painted(pieces)
            else:
                yield '  ' + '  '.join(f'{token!r} {v:+.3f}' for token, v in pieces)


def main(argv=None):
    p = data.Parser(description=__doc__, prog='predict.py')
    p.add_argument('run', metavar='RUN', help='run folder that a train script wrote, or a GPT-2 classifier of transformers or PEFT')
    p.add_argument('text', nargs='*', help='texts to classify; without any, --file, a pipe or a prompt')
    p.add_argument('--file', metavar='IN', help='classify the rows of this .csv, .tsv or .jsonl, or the lines of any other file')
    p.add_argument('--text_col', metavar='NAME', help='column or key of the text in --file; found by name without it')
    p.add_argument('--out', metavar='FILE', help='write there instead of to the terminal; complete or not at all')
    p.add_argument('--json', action='store_true', help='one JSON object per text: text, label, probs; of a generative run logprobs (nats), too')
    p.add_argument('--threshold', type=data.share, metavar='P', help='give no label (null, or - ) where the best probability is below P')
    p.add_argument('--explain', action='store_true', help='a number per token: what it does for the decision')
    p.add_argument('--html', metavar='FILE', help='with --explain: write the explanations there as a page')
    p.add_argument('--export', metavar='DIR', help='write the run there as a transformers folder, LoRA merged; of a generative run one per class')
    # generative runs
    p.add_argument('--calibrated', action='store_true', help='decide by the calibrated probabilities; without it Bayes\' rule decides, and they only inform')
    p.add_argument('--ood_quantile', type=data.share, metavar='Q', help='no label for a text less likely, per token, than the lowest share Q of the validation texts')
    p.add_argument('--sample', metavar='CLASS', help='write new texts of that class')
    p.add_argument('--num', type=data.positive, default=3, help='how many, with --sample')
    p.add_argument('--temperature', type=data.above_zero, default=1.0, help='below 1: likelier texts, with --sample')
    p.add_argument('--top_k', type=data.positive, help='choose each token among the K likeliest, with --sample; among all without it')
    p.add_argument('--seed', type=int, default=0, help='of --sample')
    # system
    p.add_argument('--device', default='auto', help='auto (cuda, then mps, then cpu), cpu, cuda, cuda:1, mps')
    p.add_argument('--dtype', choices=('auto', 'bf16', 'fp16', 'fp32'), default='auto', help='of the matrix products; auto: the fastest native one')
    args, given = p.parse(argv)
    for flag, needed in dict(html='explain', num='sample', temperature='sample', top_k='sample', seed='sample').items():
        if flag in given and not getattr(args, needed):
            raise UserError(f'--{flag} does nothing without --{needed}')
    classifying = given & {'text', 'file', 'text_col', 'json', 'threshold', 'explain', 'html', 'ood_quantile', 'calibrated', 'out'}
    if args.sample and classifying:
        raise UserError(f'--sample writes texts and classifies none; leave {sorted(classifying)[0]} out')
    ignored = given - {'run', 'export'}
    if args.export and ignored:
        raise UserError(f'--export writes a model, in float32, and does nothing else; leave {sorted(ignored)[0]} out')
    if args.text and args.file:
        raise UserError('give texts or --file, not both')
    if args.text_col and not args.file:
        raise UserError('--text_col does nothing without --file')
    if args.file and not os.path.isfile(args.file):
        raise UserError(f'--file {args.file}: no such file')
    if args.file and args.out and os.path.realpath(args.file) == os.path.realpath(args.out):
        raise UserError('--file and --out are the same file; write to another one')

    if args.export:
        for folder in lora.export(args.run, args.export):
            print(f'wrote {folder}')
        return
    if gpt.ranks() > 1 and not (args.text or args.file):
        raise UserError('several processes cannot share standard input; name texts or --file')

    run = lora.open_run(args.run, args.device, args.dtype)
    for flag in ('calibrated', 'ood_quantile', 'sample', 'explain'):
        if flag in given and (flag != 'explain' and run.kind == 'cls' or flag != 'calibrated' and run.answers):
            raise UserError(f'--{flag} needs log P(text | class), which {args.run} does not have: it is ' +
                            ('discriminative' if run.kind == 'cls' else 'a --direct one, which scores the class behind the text'))
    if args.sample:
        if args.sample not in run.labels:
            raise UserError(f'--sample {args.sample}: the classes of {args.run} are {", ".join(run.labels)}')
        for i in range(args.num):
            print(run.sample(args.sample, run.args['max_length'], args.temperature, args.top_k or 0, args.seed + i), flush=True)
        return
    paragraphs = []
    if not args.text and not args.file and not args.out and sys.stdin.isatty():
        texts = iter(())
        print(f'{args.run}: {", ".join(run.labels)}. Type a text; Ctrl-D ends.')
        while True:
            try:
                text = input('> ')
            except EOFError:
                print()
                break
            print('\n'.join(answer(run, [text], args, paragraphs)))
    elif args.text:
        texts = iter(args.text)
    elif args.file:
        texts = data.read_texts(args.file, args.text_col)
    else:
        sys.stdin.reconfigure(encoding='utf-8', errors='replace')
        texts = (line.rstrip('\r\n') for line in sys.stdin)

    def lines():
        while chunk := list(itertools.islice(texts, CHUNK)):
            yield from answer(run, chunk, args, paragraphs)
    if args.out:
        data.write_atomic(args.out, lambda f: f.writelines(line.encode('utf-8', 'replace') + b'\n' for line in lines()))
    else:
        for line in lines():
            print(line)
    if args.html:
        data.write_atomic(args.html, PAGE.format(title=html.escape(args.run), body=''.join(paragraphs)))


if __name__ == '__main__':
    data.cli(gpt.under_torchrun(main))
