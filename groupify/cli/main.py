"""The entry point: signals, warnings and errors in one line each, exit codes."""

from __future__ import annotations

import codecs
import contextlib
import io
import logging
import os
import signal
import sys
import warnings
from types import FrameType
from typing import Any, NoReturn

import click

from groupify.cli.bench_command import bench
from groupify.cli.options import CONTEXT
from groupify.cli.plan_command import plan
from groupify.cli.report_command import report
from groupify.cli.run_commands import convert, finetune
from groupify.cli.target_commands import evaluate, export
from groupify.errors import GroupifyError, GroupifyWarning

# Everything heavy (torch first of all) is imported inside the commands: --help answers at once.


# What Western code pages lack of what groupify writes.
_PLAIN = {"→": "->", "←": "<-", "≥": ">=", "≤": "<=", "−": "-"}


class _InterruptError(Exception):
    """SIGINT or SIGTERM, on its way to ``main``; click would print an empty line for a KeyboardInterrupt."""


class _Terminated(KeyboardInterrupt):
    """SIGTERM: cleaned up after like SIGINT."""


class _Group(click.Group):
    def invoke(self, context: click.Context) -> Any:
        """Run the command; the reader's leaving of the pipe ends it quietly."""
        try:
            return super().invoke(context)
        except KeyboardInterrupt as error:
            raise _InterruptError from error
        except BrokenPipeError:
            # What is still buffered would fail again, and loudly, when Python closes stdout.
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise click.exceptions.Exit(0) from None


def main() -> NoReturn:
    """Run the command line and exit.

    0 done, 1 internal error, 2 refused, 3 parity failed, 4 a limit on a measurement missed, 130 interrupted,
    143 terminated.
    """
    sys.path.insert(0, os.getcwd())  # module:function specs name the user's own files
    signal.signal(signal.SIGTERM, _terminate)
    _keep_stdout_for_results()
    _write_what_the_console_can_show()
    try:
        cli.main(standalone_mode=False)
    except GroupifyError as error:
        _die(str(error), error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(2)
    except click.ClickException as error:
        _die(error.format_message(), 2)
    except _InterruptError as error:
        _leave(error.__cause__)
    except (KeyboardInterrupt, click.Abort) as error:
        _leave(error)
    except OSError as error:
        _die(f"cannot read or write: {error}", 2)
    except MemoryError:
        _die("out of memory; use fewer calibration images or a smaller model", 2)
    except Exception as error:
        if os.environ.get("GROUPIFY_TRACEBACK"):
            raise
        _die(
            f"internal error: {type(error).__name__}: {error}; please report it, with what "
            "GROUPIFY_TRACEBACK=1 shows",
            1,
        )
    sys.exit(0)


def _keep_stdout_for_results() -> None:
    """Let what native libraries print go nowhere: HiGHS prints a line of its debugging, whatever it is told.

    https://github.com/jump-dev/HiGHS.jl/issues/312
    """
    ours = sys.__stdout__
    if ours is None or sys.stdout is not ours:
        return  # closed, or caught already
    ours.flush()
    with open(os.devnull, "w") as nowhere:
        sys.stdout = open(  # noqa: SIM115 (it stays open)
            os.dup(ours.fileno()), "w", encoding=ours.encoding, errors=ours.errors,
            buffering=1 if ours.isatty() else -1,
        )  # fmt: skip
        os.dup2(nowhere.fileno(), ours.fileno())


def _write_what_the_console_can_show() -> None:
    """Let characters that the console's encoding lacks, as cp1252 lacks →, come as plain ones."""
    codecs.register_error("groupify-plain", _plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "backslashreplace"):
            stream.reconfigure(errors="groupify-plain")


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    return "".join(_PLAIN.get(character, "?") for character in missing), error.end


def _terminate(_: int, __: FrameType | None) -> NoReturn:
    raise _Terminated


def _leave(error: BaseException | None) -> NoReturn:
    left = str(error or "") or "nothing was written"
    if isinstance(error, _Terminated):
        _die(f"terminated; {left}", 143)
    _die(f"interrupted; {left}", 130)


def _die(message: str, code: int) -> NoReturn:
    if _speaks():
        click.echo(f"groupify: error: {' '.join(message.split())}", err=True)
    sys.exit(code)


def _speaks() -> bool:
    """Of the processes of torchrun only the first one says something."""
    return os.environ.get("RANK", "0") == "0"


def _speak_in_lines() -> None:
    """Show groupify's warnings as one line each, and no other library's."""

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if issubclass(category, GroupifyWarning) and _speaks():
            click.echo(f"groupify: warning: {' '.join(str(message).split())}", err=True)

    warnings.simplefilter("ignore")
    warnings.simplefilter("always", GroupifyWarning)
    warnings.showwarning = show
    notes = logging.getLogger("groupify")
    notes.handlers, notes.propagate = [_Notes()], False
    notes.setLevel(logging.INFO)


class _Notes(logging.Handler):
    """Shows groupify's notes as one line each, unless the command is to be quiet.

    Of notes with the same attribute ``once`` it shows the first.
    """

    def __init__(self) -> None:
        super().__init__()
        self._shown: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Show one note."""
        once = getattr(record, "once", None)
        if once in self._shown:
            return
        if once is not None:
            self._shown.add(once)
        context = click.get_current_context(silent=True)
        if _speaks() and not (context is not None and context.params.get("quiet")):
            click.echo(f"groupify: {' '.join(record.getMessage().split())}", err=True)


@click.group(cls=_Group, context_settings=CONTEXT)
@click.version_option(package_name="groupify")
def cli() -> None:
    """Turn the convolutions of a trained CNN into grouped ones: smaller, faster, still accurate."""
    _speak_in_lines()


for _command in (convert, plan, evaluate, finetune, export, bench, report):
    cli.add_command(_command)
