"""Trains a sparse autoencoder at one hook point of any model through SAELens' own runner, and records its quality.

`tl-capacity run train-sae --model … --hook … --source … --out …`; after an interruption, the same command goes on from
the newest checkpoint.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tl_capacity.recipes.kept_activations import KeptActivations
from tl_capacity.recipes.sae_config import ARCHITECTURES, SAVE_DTYPES, TrainSAEConfig
from tl_capacity.recipes.sae_runner import NORM_BATCHES, save_unit_norm, train

from tl_capacity.errors import CapacityError, TokenSourceError
from tl_capacity.models.loading import LoadedModel, load_model
from tl_capacity.plugins import plugins
from tl_capacity.recipe import run_file, settings_of
from tl_capacity.runtime.devices import device_named
from tl_capacity.storage.files import make_folder, read_kept, write_json
from tl_capacity.storage.folders import new_folder, written
from tl_capacity.storage.same_run import earlier_values
from tl_capacity.text.streams import PADDING, TokenStream


def main(config: TrainSAEConfig) -> None:
    """Train, save and measure an SAE.

    Raises:
        CapacityError: on settings that do not fit, an unknown model, hook or source, or when interrupted.
    """
    _check(config)
    import torch

    from tl_capacity.models.forward import check_token_ids
    from tl_capacity.runtime.versions import library_versions
    from tl_capacity.text.counting import CountingRule, special_token_ids

    config = replace(config, device=device_named(config.device))
    loaded = load_model(config.model, device=config.device, revision=config.revision)
    config = config.fitted(loaded.model.config)
    _check_same(config)
    source = loaded.source(config.source)
    special = special_token_ids(loaded.model, loaded.tokenizer)
    stream = TokenStream(source, loaded.tokenizer, context=config.positions)
    train_rows, heldout_rows = split_rows(stream, config, special)
    for rows in (train_rows, heldout_rows):
        check_token_ids(loaded.model, rows)

    torch.manual_seed(config.seed)
    hooked, hook_in_model, watched = hooked_model(loaded, config.hook)
    if config.activations is not None:
        about = {"model": config.model, "revision": loaded.revision, "hook": config.hook}
        hooked = KeptActivations(hooked, config.activations, about)
    started = time.monotonic()
    sae = train(config, hooked, hook_in_model, source, train_rows, special)
    seconds = round(time.monotonic() - started, 1)

    out = config.out
    with new_folder(out) as folder:
        with written(out):
            save_unit_norm(sae, folder, config.save_dtype)
        quality = measure(folder, config, watched, heldout_rows, special)
        write_json(
            folder / "training.json",
            {
                "settings": settings_of(config, "out", "activations"),
                "source": source,
                "model_revision": loaded.revision,
                "d_in": int(sae.cfg.d_in),
                "tokens": config.steps * config.batch_tokens,
                "distinct_tokens": int(CountingRule.without(special).counted(train_rows).sum()),
                "seconds": seconds,
                "dead_latents": int(sae.cfg.metadata.num_dead_features),
                "heldout": quality,
                "versions": library_versions(),
            },
        )
    shutil.rmtree(config.checkpoints_folder, ignore_errors=True)
    print(
        f"{out}: {config.architecture} SAE with {config.d_sae:,} latents at {config.hook}, explained variance"
        f" {quality['explained_variance']['value']:.3f}, L0 {quality['l0']['value']:.1f} on {quality['tokens']:,}"
        f" held-out tokens, {int(sae.cfg.metadata.num_dead_features):,} dead latents, {seconds:,.0f} s"
    )


def split_rows(
    stream: TokenStream, config: TrainSAEConfig, special: list[int]
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Shuffled rows [row, position] to train on, and rows of other documents to measure on.

    Short rows are filled with a special token, which is masked.

    Raises:
        TokenSourceError: where the source has no two documents, or no full row.
    """
    from tl_capacity.text.counting import CountingRule

    needed = (
        config.tokens
        + config.heldout_tokens
        + (NORM_BATCHES + 1) * config.batch_tokens
        + config.buffer_rows * config.positions
    )
    rule = CountingRule.without(special)
    rows: list[NDArray[np.int32]] = []
    documents: list[int] = []
    counted: list[int] = []
    total = 0
    for batch in stream:
        ids = np.full((len(batch.tokens), config.positions), PADDING, dtype=np.int32)
        ids[:, : batch.tokens.shape[1]] = batch.tokens
        if not special:  # nothing to fill a short row with
            whole = (ids != PADDING).all(axis=1)
            ids, numbers = ids[whole], batch.documents[whole]
        else:
            ids, numbers = np.where(ids == PADDING, rule.filler, ids), batch.documents
        rows.extend(ids)
        documents.extend(numbers.tolist())
        counted.extend(rule.counted(ids).sum(axis=1).tolist())
        total += sum(counted[len(counted) - len(ids) :])
        if total >= needed:
            break
    shuffled = np.random.default_rng(config.seed)
    order = shuffled.permutation(np.unique(documents))
    if len(order) < 2:
        raise TokenSourceError(
            f"{stream.name()} has {len(order):,} usable document: at least two are needed, to hold one out"
        )
    tokens_of = dict.fromkeys(order.tolist(), 0)
    for document, count in zip(documents, counted, strict=True):
        tokens_of[document] += count
    reached = np.cumsum([tokens_of[document] for document in order.tolist()])
    n_heldout = min(int(np.searchsorted(reached, config.heldout_tokens)) + 1, max(1, len(order) // 10))
    held = np.isin(documents, order[:n_heldout])
    table = np.stack(rows)
    train = table[~held]
    return train[shuffled.permutation(len(train))], table[held]


def hooked_model(loaded: LoadedModel, hook: str) -> tuple[Any, str, Any]:
    """A model that SAELens can read, the hook point's name in it, and the model to measure on.

    The residual stream of a known family is read off the Hugging Face model itself, which keeps its fast attention; any
    other hook needs a bridge.

    Raises:
        HookPointError: where the model has no such hook point.
    """
    from sae_lens.load_model import HookedProxyLM

    from tl_capacity.models.hook_points import find_tap_point
    from tl_capacity.models.places import lens_name

    model = loaded.model
    model.config.use_cache = False
    family = plugins().family_of(model.config.model_type)
    place = family.residual(hook) if family else None
    if place is not None:
        find_tap_point(model, hook)
        blocks, _, layer = place[0].rpartition(".")
        # The proxy sees what modules return, so a block's input is the output of the block before.
        module = place[0] if place[1] == "output" else f"{blocks}.{int(layer) - 1}"
        if not module.endswith(".-1"):
            return HookedProxyLM(model, loaded.tokenizer, hook_names=[module]), module, model
    find_tap_point(loaded.bridge, hook)
    return loaded.bridge, lens_name(loaded.bridge, hook), loaded.bridge


def measure(
    folder: Path, config: TrainSAEConfig, model: Any, rows: NDArray[np.int32], special: list[int]
) -> dict[str, Any]:
    """How well the SAE in `folder`, loaded as a user would, does on held-out rows."""
    from sae_lens import SAE

    from tl_capacity.measure.attach import add_capacity_hooks

    sae = SAE.load_from_disk(folder, device=config.device)
    with add_capacity_hooks(model, {config.hook: sae}, fvu_every=1, mask_token_ids=special) as capacity:
        summary = (
            capacity.run(TokenStream(rows.astype(np.int64), context=config.positions, batch_rows=config.batch_rows))
            .measurement()[config.hook]
            .summary
        )
    assert summary.explained_variance is not None  # fvu_every=1 checks every row
    return {
        "tokens": summary.n_tokens,
        "explained_variance": summary.explained_variance.to_json(),
        "l0": summary.l0.to_json(),
        "latents_that_fired": int((summary.firing_rates > 0).sum()),
    }


def _check(config: TrainSAEConfig) -> None:
    if config.architecture not in ARCHITECTURES:
        raise CapacityError(
            f"{config.architecture!r} is not an architecture to train: choose one of {', '.join(ARCHITECTURES)}"
        )
    if config.save_dtype not in SAVE_DTYPES:
        raise CapacityError(f"{config.save_dtype!r} is not a dtype to save in: choose one of {', '.join(SAVE_DTYPES)}")
    if not 1 <= config.k <= config.d_sae:
        raise CapacityError(f"k = {config.k} must lie between 1 and d_sae = {config.d_sae}")
    if not 1 <= config.batch_tokens <= config.tokens:
        raise CapacityError(f"batch_tokens = {config.batch_tokens} must lie between 1 and tokens = {config.tokens}")
    for name, least in (("heldout_tokens", 1), ("checkpoints", 0), ("batch_rows", 1)):
        if getattr(config, name) < least:
            raise CapacityError(f"{name} = {getattr(config, name):,} is too small: choose at least {least}")
    if not 0 < config.lr < inf:
        raise CapacityError(f"lr = {config.lr:g} trains nothing: choose a finite number above 0")
    if config.out.exists():
        raise CapacityError(f"{config.out} exists already: choose another --out, or delete it first")
    make_folder(config.out.parent)


def _check_same(config: TrainSAEConfig) -> None:
    """Refuse to continue a run with other settings."""
    kept = config.checkpoints_folder / "settings.json"
    if kept.is_file() and (changed := earlier_values(read_kept(kept), config.decisive(), all_of_them=True)):
        raise CapacityError(
            f"{kept.parent} holds a run with other settings ({changed}): pass those to resume it, or delete the folder"
            " to start again"
        )


if __name__ == "__main__":
    run_file(main)
