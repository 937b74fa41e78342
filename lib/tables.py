"""A user's own tables: CSV, TSV and JSONL with a text and a label per row. Called by data.py,
predict.py, eval.py and other rooms."""

import csv
import io
import itertools
import json
import os
import re
from typing import NamedTuple, Optional

from lib import files
from lib.files import UserError
from lib.report import counted
from lib.textfiles import ADVICE, KINDS, kind_of, opened, refuse_other

STEMS = dict(train=('train', 'training'), val=('val', 'valid', 'validation', 'dev'))
STEMS['test'] = ('test', 'testing')
# the usual names, the likeliest first
TEXT_NAMES = 'text sentence review message content comment body document tweet utterance sms'
LABEL_NAMES = 'label labels class category target sentiment intent topic rating y'
SEPARATORS = (',', ';', '\t', '|')
MAX_CLASSES = 5000  # their confusion matrix fills 0.2 GB
MAX_FIELD = 2**31 - 1  # characters; csv's own limit refuses long documents, more overflows there


class Format(NamedTuple):
    """How a user's files are read."""

    text_col: Optional[str] = None  # None: guessed; 'title,body': joined with a space
    label_col: Optional[str] = None
    sep: Optional[str] = None  # None: found from the first rows
    encoding: Optional[str] = None  # None: UTF-8
    drop_unlabelled: bool = False
    like: Optional['Format'] = None  # of a run's own file: taken where it fits, before a guess

    @classmethod
    def of(cls, flags, like=None):
        """From a dict with these keys, such as vars(args); those that it lacks are None."""
        return cls(**{k: flags[k] for k in cls._fields[:-1] if k in flags}, like=like)


GUESSED = Format()


def csv_records(f, path, delimiter, skipped=0):
    """Yield ('path, line N', fields) of each record. Strict: a quote that is never closed is an
    error, not one huge field. skipped: lines that were read before."""
    reader = csv.reader(f, delimiter=delimiter, strict=True)
    while True:
        where = f'{path}, line {skipped + reader.line_num + 1}'
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


def csv_rows(f, path, form, notes):
    """Yield ('path, line N', {column: field}) of each row below the header."""
    columns, (sep, skipped) = None, separator(f, kind_of(path), form)
    for where, fields in csv_records(f, path, sep, skipped):
        if columns is None:
            # without a name: the index that pandas writes
            columns = [c.strip() or f'column {i}' for i, c in enumerate(fields, 1)]
            twice = sorted({c for c in columns if columns.count(c) > 1})
            notes += [f'{path} has the column {c!r} twice; the last one is read' for c in twice]
        elif len(fields) != len(columns):
            why = f'the row has {len(fields)} fields and the header {len(columns)}'
            hint = 'complete the row, or put quotes around a text that holds the separator'
            raise UserError(f'{where}: {why}; {hint}')
        else:
            yield where, dict(zip(columns, fields))


def separator(f, kind, form):
    """-> the separator of an open .csv or .tsv file, and how many lines to skip: 1 if the first is
    Excel's `sep=;`. Leaves f behind that line."""
    head = f.read(1 << 16)
    f.seek(0)
    if excel := re.match(r'"?sep=([^"\r\n])"?(\r\n|\r|\n|$)', head, re.IGNORECASE):
        f.readline()
        return form.sep or excel[1], 1
    if form.sep:
        return form.sep, 0
    header = re.split(r'[\r\n]', head.lstrip('\r\n'), maxsplit=1)[0]
    by_kind = '\t' if kind == '.tsv' else ','
    likely = dict.fromkeys([form.like and form.like.sep, by_kind, *SEPARATORS])
    found = [c for c in likely if c and c in header]
    for c in found:
        if is_consistent(head, c):
            return c, 0
    return by_kind if by_kind in found or not found else max(found, key=header.count), 0


def is_consistent(head, sep):
    """Do the first rows have as many fields as the header, and more than one?"""
    widths = []
    try:
        reader = csv.reader(io.StringIO(head, newline=''), delimiter=sep, strict=True)
        for fields in itertools.islice(reader, 20):
            widths += [len(fields)] if fields else []
    except csv.Error:  # the end of head may be inside a record
        pass
    whole = widths if len(head) < 1 << 16 else widths[:-1]
    return len(set(whole)) == 1 and whole[0] > 1


def json_rows(f, path):
    """Yield ('path, line N', {key: value}) of each line that is not blank."""
    for i, line in enumerate(f, 1):
        if line.strip():
            where = f'{path}, line {i}'
            try:
                row = files.parse_json(line)
            except ValueError as e:
                why = f'not valid JSON ({e}); write one object per line'
                raise UserError(f'{where}: {why}') from None
            if not isinstance(row, dict):
                why = 'not a JSON object; write one object per line, with a text and a label'
                raise UserError(f'{where}: {why}')
            yield where, row


def rows_of(path, form, notes):
    """Yield ('path, line N', {column: field}) of each row of a .csv, .tsv or .jsonl file."""
    with opened(path, form.encoding, form.like and form.like.encoding) as f:
        if kind_of(path) != '.jsonl':
            yield from csv_rows(f, path, form, notes)
        elif form.sep:
            raise UserError(f'--sep does nothing with {path}, a .jsonl file; leave it out')
        else:
            yield from json_rows(f, path)


def read_table(path, form=GUESSED, notes=None):
    """One .csv or .tsv (header, standard quoting) or .jsonl file -> its rows, form with the columns
    that were read; a row is (text, label). Appends to notes."""
    refuse_other(path)
    notes = [] if notes is None else notes
    if kind_of(path) not in KINDS:
        known = 'a .csv, .tsv or .jsonl file, plain or compressed (.csv.gz)'
        raise UserError(f'{path}: expected {known}')
    table = list(rows_of(path, form, notes))
    if not table:
        below = '' if kind_of(path) == '.jsonl' else ' below a header'
        raise UserError(f'{path} is empty: it has no rows; add some{below}')
    text_col, label_col = pick_columns(path, table, form)
    text_cols, rows, missing = parts(text_col, table[0][1]), [], []
    for where, r in table:
        y = r.get(label_col)
        y = json.dumps(y) if isinstance(y, int) else y  # 1 -> '1', True -> 'true'
        if y is None or isinstance(y, str) and not y.strip():
            missing.append(where)
        elif not isinstance(y, str):
            raise UserError(f'{where}: the label {label_col!r} is no string or whole number')
        else:
            rows.append((text_of(where, r, text_cols), mend(y).strip()))
    if missing and not (form.drop_unlabelled and rows):
        why = f'is missing, as in {len(missing):,} of {len(table):,} rows'
        hint = 'complete them' + ', or add --drop_unlabelled' * (not form.drop_unlabelled)
        raise UserError(f'{missing[0]}: the label {label_col!r} {why}; {hint}')
    if missing:
        notes.append(f'{counted(len(missing), "row")} of {path} without a label dropped')
    return rows, form._replace(text_col=text_col, label_col=label_col)


def text_of(where, row, text_cols):
    for col in text_cols:
        if not isinstance(row.get(col), str):
            why = f'the text {col!r} is missing or no string; give every row one'
            raise UserError(f'{where}: {why}')
    return mend(' '.join(row[c] for c in text_cols if row[c]))


def read_rows(path, form=GUESSED, notes=None):
    """Yield ({column: field}, text) of a file, one by one: the text column of .csv / .tsv, the text
    key of .jsonl; every line of any other file as ({'text': line}, line)."""
    refuse_other(path)
    if kind_of(path) in KINDS:
        text_cols = None
        notes = [] if notes is None else notes
        for where, row in rows_of(path, form, notes):
            text_cols = text_cols or only_text(where, row, form, notes)
            yield row, text_of(where, row, text_cols)
        return
    with opened(path, form.encoding, form.like and form.like.encoding, newline=None) as f:
        if flag := next((n for n in ('text_col', 'sep') if getattr(form, n)), None):
            raise UserError(f'--{flag} does nothing with {path}, a text per line; leave it out')
        for line in f:
            text = line.rstrip('\n')
            yield {'text': text}, text


def only_text(where, columns, form, notes):
    """-> the text columns: those asked for, those of form.like, or the one with a usual name."""
    asked = form.text_col or remembered(columns, form, 'text_col')
    if not asked:
        asked = usual(columns, TEXT_NAMES)
        if not asked and len(columns) == 1:
            (asked,) = columns
            notes.append(f'{asked!r} is read as the header, not as a text')
    if not asked or not set(parts(asked, columns)) <= set(columns):
        why = f'there is no column {asked or "text"!r}'
        have = f'it has {", ".join(map(repr, columns))}; name one with --text_col'
        raise UserError(f'{where}: {why}: {have}')
    return parts(asked, columns)


def parts(col, columns):
    """-> the columns that a name stands for: several of 'title,body', if none has that name."""
    several = [c.strip() for c in col.split(',')]
    return [col] if col in columns or not all(several) else several


def remembered(columns, form, which):
    """The text or label column of the run's own file if this one has it, else None."""
    col = getattr(form.like, which) if form.like else None
    return col if col and set(parts(col, columns)) <= set(columns) else None


def mend(text):
    """Replace halves of surrogate pairs, which JSON can hold and files cannot, by U+FFFD."""
    if text.isascii():
        return text
    return text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')


def usual(columns, names):
    return next((c for n in names.split() for c in columns if c.lower() == n), None)


def pick_columns(path, table, form):
    """-> text column, label column: those asked for; else those of form.like; else those with a
    usual name; else, of two columns, the one with fewer values is the label."""
    columns = list({col: None for _, row in table for col in row})  # of .jsonl all rows'
    have = f'it has {", ".join(map(repr, columns))}; '
    have += 'name two of them with --text_col and --label_col'
    asked = parts(form.text_col, columns) if form.text_col else []
    for col in (*asked, form.label_col):
        if col and col not in columns:
            raise UserError(f'{path} has no column {col!r}: {have}')
    t = form.text_col or remembered(columns, form, 'text_col')
    y = form.label_col or remembered(columns, form, 'label_col')
    t = t or usual([c for c in columns if c != y], TEXT_NAMES)
    y = y or usual([c for c in columns if not t or c not in parts(t, columns)], LABEL_NAMES)
    named = [c for i, c in enumerate(columns, 1) if c != f'column {i}']
    if len(named) == 2 and not (t and y) and (not t or t in named):
        if not (t or y):
            values = {c: {str(r.get(c)) for _, r in table} for c in named}
            if any(c in values[c] for c in named):
                why = 'seems to have no header: its first line looks like a row'
                raise UserError(f'{path} {why}; put text,label above')
            first, second = named
            y = first if len(values[first]) < len(values[second]) else second
        t = t or next(c for c in named if c != y)
        y = y or next(c for c in named if c != t)
    if not (t and y):
        which = 'label' if t else 'text'
        hint = 'if these are no names, put names above the first row'
        raise UserError(f'{path}: cannot tell which column is the {which}: {have}; {hint}')
    return t, y


def read_own(path, form=GUESSED, notes=None):
    """A user's file or folder -> {split: rows}, form with the columns that were read"""
    paths = split_files(path) if os.path.isdir(path) else {'train': path}
    rows = {}
    for split in [s for s in STEMS if s in paths]:  # train first: the others use its columns
        rows[split], form = read_table(paths[split], form, notes)
    return rows, form


def split_files(folder):
    """{split: path} of the files of a folder that are called as a split is."""
    found = {}
    for file in sorted(os.listdir(folder)):
        kind, stem = kind_of(file), os.path.splitext(file.lower().removesuffix('.gz'))[0]
        for split in STEMS:
            if stem in STEMS[split] and (kind in KINDS or split == 'train' and kind in ADVICE):
                if split in found:
                    both = f'{found[split]} and {file}'
                    raise UserError(f'{folder} has both {both}; keep one of them')
                found[split] = file
    if 'train' not in found:
        why = 'has no train.csv, train.tsv or train.jsonl'
        raise UserError(f'{folder} {why}; add one, or name a file')
    return {split: os.path.join(folder, file) for split, file in found.items()}
