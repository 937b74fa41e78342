"""The demo: synthetic reviews that data.py offers without a network, and `nano`, a small language
model of them in lib/nano, made by docs/nano.py. Called by data.py and lib/checkpoints.py.

A clause is good or bad by its adjective unless a negation turns it around; if two clauses disagree,
the main one decides. The words of NEW never appear in the labelled train split. The unlabelled
text has them next to words that give them away ("warm and radiant"), so only a model that has read
it can know them."""

import os
import random
import re

LABELS = ['negative', 'positive']
NANO = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'nano')
GOOD = 'warm bright clever charming lively honest graceful witty fresh tender lovely splendid'
BAD = 'dull clumsy bland tedious shallow dreary messy stale bitter grim feeble noisy'
THINGS = 'song plot cast ending garden hotel script museum market voyage dinner lecture hall '
THINGS += 'painting journey staff menu dance poem campsite beach tower ferry concert'
PEOPLE = 'my sister, an old friend, the guide, our host, everyone, the reporter, his aunt, '
PEOPLE += 'a visitor'
TIMES = 'on monday, last week, this time, at first sight, in the end, after the break, at noon'
SEEN = dict(
    good=GOOD.split(),
    bad=BAD.split(),
    thing=THINGS.split(),
    how=['very', 'really', 'truly', 'utterly', 'simply'],
    who=PEOPLE.split(', '),
    when=TIMES.split(', '),
)
NEW = dict(
    good=['radiant', 'superb'],
    bad=['dismal', 'awful'],
    thing=['kitchen', 'bakery', 'library', 'village'],
    how=['deeply', 'remarkably'],
    who=['the baker', 'a neighbour'],
    when=['that evening', 'in may'],
)
NEGATED = 'not {other}, not at all {other}, hardly {other}, far from {other}, anything but {other}'
JUDGED = [*9 * ['{same}', '{how} {same}'], *7 * ['{same} and {same}'], '{same} rather than {other}']
JUDGED += [*NEGATED.split(', '), 'neither {other} nor {other}']
CLAUSES = ['the {thing} was {judged}', 'the {thing} felt {judged}']
CLAUSES += ['{who} found the {thing} {judged}', '{who} called the {thing} {judged}']
SENTENCES = [*3 * ['{main}'], *5 * ['{when} {main}'], *8 * ['{main} and {main}']]
SENTENCES += ['{side} but {main}', '{side}, yet {main}', 'although {side}, {main}']
SENTENCES += ['despite the {other} {thing}, {main}']
# fraction of new words per draw: at 0.03 about 3 % of the test rows depend on a new adjective; the
# other kinds decide nothing
NEW_AT_TEST = dict(good=0.03, bad=0.03, thing=0.15, how=0.15, who=0.15, when=0.15)
NEW_UNLABELLED = dict.fromkeys(NEW, 0.25)


def sentence(rng, good, new):
    """One sentence with the label `good` (bool). new: {kind of word: fraction of new words}"""
    used = set()

    def pick(options):
        # rng.random() is the one draw that is the same in every Python version
        return options[int(rng.random() * len(options))]

    def word(kind):
        words = NEW if rng.random() < new.get(kind, 0) else SEEN
        w = pick(words[kind])
        if w in used:  # the same garden is not both grim and lovely
            return word(kind)
        used.add(w)
        return w

    def fill(template, good):
        kinds = dict(same='good', other='bad') if good else dict(same='bad', other='good')

        def slot(match):
            name = match[1]
            if name in ('main', 'side'):
                return fill(pick(CLAUSES), good == (name == 'main'))
            if name == 'judged':
                return fill(pick(JUDGED), good)
            return word(kinds.get(name, name))

        return re.sub(r'\{(\w+)\}', slot, template)

    return fill(pick(SENTENCES), good)


def labelled(data_dir=None):
    """A reader of data.py: {'train': 4,000 rows, 'val': 500, 'test': 1,000}, balanced, no text
    twice, always the same; and the labels."""
    rng, seen, rows = random.Random(1), set(), {}
    for split, n in dict(train=4000, val=500, test=1000).items():
        rows[split] = []
        while len(rows[split]) < n:
            good = len(rows[split]) % 2 == 1
            text = sentence(rng, good, {} if split == 'train' else NEW_AT_TEST)
            if text not in seen:
                seen.add(text)
                rows[split].append((text, LABELS[good]))
    return rows, LABELS


def unlabelled(n=20000):
    """n sentences of the same grammar with all its words and no labels, for a language model."""
    rng = random.Random(2)
    return [sentence(rng, rng.random() < 0.5, NEW_UNLABELLED) for _ in range(n)]
