"""The `tessera` command: its verbs, one file a group, and what becomes of an error.

`tessera --help` answers in a tenth of a second: nothing heavier than typer is imported before a command runs.
Results go to standard output, everything else to standard error. Exit codes: 0 done, 1 a stage failed or damage was
found, 2 wrong usage or config, 130 stopped by Ctrl-C, 143 by SIGTERM.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

import typer

from pipeline import threads
from pipeline.cli.artifacts import artifacts_app
from pipeline.cli.compare import compare
from pipeline.cli.doctor import doctor
from pipeline.cli.export import export
from pipeline.cli.lineage import lineage
from pipeline.cli.run import plan, run
from pipeline.cli.schema import schema
from pipeline.cli.submit import logs, status, stop, submit
from pipeline.cli.sweep import sweep
from pipeline.cli.tracking import tracking_app
from pipeline.errors import TesseraError

INTERRUPTED, TERMINATED = 130, 143

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help: importing rich for it would cost a tenth of a second
    pretty_exceptions_enable=False,
    help="From unlabelled images to a vision encoder with good dense features: a cached pipeline on Ray.",
)
for command in (run, plan, compare, sweep, submit, status, logs, stop, lineage, export, schema, doctor):
    app.command()(command)
app.add_typer(artifacts_app, name="artifacts")
app.add_typer(tracking_app, name="tracking")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code."""
    terminated = False

    def terminate(signum: int, frame: object) -> NoReturn:
        nonlocal terminated
        terminated = True
        raise SystemExit(TERMINATED)  # unwinds like Ctrl-C: leases are given back, Ray is shut down

    signal.signal(signal.SIGTERM, terminate)
    try:
        code = app(args=list(arguments) if arguments is not None else None, standalone_mode=False)
        sys.stdout.flush()
        if code == INTERRUPTED:  # what typer makes of a KeyboardInterrupt
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except TesseraError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort, SystemExit) as stop:
        if isinstance(stop, SystemExit) and not terminated:
            raise
        print("stopped; what was finished is kept, the same command continues", file=sys.stderr)
        code = TERMINATED if terminated else INTERRUPTED  # Ray turns a SystemExit of ours into one of its own
        if threads.any_left():
            # They wait inside a library. Python and Ray would be taken down under them, and might crash or wait too.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        return code
    except BrokenPipeError:  # `tessera plan ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if not (hasattr(error, "show") and hasattr(error, "exit_code")):
            raise
        error.show()  # the parser's own errors: unknown option, missing argument
        return int(error.exit_code)


if __name__ == "__main__":
    sys.exit(main())
