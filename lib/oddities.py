"""What is odd about a data set's rows: one note each, nothing is changed. Called by data.py."""

import collections
import re
import unicodedata

from lib.report import counted, listing

NO_LABELS = ('nan', 'none', 'null', 'n/a', 'na')  # what programs write for a missing value
MANY = 20  # numbers as class names: ratings have fewer


def notes(rows, labels):
    """Of a user's own files. rows: {split: [(text, label)]}, labels in order -> notes"""
    every = [row for split in rows.values() for row in split]
    return [*of_texts(every), *of_labels(every, labels)]


def of_texts(rows):
    if empty := sum(not text.strip() for text, _ in rows):
        yield f'{empty:,} {"text is" if empty == 1 else "texts are"} empty'
    by_text = collections.defaultdict(set)
    for text, label in rows:
        by_text[text].add(label)
    if torn := [text for text, found in by_text.items() if len(found) > 1 and text.strip()]:
        first, several = torn[0], 'text has' if len(torn) == 1 else 'texts have'
        shown = first[:40] + '...' * (len(first) > 40)
        names = ', '.join(map(repr, sorted(by_text[first])[:4]))
        yield f'{len(torn):,} {several} more than one label, for example {shown!r}: {names}'


def of_labels(rows, labels):
    counts = collections.Counter(label for _, label in rows)
    for label in labels:
        if label.lower() in NO_LABELS:
            yield f'{counted(counts[label], "row")} of {label!r}, here a label like any other'
    alike = collections.defaultdict(list)
    for label in labels:
        plain = unicodedata.normalize('NFKC', label)
        alike[' '.join(plain.split()).casefold()].append(label)
    for same in alike.values():
        if len(same) > 1:
            names = ', '.join(map(repr, same))
            yield f'the labels {names} differ only by case or spaces, and are classes of their own'
    numbers = [float(x) for x in labels if re.fullmatch(r'[+-]?\d{1,18}(\.\d{1,18})?', x)]
    fractions = any(not x.is_integer() for x in numbers)
    if len(numbers) == len(labels) and (fractions or len(numbers) > MANY):
        why = 'each is a class of its own, and no number is predicted'
        yield f'the {len(labels):,} labels look like numbers: {why}'


def of_held_out(split, rows, texts, labels):
    """The rows of 'val' or 'test' beside the set of training texts."""
    if both := sum(text in texts for text, _ in rows):
        left = 'give other rows' if both > len(rows) // 2 else 'left as they are'
        yield f'{counted(both, f"{split} text")} also in train ({left})'
    found = {label for _, label in rows}
    if without := [label for label in labels if label not in found]:
        yield f'no {split} row of {listing(without)}: nothing is known of it there'
