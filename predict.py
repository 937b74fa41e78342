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
import os
import sys

import numpy as np

from lib import cli, export, files, flags, ranks, rundata, runs, tables
from lib.answers import Table, as_line, prompt
from lib.explain import LEGEND, PAGE, explain, paragraph
from lib.files import UserError
from lib.tokens import cut_note, tokenize

CHUNK = 1024  # texts per evaluation: enough to sort by length and fill batches, in constant memory


def parse(argv):
    p = cli.Parser(prog='predict.py', description=__doc__)
    text = 'run folder, or a GPT-2 classifier of transformers or PEFT'
    p.add_argument('run', metavar='RUN', help=text)
    p.add_argument('text', nargs='*', help='texts; without any: --file, a pipe, or a prompt')
    add = cli.group(p, 'input')
    text = 'classify the rows of a .csv, .tsv or .jsonl file, or the lines of any other file'
    add('--file', text, metavar='IN')
    flags.table_flags(add, '--file', labels=False)
    add = cli.group(p, 'output')
    text = 'write there, all or nothing; NAME.csv or .tsv: a table that keeps the columns of --file'
    add('--out', text + ' (default: the terminal)', metavar='FILE')
    text = 'a JSON object per text: text, label, probs; of a generative run logprobs (nats)'
    add('--json', text, bool)
    text = 'no label (null, or -) if the best probability is below P'
    add('--threshold', text, cli.share, metavar='P')
    add('--explain', 'a number per word: its contribution to the decision', bool)
    add('--html', 'write the explanations there as a page (with --explain)', metavar='FILE')
    text = 'write the run there for transformers, LoRA merged'
    add('--export', f'{text}; of a generative run a folder per class', metavar='DIR')
    add = cli.group(p, 'generative runs')
    text = 'no label if the text is less likely per token than this fraction of validation texts'
    add('--ood_quantile', text, cli.share, metavar='Q')
    add('--sample', 'write new texts of this class', metavar='CLASS')
    add('--num', 'number of samples', cli.positive, 3)
    add('--temperature', 'of sampling; below 1: more likely texts', cli.above_zero, 1.0)
    add('--top_k', 'sample among the N most likely tokens (default: all)', cli.positive)
    add('--seed', 'sampling seed', cli.seed, 0)
    flags.opening_flags(p)
    args, given = p.parse(argv)
    check(args, given)
    return args, given


def check(args, given):
    """Raise UserError for flags that do not fit together, before anything is loaded."""
    sampling = ('num', 'temperature', 'top_k', 'seed')
    for flag, needed in dict(html='explain', **dict.fromkeys(sampling, 'sample')).items():
        if flag in given and not getattr(args, needed):
            raise UserError(f'--{flag} does nothing without --{needed}')
    system = ('data_dir', 'base', 'device', 'dtype', 'plain')
    classifying = sorted(given - {'run', 'export', 'sample', *sampling, *system})
    if args.sample and classifying:
        raise UserError(f'--sample writes new texts only; leave {classifying[0]} out')
    ignored = sorted(given - {'run', 'export', 'data_dir', 'base'})
    if args.export and ignored:
        raise UserError(f'--export only writes a model, in float32; leave {ignored[0]} out')
    if args.text and args.file:
        raise UserError('give texts or --file, not both')
    for text in filter(os.path.isfile, args.text):
        advice = 'classify its rows with --file, or pipe the text into predict.py'
        raise UserError(f'{text} is the name of a file, not a text: {advice}')
    kind = os.path.splitext(args.out or '')[1].lower()
    if kind in ('.gz', '.json', '.xlsx', '.xls', '.parquet') or kind == '.jsonl' and not args.json:
        raise UserError(
            f'--out {args.out}: write .csv, .tsv, or with --json .jsonl; no .json or .gz'
        )
    if args.out and Table.of(args.out) and (args.json or args.explain and not args.html):
        flag = '--json' if args.json else '--explain'
        raise UserError(f'{flag} has no place in a table; give --out {args.out} another ending')
    if args.windows and args.explain:
        raise UserError('--explain covers what --max_length reads; leave --windows out')
    unread = sorted(given & {'text_col', 'sep', 'encoding'})
    if unread and not args.file:
        raise UserError(f'--{unread[0]} does nothing without --file')
    if args.file and not os.path.isfile(args.file):
        why = 'is no regular file' if os.path.exists(args.file) else 'no such file'
        raise UserError(f'--file {args.file}: {why}')
    places = [os.path.realpath(path) for path in (args.file, args.out, args.html) if path]
    if len({*places}) < len(places):
        raise UserError('--file, --out and --html must be different files')
    if ranks.world_size() > 1 and not (args.text or args.file):
        raise UserError('several processes share texts or --file, nothing else: start one')


def check_run(run, args, given):
    """Raise UserError for flags that the run cannot serve."""
    kind = 'a --direct run, which scores the class after the text'
    refused = ('ood_quantile', 'sample', 'explain') if run.answers else ()
    if run.kind == 'cls':
        kind, refused = 'discriminative', ('rule', 'ood_quantile', 'sample')
    for flag in refused:
        if flag in given:
            raise UserError(f'--{flag} needs log P(text | class), but {args.run} is {kind}')
    if args.sample and args.sample not in run.labels:
        names = ', '.join(run.labels)
        raise UserError(f'--sample {args.sample}: the classes of {args.run} are {names}')


def answers(run, texts, tokens, args):
    """Yield what is written of each text, in order."""
    logits = run.logits_of(tokens)  # (N, K)
    probs, likelihood, lowest = run.probs(logits), None, None
    if run.kind == 'gen' and not run.answers:
        likelihood = run.nats_per_token(tokens, logits)  # (N,)
    if args.ood_quantile is not None:
        lowest = run.likelihood_quantile(args.ood_quantile)
    for i, (text, p, best) in enumerate(zip(texts, probs, probs.argmax(1))):
        strange = lowest is not None and likelihood[i] < lowest
        sure = args.threshold is None or p[best] >= args.threshold
        label = run.labels[best] if sure and not strange else None
        record = dict(text=text, label=label, probs=dict(zip(run.labels, p.tolist())))
        if run.kind == 'gen':
            record['logprobs'] = dict(zip(run.labels, (logits[i] - run.log_prior).tolist()))
        if likelihood is not None:
            record['nats_per_token'] = float(likelihood[i])
        if args.explain:
            record['runner_up'], record['explain'] = explain(run, text, best)
        yield record


def rows_of(run, args, notes):
    """Pairs of the columns of a row, {name: field}, and the text to classify, one by one."""
    if args.file:
        form = tables.Format.of(vars(args), like=rundata.form_of(run.info))
        return tables.read_rows(args.file, form, notes)
    texts = args.text or (line.rstrip('\r\n') for line in sys.stdin)
    return ((dict(text=text), text) for text in texts)


def main(argv=None):
    args, given = parse(argv)
    if args.export:
        for folder in export.export(args.run, args.export, args.data_dir, args.base):
            print(f'wrote {folder}')
        return
    run = runs.open_run(args.run, args.device, args.dtype, args.data_dir, args.plain, args.base)
    check_run(run, args, given)
    if args.sample:
        how = run.args['max_length'], args.temperature, args.top_k or 0
        for seed in range(args.seed, args.seed + args.num):
            print(run.sample(args.sample, *how, seed % 2**64), flush=True)
        return

    run.rule, run.windows = args.rule or run.rule, args.windows
    paragraphs, lengths, notes, table = [], [], [], args.out and Table.of(args.out)
    screen = sys.stdout.isatty() and not args.out
    from_stdin = not args.text and not args.file
    if from_stdin:
        sys.stdin.reconfigure(encoding='utf-8-sig', errors='replace')

    def show(row, record):
        if table:
            return table.row(row, record)
        if args.json:
            return files.as_json(record, ensure_ascii=False)
        return as_line(record, screen, not args.html)

    def lines(rows):
        rows = iter(rows)
        while chunk := list(itertools.islice(rows, CHUNK)):
            texts = [text for _, text in chunk]
            tokens = tokenize(run.enc, texts, cache=False)
            lengths.append(tokens.lengths)
            for (row, _), record in zip(chunk, answers(run, texts, tokens, args)):
                if args.html:
                    paragraphs.append(paragraph(record))
                yield show(row, record)

    found = lines(rows_of(run, args, notes))
    if from_stdin and not args.out and sys.stdin.isatty():
        prompt(args.run, run.labels, lines)
    elif args.out:
        encoded = (line.encode('utf-8', 'replace') + b'\n' for line in found)
        files.write_atomic(args.out, lambda f: f.writelines(encoded))
    else:
        for line in found:
            print(line)
    if args.html:
        page = PAGE.format(title=html.escape(args.run), legend=LEGEND, body=''.join(paragraphs))
        files.write_atomic(args.html, page)
    notes += [f'wrote {path}' for path in (args.out, args.html) if path]
    if lengths and not args.windows:
        notes += cut_note(np.concatenate(lengths), run.args['max_length'])
    for note in notes if ranks.rank() == 0 else ():
        print(note, file=sys.stderr)


if __name__ == '__main__':
    cli.run(ranks.under_torchrun(main))
