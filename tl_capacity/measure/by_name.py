"""SAEs, bases and text that a session names instead of loading them, for a model that is already in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tl_capacity.dictionaries.adapter import NamedDictionary, SAEs, given_dictionaries, named_dictionary
from tl_capacity.dictionaries.bases import BasisSpec
from tl_capacity.dictionaries.releases import advice
from tl_capacity.dictionaries.rows import default_bos
from tl_capacity.errors import DictionaryError, TokenSourceError
from tl_capacity.measure.setup import context_of, dictionary_named
from tl_capacity.models.carried import carried_saes
from tl_capacity.models.forward import device_of
from tl_capacity.models.identity import Identity
from tl_capacity.models.loading import LoadedModel, load_tokenizer
from tl_capacity.plugins import plugins
from tl_capacity.text.streams import TokenStream


def dictionaries_of(model: Any, saes: SAEs | None, text: str | TokenStream | None = None) -> list[NamedDictionary]:
    """Every SAE that was asked for, with its hook point and name.

    Args:
        model: the model that is measured.
        saes: what was given; None for the SAEs that the model carries, or else those that come with it.
        text: what `pca:` bases are fitted to; None for the text that comes with the model.

    Raises:
        DictionaryError: where there is none, or one cannot be loaded.
    """
    meant: Any = saes if saes is not None else carried_saes(model) or _coming_with(model)
    return [
        _loaded(model, hook, str(given), text) if isinstance(given, (str, Path)) else named_dictionary(hook, given)
        for hook, given in given_dictionaries(meant)
    ]


def stream_of(model: Any, source: str, saes: Sequence[Any] = ()) -> TokenStream:
    """A source as a stream for a model in memory: with the model's tokenizer, in rows of the SAEs' context.

    Raises:
        TokenSourceError: where the model has no tokenizer and names none.
    """
    return TokenStream(source, _tokenizer_of(model), context_of(model, saes), prepend_bos=default_bos(saes))


def _coming_with(model: Any) -> Mapping[str, str]:
    """The names of the SAEs that a plugin registered for the model, by hook point."""
    loaded = _in_session(model)
    if loaded.named is None or not loaded.named.saes:
        raise DictionaryError(f"no SAE was given, and none comes with the model {loaded.name!r}: {advice(loaded.name)}")
    return {hook: hook for hook in loaded.named.saes}


def _loaded(model: Any, hook: str | None, spec: str, text: str | TokenStream | None) -> NamedDictionary:
    """An SAE or basis loaded by its name, on the model's device."""
    loaded, device = _in_session(model), device_of(model)
    basis = BasisSpec.parse(spec)
    if basis is None:
        return dictionary_named(spec if hook is None else f"{hook}={spec}", loaded, str(device))
    if hook not in (None, basis.hook):
        raise DictionaryError(
            f"{spec!r} is a basis of {basis.hook}, but is given for {hook}: name the same hook "
            "point twice, or leave one out"
        )
    return NamedDictionary(basis.hook, str(basis), basis.fit(model, _text_for(basis, loaded, text)).to(device))


def _text_for(basis: BasisSpec, loaded: LoadedModel, text: str | TokenStream | None) -> TokenStream:
    """The text that a basis is fitted to."""
    if isinstance(text, TokenStream):
        return text
    if source := text or loaded.corpus:
        return stream_of(loaded.model, source)
    if basis.needs_text:
        raise TokenSourceError(
            f"{basis} needs text to be fitted to, and no text comes with the model {loaded.name!r}: pass text=SOURCE "
            "or text=TokenStream(…) to add_capacity_hooks"
        )
    return TokenStream(np.arange(1, 9, dtype=np.int64)[None])  # any tokens show how wide the hook point is


def _in_session(model: Any) -> LoadedModel:
    """A model in memory, with whatever a plugin registered under its name."""
    identity = Identity.according_to(model)
    named = plugins().models.items.get(identity.name)
    return LoadedModel(model, getattr(model, "tokenizer", None), identity.name, identity.revision, named)


def _tokenizer_of(model: Any) -> Any:
    """The model's own tokenizer, or the one that is loaded by the model's name."""
    own = getattr(model, "tokenizer", None)
    return own if own is not None else load_tokenizer(Identity.according_to(model).name)
