"""Checks importances in nats against exact ablations.

It sets a sample of latents to zero, one at a time. The KL that each costs stands beside its importance estimates.

`tl-capacity run check-importance --model embedded --hook blocks.3.hook_resid_post`
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from tl_capacity.dictionaries.adapter import metadata_of
from tl_capacity.dictionaries.loading import load_sae
from tl_capacity.errors import CapacityError, TokenSourceError
from tl_capacity.measure.ablation import ablation_kl
from tl_capacity.measure.attach import add_capacity_hooks
from tl_capacity.models.defaults import row_length
from tl_capacity.models.loading import LoadedModel, load_model
from tl_capacity.recipe import option, run_file, settings_of
from tl_capacity.results.estimate import pair_interval
from tl_capacity.runtime.units import NATS
from tl_capacity.runtime.versions import library_versions
from tl_capacity.show.tables import table
from tl_capacity.storage.files import make_folder, write_json
from tl_capacity.text.counting import CountingRule
from tl_capacity.text.streams import PADDING, TokenStream


@dataclass(frozen=True)
class CheckImportanceConfig:
    """Everything that decides the result."""

    model: str = option(
        "embedded", "The model: a name that a plugin registered, a save_pretrained folder, or a hub id."
    )
    hook: str = option(
        "",
        "Hook point, by TransformerLens' name. Default: the SAE's own, or the middle one of those that come with the"
        " model.",
    )
    sae: str = option("", "SAE folder or RELEASE/SAE_ID. Default: the one that comes with the model.")
    source: str = option("", "Text to read. Default: the text that comes with the model.")
    importance: tuple[str, ...] = option(("gradient", "fisher", "second_moment", "firing_rate"), "Estimators to check.")
    rows: int = option(32, "Rows of text to ablate on. Only rows that fill the context count.")
    context: int | None = option(None, "Positions in a row, BOS included. Default: what the model takes, at most 256.")
    latents: int = option(
        100, "Latents to ablate: evenly spaced among those that fire, ordered by the first estimator."
    )
    out: Path | None = option(None, "Folder for check_importance.json.")


def main(config: CheckImportanceConfig) -> None:
    """Compare importances in nats with the KL of exact ablations."""
    from scipy.stats import spearmanr

    if min(config.rows, config.latents) < 2 or not config.importance:
        raise CapacityError(
            f"--rows {config.rows} and --latents {config.latents} must be at least 2, and --importance must name an"
            " estimator"
        )
    loaded = load_model(config.model)
    config, sae = _with_dictionary(config, loaded)
    context = row_length(loaded.model.config, config.context)
    rows = full_rows(TokenStream(loaded.source(config.source), loaded.tokenizer, context=context), config.rows)
    started = time.monotonic()
    with add_capacity_hooks(
        loaded.model, {config.hook: sae}, importance=config.importance, alive_threshold=0.0
    ) as capacity:
        measured = capacity.run(torch.split(rows, 8)).measurement()[config.hook]
    alive = np.flatnonzero(measured.summary.alive)
    estimates = {name: measured.importance(name) for name in config.importance}
    order = np.argsort(estimates[config.importance[0]])
    places = order[np.unique(np.linspace(0, len(order) - 1, config.latents).round().astype(int))]
    counted = torch.from_numpy(CountingRule.for_model(loaded.model, loaded.tokenizer).counted(rows.numpy()))
    kl = ablation_kl(
        loaded.model, config.hook, sae, rows, alive[places].tolist(), counted=counted, progress=True
    ).numpy()
    compared = []
    for name, values in estimates.items():
        nats = measured.estimator(name).unit == NATS
        ratio = values[places][kl > 0] / kl[kl > 0]
        compared.append(
            {
                "importance": name,
                "unit": measured.estimator(name).unit,
                "rank_correlation": float(spearmanr(values[places], kl).statistic),
                "rank_correlation_interval": pair_interval(
                    values[places], kl, lambda a, b: float(spearmanr(a, b).statistic)
                ),
                "median_ratio": float(np.median(ratio)) if nats else None,
                "ratio_quartiles": [float(q) for q in np.quantile(ratio, (0.25, 0.75))] if nats else None,
            }
        )
    Console().print(rendered(compared, len(places), int(counted.sum())))
    if config.out is not None:
        make_folder(config.out)
        content = {
            "schema": 1,
            "settings": settings_of(config),
            "tokens": int(counted.sum()),
            "versions": library_versions(),
            "seconds": round(time.monotonic() - started, 1),
            "estimators": compared,
            "latents": [
                {
                    "latent": int(latent),
                    "kl": float(value),
                    **{name: float(estimates[name][place]) for name in estimates},
                }
                for latent, place, value in zip(alive[places], places, kl, strict=True)
            ],
        }
        write_json(config.out / "check_importance.json", content)


def _with_dictionary(config: CheckImportanceConfig, loaded: LoadedModel) -> tuple[CheckImportanceConfig, Any]:
    """The SAE to check with, and the settings with its hook point filled in.

    Raises:
        CapacityError: where none comes with the model, or it does not name its hook point.
    """
    bundled = dict(loaded.named.saes) if loaded.named else {}
    hook = config.hook
    if not (hook or config.sae) and bundled:
        hook = list(bundled)[len(bundled) // 2]
    folder = config.sae or str(bundled.get(hook, ""))
    if not folder:
        where = f" at {hook}" if hook else ""
        raise CapacityError(f"no SAE comes with {config.model}{where}: pass --sae")
    _, sae = load_sae(folder)
    hook = hook or str(metadata_of(sae, "hook_name") or "")
    if not hook:
        raise CapacityError(f"the SAE {folder} does not name its hook point: pass --hook")
    return replace(config, hook=hook), sae


def full_rows(stream: TokenStream, wanted: int) -> torch.Tensor:
    """The first rows of a stream that need no padding: int64 [row, position].

    Raises:
        TokenSourceError: where the source has fewer.
    """
    full: list[NDArray[np.int64]] = []
    for batch in stream:
        full += [row for row in batch.tokens if (row != PADDING).all()]
        if len(full) >= wanted:
            return torch.from_numpy(np.stack(full[:wanted]))
    raise TokenSourceError(
        f"{stream.name()} has {len(full):,} rows that fill a context of {stream.context:,}, fewer than {wanted:,}:"
        " choose fewer --rows or a shorter --context"
    )


def rendered(compared: list[dict[str, Any]], latents: int, tokens: int) -> Any:
    """The result as a table."""
    body = []
    for row in compared:
        low, high = row["rank_correlation_interval"]
        ratio = (
            "–"
            if row["median_ratio"] is None
            else f"{row['median_ratio']:.2f} ({row['ratio_quartiles'][0]:.2f} to {row['ratio_quartiles'][1]:.2f})"
        )
        body.append([row["importance"], row["unit"], f"{row['rank_correlation']:.2f} [{low:.2f}, {high:.2f}]", ratio])
    title = f"Importance against the KL of {latents:,} exact ablations on {tokens:,} tokens"
    return table(title, ["importance", "unit", "rank correlation", "importance / KL, median (quartiles)"], body)


if __name__ == "__main__":
    run_file(main)
