"""lib/download.py."""

import contextlib
import hashlib
import io
import os
import random
import subprocess
import sys
import threading
import time
import zipfile

import data
import lib.download
import lib.files
from lib.download import file_or_member
from lib.files import Unavailable, UserError, hash_file, read_bytes
from tests.helpers import (
    TOP,
    answer,
    environment,
    fresh_cache,
    patched,
    quiet,
    raises,
    server,
    tmp,
    write,
)

BODY = bytes(range(256)) * 4000  # 1 MB


GOOD = dict(size=len(BODY), sha256=hashlib.sha256(BODY).hexdigest())


def get(urls, **checks):
    """Download into a fresh folder -> (bytes, what lies in the folder)."""
    dest = os.path.join(tmp(), 'sub', 'file')
    quiet(lib.download.download, urls, dest, **checks)
    return read_bytes(dest), os.listdir(os.path.dirname(dest))


def test_download():
    def moved(h):
        h.send_response(302)
        h.send_header('Location', '/whole')
        h.send_header('Content-Length', '0')
        h.end_headers()

    with server({'/whole': BODY, '/moved': moved}) as (at, asked):
        for checks in ({}, GOOD, dict(md5=hashlib.md5(BODY).hexdigest())):
            assert get([at + '/whole'], **checks) == (BODY, ['file'])
        assert get([at + '/moved'], **GOOD) == (BODY, ['file'])
        assert get([at + '/lost', at + '/whole'], **GOOD) == (BODY, ['file'])
        assert get(['http://127.0.0.1:1/refused', at + '/whole'], **GOOD) == (BODY, ['file'])
        asked.clear()
        e = raises(Unavailable, get, [at + '/lost', at + '/lost2'], match='404 Not Found')
        assert '/lost:' in str(e) and '/lost2:' in str(e) and '--data_dir' in str(e)
        assert '\n' not in str(e) and len(asked) == 2
        raises(Unavailable, lambda: get([at + '/whole'], sha256='0' * 64), match='checksum')
        raises(Unavailable, lambda: get([at + '/whole'], size=5), match='size')
        raises(Unavailable, get, ['http://127.0.0.1:1/refused'], match='no connection')
        asked_for = []

        def watched(path, kind='sha256'):
            asked_for.append(kind)
            return hash_file(path, kind)

        with patched(lib.files, 'hash_file', watched):
            assert get([at + '/whole'], **GOOD) == (BODY, ['file'])
            assert get([at + '/whole'], size=len(BODY)) == (BODY, ['file'])
        assert 'md5' not in asked_for, 'nobody asked for it'


def test_download_resumes():
    cuts = []

    def cut(h):  # breaks off twice
        cuts.append(h.headers.get('Range'))
        answer(h, BODY, stop=300_000 if len(cuts) < 3 else None)

    def always_cut(h):
        answer(h, BODY, ranges=False, stop=300_000)

    with server(
        {
            '/cut': cut,
            '/never': always_cut,
            '/whole': BODY,
            '/plain': lambda h: answer(h, BODY, ranges=False),
            '/other': b'z' * len(BODY),
        }
    ) as (at, asked):
        assert get([at + '/cut'], **GOOD) == (BODY, ['file'])
        assert cuts[0] is None and len(cuts) == 3 and all(c.startswith('bytes=') for c in cuts[1:])
        dest = os.path.join(tmp(), 'file')
        raises(
            Unavailable,
            lambda: quiet(lib.download.download, [at + '/never'], dest, **GOOD),
            match='broke off',
        )
        assert os.listdir(os.path.dirname(dest)) == ['file.part']
        assert 0 < os.path.getsize(dest + '.part') <= 300_000
        assert get([at + '/never', at + '/whole'], **GOOD) == (
            BODY,
            ['file'],
        )  # the second address goes on from the first
        for left, url, requests_made in (
            (BODY[:1000], '/whole', 1),
            (BODY[:1000], '/plain', 1),
            (b'junk' * 99, '/whole', 2),
            (BODY, '/whole', 1),
            (BODY + b'more', '/whole', 2),
            (BODY[:1000], '/other', 2),
        ):
            dest = write('file.part', left)[:-5]
            asked.clear()
            if url == '/other':
                raises(
                    Unavailable,
                    lambda: quiet(lib.download.download, [at + url], dest, **GOOD),
                    match='checksum',
                )
                assert not os.listdir(os.path.dirname(dest))
            else:
                quiet(lib.download.download, [at + url], dest, **GOOD)
                assert read_bytes(dest) == BODY and os.listdir(os.path.dirname(dest)) == ['file']
            assert len(asked) == requests_made, (url, asked)
            assert asked[0][1] == f'bytes={len(left)}-', (url, asked)


def test_download_from_bad_servers():
    """Whatever a server does: the complete and checked file, or one clear sentence, and what
    arrived is kept. The next try, at a good server, succeeds."""
    over, first = threading.Event(), BODY[:400_000]

    def told(status, *headers, body=b''):
        def reply(h):
            h.send_response(status)
            for k, v in headers:
                h.send_header(k, v)
            h.end_headers()
            with contextlib.suppress(OSError):  # the client may hang up
                h.wfile.write(body)

        return reply

    def stalls(h, n):
        h.send_response(206 if h.headers.get('Range') else 200)
        h.send_header(
            'Content-Length', str(len(BODY) - (len(first) if h.headers.get('Range') else 0))
        )
        h.end_headers()
        h.wfile.write(BODY[:n])
        h.wfile.flush()
        over.wait(20)

    def endless(h):
        h.send_response(200)
        h.end_headers()
        with contextlib.suppress(OSError):
            while not over.is_set():
                h.wfile.write(BODY)

    def to(where):
        return told(302, ('Location', where), ('Content-Length', '0'))

    size = ('Content-Length', str(len(BODY)))
    # name: (server, words of the complaint, bytes kept of nothing, bytes kept of a first part)
    servers = {
        'stalls': (lambda h: stalls(h, 0), 'timed out', 0, 400_000),
        'stalls-later': (
            lambda h: stalls(h, 0 if h.headers.get('Range') else 400_000),
            'timed out',
            400_000,
            400_000,
        ),
        '404': (told(404, size), '404', 0, 400_000),
        '416': (told(416, ('Content-Length', '0')), '', 0, 0),
        '429': (
            told(429, ('Retry-After', '7'), ('Content-Length', '0')),
            '429 Too Many Requests, try again in 7 s',
            0,
            400_000,
        ),
        '503': (told(503, ('Retry-After', 'Mon, 01 Jan 2029 00:00:00 GMT')), '503', 0, 400_000),
        'loop': (to('/loop'), 'redirects in a circle', 0, 400_000),
        'nowhere': (to('ftp://127.0.0.1/x'), '', 0, 400_000),
        'odd': (to('http://[::'), '', 0, 400_000),
        'refused': (to('http://127.0.0.1:1/x'), 'no connection', 0, 400_000),
        'page': (lambda h: answer(h, b'<html>log in first</html>'), 'wrong size or checksum', 0, 0),
        'other': (told(200, size, body=BODY[::-1]), 'wrong size or checksum', 0, 0),
        'short': (lambda h: answer(h, BODY[:-1]), 'wrong size or checksum', 0, 0),
        'long': (lambda h: answer(h, BODY + b'x'), 'wrong size or checksum', 0, 0),
        'endless': (endless, 'wrong size or checksum', 0, 0),
        'lies': (
            told(200, ('Content-Length', str(10 << 30)), body=BODY[:500_000]),
            'broke off',
            500_000,
            500_000,
        ),
        'empty': (told(200), 'wrong size', 0, 0),
        'negative': (told(200, ('Content-Length', '-5'), body=BODY[:9]), 'wrong size', 0, 0),
        'no-number': (told(200, ('Content-Length', 'x'), body=BODY[:9]), 'wrong size', 0, 0),
        'no-http': (lambda h: h.wfile.write(b'\0\1\2 hello\r\n\r\n'), '', 0, 400_000),
    }
    with (
        server({'/good': BODY, **{'/' + name: it[0] for name, it in servers.items()}}) as (
            at,
            asked,
        ),
        patched(lib.download, 'TIMEOUT', (5, 0.3)),
    ):
        for name, (_, match, *kept) in servers.items():
            for start, left in zip((b'', first), kept):
                dest = write('file.part', start)[:-5]
                if not start:
                    os.remove(dest + '.part')
                asked.clear()
                e = raises(
                    Unavailable,
                    lambda: quiet(lib.download.download, [f'{at}/{name}'], dest, **GOOD),
                    match=match,
                )
                assert f'/{name}: ' in e, (name, e, len(asked))
                assert '--data_dir' in e, (name, e, len(asked))
                assert len(asked) < 35, (name, e, len(asked))
                there = os.path.getsize(dest + '.part') if os.path.exists(dest + '.part') else 0
                assert not os.path.exists(dest), (name, there)
                assert left - (1 << 16) < there <= left, (
                    name,
                    there,
                )  # a block that did not come whole is lost
                asked.clear()
                quiet(lib.download.download, [f'{at}/good'], dest, **GOOD)
                assert read_bytes(dest) == BODY and os.listdir(os.path.dirname(dest)) == ['file']
                assert asked == [('/good', f'bytes={there}-' if there else None)], (name, asked)
        once = []

        def stalls_once(h):
            once.append(h.headers.get('Range'))
            stalls(h, 400_000) if len(once) == 1 else answer(h, BODY)

        with server({'/once': stalls_once}) as (at, _):
            assert get([at + '/once'], **GOOD) == (BODY, ['file'])
            assert once == [None, f'bytes={400_000 >> 16 << 16}-']
        over.set()


def test_datasets_from_downloads():
    sms = ''.join(f'{"ham" if i % 3 else "spam"}\tmessage {i}\n' for i in range(60)).encode()

    def zipped(**members):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, 'w', zipfile.ZIP_DEFLATED) as z:
            for name, content in members.items():
                z.writestr(name.replace('__', '/').replace('_tsv', '.tsv'), content)
        return buffer.getvalue()

    sst2 = 'sentence\tlabel\n' + ''.join(f'phrase {i} \t{i % 2}\n' for i in range(60))
    with (
        server(
            {
                '/bad.zip': b'<html>sorry</html>',
                '/sms.zip': zipped(readme='x', SMSSpamCollection=sms),
                '/sst2.zip': zipped(**{'SST-2__train_tsv': sst2, 'SST-2__dev_tsv': sst2}),
            }
        ) as (at, asked),
        fresh_cache() as cache,
        environment(NANOCLS_DATA=None),
    ):
        got = quiet(
            file_or_member,
            'sms_spam/SMSSpamCollection',
            'sms_spam/x.zip',
            'SMSSpamCollection',
            None,
            [at + '/bad.zip', at + '/sms.zip'],
            member='SMSSpamCollection',
            sha256=hashlib.sha256(sms).hexdigest(),
        )[0]
        assert got == sms and os.listdir(os.path.join(cache, 'sms_spam')) == ['x.zip']
        quiet(lib.download.download, [at + '/sst2.zip'], os.path.join(cache, 'sst2', 'SST-2.zip'))
        d = data.load('sst2')
        assert len(d.test.y) == 60 and len(d.train.y) == 54
        write('sst2/SST-2.zip', b'PK no zip', cache)
        raises(UserError, data.load, 'sst2', match='not the published zip')


def test_weights():
    def redirect(h):
        h.send_response(302)
        h.send_header('Location', '/blob')
        h.send_header('x-linked-size', str(len(BODY)))
        h.send_header('x-linked-etag', f'"{GOOD["sha256"]}"')
        h.send_header('Content-Length', '0')
        h.end_headers()

    home = tmp()
    here = dict(NANOCLS_DATA=None, HF_HUB_CACHE=None, HF_HOME=home)

    def nonsense(h):
        answer(h, BODY, headers=(('x-linked-size', 'many'), ('x-linked-etag', '"no hash"')))

    with (
        server(
            {
                '/distilbert/distilgpt2/resolve/main/model.safetensors': redirect,
                '/blob': BODY,
                '/openai-community/gpt2-large/resolve/main/model.safetensors': nonsense,
                '/openai-community/gpt2/resolve/main/model.safetensors': BODY,
            }
        ) as (at, asked),
        fresh_cache() as cache,
    ):
        with environment(HF_ENDPOINT=at, **here):
            path = quiet(lib.download.weights, 'distilgpt2')
            assert path == os.path.join(cache, 'models/distilgpt2/model.safetensors')
            assert read_bytes(path) == BODY
            asked.clear()
            assert lib.download.weights('distilgpt2') == path and not asked
            raises(
                Unavailable, lambda: quiet(lib.download.weights, 'gpt2'), match='size or checksum'
            )
            raises(Unavailable, lambda: quiet(lib.download.weights, 'gpt2-xl'), match='404')
            raises(Unavailable, lambda: quiet(lib.download.weights, 'gpt2-large'), match='checksum')
            for folder in ('models--gpt2', 'models--openai-community--gpt2'):
                snapshot = os.path.join(home, 'hub', folder, 'snapshots', 'abc')
                os.makedirs(snapshot)
                path = write('model.safetensors', b'x', snapshot)
                assert lib.download.weights('gpt2') == path
        own = tmp()
        os.makedirs(os.path.join(own, 'models', 'gpt2'))
        path = write('models/gpt2/model.safetensors', b'x', own)
        assert lib.download.weights('gpt2', own) == path


def test_find():
    folder, cache = tmp(), tmp()
    with environment(NANOCLS_CACHE=cache, NANOCLS_DATA=None):
        assert lib.download.find('x/y.csv') is None
        os.mkdir(os.path.join(cache, 'x')), os.mkdir(os.path.join(folder, 'x'))
        in_cache = write('x/y.csv', b'', cache)
        assert lib.download.find('x/y.csv') == lib.download.find('x/y.csv', folder) == in_cache
        in_folder = write('x/y.csv', b'', folder)
        assert lib.download.find('x/y.csv', folder) == in_folder
        assert lib.download.find('x/*.csv') == in_cache
        with environment(NANOCLS_DATA=folder):
            assert lib.download.find('x/y.csv') == in_folder
        with environment(NANOCLS_DATA=os.path.join(folder, 'none')):
            raises(UserError, lib.download.find, 'x', match='$NANOCLS_DATA')


def test_two_processes_download_one_file():
    """The second waits for the first and uses its file: one request, no mixed-up file."""
    content, served = random.Random(0).randbytes(300_000), []

    def slowly(h):
        served.append(h.path)
        h.send_response(200)
        h.send_header('Content-Length', str(len(content)))
        h.end_headers()
        for start in range(0, len(content), 50_000):
            h.wfile.write(content[start : start + 50_000])
            time.sleep(0.2)

    dest, digest = os.path.join(tmp(), 'file'), hashlib.sha256(content).hexdigest()
    env = {k: v for k, v in os.environ.items() if 'proxy' not in k.lower()}
    with server({'/file': slowly}) as (address, _):
        checks = dict(size=len(content), sha256=digest)
        code = 'from lib import download\n'
        code += f'download.download([{address + "/file"!r}], {dest!r}, **{checks!r})'
        how = dict(cwd=TOP, stderr=subprocess.PIPE, text=True, env=env)
        ps = [subprocess.Popen([sys.executable, '-c', code], **how) for _ in range(3)]
        said = [p.communicate()[1] for p in ps]
    assert [p.returncode for p in ps] == [0, 0, 0], said
    folder = os.listdir(os.path.dirname(dest))
    assert len(served) == 1 and folder == ['file'], (served, folder)
    assert read_bytes(dest) == content
