"""lib/tables.py: a user's own tables."""

import os

from lib.files import UserError
from lib.tables import Format, read_table, read_texts
from tests.helpers import raises, tmp, write


def test_csv_oddities():
    body = '"one, with a comma",a\r\n"two ""quoted""",b\r\n"three\r\nin two lines",a\r\n"",b\r\n'
    body += '\r\nfünf \u2028 \x85,a\r\n"' + 'x' * 1_000_000 + '",b\r\n'
    rows = read_table(write('odd.csv', b'\xef\xbb\xbf' + ('text,label\r\n' + body).encode()))[0]
    want = ['one, with a comma', 'two "quoted"', 'three\r\nin two lines', '']
    assert [t for t, _ in rows] == [*want, 'fünf \u2028 \x85', 'x' * 1_000_000]
    assert [y for _, y in rows] == list('ababab')
    rows = read_table(write('odd.tsv', 'label\ttext\n a \t"one\ttab"\nb\ttwo, no tab\n'))[0]
    assert rows == [('one\ttab', 'a'), ('two, no tab', 'b')]
    one = '{"text": "one\\u2028", "label": true}\n'
    two = '{"label": 3, "text": "half \\ud83d", "x": 1}\r\n'
    rows = read_table(write('ODD.JSONL', f'{one}\n{two}'))[0]
    assert rows == [('one\u2028', 'true'), ('half \ufffd', '3')]


def test_columns():
    def columns(header, rows, *asked):
        return read_table(write('c.csv', header + '\n' + '\n'.join(rows) + '\n'), Format(*asked))[
            1
        ][:2]

    rows = ['first,a,1', 'second,b,2', 'third,a,3']
    assert columns('Text,Label,id', rows) == ('Text', 'Label')
    assert columns('sentence,kind,id', rows, None, 'kind') == ('sentence', 'kind')
    assert columns('q,kind,id', rows, 'q', 'kind') == ('q', 'kind')
    assert columns('u,v', ['a,first', 'b,second', 'a,third']) == ('v', 'u')
    assert columns('u,v', ['first,a', 'second,b', 'third,a']) == ('u', 'v')
    assert columns('label,v', ['a,a', 'b,b']) == ('v', 'label')
    assert columns('v,review', ['a,a']) == ('review', 'v')
    path = write('c.csv', 'q,kind,id\n' + '\n'.join(rows))
    e = raises(UserError, read_table, path, match='--text_col')
    assert "'q', 'kind', 'id'" in str(e)
    e = raises(UserError, read_table, path, Format('body'), match="no column 'body'")
    assert "'q', 'kind', 'id'" in str(e)
    bare = write('c.csv', 'good film,pos\nbad film,neg\nnice film,pos\n')
    raises(UserError, read_table, bare, match='no header')


def test_streams():
    def texts(name, content, *column):
        return list(read_texts(write(name, content), Format(*column)))

    csv = 'id,text\n1,"a\nb"\n2,c\n'
    assert texts('s.csv', csv) == ['a\nb', 'c']
    raises(UserError, texts, 's.csv', csv, 'body', match="no column 'body'")
    assert texts('S.TSV', 'anything\nx\ny\n') == ['x', 'y']
    assert texts('s.jsonl', '{"body": "x", "n": 1}\n{"body": "y"}\n', 'body') == ['x', 'y']
    raises(UserError, texts, 's.jsonl', '{"text": "x"}\n{"text": 1}\n', match='line 2')
    assert texts('s.txt', '\ufeffone, "two\n\nthree') == ['one, "two', '', 'three']
    raises(UserError, texts, 's.txt', b'fine\ncaf\xe9\n', match='0xe9')
    missing = os.path.join(tmp(), 'none.txt')
    raises(UserError, lambda: list(read_texts(missing)), match='cannot read')
