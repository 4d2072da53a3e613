"""The errors of the package. Each is one sentence that says what is wrong, the value, and what to do. Also how a
command shows it.
"""

from __future__ import annotations

import inspect
import logging
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


class CapacityError(ValueError):
    """Bad input or state that the user can fix. Its message is one sentence, and the command line
    prints nothing else.
    """

    def __str__(self) -> str:
        return " ".join(super().__str__().split())  # the reasons of other libraries inside it come on several lines


class HookPointError(CapacityError):
    """A hook point is unknown, was replaced, did not fire, or has another width than the SAE."""


class DictionaryError(CapacityError):
    """A sparse autoencoder cannot be measured as it is."""


class TokenSourceError(CapacityError):
    """A token source is missing, empty or unreadable, or has nothing to count."""


class NothingCountedError(CapacityError):
    """No token was counted: there were none, or all were padding or special."""


class NothingToReadError(TokenSourceError, NothingCountedError):
    """A token source has no token for its reader: it is empty, or the reader's share of it is."""


class SourceCutOffError(TokenSourceError):
    """A token source stopped in the middle of its text, for example because the network failed. What came before is
    whole.
    """


class DeviceFullError(CapacityError):
    """A device has no memory left for the task. Checkpoints stay."""


class NotWrittenError(CapacityError):
    """A file or folder cannot be written, for example because the disk is full. What was there before is whole."""


class MeasurementError(CapacityError):
    """A measurement on disk is damaged, has another schema, or does not fit what it is combined with."""


class ArgumentTypeError(CapacityError, TypeError):
    """An argument of a public function has the wrong type."""


class PluginError(CapacityError):
    """Two plugins clash, a plugin implements a hook that does not exist, or a plugin's code fails."""


@contextmanager
def plugin_code(kind: str, name: str, code: object) -> Iterator[None]:
    """Turn whatever a plugin's code raises into one sentence that names the plugin and its line. A `CapacityError`
    passes unchanged.

    Args:
        kind: what the plugin registered, such as "importance estimator".
        name: the name under which it did.
        code: the function or method of it that is called.

    Raises:
        PluginError: from what was raised.
    """
    try:
        yield
    except CapacityError:
        raise
    except (Exception, SystemExit) as problem:
        what = ": ".join(filter(None, (type(problem).__name__, str(problem))))
        raise PluginError(
            f"the {kind} {name!r} failed{line_of(code, problem)} ({what}): fix it, or choose another"
        ) from problem


def line_of(code: object, problem: BaseException | None = None) -> str:
    """Where a plugin's function failed, as " in line 9 of plugin.py", or else where it begins; empty if that is
    unknown.
    """
    file, begins = _written_in(code)
    raised = traceback.extract_tb(problem.__traceback__) if problem is not None else []
    lines = [frame.lineno for frame in raised if frame.filename == file]
    line = lines[-1] if lines else begins
    return "" if line is None else f" in line {line} of {file}"


def _written_in(code: object) -> tuple[str | None, int | None]:
    """The file of a plugin's function, and the line where the function begins. None if a method is inherited from
    another file.
    """
    bound_to = getattr(code, "__self__", None)
    owner = type(bound_to) if inspect.ismethod(code) and not isinstance(bound_to, type) else code
    module = sys.modules.get(str(getattr(owner, "__module__", "")))
    compiled = getattr(inspect.unwrap(getattr(code, "__func__", code)), "__code__", None)  # type: ignore[arg-type]
    # A notebook's module has no file, but each of its cells has one.
    file = getattr(module, "__file__", None) or getattr(compiled, "co_filename", None)
    return file, compiled.co_firstlineno if compiled is not None and compiled.co_filename == file else None


@contextmanager
def reporting_errors() -> Iterator[None]:
    """Turn an error that the user can fix into one sentence and an exit code."""
    try:
        yield
    except CapacityError as problem:
        _say(str(problem), EXIT_BAD_INPUT, "error: ")
    except KeyboardInterrupt:
        _say(
            "interrupted; what was saved is whole, and the same command continues from it, measure and distill with "
            "--resume",
            EXIT_INTERRUPTED,
        )
    except Exception as problem:
        # Typer carries click's exceptions under a private name: what can show itself and has an exit code is one of
        # them.
        show, code = getattr(problem, "show", None), getattr(problem, "exit_code", None)
        if show is None or code is None:
            raise
        log = logging.getLogger("tl_capacity")
        if log.handlers and hasattr(problem, "format_message"):
            _say(problem.format_message(), code)
        show()
        raise SystemExit(code) from None


def printable(text: str) -> str:
    """Text with its control characters escaped. A file's name may contain any, and a terminal obeys them."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _say(sentence: str, code: int, prefix: str = "") -> NoReturn:
    """Show a sentence, in the log if there is one, and end."""
    sentence = printable(sentence)
    log = logging.getLogger("tl_capacity")
    if log.handlers:
        log.error(sentence, extra={"figures": {"exit_code": code}})
    else:
        print(prefix + sentence, file=sys.stderr)
    raise SystemExit(code)
