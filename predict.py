"""Classify new text with a trained run.

    python predict.py runs/sst2-lora "a gorgeous, witty film"         texts as arguments
    python predict.py runs/sst2-lora --file in.csv --out out.jsonl --json
    cat texts.txt | python predict.py runs/sst2-lora                  one text per line; on a terminal, a prompt
"""
import itertools
import json
import os
import sys

import data     # first: its excepthook covers the seconds that torch takes to import
import numpy as np

import lora
from data import UserError
from eval import softmax

CHUNK = 1024        # texts classified together: enough to sort by length and fill batches, little enough for constant memory


def read_texts(path, text_col):
    """Yield the texts of a file one by one: the text column of .csv / .tsv, the text key of .jsonl, else every line."""
    kind = os.path.splitext(path)[1].lower()
    try:
        with open(path, encoding='utf-8-sig', newline='' if kind in ('.csv', '.tsv') else None) as f:
            if kind == '.jsonl':
                yield from data.stream_jsonl(f, path, text_col)
            elif kind in ('.csv', '.tsv'):
                yield from data.stream_csv(f, path, '\t' if kind == '.tsv' else ',', text_col)
            else:
                yield from (line.rstrip('\n') for line in f)
    except OSError as e:
        raise UserError(f'cannot read --file {path}: {e.strerror}')
    except UnicodeDecodeError as e:
        raise UserError(f'--file {path} is not UTF-8 (byte 0x{e.object[e.start]:02x}); save it as UTF-8')


def explain(run, text):
    """-> [(token, number)]: how much the predicted class's lead over the runner-up (a difference of logits) shrinks when that token alone is
    left out; negative = the token speaks against the prediction. Leave-one-out (Li et al. 2016, arXiv 1612.08220): one forward pass per
    token, exact for every method. Tokens beyond --max_length play no part and get no number."""
    ids, limit = data.tokenize(run.enc, [text], cache=False)[0], run.args['max_length']
    ids = ids[:limit] if run.args['truncate'] == 'head' else ids[-limit:]
    without = [np.delete(ids, i) if len(ids) > 1 else np.array([run.model.end], ids.dtype) for i in range(len(ids))]
    every = [ids, *without]
    logits = run.logits_of(data.Tokens(np.concatenate(every), np.cumsum([0] + [len(x) for x in every])))     # (1 + T, K)
    best = int(logits[0].argmax())
    others = np.delete(logits, best, axis=1)                            # (1 + T, K - 1)
    lead = logits[:, best] - others[:, int(others[0].argmax())]         # (1 + T,) over the runner-up of the whole text
    tokens = [run.enc.decode_single_token_bytes(int(t)).decode('utf-8', 'replace') for t in ids]
    return list(zip(tokens, (lead[0] - lead[1:]).tolist()))


def painted(pieces):
    """Tokens on a terminal: green backs the prediction, red speaks against it, the strength of the colour is the number."""
    top = max(abs(v) for _, v in pieces) or 1.0
    out = []
    for token, v in pieces:
        level = int(3 * abs(v) / top + 0.5)                             # 0..3: the dark half of the 6 x 6 x 6 colour cube
        colour = 16 + 6 * level if v > 0 else 16 + 36 * level
        out.append(f'\033[48;5;{colour}m\033[97m{token}\033[0m' if level else token)
    return ''.join(out)


def answer(run, texts, args):
    """-> one output line (or paragraph) per text, in order."""
    probs = softmax(run.logits(texts))
    for text, p in zip(texts, probs):
        best = int(p.argmax())
        label = run.labels[best] if args.threshold is None or p[best] >= args.threshold else None
        pieces = explain(run, text) if args.explain else None
        if args.json:
            record = dict(text=text, label=label, probs=dict(zip(run.labels, p.tolist())))
            if pieces is not None:
                record['explain'] = pieces
            yield json.dumps(record, ensure_ascii=False)
            continue
        flat = ' '.join(text.split())
        if sys.stdout.isatty() and not args.out and len(flat) > 100:
            flat = flat[:100] + '...'
        yield f'{label if label is not None else "-"}\t{p[best]:.4f}\t{flat}'
        if pieces is not None:
            if sys.stdout.isatty() and not args.out:
                yield painted(pieces)
            else:
                yield '  ' + '  '.join(f'{token!r} {v:+.3f}' for token, v in pieces)


def main(argv=None):
    p = data.Parser(description=__doc__, prog='predict.py')
    p.add_argument('run', metavar='RUN', help='run folder that a train script wrote')
    p.add_argument('text', nargs='*', help='texts to classify; without any, --file, a pipe or a prompt')
    p.add_argument('--file', metavar='IN', help='classify the rows of this .csv, .tsv or .jsonl, or the lines of any other file')
    p.add_argument('--text_col', metavar='NAME', help='column or key of the text in --file; found by name without it')
    p.add_argument('--out', metavar='FILE', help='write there instead of to the terminal; complete or not at all')
    p.add_argument('--json', action='store_true', help='one JSON object per text: text, label, probs')
    p.add_argument('--threshold', type=data.share, metavar='P', help='give no label (null, or - ) where the best probability is below P')
    p.add_argument('--explain', action='store_true', help='a number per token: how much the decision leans on it (one forward pass per token)')
    p.add_argument('--device', default='auto', help='auto (cuda, then mps, then cpu), cpu, cuda, cuda:1, mps')
    p.add_argument('--dtype', choices=('auto', 'bf16', 'fp16', 'fp32'), default='auto', help='of the matrix products; auto: the fastest native one')
    args, _ = p.parse(argv)
    if args.text and args.file:
        raise UserError('give texts or --file, not both')
    if args.text_col and not args.file:
        raise UserError('--text_col does nothing without --file')
    if args.file and not os.path.isfile(args.file):
        raise UserError(f'--file {args.file}: no such file')
    if args.file and args.out and os.path.realpath(args.file) == os.path.realpath(args.out):
        raise UserError('--file and --out are the same file; write to another one')

    run = lora.open_run(args.run, args.device, args.dtype)
    if not args.text and not args.file and sys.stdin.isatty():
        print(f'{args.run}: {", ".join(run.labels)}. Type a text; Ctrl-D ends.')
        while True:
            try:
                text = input('> ')
            except EOFError:
                print()
                return
            print('\n'.join(answer(run, [text], args)))

    if args.text:
        texts = iter(args.text)
    elif args.file:
        texts = read_texts(args.file, args.text_col)
    else:
        sys.stdin.reconfigure(encoding='utf-8', errors='replace')
        texts = (line.rstrip('\r\n') for line in sys.stdin)

    def lines():
        while chunk := list(itertools.islice(texts, CHUNK)):
            yield from answer(run, chunk, args)
    if args.out:
        data.write_atomic(args.out, lambda f: f.writelines(line.encode('utf-8', 'replace') + b'\n' for line in lines()))
    else:
        for line in lines():
            print(line)


if __name__ == '__main__':
    data.cli(main)
