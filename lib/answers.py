"""What predict.py writes of a text: a line, a JSON object, or a row of a table. A record is
dict(text, label or None, probs {label: probability}), of some runs with logprobs and
nats_per_token, with --explain with runner_up and explain [(word, number)]. Called by predict.py."""

import csv
import io

from lib.explain import coloured, painted


def as_line(record, screen, explained):
    """Label, its probability and the text, separated by tabs; below them the explanation. screen:
    for a terminal, where a long text is cut and words are painted; explained: show that."""
    label, p = record['label'], max(record['probs'].values())
    flat = ' '.join(record['text'].split())
    flat = flat[:100] + '...' if screen and len(flat) > 100 else flat
    line = f'{"-" if label is None else label}\t{p:.4f}\t{flat}'
    if explained and 'explain' in record:
        words = record['explain']
        plain = '  '.join(f'{word!r} {v:+.3f}' for word, v in words)
        shown = painted(words) if screen and coloured() else plain
        line += f'\n  against {record["runner_up"]}: {shown}'
    return line


def prompt(path, labels, lines):
    """Classify what is typed on a terminal until Ctrl-D. lines: a function of pairs of a row and a
    text -> what to print of them."""
    print(f'{path}: {", ".join(labels)}. Type a text; Ctrl-D ends.')
    while True:
        try:
            text = input('> ')
        except EOFError:
            print()
            return
        for line in lines([({}, text)]):
            print(line)


class Table:
    """The rows of a .csv or .tsv file: the columns of the input, then label, probability and
    P(class) of every class. A name that the input has already gets `predicted_` in front."""

    def __init__(self, sep):
        self.sep, self.columns = sep, None  # columns: of the input, known from its first row

    @staticmethod
    def of(path):
        """The table that a file of this name holds, or None."""
        seps = {'.csv': ',', '.tsv': '\t'}
        return next((Table(s) for kind, s in seps.items() if path.lower().endswith(kind)), None)

    def row(self, row, record):
        """row: {column: field} of the input -> a line, the first one below a header. Columns that
        the first row lacks (of a .jsonl file) are left out."""
        head = ''
        if self.columns is None:
            self.columns, names = list(row), list(row)
            for name in ('label', 'probability', *(f'P({label})' for label in record['probs'])):
                while name in names:
                    name = f'predicted_{name}'
                names.append(name)
            head = self.line(names) + '\n'
        label, probs = record['label'], list(record['probs'].values())
        fields = [row.get(name, '') for name in self.columns]
        return head + self.line([*fields, '' if label is None else label, max(probs), *probs])

    def line(self, fields):
        out = io.StringIO(newline='')
        csv.writer(out, delimiter=self.sep).writerow(fields)  # ends in \r\n, so quotes both
        return out.getvalue()[:-2]
