"""A user's own files: CSV, TSV and JSONL with a text and a label per row. Called by data.py,
predict.py and eval.py."""

import csv
import io
import json
import os

from lib import files
from lib.files import UserError

KINDS = ('.csv', '.tsv', '.jsonl')
STEMS = dict(train=('train', 'training'), val=('val', 'valid', 'validation', 'dev'))
STEMS['test'] = ('test', 'testing')
TEXT_NAMES = (
    'text sentence review message content comment body document tweet utterance sms'.split()
)
LABEL_NAMES = 'label labels class category target sentiment intent topic rating y'.split()
MAX_CLASSES = 5000  # their confusion matrix fills 0.2 GB
MAX_FIELD = 2**31 - 1  # characters; csv's own limit refuses long documents, more overflows there


def csv_records(f, path, delimiter):
    """Yield ('path, line N', fields) of each record. Strict: a quote that is never closed is an
    error, not one huge field."""
    reader = csv.reader(f, delimiter=delimiter, strict=True)
    while True:
        where = f'{path}, line {reader.line_num + 1}'
        before = csv.field_size_limit(MAX_FIELD)
        try:
            record = next(reader, None)
        except csv.Error as e:
            why = f'the record that begins here cannot be read ({e})'
            raise UserError(f'{where}: {why}; check its quotes') from None
        finally:
            csv.field_size_limit(before)  # it is the limit of the whole process
        if record is None:
            return
        if record:  # not a blank line
            yield where, record


def csv_rows(f, path, delimiter):
    """Yield ('path, line N', {column: field}) of each row below the header."""
    columns = None
    for where, fields in csv_records(f, path, delimiter):
        if columns is None:
            columns = [c.strip() for c in fields]
        elif len(fields) != len(columns):
            why = f'the row has {len(fields)} fields and the header {len(columns)}'
            hint = 'complete the row, or put quotes around a text that holds the separator'
            raise UserError(f'{where}: {why}; {hint}')
        else:
            yield where, dict(zip(columns, fields))


def json_rows(f, path):
    """Yield ('path, line N', {key: value}) of each line that is not blank."""
    for i, line in enumerate(f):
        if line.strip():
            where = f'{path}, line {i + 1}'
            try:
                row = files.parse_json(line)
            except ValueError as e:
                why = f'not valid JSON ({e}); write one object per line'
                raise UserError(f'{where}: {why}') from None
            if not isinstance(row, dict):
                why = 'not a JSON object; write one object per line, with a text and a label'
                raise UserError(f'{where}: {why}')
            yield where, row


def rows_of(f, path, kind):
    """Rows of an open .csv, .tsv or .jsonl file, as csv_rows and json_rows yield them."""
    if kind == '.jsonl':
        return json_rows(f, path)
    return csv_rows(f, path, ',' if kind == '.csv' else '\t')


def read_table(path, text_col=None, label_col=None):
    """One .csv or .tsv (header, standard quoting) or .jsonl file -> (rows, text_col, label_col);
    a row is (text, label)."""
    kind = os.path.splitext(path)[1].lower()
    if kind not in KINDS:
        raise UserError(f'{path}: expected a file that ends in {", ".join(KINDS)}')
    # newline='': line ends inside quotes stay as they are
    f = io.StringIO(files.decode(files.read_bytes(path), path), newline='')
    table = list(rows_of(f, path, kind))
    if not table:
        below = '' if kind == '.jsonl' else ' below a header'
        raise UserError(f'{path} is empty: it has no rows; add some{below}')
    text_col, label_col = pick_columns(path, table, text_col, label_col)
    rows = []
    for where, r in table:
        y = r.get(label_col)
        y = json.dumps(y) if isinstance(y, int) else y  # 1 -> '1', True -> 'true'
        if not isinstance(y, str) or not y.strip():
            why = 'is not a string, whole number or true/false, or is empty'
            raise UserError(f'{where}: the label {label_col!r} {why}')
        rows.append((text_of(where, r, text_col), mend(y).strip()))
    return rows, text_col, label_col


def text_of(where, row, text_col):
    if not isinstance(row.get(text_col), str):
        why = f'the text {text_col!r} is missing or no string; give every row one'
        raise UserError(f'{where}: {why}')
    return mend(row[text_col])


def read_texts(path, text_col=None):
    """Yield the texts of a file one by one: the text column of .csv / .tsv, the text key of .jsonl,
    every line of any other file."""
    kind = os.path.splitext(path)[1].lower()
    try:
        newline = '' if kind in ('.csv', '.tsv') else None
        with open(path, encoding='utf-8-sig', newline=newline) as f:
            if kind not in KINDS:
                yield from (line.rstrip('\n') for line in f)
                return
            for where, row in rows_of(f, path, kind):
                text_col = text_col or only_text(list(row))
                if text_col not in row:
                    why = f'there is no column {text_col or "text"!r}'
                    have = f'it has {", ".join(map(repr, row))}; name one with --text_col'
                    raise UserError(f'{where}: {why}: {have}')
                yield text_of(where, row, text_col)
    except OSError as e:
        raise UserError(f'cannot read {path}: {e.strerror}; check the path') from None
    except UnicodeDecodeError as e:
        byte = f'byte 0x{e.object[e.start]:02x}'
        raise UserError(f'{path} is not UTF-8 ({byte}); save it as UTF-8') from None


def only_text(columns):
    return columns[0] if len(columns) == 1 else usual(columns, TEXT_NAMES)


def mend(text):
    """Replace halves of surrogate pairs, which JSON can hold and files cannot, by U+FFFD."""
    if text.isascii():
        return text
    return text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')


def usual(columns, names):
    return next((c for n in names for c in columns if c.lower() == n), None)


def pick_columns(path, table, text_col, label_col):
    """-> the columns asked for; else those with a usual name; else, of two columns, the one with
    fewer values is the label."""
    columns = list(table[0][1])
    have = (
        f'it has {", ".join(map(repr, columns))}; name two of them with --text_col and --label_col'
    )
    for col in (text_col, label_col):
        if col and col not in columns:
            raise UserError(f'{path} has no column {col!r}: {have}')
    t = text_col or usual([c for c in columns if c != label_col], TEXT_NAMES)
    y = label_col or usual([c for c in columns if c != t], LABEL_NAMES)
    if len(columns) == 2 and not (t and y):
        values = [{str(r.get(c)) for _, r in table} for c in columns]
        if not (t or y):
            if any(c in v for c, v in zip(columns, values)):
                why = 'seems to have no header: its first line looks like a row'
                raise UserError(f'{path} {why}; put text,label above')
            y = columns[len(values[0]) >= len(values[1])]
        other = columns[columns[0] == (t or y)]
        t, y = t or other, y or other
    if not (t and y):
        which = 'label' if t else 'text'
        raise UserError(f'{path}: cannot tell which column is the {which}: {have}')
    return t, y


def read_own(path, text_col, label_col):
    """A user's file or folder -> ({split: rows}, text_col, label_col)"""
    paths = {} if os.path.isdir(path) else {'train': path}
    for file in sorted(os.listdir(path)) if os.path.isdir(path) else ():
        stem, kind = os.path.splitext(file.lower())
        for split in STEMS:
            if stem in STEMS[split] and kind in KINDS:
                if split in paths:
                    both = f'{os.path.basename(paths[split])} and {file}'
                    raise UserError(f'{path} has both {both}; keep one of them')
                paths[split] = os.path.join(path, file)
    if 'train' not in paths:
        why = 'has no train.csv, train.tsv or train.jsonl'
        raise UserError(f'{path} {why}; add one, or name a file')
    rows = {}
    for split in [s for s in STEMS if s in paths]:  # train first: the others use its columns
        rows[split], text_col, label_col = read_table(paths[split], text_col, label_col)
    return rows, text_col, label_col
