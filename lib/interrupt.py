"""What ends a training run early: Ctrl-C and SIGTERM, after which the loop ends its step and the
run can be resumed, and out of memory. Called by both train scripts."""

import contextlib
import signal
import sys
import threading

import torch

from lib import cli, ranks
from lib.files import UserError


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM inside Interrupt.evaluation()."""


class Interrupt:
    """.requested: stop after this step.  .evaluating: an evaluation is running or was cut short."""

    requested = evaluating = False

    def note(self, signum, frame):
        """Signal handler. A second Ctrl-C ends at once; not under torchrun, which passes on every
        signal that its processes have seen already."""
        if self.requested:
            if ranks.world_size() == 1:
                raise KeyboardInterrupt
            return
        self.requested = True
        what = 'stopping the evaluation' if self.evaluating else 'finishing this step'
        again = 'once more to stop at once without saving'
        print(f'\ninterrupted: {what}, then saving ({again})', file=sys.stderr)
        if self.evaluating:
            raise Interrupted

    @contextlib.contextmanager
    def evaluation(self):
        """Inside, an interrupt raises Interrupted. Several ranks finish it: they exchange results
        and must all get there."""
        self.evaluating = ranks.world_size() == 1
        if self.evaluating and self.requested:
            raise Interrupted
        yield
        self.evaluating = False


@contextlib.contextmanager
def interruptible():
    """Inside, Ctrl-C and SIGTERM set `requested` of the Interrupt that it yields, and the loop
    ends after its step. An evaluation that is interrupted ends the body."""
    interrupt, signals = Interrupt(), (signal.SIGINT, signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread():
        signals = ()  # Python delivers signals to the main thread alone
    before = {s: signal.signal(s, interrupt.note) for s in signals}
    try:
        yield interrupt
    except Interrupted:
        pass
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def interrupted(script, out, step, max_steps):
    """Say how to resume. -> exit code"""
    how = f'resume with: {cli.command(script, "--resume", "--out", out)}'
    print(f'\ninterrupted after step {step} of {max_steps}; {how}', file=sys.stderr)
    return 130


@contextlib.contextmanager
def memory_advice(args):
    """Inside, out of memory is a UserError that names a batch size to try."""
    try:
        yield
    except (RuntimeError, MemoryError) as e:
        no_memory = isinstance(e, (torch.OutOfMemoryError, MemoryError))
        if not no_memory and "can't allocate memory" not in str(e):
            raise
        smaller, tokens = 'a smaller --max_length', args.batch_tokens
        if tokens and tokens // 2 >= args.max_length:
            smaller = f'--batch_tokens {tokens // 2} --grad_accum {2 * args.grad_accum}'
        elif not tokens and args.batch_size > 1:
            smaller = f'--batch_size {args.batch_size // 2} --grad_accum {2 * args.grad_accum}'
            smaller += '' if args.batch_size % 2 else ' (the same steps)'
        if not args.gradient_checkpointing and args.method != 'head':
            smaller += ', or --gradient_checkpointing'
        where = f'--batch_tokens {tokens}' if tokens else f'--batch_size {args.batch_size}'
        where += f' and --max_length {args.max_length}'
        raise UserError(f'out of memory at {where}: try {smaller}') from None
