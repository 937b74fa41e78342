"""Tokenizers, and the cached token ids of many texts. Called by scripts and rooms alike."""

import hashlib
import os
import re

import numpy as np
import tiktoken

from lib import download, files
from lib.files import UserError

BPE_ADDRESS = 'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/'
BPE_SHA256 = {
    'vocab.bpe': '1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5',
    'encoder.json': '196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783',
}
# as GPT-2 was published
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
EOT = '<|endoftext|>'
# tiktoken panics on a run of a million spaces. So a longer text is cut before a space that follows
# a non-space: there GPT-2's pattern starts a new piece in any context, and the ids stay the same.
# Where there is no such place it is cut anywhere.
LONG = 100_000  # characters: 0.01-0.02 s each, even without a space
CUT = re.compile(rf'(?s:.{{1,{LONG}}}(?<=\S)(?= )|.{{1,{LONG}}})')


def tokenizer_name(vocab_size):
    """Name of the tokenizer of a vocabulary of that size. Raises UserError for any other size."""
    names = {257: 'bytes', 50257: 'gpt2'}
    if vocab_size not in names:
        known = "GPT-2's 50257 and the 257 of bytes"
        raise UserError(f'this model has {vocab_size} tokens; {known} are supported')
    return names[vocab_size]


def tokenizer(name, data_dir=None):
    """'gpt2' (OpenAI's two files, sha256 checked) or 'bytes' (256 bytes and <|endoftext|>)
    -> tiktoken.Encoding"""
    if name == 'bytes':
        ranks = {bytes([i]): i for i in range(256)}
        kw = dict(pat_str=r'[\s\S]+', mergeable_ranks=ranks, special_tokens={EOT: 256})
        return tiktoken.Encoding('bytes', **kw)
    assert name == 'gpt2', name
    content = {}
    for file, sha256 in BPE_SHA256.items():
        rel, urls = f'gpt2_bpe/{file}', [BPE_ADDRESS + file]
        path = download.find_or_download(rel, urls, data_dir, sha256=sha256)
        content[file] = files.read_bytes(path)
        if hashlib.sha256(content[file]).hexdigest() != sha256:
            why = f"is not GPT-2's {file} (its sha256 differs)"
            raise UserError(f'{path} {why}; replace or remove it')
    byte = byte_of_character()
    ranks = {bytes([b]): i for i, b in enumerate(byte.values())}
    for i, merge in enumerate(content['vocab.bpe'].decode().split('\n')[1:-1]):  # line 1: version
        ranks[bytes(byte[c] for c in merge if c != ' ')] = 256 + i
    kw = dict(mergeable_ranks=ranks, special_tokens={EOT: len(ranks)})
    return tiktoken.Encoding('gpt2', pat_str=GPT2_PATTERN, **kw)


def byte_of_character():
    """{character: byte} of GPT-2's files: a printable Latin-1 byte is written as itself, the others
    as characters 256, 257, ..."""
    plain = [b for b in range(256) if chr(b).isprintable() and chr(b) != ' ']
    others = [b for b in range(256) if b not in plain]
    return {**{chr(b): b for b in plain}, **{chr(256 + i): b for i, b in enumerate(others)}}


class Tokens:
    """The ids of many texts in one flat array: t[i] is a view, (length,) uint16."""

    def __init__(self, flat, starts):
        self.flat, self.starts = flat, starts  # (n_tokens,) uint16, (n + 1,) int64
        self.lengths = np.diff(starts)  # (n,) int64

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, i):
        return self.flat[self.starts[i] : self.starts[i + 1]]


def listed(texts):
    """Texts as a list. Raises TypeError, which names the place, for anything but strings."""
    if isinstance(texts, (str, bytes)):
        why = f'a list of strings is needed, not one {type(texts).__name__}'
        raise TypeError(f'{why}: put it into brackets, [text]')
    texts = list(texts)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            advice = 'leave it out, give it a text (an empty one is read as well), or use str(...)'
            raise TypeError(f'texts[{i}] is {repr(text)[:40]}, which is no string: {advice}')
    return texts


def cut_note(lengths, max_length):
    """[a sentence] if max_length cuts more than a fifth of the tokens of texts of these lengths
    (N,), else []."""
    share = 1 - np.minimum(lengths, max_length).sum() / max(1, lengths.sum())
    advice = 'train with more, or let eval.py and predict.py read whole texts with --windows'
    text = f'{100 * share:.0f} % of the tokens are cut by --max_length {max_length}: {advice}'
    return [text] if share > 0.2 else []


def tokenize(enc, texts, cache=True):
    """Texts -> Tokens. '<|endoftext|>' inside a text is plain text; an empty text becomes that
    one special id. cache: keep the ids in the cache, under a hash of all that they depend on."""
    if not cache:
        return encoded(enc, texts)
    path = files.cached(f'tokens/{key_of(enc, texts)}.npz')
    tokens = read_cached(path, len(texts), enc.n_vocab)
    if tokens is not None:
        some = range(0, len(texts), 1 + len(texts) // 4)
        now = encoded(enc, [texts[i] for i in some])
        if all(np.array_equal(tokens[i], ids) for i, ids in zip(some, now)):
            return tokens  # else they are read otherwise now, by an edit that the hash cannot see
    tokens = encoded(enc, texts)
    arrays = dict(flat=tokens.flat, starts=tokens.starts)
    with files.optional():
        files.write_atomic(path, lambda f: np.savez(f, **arrays), every_rank=True)
    return tokens


def encoded(enc, texts):
    """Texts -> Tokens, computed now."""
    assert enc.n_vocab <= 1 << 16, 'ids are stored in 16 bits'
    arrays = []
    for start in range(0, len(texts), 4096):  # IMDB as lists of Python ints would take 0.5 GB
        part = texts[start : start + 4096]
        short = ['' if len(t) > LONG else t for t in part]
        ids = enc.encode_ordinary_batch(short, num_threads=os.cpu_count() or 1)
        for i, t in enumerate(part):
            if len(t) > LONG:
                ids[i] = [x for piece in CUT.findall(t) for x in enc.encode_ordinary(piece)]
            arrays.append(np.array(ids[i] or [enc.eot_token], np.uint16))
    starts = np.cumsum([0] + [len(a) for a in arrays], dtype=np.int64)
    flat = np.concatenate(arrays) if arrays else np.empty(0, np.uint16)
    return Tokens(flat, starts)


def key_of(enc, texts):
    """Hash of the tokenizer, of this file, an edit of which counts as well, and of the texts."""
    h = hashlib.sha256(f'{files.hash_file(__file__)} {enc.name} {enc.n_vocab}'.encode())
    for t in texts:
        raw = t.encode('utf-8', 'surrogatepass')
        h.update(b'%d:' % len(raw) + raw)
    return h.hexdigest()[:32]


def read_cached(path, n, n_vocab):
    """-> Tokens of n texts, or None if the file is missing or damaged"""
    try:
        with np.load(path, allow_pickle=False) as z:
            flat, starts = z['flat'], z['starts']
        kinds = flat.dtype, starts.dtype, starts.shape, flat.shape
        valid = kinds == (np.uint16, np.int64, (n + 1,), (starts[-1],)) and starts[0] == 0
        valid = valid and (np.diff(starts) > 0).all() and flat.max(initial=0) < n_vocab
        return Tokens(flat, starts) if valid else None
    except Exception:  # numpy raises many types for a damaged file
        return None


def piece_starts(lengths, limit):
    """Rows of ascending lengths (n,), cut into pieces of at most `limit` tokens, padding included;
    a longer row is a piece of its own. -> first row of each piece"""
    starts = [0]
    for i, n in enumerate(lengths.tolist()):
        if i > starts[-1] and (i + 1 - starts[-1]) * n > limit:
            starts.append(i)
    return starts


def even_pieces(lengths, limit):
    """piece_starts with the lowest limit that gives no more pieces: else the last piece could be a
    single row, and count as a whole step."""
    count, low, high = len(piece_starts(lengths, limit)), 0, limit
    while high - low > max(1, limit // 100):
        middle = (low + high) // 2
        fits = len(piece_starts(lengths, middle)) <= count
        low, high = (low, middle) if fits else (middle, high)
    return piece_starts(lengths, high)
