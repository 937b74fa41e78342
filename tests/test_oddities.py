"""lib/oddities.py: notes on what is odd about a user's rows."""

import data
from lib.oddities import notes
from lib.tables import Format
from tests.helpers import table, tmp, write


def test_notes():
    def of(*rows):
        return notes(dict(train=list(rows)), sorted({label for _, label in rows}))

    good = [(f'text {i}', 'ab'[i % 2]) for i in range(6)]
    assert of(*good) == []
    assert of(*good, ('', 'a'), (' \n', 'b')) == ['2 texts are empty']
    (note,) = of(*good, ('text 0', 'b'))
    assert note == "1 text has more than one label, for example 'text 0': 'a', 'b'"
    for name in ('nan', 'None', 'NULL'):
        (note,) = of(*good, ('x', name), ('y', name))
        assert f'2 rows of {name!r}' in note
    (note,) = of(*good, ('x', 'Good  film'), ('y', 'good film'), ('z', 'other'))
    assert "'Good  film', 'good film' differ only by case or spaces" in note
    (note,) = of(*good, ('x', 'caf\u00e9'), ('y', 'cafe\u0301'))  # two ways to write one letter
    assert 'differ only by' in note
    assert of(*((f't{i}', str(i)) for i in range(1, 6))) == []  # ratings
    (note,) = of(*((f't{i}', str(i)) for i in range(30)))
    assert 'the 30 labels look like numbers' in note
    (note,) = of(('a', '0.5'), ('b', '1.5'), ('c', '-2'))
    assert 'the 3 labels look like numbers' in note
    assert of(*((f't{i}', f'{i}.0') for i in range(5))) == []


def test_notes_of_a_data_set():
    folder = tmp()
    path = write('train.csv', table(100), folder)
    plain = data.load(path).notes
    assert not any('empty' in n or 'also' in n for n in plain), plain
    d = data.load(path, val=path)
    assert any('val texts also in train (give other rows)' in n for n in d.notes), d.notes
    text = table(100).replace('text,label\n', 'text,text,label\n').replace('text n', 'x,text n')
    path = write('odd.csv', text + 'x,text number 8,yes\nx,,no\nx,only,\n', folder)
    d = data.load(path, form=Format(drop_unlabelled=True))
    for words in ("column 'text' twice", '1 text is empty', 'more than one label', 'dropped'):
        assert any(words in n for n in d.notes), (words, d.notes)
    assert all('\n' not in n for n in d.notes)
