"""Command lines: the parser, and running a script so that a user's mistake ends in one sentence.
Called by every script, and by modules that suggest a command."""

import argparse
import contextlib
import difflib
import os
import re
import shlex
import shutil
import signal
import sys

from lib import start
from lib.files import UserError

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # where the scripts are


def run(main):
    """Run main() and exit: a user's mistake ends with one sentence and exit code 2; a bug keeps its
    traceback."""
    for name, mode in dict(stdin='r', stdout='w', stderr='w').items():
        if getattr(sys, name) is None:  # closed by whoever started this
            setattr(sys, name, open(os.devnull, mode))
    if hasattr(sys.stdout, 'reconfigure'):
        sys.stdout.reconfigure(errors='replace')  # for texts that the terminal cannot show
    try:
        if signal.getsignal(signal.SIGINT) is start.end_quietly:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        code = exit_code(main())
        sys.stdout.flush()  # notices a closed pipe here, not while Python shuts down
    except UserError as e:
        # a broken file's names may hold control characters
        text = ''.join(c if c.isprintable() else repr(c)[1:-1] for c in str(e))
        text = text if len(text) <= 2000 else text[:1000] + ' ... ' + text[-1000:]
        print(f'error: {text}', file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        code = 130
    except BrokenPipeError:  # train_cls.py | head -3: it ends too, as by SIGPIPE
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141  # 128 + SIGPIPE
    sys.exit(code)


def command(name, *words):
    """-> a line to paste into a shell, in this folder: a script of ours, or a path, and words."""
    folder, script = os.path.split(os.path.join(TOP, name))
    if os.path.realpath(os.getcwd()) != os.path.realpath(folder):
        script = f'{folder}/{script}'
    return f'python {shlex.join([script, *words])}'


class Help(argparse.RawDescriptionHelpFormatter):
    """--help of at most 100 columns, in which each flag that has a default names it."""

    def __init__(self, prog, **kw):
        super().__init__(prog, width=min(100, shutil.get_terminal_size((100, 24)).columns), **kw)

    def _get_help_string(self, action):
        text, value = action.help, action.default
        silent = value is None or value is False or value in ('', argparse.SUPPRESS)
        if silent or not action.option_strings or 'default' in text:
            return text
        return f'{text} (default: {format(value, "g") if type(value) is float else value})'


def exit_code(value):
    """What main() returned, an exit code, results or nothing -> exit code"""
    return value if isinstance(value, int) else 0


class Parser(argparse.ArgumentParser):
    """argparse with --max-steps == --max_steps, no abbreviations, and errors as UserError."""

    def __init__(self, **kw):
        super().__init__(allow_abbrev=False, formatter_class=Help, **kw)

    def parse(self, argv=None):
        """-> (namespace, given); given: names of the arguments that were typed."""
        argv = list(sys.argv[1:] if argv is None else argv)
        end = argv.index('--') if '--' in argv else len(argv)  # what follows are texts, not flags
        for i, arg in enumerate(argv[:end]):
            if arg.startswith('--'):
                name, equals, value = arg.partition('=')
                argv[i] = '--' + name[2:].replace('-', '_') + equals + value
        args = self.parse_intermixed_args(argv)  # `RUN --json TEXT` as well as `RUN TEXT --json`
        typed = {arg.partition('=')[0] for arg in argv[:end]}

        def was_typed(action):
            if action.option_strings:
                return typed & set(action.option_strings)
            return getattr(args, action.dest) not in (action.default, [])

        return args, {action.dest for action in self._actions if was_typed(action)}

    def chosen(self, args):
        """Name of the flag that is set of those that exclude each other, or None."""
        (group,) = self._mutually_exclusive_groups
        return next((a.dest for a in group._group_actions if getattr(args, a.dest)), None)

    def error(self, message):
        unknown = re.match(r'unrecognized arguments: --([^\s=]+)', message)
        names = [flag.lstrip('-') for flag in self._option_string_actions]
        near = difflib.get_close_matches(unknown[1], names, 1) if unknown else []
        raise UserError(f'{message} ({f"did you mean --{near[0]}?" if near else "see --help"})')


def number(kind, valid, words):
    """-> a type for Parser: int or float for which valid(value)."""

    def parse(text):
        with contextlib.suppress(ValueError):
            if valid(kind(text)):
                return kind(text)
        raise argparse.ArgumentTypeError(f'{text!r} is not {words}')

    return parse


seed = number(int, lambda x: -(2**63) <= x < 2**64, 'a whole number of at most 64 bits')
positive = number(int, lambda x: x > 0, 'a whole number above 0')
several = number(int, lambda x: x > 1, 'a whole number above 1')
above_zero = number(float, lambda x: 0 < x < float('inf'), 'a number above 0')
not_negative = number(float, lambda x: 0 <= x < float('inf'), 'a number of at least 0')
share = number(float, lambda x: 0 <= x < 1, 'a fraction from 0 to below 1')
NUMBERS = {several: 'K', **dict.fromkeys((int, positive, seed), 'N')}  # metavar
NUMBERS.update(dict.fromkeys((above_zero, not_negative, share), 'X'))


def absolute(path):
    """A type for Parser: the absolute path of a file or folder of the user's, which is stored in
    the run and must be found from any folder; anything else stays as it is."""
    return os.path.abspath(path) if os.path.exists(path) else path


def folder(path):
    """A type for Parser: a folder that is there."""
    if not os.path.isdir(path):
        raise argparse.ArgumentTypeError(f'there is no folder {path!r}')
    return path


def group(p, title):
    """A new argument group -> add(flag, help text, kind, default, metavar), a function that adds a
    flag to it. kind: a type, a tuple of choices, or bool for a flag without a value."""
    add_argument = p.add_argument_group(title).add_argument

    def add(flag, text, kind=str, default=None, metavar=None, **more):
        if kind is bool:
            return add_argument(flag, help=text, action='store_true')
        choices, kind = (kind, str) if isinstance(kind, tuple) else (None, kind)
        if choices and 'nargs' in more:  # argparse would write all of them twice
            text, metavar = f'{text}; of {", ".join(choices)}', 'NAME'
        kw = dict(type=kind, default=default, choices=choices, **more)
        add_argument(flag, help=text, metavar=metavar or NUMBERS.get(kind), **kw)

    return add
