"""Classify new text with a trained run.

    python predict.py runs/sst2-lora "a gorgeous, witty film"    texts as arguments
    python predict.py runs/sst2-lora --file in.csv --out out.jsonl --json
    cat texts.txt | python predict.py runs/sst2-lora    a text per line; a prompt on a terminal
    python predict.py runs/sst2-gen-lora --sample positive       a generative run writes new text
    python predict.py runs/sst2-lora --export folder             the merged model, for transformers

RUN may also be a folder written by transformers or PEFT. It may lie anywhere: only the run, its
base model and the tokenizer are needed.
"""

from lib import start

start.script(__name__)

import html
import itertools
import json
import os
import sys

from lib import cli, export, files, ranks, runs, tables
from lib.explain import PAGE, explain, painted, paragraph
from lib.files import UserError
from lib.metrics import softmax
from lib.tokens import tokenize

CHUNK = 1024  # texts per evaluation: enough to sort by length and fill batches, in constant memory


def parse(argv):
    p = cli.Parser(prog='predict.py', description=__doc__)
    text = 'run folder, or a GPT-2 classifier of transformers or PEFT'
    p.add_argument('run', metavar='RUN', help=text)
    p.add_argument('text', nargs='*', help='texts; without any: --file, a pipe, or a prompt')
    add = cli.group(p, 'input')
    text = 'classify the rows of a .csv, .tsv or .jsonl file, or the lines of any other file'
    add('--file', text, metavar='IN')
    add('--text_col', 'text column or key of --file (default: guessed)', metavar='NAME')
    add = cli.group(p, 'output')
    add('--out', 'write there, all or nothing (default: stdout)', metavar='FILE')
    text = 'a JSON object per text: text, label, probs; of a generative run logprobs (nats)'
    add('--json', text, bool)
    text = 'no label (null, or -) if the best probability is below P'
    add('--threshold', text, cli.share, metavar='P')
    add('--explain', 'a number per token: its contribution to the decision', bool)
    add('--html', 'write the explanations there as a page (with --explain)', metavar='FILE')
    text = (
        'write the run there for transformers, LoRA merged; of a generative run a folder per class'
    )
    add('--export', text, metavar='DIR')
    add = cli.group(p, 'generative runs')
    text = "label and probabilities of the calibrated rule (default: of Bayes' rule)"
    add('--calibrated', text, bool)
    text = 'no label if the text is less likely per token than this fraction of validation texts'
    add('--ood_quantile', text, cli.share, metavar='Q')
    add('--sample', 'write new texts of this class', metavar='CLASS')
    add('--num', 'number of samples', cli.positive, 3)
    add('--temperature', 'of sampling; below 1: more likely texts', cli.above_zero, 1.0)
    add('--top_k', 'sample among the N most likely tokens (default: all)', cli.positive)
    add('--seed', 'sampling seed', int, 0)
    add = cli.group(p, 'system')
    text = 'search here for base model and tokenizer before the cache (default: $NANOCLS_DATA)'
    add('--data_dir', text, metavar='DIR')
    add('--device', 'auto (cuda, then mps, then cpu), cpu, cuda, cuda:1, mps', str, 'auto', 'NAME')
    dtypes = ('auto', 'bf16', 'fp16', 'fp32')
    add('--dtype', 'matmul precision; auto: the fastest native one', dtypes, 'auto')
    add('--plain', 'run the plain model, without lib/fast.py', bool)
    args, given = p.parse(argv)
    check(args, given)
    return args, given


def check(args, given):
    """Raise UserError for flags that do not fit together, before anything is loaded."""
    sampling = ('num', 'temperature', 'top_k', 'seed')
    for flag, needed in dict(html='explain', **dict.fromkeys(sampling, 'sample')).items():
        if flag in given and not getattr(args, needed):
            raise UserError(f'--{flag} does nothing without --{needed}')
    system = ('data_dir', 'device', 'dtype', 'plain')
    classifying = sorted(given - {'run', 'export', 'sample', *sampling, *system})
    if args.sample and classifying:
        raise UserError(f'--sample writes new texts only; leave {classifying[0]} out')
    ignored = sorted(given - {'run', 'export', 'data_dir'})
    if args.export and ignored:
        raise UserError(f'--export only writes a model, in float32; leave {ignored[0]} out')
    if args.text and args.file:
        raise UserError('give texts or --file, not both')
    if args.text_col and not args.file:
        raise UserError('--text_col does nothing without --file')
    if args.file and not os.path.isfile(args.file):
        raise UserError(f'--file {args.file}: no such file')
    if args.file and args.out and os.path.realpath(args.file) == os.path.realpath(args.out):
        raise UserError('--file and --out are the same file; write to another one')
    if ranks.world_size() > 1 and not (args.text or args.file or args.export):
        raise UserError('several processes cannot share standard input; give texts or --file')


def check_run(run, args, given):
    """Raise UserError for flags that the run cannot serve."""
    kind = 'a --direct run, which scores the class after the text'
    refused = ('ood_quantile', 'sample', 'explain') if run.answers else ()
    if run.kind == 'cls':
        kind, refused = 'discriminative', ('calibrated', 'ood_quantile', 'sample')
    for flag in refused:
        if flag in given:
            raise UserError(f'--{flag} needs log P(text | class), but {args.run} is {kind}')
    if args.sample and args.sample not in run.labels:
        names = ', '.join(run.labels)
        raise UserError(f'--sample {args.sample}: the classes of {args.run} are {names}')


def answer(run, texts, args, paragraphs):
    """-> output lines for the texts, in order. Appends explanations for --html to `paragraphs`."""
    tokens = tokenize(run.enc, texts, cache=False)
    logits = run.logits_of(tokens)  # (N, K)
    # label and probabilities are of one rule: Bayes' or the calibrated one
    probs = softmax(run.calibrated(logits) if args.calibrated else logits)
    likelihood = lowest = None
    if run.kind == 'gen' and not run.answers:
        likelihood = run.nats_per_token(tokens, logits)  # (N,)
    if args.ood_quantile is not None:
        lowest = run.likelihood_quantile(args.ood_quantile)
    on_screen = sys.stdout.isatty() and not args.out
    for i, (text, p, best) in enumerate(zip(texts, probs, probs.argmax(1))):
        strange = lowest is not None and likelihood[i] < lowest
        sure = args.threshold is None or p[best] >= args.threshold
        label = run.labels[best] if sure and not strange else None
        shown = '-' if label is None else label
        pieces = explain(run, text, args.calibrated, best) if args.explain else None
        if args.html:
            paragraphs.append(paragraph(shown, p[best], pieces))
        if args.json:
            record = dict(text=text, label=label, probs=dict(zip(run.labels, p.tolist())))
            if run.kind == 'gen':
                record['logprobs'] = dict(zip(run.labels, (logits[i] - run.log_prior).tolist()))
            if likelihood is not None:
                record['nats_per_token'] = float(likelihood[i])
            if pieces is not None:
                record['explain'] = pieces
            yield json.dumps(record, ensure_ascii=False)
            continue
        flat = ' '.join(text.split())
        if on_screen and len(flat) > 100:
            flat = flat[:100] + '...'
        yield f'{shown}\t{p[best]:.4f}\t{flat}'
        if pieces is not None and not args.html:
            plain = '  ' + '  '.join(f'{token!r} {v:+.3f}' for token, v in pieces)
            yield painted(pieces) if on_screen else plain


def prompt(run, args, paragraphs):
    """Classify what is typed on a terminal until Ctrl-D."""
    print(f'{args.run}: {", ".join(run.labels)}. Type a text; Ctrl-D ends.')
    while True:
        try:
            text = input('> ')
        except EOFError:
            print()
            return
        print('\n'.join(answer(run, [text], args, paragraphs)))


def texts_of(args):
    """The texts to classify, one by one."""
    if args.text:
        return iter(args.text)
    if args.file:
        return tables.read_texts(args.file, tables.Format(args.text_col))
    sys.stdin.reconfigure(encoding='utf-8', errors='replace')
    return (line.rstrip('\r\n') for line in sys.stdin)


def main(argv=None):
    args, given = parse(argv)
    if args.export:
        for folder in export.export(args.run, args.export, args.data_dir):
            print(f'wrote {folder}')
        return
    run = runs.open_run(args.run, args.device, args.dtype, args.data_dir, args.plain)
    check_run(run, args, given)
    if args.sample:
        limit, top_k = run.args['max_length'], args.top_k or 0
        for i in range(args.num):
            seed = args.seed + i
            print(run.sample(args.sample, limit, args.temperature, top_k, seed), flush=True)
        return

    paragraphs = []

    def lines():
        texts = texts_of(args)
        while chunk := list(itertools.islice(texts, CHUNK)):
            yield from answer(run, chunk, args, paragraphs)

    if not args.text and not args.file and not args.out and sys.stdin.isatty():
        prompt(run, args, paragraphs)
    elif args.out:
        encoded = (line.encode('utf-8', 'replace') + b'\n' for line in lines())
        files.write_atomic(args.out, lambda f: f.writelines(encoded))
    else:
        for line in lines():
            print(line)
    if args.html:
        page = PAGE.format(title=html.escape(args.run), body=''.join(paragraphs))
        files.write_atomic(args.html, page)


if __name__ == '__main__':
    cli.run(ranks.under_torchrun(main))
