"""Files that come from elsewhere: looked up in a data folder and the cache, else downloaded into
the cache. Called by the rooms that read published files."""

import glob
import hashlib
import os
import re
import sys
import tarfile
import time
import zipfile

import requests

from lib import files
from lib.files import Unavailable, UserError

MAX_MEMBER = 32 << 20  # bytes of one file in an archive: the largest in use has 4 MB
MAX_UNPACKED = 1 << 30  # bytes of a whole archive, unpacked: several times IMDB's
TIMEOUT = (10, 60)  # seconds to connect, seconds without a byte
SIZES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')
HUB_NAMES = {name: f'openai-community/{name}' for name in SIZES}
HUB_NAMES['distilgpt2'] = 'distilbert/distilgpt2'
SHORT = {full: name for name, full in HUB_NAMES.items()}
GPT2 = dict(size=548105171)
GPT2['sha256'] = '248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707'


def find(rel, data_dir=None):
    """The first file that matches rel in data_dir or $NANOCLS_DATA, then in the cache; else None.
    Raises UserError if the folder is not there."""
    folder = data_dir or os.environ.get('NANOCLS_DATA')
    if folder and not os.path.isdir(folder):
        name = '--data_dir' if data_dir else '$NANOCLS_DATA'
        raise UserError(f'there is no data folder {folder}; correct {name}')
    for place in filter(None, (folder, files.cache_dir())):
        if hits := sorted(glob.glob(os.path.join(glob.escape(place), rel))):
            return hits[0]
    return None


def find_or_download(rel, urls, data_dir=None, **checks):
    return find(rel, data_dir) or download(urls, files.cached(rel), **checks)


def download(urls, dest, **checks):
    """Download to dest, trying the addresses in order -> dest. A broken connection resumes where
    it stopped, in this run or the next (dest.part). checks: see intact(). Raises Unavailable."""
    folder, part, failures = os.path.dirname(dest), dest + '.part', []
    files.make_folder(folder)
    with files.locked(folder, patience=3600):
        if os.path.exists(dest):  # another process has downloaded it
            return dest
        try:
            for url in urls:
                why = fetch_from(url, part, checks)
                if why is None:
                    os.replace(part, dest)
                    return dest
                failures.append(f'{url}: {why}')
        except OSError as e:
            raise files.cannot_write(dest, e) from None
    raise unavailable(dest, failures)


def fetch_from(url, part, checks):
    """Complete part from one address -> None, or why it failed"""
    resumed = size_of(part) > 0
    while True:
        have = size_of(part)
        try:
            fetch(url, part, have, checks.get('size'))
        except (requests.RequestException, ValueError) as e:  # ValueError: a bad redirect
            if size_of(part) > have:  # it brought something: once more, for the rest
                continue
            return reason(e)
        if intact(part, **checks):
            return None
        os.remove(part)
        if not resumed:
            return 'wrong size or checksum'
        resumed = False  # the old beginning may be at fault: once more, from byte 0


def size_of(path):
    return os.path.getsize(path) if os.path.exists(path) else 0


def unavailable(dest, failures):
    """-> the error to raise"""
    rel = os.path.relpath(dest, files.cache_dir())
    hint = f'check the network, or put the file into a folder as {rel} '
    hint += 'and name that folder with --data_dir or $NANOCLS_DATA'
    return Unavailable(f'cannot download {rel} ({"; ".join(failures)}); {hint}')


def fetch(url, part, have, size):
    """One request: append to part after its first `have` bytes. Raises RequestException if it
    fails or breaks off. Stops reading after more than `size` bytes."""
    headers = {'Accept-Encoding': 'identity'}  # Content-Length and Range count the bytes we store
    if have:
        headers['Range'] = f'bytes={have}-'
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as r:
        if r.status_code == 416 and have:  # nothing comes after what we have: the checks decide
            return
        r.raise_for_status()
        have = have if r.status_code == 206 else 0  # a server without ranges sends it all again
        total = have + told_size(r.headers.get('Content-Length'))
        print(f'downloading {url} ({total / 1e6:,.1f} MB)', file=sys.stderr)
        tty, shown = sys.stderr.isatty(), time.monotonic()
        with open(part, 'ab' if have else 'wb') as f:
            for block in r.iter_content(1 << 16):
                f.write(block)
                have += len(block)
                if size is not None and have > size:
                    return
                if time.monotonic() - shown > (0.2 if tty else 10):  # seconds between lines
                    shown = time.monotonic()
                    of = f' of {total / 1e6:,.1f}' if total else ''
                    line = f'  {have / 1e6:,.1f}{of} MB '
                    print(line, file=sys.stderr, end='\r' if tty else '\n', flush=True)
        if have < total:
            raise requests.exceptions.ChunkedEncodingError


def told_size(text):
    """A number of bytes as a server tells it; 0 if it tells none, or nonsense."""
    return int(text) if re.fullmatch('[0-9]{1,18}', text or '') else 0


def reason(e):
    """A failed request in a few words."""
    if isinstance(e, requests.TooManyRedirects):
        return 'it redirects in a circle'
    if getattr(e, 'response', None) is not None:
        wait = told_size(e.response.headers.get('Retry-After'))
        again = f', try again in {wait:,} s' * (wait > 0)
        return f'{e.response.status_code} {e.response.reason}{again}'
    if isinstance(e, requests.exceptions.ChunkedEncodingError):
        return 'the connection broke off'
    # in mid-file, requests reports a timeout as a ConnectionError
    if isinstance(e, requests.Timeout) or 'timed out' in str(e):
        return 'timed out'
    return 'no connection' if isinstance(e, requests.ConnectionError) else str(e)


def intact(path, size=None, sha256=None, md5=None, member=None):
    """Does a file have the size (bytes) and checksums that are given? member: it is a zip, and
    sha256 is that of this file in it."""
    if size not in (None, os.path.getsize(path)):
        return False
    if md5 and md5 != files.hash_file(path, 'md5'):
        return False
    if not sha256:
        return True
    if not member:
        return sha256 == files.hash_file(path)
    try:
        return sha256 == hashlib.sha256(zip_member(path, member)).hexdigest()
    except UserError:  # not a zip, or another one
        return False


def zip_member(path, name):
    """The bytes of the member whose name ends like this; nothing is unpacked to disk."""
    try:
        with zipfile.ZipFile(path) as z:
            for info in z.infolist():
                if ('/' + info.filename).endswith('/' + name) and info.file_size <= MAX_MEMBER:
                    # zipfile unpacks other compressions without a limit
                    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                        raise zipfile.BadZipFile('another compression')
                    with z.open(info) as f:
                        return f.read(info.file_size)  # unpacks no more, and checks the CRC
        why = f'it has no {name} of at most {MAX_MEMBER:,} bytes'
    except Exception as e:  # zipfile raises a dozen types for a broken file
        why = e
    text = f'is not the published zip file ({why}); remove it to have it downloaded again'
    raise UserError(f'{path} {text}')


def file_or_member(rel, archive, inside, data_dir, urls, **checks):
    """(bytes, name) of a plain file, or else of the same file in the published zip."""
    if path := find(rel, data_dir):
        return files.read_bytes(path), path
    path = find_or_download(archive, urls, data_dir, **checks)
    return zip_member(path, inside), f'{path}, {inside}'


class LimitedReader:
    """A file that raises an error after so many bytes: what a small archive unpacks to must not
    fill the memory."""

    def __init__(self, f, limit):
        self.f, self.left = f, limit

    def read(self, n):
        # n, not the bytes that come: tarfile may look for the end of a member of 10 GB
        self.left -= n
        if self.left < 0:
            raise tarfile.ReadError('it unpacks to far more than that one, or claims to')
        return self.f.read(n)


def weights(name, data_dir=None):
    """The path of a published model's model.safetensors: in a data folder, in the cache, in Hugging
    Face's cache, or downloaded."""
    rel = f'models/{name}/model.safetensors'
    if path := find(rel, data_dir):
        return path
    home = os.environ.get('HF_HOME') or '~/.cache/huggingface'
    hub = os.path.expanduser(os.environ.get('HF_HUB_CACHE') or os.path.join(home, 'hub'))
    for repo in (HUB_NAMES[name].replace('/', '--'), name):  # as the user asked for it
        snapshot = os.path.join('snapshots', '*', 'model.safetensors')
        if hits := glob.glob(os.path.join(hub, f'models--{repo}', snapshot)):
            return hits[0]
    host = (os.environ.get('HF_ENDPOINT') or 'https://huggingface.co').rstrip('/')
    url, checks = f'{host}/{HUB_NAMES[name]}/resolve/main/model.safetensors', GPT2
    if name != 'gpt2':
        headers = {'Accept-Encoding': 'identity'}
        try:  # the redirect itself has size and sha256 of the file it leads to
            reply = requests.head(url, headers=headers, timeout=TIMEOUT).headers
        except requests.RequestException as e:
            raise unavailable(files.cached(rel), [f'{url}: {reason(e)}']) from None
        size = told_size(reply.get('x-linked-size')) or None
        checks = dict(size=size, sha256=reply.get('x-linked-etag', '').strip('"') or None)
    return download([url], files.cached(rel), **checks)
