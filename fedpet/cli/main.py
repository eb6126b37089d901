"""Run the command line, and turn each error into one sentence and an exit code.

Exit codes: 0 done; 1 the run failed or nothing was learned; 2 bad input, one clear sentence;
70 an unforeseen error, with the path of its traceback; 130 interrupted (143 by SIGTERM), and how to
resume; 141 the reader of the output has gone.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import threading
from collections.abc import Callable

import click
import typer

from fedpet.cli.app import app
from fedpet.cli.compare_command import compare
from fedpet.cli.deploy_command import deploy
from fedpet.cli.estimate_command import estimate
from fedpet.cli.export_command import export
from fedpet.cli.faults import is_of_paths, report_fault, watched_outputs
from fedpet.cli.import_command import import_settings
from fedpet.cli.init_command import init
from fedpet.cli.mask_command import mask
from fedpet.cli.merge_command import merge
from fedpet.cli.nodes_command import nodes
from fedpet.cli.report_command import report
from fedpet.cli.search_command import search
from fedpet.cli.simulate_command import simulate
from fedpet.errors import FedpetError, InputError, RunInterrupted
from fedpet.utils.paths import NO_HOME, give_no_home, replace_home

__all__ = ["app", "main"]

COMMANDS = (
    *(init, import_settings, simulate, search, estimate, mask, report, compare),
    *(export, merge, deploy, nodes),
)
app.registered_commands.sort(key=lambda command: COMMANDS.index(command.callback))  # in `--help`


def main() -> None:
    """Run the command line; whatever goes wrong is one sentence on standard error."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    replace_home()
    with watched_outputs() as nobody_reads:
        code = _run(nobody_reads)
    if code:
        sys.exit(code)


def _run(nobody_reads: Callable[[], bool]) -> int:
    try:
        code: int = app(standalone_mode=False)
        if code == 130:  # how Typer puts an interrupt
            print("Interrupted.", file=sys.stderr)
        if sys.stdout is not None:  # else it was closed from the start
            sys.stdout.flush()
    except (typer.Abort, KeyboardInterrupt):
        print("Interrupted.", file=sys.stderr)
        code = 130
    except RunInterrupted as stopped:
        print(stopped, file=sys.stderr, flush=True)
        code = stopped.exit_code
        if sum(not thread.daemon for thread in threading.enumerate()) > 1:
            # Flower's server would be waited for, in a thread that is not told.
            sys.stdout.flush()
            os._exit(code)
    except FedpetError as error:
        code = _fail(str(error), 2 if isinstance(error, InputError) else 1)
    except click.ClickException as error:
        error.show()
        code = 2
    except SystemExit as ended:  # Typer's and Rich's way out of a closed pipe
        if not isinstance(ended.__context__, BrokenPipeError):
            raise
        code = _unforeseen(ended.__context__, nobody_reads)
    except Exception as error:
        code = _unforeseen(error, nobody_reads)
    return code or 0


def _unforeseen(error: Exception, nobody_reads: Callable[[], bool]) -> int:
    """Say what went wrong that no code says; gives the exit code."""
    if isinstance(error, BrokenPipeError) and nobody_reads():
        _say_no_more(1, 2)
        return 141
    if isinstance(error, RuntimeError) and str(error) == NO_HOME:
        return _fail(str(give_no_home()), 2)
    if isinstance(error, OSError) and is_of_paths(error, sys.argv[1:]):
        return _fail(f"{error.filename!r} cannot be used: {error.strerror}.", 2)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        _say_no_more(1)
        what = repr(error.filename) if error.filename else "the output"
        return _fail(f"{what} cannot be written: {error.strerror}. Make room.", 1)
    return _fail(report_fault(error), 70)


def _say_no_more(*descriptors: int) -> None:
    """Lose what is still to be written there, which at the process's end would fail once more."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in descriptors:
        os.dup2(nowhere, descriptor)


def _fail(sentence: str, code: int) -> int:
    print(f"Error: {sentence}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
