"""The Hugging Face hub: asked once whether it can be reached. Also what libraries raise if something
cannot be loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

PROBE_SECONDS = 5.0


@contextmanager
def hub_or_cache(needed: bool = True) -> Iterator[None]:
    """Inside the block, use the hub if it can be reached, which is asked once. Otherwise use only its cache.

    Without a network its clients retry five times for each file, half a minute in all, before they look into the cache.
    """
    from huggingface_hub import constants

    if not needed or constants.is_offline_mode() or _hub_answers():
        yield
        return
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _hub_answers() -> bool:
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=PROBE_SECONDS)
    except Exception:  # the HTTP client's own classes; whatever it is, no answer came
        return False
    return True


def loading_errors() -> tuple[type[Exception], ...]:
    """What transformers, SAELens and safetensors raise on missing, damaged or unsuitable files."""
    from pickle import UnpicklingError
    from struct import error as StructError

    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    return (
        StrictDataclassError,
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RuntimeError,
        OverflowError,
        ImportError,
        EOFError,
        SafetensorError,
        StructError,  # of a few bytes where a pickle begins
        UnpicklingError,
    )


UNREACHABLE = "no hub can be reached and the local cache does not have it"


def reason_of(problem: BaseException) -> str:
    """Why something failed, in a few words that fit into a sentence."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    cause: BaseException | None = problem
    while cause is not None:
        if isinstance(cause, (LocalEntryNotFoundError, ConnectionError)):
            return UNREACHABLE
        cause = cause.__cause__ or cause.__context__
    if isinstance(problem, KeyError):
        return f"{problem} is missing"
    line = " ".join((str(problem).strip() or type(problem).__name__).splitlines()[0].split()).rstrip(".:")
    return line if len(line) <= 200 else f"{line[:199]}…"
