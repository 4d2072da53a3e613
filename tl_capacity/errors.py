"""What the package raises on bad input, one sentence with what is wrong, the value, and what to do; and how a command shows it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


class CapacityError(ValueError):
    """Bad input or state that the user can mend; its message is one sentence and the command line prints nothing else."""


class HookPointError(CapacityError):
    """A hook point is unknown, was replaced, did not fire, or has another width than the SAE."""


class DictionaryError(CapacityError):
    """A sparse autoencoder cannot be measured as it is."""


class TokenSourceError(CapacityError):
    """A token source is missing, empty, unreadable or yields nothing to count."""


class MeasurementError(CapacityError):
    """A measurement on disk is damaged, of another schema, or does not fit what it is combined with."""


class ArgumentTypeError(CapacityError, TypeError):
    """A public function was given an argument of another type than it asks for."""


class PluginError(CapacityError):
    """Two plugins clash, or one implements a hook that does not exist."""


@contextmanager
def reporting_errors() -> Iterator[None]:
    """Turn what the user can mend into one sentence and an exit code."""
    try:
        yield
    except CapacityError as problem:
        print(f"error: {problem}", file=sys.stderr)
        raise SystemExit(EXIT_BAD_INPUT) from None
    except KeyboardInterrupt:
        print("interrupted; what was saved is whole, and --resume goes on", file=sys.stderr)
        raise SystemExit(EXIT_INTERRUPTED) from None
    except Exception as problem:
        # Typer carries click's exceptions under a private name: what can show itself and has an exit code is one of them.
        show, code = getattr(problem, "show", None), getattr(problem, "exit_code", None)
        if show is None or code is None:
            raise
        show()
        raise SystemExit(code) from None
