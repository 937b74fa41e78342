"""lib/tables.py: a user's own tables."""

import gzip
import json
import os

from lib.files import UserError
from lib.tables import GUESSED, Format, read_own, read_rows, read_table
from tests.helpers import raises, tmp, write


def read_texts(*a):
    return (text for _, text in read_rows(*a))


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


def both(name, content, form=GUESSED):
    """Rows as training reads them, after checking that prediction reads the same texts."""
    path, notes = write(name, content), []
    rows, used = read_table(path, form, notes)
    assert list(read_texts(path, used)) == [text for text, _ in rows]
    return rows, used, notes


def test_separators():
    want = [('eins, zwei', 'a'), ('drei | "vier"', 'b'), ('fünf', 'a')]
    for sep in ';\t|~':
        lines = [f'text{sep}label', f'eins, zwei{sep}a', f'"drei | ""vier"""{sep}b', f'fünf{sep}a']
        form = Format(sep='~') if sep == '~' else GUESSED
        for name in ('s.csv', 's.tsv'):
            assert both(name, '\n'.join(lines), form)[0] == want, (sep, name)
            excel = f'sep={sep}\r\n' + '\r\n'.join(lines)
            assert both(name, excel)[0] == want, (sep, name)
    # several separators in the header: the one that all rows agree on; the usual one if it does
    rows = 'text;a,b;label\nx, y, z;1,2;p\nw;3;n\n'
    assert both('s.csv', rows)[0] == [('x, y, z', 'p'), ('w', 'n')]
    rows = 'text,a;b,label\nx;y,1,p\nw,3;4,n\n'
    assert both('s.csv', rows)[0] == [('x;y', 'p'), ('w', 'n')]
    # lines are counted from the top of the file
    short = write('s.csv', 'sep=;\ntext;label\nfine;a\nonly one field\n')
    raises(UserError, read_table, short, match='line 4: the row has 1 field')
    raises(UserError, read_table, write('s.jsonl', '{"text": ""}'), Format(sep=';'), match='--sep')


def test_encodings():
    text = 'text,label\ncafé €,a\nnaïve,b\n'
    want = [('café €', 'a'), ('naïve', 'b')]
    for encoding in ('cp1252', 'utf-16', 'utf-16-be', 'UTF8', 'utf-8-sig'):
        for name in ('e.csv', 'e.csv.gz'):
            raw = text.encode(encoding)
            raw = gzip.compress(raw) if name.endswith('gz') else raw
            assert both(name, raw, Format(encoding=encoding))[0] == want, (encoding, name)
    cp1252 = write('e.csv', text.encode('cp1252'))
    why = (
        'line 2: byte 0xe9 is not UTF-8; save the file as UTF-8, or name its encoding, for example'
    )
    raises(UserError, read_table, cp1252, match=why)
    raises(UserError, lambda: list(read_texts(cp1252)), match='line 2: byte 0xe9')
    for encoding, named in (('utf-16', 'utf-16'), ('utf-16-le',) * 2, ('utf-16-be',) * 2):
        path = write('e.csv', text.encode(encoding))
        raises(UserError, read_table, path, match=f'looks like UTF-16; give --encoding {named}')
    for encoding in ('utf-32-le', 'utf-32-be'):
        path = write('e.csv', text.encode(encoding))
        raises(UserError, read_table, path, match=f'looks like UTF-32; give --encoding {encoding}')
    raises(UserError, read_table, cp1252, Format(encoding='utf-16'), match='check --encoding')
    for name in ('nonsense', 'hex', 'idna', 'undefined', 'a\0b'):
        raises(UserError, read_table, cp1252, Format(encoding=name), match='no such encoding')


def test_packed_and_other_files():
    want = [('one', 'a'), ('two', 'b')]
    for name, rows in (
        ('p.csv.gz', 'text,label\none,a\ntwo,b\n'),
        ('P.TSV.GZ', 'text\tlabel\none\ta\ntwo\tb\n'),
        ('p.jsonl.gz', '{"text": "one", "label": "a"}\n{"text": "two", "label": "b"}'),
    ):
        assert both(name, gzip.compress(rows.encode()))[0] == want
    assert list(read_texts(write('p.txt.gz', gzip.compress(b'a\nb')))) == ['a', 'b']
    packed = gzip.compress(b'text,label\n' + b'one,a\n' * 99)
    for raw in (packed[:-9], b'text,label\none,a\n', b''):
        path = write('p.csv.gz', raw)
        raises(UserError, read_table, path, match='p.csv.gz is' if raw else 'is empty')
    for kind, way in dict(xlsx='CSV UTF-8', parquet='to_csv', json='.jsonl', zip='gzip').items():
        path = write(f'x.{kind}', 'x')
        raises(UserError, read_table, path, match=way)
        raises(UserError, lambda path=path: list(read_texts(path)), match=way)
        folder = os.path.dirname(write(f'train.{kind}', 'x'))
        raises(UserError, read_own, folder, match=way)
    folder = tmp()
    write('train.csv.gz', gzip.compress(b'text,label\none,a\n'), folder)
    write('test.tsv', 'text\tlabel\ntwo\tb\n', folder)
    assert read_own(folder)[0] == dict(train=[('one', 'a')], test=[('two', 'b')])


def test_columns_without_a_name_and_twice():
    rows, form, _ = both('c.csv', ',q,kind\n0,one,a\n1,two,b\n2,three,a\n')  # as pandas writes them
    assert rows == [('one', 'a'), ('two', 'b'), ('three', 'a')] and form[:2] == ('q', 'kind')
    assert both('c.csv', ',label\none,a\n', Format('column 1'))[0] == [('one', 'a')]
    rows, _, notes = both('c.csv', 'text,text,label\none,two,a\n')
    assert rows == [('two', 'a')] and "has the column 'text' twice" in notes[0]
    path = write('no-name.jsonl', '{"q": "one", "": "a"}\n{"q": "two", "": "a"}\n')
    raises(UserError, read_table, path, match='cannot tell which column is the label')


def test_joined_columns():
    text = 'title,body,label\nOne,first,a\n,second,b\nThree,,a\n'
    rows, form, _ = both('j.csv', text, Format('title,body'))
    assert rows == [('One first', 'a'), ('second', 'b'), ('Three', 'a')]
    assert form.text_col == 'title,body'
    rows = both('j.csv', '"title,body",title,body,label\nx,y,z,a\n', Format('title,body'))[0]
    assert rows == [('x', 'a')]  # a column of that very name
    raises(UserError, read_table, write('j.csv', text), Format('title,boddy'), match="'boddy'")
    lines = '{"title": "A", "body": "b", "label": 1}\n'
    assert both('j.jsonl', lines, Format('title,body'))[0] == [('A b', '1')]
    lacks = write('j.jsonl', lines + '{"title": "A", "label": 1}\n')
    e = raises(UserError, read_table, lacks, Format('title,body'), match='line 2')
    assert "'body'" in str(e)


def test_missing_labels():
    text = 'text,label\none,a\ntwo,\nthree,b\nfour,  \n'
    path, drop = write('m.csv', text), Format(drop_unlabelled=True)
    e = raises(UserError, read_table, path, match='line 3: the label')
    assert '2 of 4 rows' in str(e) and '--drop_unlabelled' in str(e)
    rows, _, notes = both('n.csv', 'text,label\none,a\nthree,b\n', drop)
    assert len(rows) == 2 and not notes
    rows, _ = read_table(path, drop, notes)
    assert rows == [('one', 'a'), ('three', 'b')] and '2 rows' in notes[0] and 'dropped' in notes[0]
    lines = '{"text": "x", "label": null}\n{"text": "y"}\n{"text": "z", "label": "a"}\n'
    path = write('m.jsonl', lines)
    raises(UserError, read_table, path, match='line 1')
    assert read_table(path, drop)[0] == [('z', 'a')]
    nothing = write('m.csv', 'text,label\none,\n')
    raises(UserError, read_table, nothing, drop, match='1 of 1 row')


def test_another_file_is_read_as_the_runs_own():
    like = Format('q', 'kind', ';', 'cp1252')
    text = 'text;kind;q;label\nno;a;café;x\nno;b;two;y\n'
    want = [('café', 'a'), ('two', 'b')]
    for encoding in ('utf-8', 'cp1252'):  # that of the run only if the file is not UTF-8
        assert both('l.csv', text.encode(encoding), Format(like=like))[0] == want
    other = text.replace(';', '\t')
    assert both('l.tsv', other, Format(like=like))[0] == want
    assert both('l.csv', text, Format('text', 'label', like=like))[0] == [('no', 'x'), ('no', 'y')]
    other = 'text,label\none,a\n'  # has none of these columns: guessed
    assert both('l.csv', other, Format(like=like))[0] == [('one', 'a')]
    path = write('l.csv', 'q,title\none,two\n')
    assert [row for row, _ in read_rows(path, Format(like=like))] == [dict(q='one', title='two')]
    assert list(read_texts(path, Format(like=like))) == ['one']


def test_columns_of_all_rows_of_jsonl():
    """The first row may lack one."""
    rows = [dict(text='no label'), *(dict(text=f't{i}', label='ab'[i % 2]) for i in range(4))]
    path = write('rows.jsonl', '\n'.join(map(json.dumps, rows)))
    found, _ = read_table(path, Format(drop_unlabelled=True))
    assert len(found) == 4
    raises(UserError, read_table, path, match='1 of 5 rows')
