"""The readers of the published data sets: found or downloaded, checked row by row. Called by
data.py.

A reader is a function of data_dir -> {split: rows}, labels in order; a row is (text, label)."""

import gzip
import io
import json
import os
import re
import tarfile

from lib import download, files, tables
from lib.files import UserError

POLARITY = ['negative', 'positive']
SST2_URLS = ['https://dl.fbaipublicfiles.com/glue/data/SST-2.zip']
AGNEWS_URL = 'https://raw.githubusercontent.com/mhjabreel/CharCnn_Keras/master/data/'
IMDB_URLS = ['https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz']
SMS_URLS = ['https://archive.ics.uci.edu/static/public/228/sms+spam+collection.zip']
SMS_URLS += ['https://f001.backblazeb2.com/file/LLMs-from-scratch/sms%2Bspam%2Bcollection.zip']
SMS_SHA256 = '7d039a24a6083ed9ef0f806ebad56bbb976e3aeb8de05669173bfdc4996c239d'


def tab_rows(raw, path, names, label_first):
    """Rows of a file with one tab per line, without quoting.  names: {label in the file: label}"""
    rows = []
    for i, line in enumerate(files.decode(raw, path).split('\n')):
        fields = line.rstrip('\r').split('\t')
        ordered = fields if label_first else fields[::-1]
        label, text = ordered if len(fields) == 2 else (None, None)
        if label in names:
            rows.append((text, names[label]))
        elif line.strip() and not (i == 0 and label == 'label'):  # not blank, not SST-2's header
            expected = f'expected a text, a tab and {" or ".join(names)}'
            raise UserError(f'{path}, line {i + 1}: {expected}; replace the file')
    return rows


def sst2(data_dir):
    rows, names, md5 = {}, dict(zip('01', POLARITY)), '9f81648d4199384278b86e315dac217c'
    for split, file in (('train', 'train.tsv'), ('test', 'dev.tsv')):  # test.tsv has no labels
        paths = f'sst2/{file}', 'sst2/SST-2.zip', f'SST-2/{file}'
        raw, path = download.file_or_member(*paths, data_dir, SST2_URLS, md5=md5)
        rows[split] = tab_rows(raw, path, names, label_first=False)
    return rows, POLARITY


def agnews(data_dir):
    rows, labels = {}, ['World', 'Sports', 'Business', 'Sci/Tech']
    md5s = dict(train='b1a00f826fdfbd249f79597b59e1dc12', test='d52ea96a97a2d943681189a97654912d')
    for split, md5 in md5s.items():
        rel = f'ag_news_csv/{split}.csv'
        path = download.find_or_download(rel, [AGNEWS_URL + rel], data_dir, md5=md5)
        rows[split] = []
        text = io.StringIO(files.decode(files.read_bytes(path), path), newline='')
        for where, r in tables.csv_records(text, path, ','):
            if len(r) != 3 or r[0] not in ('1', '2', '3', '4'):
                expected = 'expected class 1-4, title, description'
                raise UserError(f'{where}: {expected}; replace the file')
            rows[split].append((f'{r[1]} {r[2]}', labels[int(r[0]) - 1]))
    return rows, labels


def imdb(data_dir):
    path = download.find('imdb/aclImdb*.tar.gz', data_dir) or download.download(
        IMDB_URLS, files.cached('imdb/aclImdb_v1.tar.gz'), md5='7c2ac02c03563afcf9b574c7e56c153a'
    )
    stat = os.stat(path)
    # reading the rows takes 0.5 s, the archive 6 s
    parsed = files.cached(f'imdb/rows-{stat.st_size}-{stat.st_mtime_ns}.json')
    try:
        with open(parsed, encoding='utf-8') as f:
            rows = json.load(f)
        rows = {s: [(text, label) for text, label in rows[s]] for s in ('train', 'test')}
        every = [*rows['train'], *rows['test']]
        valid = all(isinstance(text, str) and label in POLARITY for text, label in every)
        if valid and all(rows.values()):
            return rows, POLARITY
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        pass  # missing or damaged: rebuilt
    rows = imdb_rows(path)
    with files.optional():
        files.write_atomic(parsed, json.dumps(rows), every_rank=True)
    return rows, POLARITY


def imdb_rows(path):
    """The rows of the archive, in the order of its file names."""
    found = dict(train=[], test=[])
    try:
        with gzip.open(path) as f:
            reader = download.LimitedReader(f, download.MAX_UNPACKED)
            with tarfile.open(fileobj=reader, mode='r|') as tar:  # one pass, nothing is unpacked
                while (m := tar.next()) is not None:
                    tar.members.clear()  # or it would keep them all
                    hit = re.fullmatch(r'(?:.*/)?(train|test)/(neg|pos)/\d+_\d+\.txt', m.name)
                    if hit and m.isfile() and not m.issparse() and m.size <= download.MAX_MEMBER:
                        text = files.decode(tar.extractfile(m).read(), f'{path}, {m.name}')
                        text, label = text.replace('<br />', '\n'), POLARITY[hit[2] == 'pos']
                        found[hit[1]].append((m.name, text, label))
        if not all(found.values()):
            raise ValueError('it lacks train or test reviews')
    except UserError:
        raise
    except Exception as e:  # tarfile raises a dozen types for a broken file
        text = f'is not the published archive ({e}); remove it to have it downloaded again'
        raise UserError(f'{path} {text}') from None
    return {s: [(text, label) for _, text, label in sorted(found[s])] for s in found}


def sms(data_dir):
    name = 'SMSSpamCollection'
    paths = f'sms_spam/{name}', 'sms_spam/sms+spam+collection.zip', name
    checks, labels = dict(member=name, sha256=SMS_SHA256), dict(ham='ham', spam='spam')
    raw, path = download.file_or_member(*paths, data_dir, SMS_URLS, **checks)
    return {'train': tab_rows(raw, path, labels, label_first=True)}, list(labels)
