"""A user's text files opened: what kind they are, .gz, encodings. Called by lib/flags.py,
lib/runfolder.py, lib/summary.py and lib/tables.py."""

import codecs
import contextlib
import gzip
import io
import os
import zlib

from lib.files import UserError

KINDS = ('.csv', '.tsv', '.jsonl')
TO_CSV = "with pandas: read_parquet(FILE).to_csv('data.csv', index=False)"
TO_JSONL = "with pandas: read_json(FILE).to_json('data.jsonl', orient='records', lines=True)"
ADVICE = dict.fromkeys(('.xlsx', '.xls', '.ods'), 'save it as "CSV UTF-8" in your spreadsheet')
ADVICE.update(dict.fromkeys(('.zip', '.bz2', '.xz', '.zst'), 'unpack it, or compress it with gzip'))
ADVICE['.parquet'] = f'convert it to CSV, {TO_CSV}'
ADVICE['.json'] = f'name it .jsonl if it has an object per line, else convert it, {TO_JSONL}'
# UTF-32 first: its little-endian mark begins with that of UTF-16
MARKS = dict.fromkeys((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE), 'utf-32')
MARKS.update(dict.fromkeys((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE), 'utf-16'))


def kind_of(path):
    """The end of a file's name in lower case, of NAME.csv.gz `.csv`."""
    stem, kind = os.path.splitext(path.lower())
    return os.path.splitext(stem)[1] if kind == '.gz' else kind


def refuse_other(path):
    """Raise UserError for a kind of file that is not read, with the way out."""
    if (kind := kind_of(path)) in ADVICE:
        raise UserError(f'{path}: {kind} files are not read; {ADVICE[kind]}')


def is_encoding(name):
    """Is this the name of a text encoding that can decode any file?"""
    try:
        codecs.getincrementaldecoder(name)
        return ''.encode(name).decode(name) == '' and name.lower() not in ('idna', 'punycode')
    except (LookupError, TypeError, ValueError):
        return False


def is_separator(sep):
    """Can this character separate the fields of a table?"""
    one = isinstance(sep, str) and len(sep) == 1
    return one and (sep == '\t' or sep.isprintable() and sep != '"')


@contextlib.contextmanager
def opened(path, encoding=None, spare=None, newline=''):
    """Inside: the text of a file, packed by gzip if it is called *.gz. encoding: default UTF-8, or
    `spare` if the file is not UTF-8. newline: as of open(); by default all line ends stay as they
    are, also inside quotes. Raises UserError with the line of a byte that cannot be decoded."""
    if spare and not encoding and not is_utf8(path):
        encoding = spare
    if encoding and not is_encoding(encoding):
        raise UserError(f'--encoding {encoding}: there is no such encoding; try utf-8 or cp1252')
    codec = codecs.lookup(encoding or 'utf-8').name
    codec = 'utf-8-sig' if codec == 'utf-8' else codec  # a byte order mark is no text
    try:
        with binary(path) as raw:
            if not encoding:
                refuse_wide(path, raw.peek(4096)[:4096])
            with io.TextIOWrapper(raw, encoding=codec, newline=newline) as f:
                yield f
    except UnicodeError as e:
        raise undecodable(path, codec, encoding, e) from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise UserError(f'{path} is no complete gzip file ({e}); restore it') from None
    except OSError as e:
        raise UserError(f'cannot read {path} ({e.strerror or e}); check the path') from None


def binary(path):
    try:
        return gzip.open(path) if path.lower().endswith('.gz') else open(path, 'rb')
    except ValueError as e:  # a zero byte in the path
        raise UserError(f'cannot read {path} ({e}); check the path') from None


def is_utf8(path):
    try:
        with opened(path) as f:
            while f.read(1 << 20):
                pass
        return True
    except UserError:
        return False


def refuse_wide(path, start):
    """Raise UserError if the start of a file looks like UTF-16 or UTF-32."""
    named = next((name for mark, name in MARKS.items() if start.startswith(mark)), None)
    if not named and start.count(0) > len(start) // 5:  # Latin text, unmarked
        kind = 'utf-32' if start.count(0) > len(start) * 2 // 3 else 'utf-16'
        named = f'{kind}-be' if start[:1] == b'\0' else f'{kind}-le'
    if named:
        raise UserError(f'{path} looks like {named[:6].upper()}; give --encoding {named}')


def undecodable(path, codec, encoding, e):
    """-> UserError for a file that is not in the encoding it was read in"""
    where, why = path, f'the file ({e})'
    try:
        with binary(path) as f:
            raw = f.read()
        raw.decode(codec)
    except UnicodeDecodeError as e:
        line = e.object[: e.start].decode(codec, 'replace').count('\n') + 1  # without a mark
        where, why = f'{path}, line {line}', f'byte 0x{e.object[e.start]:02x}'
    except (OSError, EOFError, UnicodeError, zlib.error):
        pass
    if encoding:
        return UserError(f'{where}: {why} is not {encoding}; check --encoding')
    hint = 'save the file as UTF-8, or name its encoding, for example --encoding cp1252'
    return UserError(f'{where}: {why} is not UTF-8; {hint}')
