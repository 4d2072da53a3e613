"""What a job measures: the dictionaries that it names, and its model in a form that can be tapped."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tl_capacity.dictionaries.adapter import NamedDictionary, dictionary_digest, metadata_of, read_hook, target_hook
from tl_capacity.dictionaries.bases import BasisSpec
from tl_capacity.dictionaries.reading import processing_wanted
from tl_capacity.dictionaries.releases import advice
from tl_capacity.dictionaries.rows import advised_source, counted_positions, default_bos
from tl_capacity.errors import CapacityError, DictionaryError
from tl_capacity.measure.settings import MeasureSettings
from tl_capacity.measurement.provenance import Provenance
from tl_capacity.models.defaults import MEASURED_CONTEXT
from tl_capacity.models.defaults import row_length as fitting_row_length
from tl_capacity.models.forward import device_of, longest
from tl_capacity.models.places import hugging_face_place
from tl_capacity.models.processing import processed
from tl_capacity.models.sharding import is_spread
from tl_capacity.plugins import plugins
from tl_capacity.results.hook import HookMeasurement
from tl_capacity.runtime.devices import device_named
from tl_capacity.runtime.logs import log
from tl_capacity.text.counting import CountingRule
from tl_capacity.text.shares import Share
from tl_capacity.text.streams import TokenStream

if TYPE_CHECKING:
    from tl_capacity.models.loading import LoadedModel


def dictionaries(settings: MeasureSettings, loaded: LoadedModel) -> list[NamedDictionary]:
    """Every SAE or basis asked for, or else all SAEs that come with the model."""
    named = loaded.named
    bundled = [f"{hook}={folder}" for hook, folder in (named.saes if named else {}).items()]
    specs = list(dict.fromkeys(settings.saes)) or bundled
    if not specs:
        raise CapacityError(
            f"no SAE was given for {settings.model!r}, and none comes with it: {advice(settings.model)}"
        )
    device = device_named(settings.device)
    wanted = [BasisSpec.parse(spec) or dictionary_named(spec, loaded, device) for spec in specs]
    bases = [basis for basis in wanted if isinstance(basis, BasisSpec)]
    saes = [loaded_sae for loaded_sae in wanted if not isinstance(loaded_sae, BasisSpec)]
    fitted: dict[BasisSpec, Any] = {}
    if bases:
        model = tapped_model(
            loaded, [sae for _, _, sae in saes], [hook for hook, _, _ in saes], [basis.hook for basis in bases]
        )
        # From the whole source, so that every shard is measured in the same basis.
        stream = replace(stream_for(settings, loaded, [sae for _, _, sae in saes]), shard=(0, 1), share=Share())
        fitted = {basis: basis.fit(model, stream, progress=settings.progress).to(device) for basis in bases}
    return [
        NamedDictionary(spec.hook, str(spec), fitted[spec]) if isinstance(spec, BasisSpec) else spec for spec in wanted
    ]


def spec_of(measured: HookMeasurement, model: str) -> str:
    """The `--sae` argument for an SAE or basis that was measured on a model of that name."""
    registered = any(m.name == model for m in plugins().models)
    name = measured.sae.removeprefix(f"{model}/") if registered else measured.sae
    return name if BasisSpec.parse(name) else f"{measured.hook}={name}"


def measured_teacher(folder: Path, provenance: Provenance, device: str) -> LoadedModel:
    """The model that was measured, with the weights that it had.

    Args:
        folder: of the measurement, for the sentence where it has others.

    Raises:
        CapacityError: where it cannot be loaded, or has other weights by now.
    """
    from tl_capacity.models.loading import load_measured_model

    teacher = load_measured_model(provenance.model, provenance.revision, device=device)
    if provenance.revision not in (None, teacher.revision):
        raise CapacityError(
            f"{folder} was measured with other weights than {provenance.model!r} has now: measure again"
        )
    return teacher


def began_with_bos(provenance: Provenance) -> bool:
    """Whether the rows of a measurement began with BOS. They did if it does not say."""
    return provenance.settings.get("bos", 0) is not None


def as_measured(source: str, tokenizer: Any, provenance: Provenance, usual: int, batch_rows: int = 8) -> TokenStream:
    """Text in rows like those of a measurement: of the same length, with or without BOS, special tokens read or not.

    Args:
        usual: positions in a row, where the measurement does not say.
    """
    settings = provenance.settings
    return TokenStream(
        source,
        tokenizer,
        int(settings.get("context") or usual),
        batch_rows,
        began_with_bos(provenance),
        special_tokens=bool(settings.get("special_tokens")),
    )


def measured_dictionary(measured: HookMeasurement, loaded: LoadedModel, provenance: Provenance) -> Any:
    """The SAE or basis that was measured, found by name and checked by its weights.

    Raises:
        DictionaryError: where it cannot be found, or has other weights by now.
    """
    context, device = provenance.settings.get("context"), str(device_of(loaded.model))
    settings = MeasureSettings(
        provenance.model,
        Path(),
        (spec_of(measured, loaded.name),),
        source=provenance.source,
        context=context,
        prepend_bos=began_with_bos(provenance),
        special_tokens=bool(provenance.settings.get("special_tokens")),
        batch_rows=provenance.settings.get("batch_rows", MeasureSettings.batch_rows),
        device=device,
    )
    [(_, _, sae)] = dictionaries(settings, loaded)
    if dictionary_digest(sae) != measured.sae_digest:
        raise DictionaryError(
            f"the SAE {measured.sae!r} at {measured.hook} has other weights than the one that was measured: "
            "measure again"
        )
    return sae


def dictionary_named(spec: str, loaded: LoadedModel, device: str) -> NamedDictionary:
    """One SAE, loaded by name.

    Raises:
        CapacityError: where there is none, or it does not say its hook point.
    """
    from tl_capacity.dictionaries.loading import load_sae

    named = loaded.named
    hook, equals, rest = spec.partition("=")
    if not equals or not re.fullmatch(r"[\w.]+", hook) or Path(spec).exists():
        hook, rest = "", spec
    in_results = {f"{named.name}/{place}": place for place in named.saes} if named and not Path(rest).exists() else {}
    rest = in_results.get(rest, rest)
    if named and rest in named.saes:
        name, sae = load_sae(str(named.saes[rest]), device)
        name = f"{named.name}/{rest}"
    else:
        name, sae = load_sae(rest, device)
        if named and hook in named.saes and str(named.saes[hook]) == rest:
            name = f"{named.name}/{hook}"
    hook = hook or read_hook(sae) or ""
    if not hook:
        raise CapacityError(f"the SAE {rest} does not name its hook point: pass it as --sae HOOK={rest}")
    if not (named and name.startswith(f"{named.name}/")):
        _warn_of_another_model(name, metadata_of(sae, "model_name"), loaded)
    return NamedDictionary(hook, name, sae)


def _warn_of_another_model(sae: str, trained_on: Any, loaded: LoadedModel) -> None:
    """Warn if an SAE's metadata names a model that this one does not seem to be. Names alone decide nothing, since a
    folder can have any name.
    """
    theirs = str(trained_on or "").rpartition("/")[2].lower()
    ours = [
        Path(name).name.lower()
        for name in (loaded.name, str(getattr(getattr(loaded.model, "config", None), "_name_or_path", "") or ""))
        if name
    ]
    if theirs and not any(theirs in name or name in theirs for name in ours):
        log.warning(
            f"the metadata of the SAE {sae} says that it was trained on {trained_on!r}, and it is measured on "
            f"{loaded.name!r}: if that is a different model, use that model's own SAE"
        )


def text_source(settings: MeasureSettings, loaded: LoadedModel, saes: Sequence[Any]) -> str:
    """The token source that was asked for, or else the model's own.

    Raises:
        CapacityError: where there is neither; the text that the SAEs were trained on is offered.
    """
    source = settings.source or loaded.corpus
    if not source:
        raise CapacityError(
            f"no text to measure {settings.model!r} on: name a file, a `datasets` id or `embedded` with"
            f" --source{advised_source(saes)}"
        )
    return source


def stream_for(settings: MeasureSettings, loaded: LoadedModel, saes: Sequence[Any]) -> TokenStream:
    """The text to measure on. By default its rows are like those that the SAEs were trained on."""
    return TokenStream(
        text_source(settings, loaded, saes),
        loaded.tokenizer,
        row_length(settings, loaded.model, saes),
        settings.batch_rows,
        default_bos(saes) if settings.prepend_bos is None else settings.prepend_bos,
        settings.shard,
        settings.special_tokens,
        settings.share,
    )


def rule_for(settings: MeasureSettings, loaded: LoadedModel, saes: Sequence[Any]) -> CountingRule:
    """The rule that decides which tokens of that text count."""
    rule = CountingRule.for_model(loaded.model, loaded.tokenizer)
    return rule.at(counted_positions(settings.skip_first_positions, saes))


def row_length(settings: MeasureSettings, model: Any, saes: Sequence[Any]) -> int:
    """Positions in a row: those asked for, else the shortest context of the SAEs, else 512. Never more than the model
    has.
    """
    return fitting_row_length(model.config, settings.context, usual=context_of(model, saes))


def context_of(model: Any, saes: Sequence[Any]) -> int:
    """Positions in a row by default: the shortest context of the SAEs, else 512. Never more than the model has."""
    contexts = [int(size) for sae in saes if (size := metadata_of(sae, "context_size"))]
    return min(longest(model), min(contexts, default=MEASURED_CONTEXT))


def tapped_model(loaded: LoadedModel, saes: Sequence[Any], hooks: Sequence[str], more_hooks: Sequence[str] = ()) -> Any:
    """The model to tap. It is the Hugging Face model if its family has a place for every hook point, else a bridge
    around it. It is a `HookedTransformer` if SAEs were trained on processed weights and that shows in the activations.
    """
    outputs = [target_hook(sae, hook) for sae, hook in zip(saes, hooks, strict=True)]
    wanted = [*hooks, *more_hooks, *(o for o in outputs if o)]
    written = [(sae, output) for sae, output in zip(saes, outputs, strict=True) if output]
    places = [*zip(saes, hooks, strict=True), *written]
    if options := processing_wanted(loaded.model, places):
        if is_spread(loaded.model):
            raise CapacityError(
                f"an SAE needs a model with {' and '.join(sorted(options))}, which cannot be made from one that is "
                "spread over processes: leave out --shard-model or that SAE"
            )
        return processed(loaded.model, loaded.tokenizer, options)
    if all(hugging_face_place(loaded.model, hook) for hook in wanted):
        return loaded.model
    return loaded.bridge
