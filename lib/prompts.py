"""Prompts of `train_gen.py --zero_shot`: in front of a text, or with --direct behind it. What the
prompts of a data set share cancels between its classes. Called by train_gen.py."""

from lib import files
from lib.files import UserError

REVIEWS = dict(negative='A negative movie review:\n', positive='A positive movie review:\n')
NEWS = dict(World='World news:\n', Sports='Sports news:\n', Business='Business news:\n')
NEWS['Sci/Tech'] = 'Science and technology news:\n'
MESSAGES = dict(ham='A text message from a friend:\n', spam='An advertising text message:\n')
PROMPTS = dict(sst2=REVIEWS, imdb=REVIEWS, agnews=NEWS, sms=MESSAGES)
SENTIMENT = dict(negative='\nSentiment: negative', positive='\nSentiment: positive')
TOPICS = dict(World='\nTopic: world', Sports='\nTopic: sports', Business='\nTopic: business')
TOPICS['Sci/Tech'] = '\nTopic: technology'
SOURCES = dict(ham='\nThis message is from a friend', spam='\nThis message is spam')
ANSWERS = dict(sst2=SENTIMENT, imdb=SENTIMENT, agnews=TOPICS, sms=SOURCES)


def prompts_of(args, labels):
    """{label: prompt} from --prompts, or the defaults of the data set; for other data the label."""
    if not args.prompts:
        known = (ANSWERS if args.direct else PROMPTS).get(args.data, {})
        plain = '\nLabel: {}' if args.direct else '{}:\n'
        return {label: known.get(label, plain.format(label)) for label in labels}
    prompts = files.read_json(args.prompts)
    if not isinstance(prompts, dict) or not all(isinstance(p, str) and p for p in prompts.values()):
        why = 'needs a JSON object, a prompt per class: {"class": "text", ...}'
        raise UserError(f'--prompts {args.prompts}: {why}')
    unknown = [label for label in prompts if label not in labels]
    missing = [label for label in labels if label not in prompts]
    if unknown or missing:
        why = f'{unknown[0]!r} is no class of the data' if unknown else f'{missing[0]!r} is missing'
        raise UserError(f'--prompts {args.prompts}: {why}; the classes are {", ".join(labels)}')
    return prompts
