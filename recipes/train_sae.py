"""Trains a sparse autoencoder on one hook point of any model that loads, through SAELens' own runner, and records how
it was made and how good it is.

`tl-capacity run train-sae --model … --hook … --source … --out …`; after an interruption, the same command goes on from
the newest checkpoint.
"""

from __future__ import annotations

import shutil
import time
import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tl_capacity.errors import CapacityError, HookPointError, TokenSourceError
from tl_capacity.models.loading import LoadedModel, load_model
from tl_capacity.plugins import plugins
from tl_capacity.recipe import option, run_file, settings_of
from tl_capacity.runtime.hub import loading_errors, reason_of
from tl_capacity.runtime.logs import log
from tl_capacity.storage.files import make_folder, read_kept, write_json
from tl_capacity.storage.folders import new_folder, written
from tl_capacity.storage.same_run import changed_fields
from tl_capacity.text.streams import PADDING, TokenStream

ARCHITECTURES = ("topk", "batchtopk", "standard", "gated", "jumprelu")
SAVE_DTYPES = ("float32", "float16", "bfloat16")
NORM_BATCHES = 8
"""Batches from which SAELens estimates the scale of the activations."""


@dataclass(frozen=True)
class TrainSAEConfig:
    """Everything that decides the SAE."""

    model: str = option("embedded", "A model name, folder or hub id.")
    hook: str = option("blocks.3.hook_resid_post", "The hook point, in TransformerLens' names.")
    source: str = option("", "The token source; by default the corpus that belongs to the model.")
    out: Path = option(Path("sae"), "The folder to write; checkpoints stand beside it until it is complete.")
    tokens: int = option(1_000_000, "Tokens to train on, special ones not counted; a shorter source is repeated.")
    heldout_tokens: int = option(20_000, "Tokens kept apart, by whole documents, to measure the SAE on.")
    architecture: str = option("topk", f"One of {', '.join(ARCHITECTURES)}.")
    d_sae: int = option(4096, "Number of latents.")
    k: int = option(32, "Active latents per token, of topk and batchtopk.")
    l1_coefficient: float = option(1.0, "Sparsity penalty of standard and gated.")
    l0_coefficient: float = option(1.0, "Sparsity penalty of jumprelu.")
    lr: float = option(
        1e-3, "Peak learning rate of Adam; it rises over the first 5% of the steps and falls to zero over the last 20%."
    )
    batch_tokens: int = option(1024, "Activations per training step.")
    context: int = option(256, "Positions in a row, BOS included.")
    batch_rows: int = option(8, "Rows in one forward pass of the model.")
    dead_after_tokens: int = option(
        200_000, "A latent that was silent for so long counts as dead, and topk revives it."
    )
    checkpoints: int = option(4, "How many to write on the way; run the same command again to go on from the newest.")
    save_dtype: str = option(
        "float32",
        f"How the weights are stored, one of {', '.join(SAVE_DTYPES)}; they are computed with in float32 all the same.",
    )
    device: str = option("cpu", "Where the model and the SAE run.")
    seed: int = option(0, "Of the split, the order of the rows and the initial weights.")

    @property
    def steps(self) -> int:
        return max(1, self.tokens // self.batch_tokens)

    @property
    def buffer_rows(self) -> int:
        """Rows whose activations are mixed with one another before they are trained on."""
        return max(64, -(-4 * self.batch_tokens // self.context))


def main(config: TrainSAEConfig) -> None:
    """Train, save and measure an SAE.

    Raises:
        CapacityError: on settings that do not fit, an unknown model, hook or source, or when interrupted.
    """
    _check(config)
    import torch

    from tl_capacity.models.forward import check_token_ids
    from tl_capacity.runtime.versions import library_versions
    from tl_capacity.text.counting import special_token_ids

    loaded = load_model(config.model, device=config.device)
    source = loaded.source(config.source)
    special = special_token_ids(loaded.model, loaded.tokenizer)
    stream = TokenStream(source, loaded.tokenizer, context=config.context)
    train_rows, heldout_rows = split_rows(stream, config, special)
    for rows in (train_rows, heldout_rows):
        check_token_ids(loaded.model, rows)

    torch.manual_seed(config.seed)
    hooked, hook_in_model, watched = hooked_model(loaded, config.hook)
    started = time.monotonic()
    sae = _train(config, hooked, hook_in_model, source, train_rows, special)
    seconds = round(time.monotonic() - started, 1)

    out = config.out
    with new_folder(out) as folder:
        with written(out):
            _save(sae, folder, config.save_dtype)
        quality = measure(folder, config, watched, heldout_rows, special)
        write_json(
            folder / "training.json",
            {
                "settings": settings_of(config, "out"),
                "source": source,
                "model_revision": loaded.revision,
                "d_in": int(sae.cfg.d_in),
                "tokens": config.steps * config.batch_tokens,
                "distinct_tokens": int((~np.isin(train_rows, special)).sum()),
                "seconds": seconds,
                "dead_latents": int(sae.cfg.metadata.num_dead_features),
                "heldout": quality,
                "versions": library_versions(),
            },
        )
    shutil.rmtree(_checkpoints(config), ignore_errors=True)
    print(
        f"{out}: {config.architecture} SAE with {config.d_sae:,} latents at {config.hook}, explained variance"
        f" {quality['explained_variance']['value']:.3f}, L0 {quality['l0']['value']:.1f} on {quality['tokens']:,}"
        f" held-out tokens, {int(sae.cfg.metadata.num_dead_features):,} dead latents, {seconds:,.0f} s"
    )


def split_rows(
    stream: TokenStream, config: TrainSAEConfig, special: list[int]
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Rows [row, position] to train on, shuffled, and rows of other documents to measure on; short rows are filled with
    a special token, which is masked.

    Raises:
        TokenSourceError: where the source has no two documents, or no full row.
    """
    needed = (
        config.tokens
        + config.heldout_tokens
        + (NORM_BATCHES + 1) * config.batch_tokens
        + config.buffer_rows * config.context
    )
    rows: list[NDArray[np.int32]] = []
    documents: list[int] = []
    counted: list[int] = []
    total = 0
    for batch in stream:
        ids = np.full((len(batch.tokens), config.context), PADDING, dtype=np.int32)
        ids[:, : batch.tokens.shape[1]] = batch.tokens
        if not special:  # nothing to fill a short row with
            whole = (ids != PADDING).all(axis=1)
            ids, numbers = ids[whole], batch.documents[whole]
        else:
            ids, numbers = np.where(ids == PADDING, special[0], ids), batch.documents
        rows.extend(ids)
        documents.extend(numbers.tolist())
        counted.extend((~np.isin(ids, special)).sum(axis=1).tolist())
        total += sum(counted[len(counted) - len(ids) :])
        if total >= needed:
            break
    shuffled = np.random.default_rng(config.seed)
    order = shuffled.permutation(np.unique(documents))
    if len(order) < 2:
        raise TokenSourceError(
            f"{stream.name()} has {len(order)} document of use: at least two are needed, to hold one out"
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
    """A model that SAELens can read activations from, the hook's name in it, and the model to measure on.

    The residual stream of a known family is read off the Hugging Face model itself, which keeps its fast attention; any
    other hook needs a bridge.

    Raises:
        HookPointError: where the model has no such hook point.
    """
    from sae_lens.load_model import HookedProxyLM

    from tl_capacity.models.hook_points import TapPoint

    model = loaded.model
    model.config.use_cache = False
    family = plugins().family_of(model.config.model_type)
    place = family.residual(hook) if family else None
    if place is not None:
        TapPoint.of(model, hook)
        blocks, _, layer = place[0].rpartition(".")
        # The proxy sees what modules return, so a block's input is the output of the block before.
        module = place[0] if place[1] == "output" else f"{blocks}.{int(layer) - 1}"
        if not module.endswith(".-1"):
            return HookedProxyLM(model, loaded.tokenizer, hook_names=[module]), module, model
    TapPoint.of(loaded.bridge, hook)
    return loaded.bridge, hook, loaded.bridge


def measure(
    folder: Path, config: TrainSAEConfig, model: Any, rows: NDArray[np.int32], special: list[int]
) -> dict[str, Any]:
    """What the SAE in `folder`, loaded as anybody would, does on held-out rows."""
    from sae_lens import SAE

    from tl_capacity.measure.attach import add_capacity_hooks

    sae = SAE.load_from_disk(folder, device=config.device)
    with add_capacity_hooks(model, {config.hook: sae}, fvu_every=1, mask_token_ids=special) as capacity:
        summary = (
            capacity.run(TokenStream(rows.astype(np.int64), context=config.context, batch_rows=config.batch_rows))
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


def _train(
    config: TrainSAEConfig, hooked: Any, hook_in_model: str, source: str, rows: NDArray[np.int32], special: list[int]
) -> Any:
    import torch
    from datasets import Dataset
    from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, LoggingConfig
    from sae_lens.registry import get_sae_training_class

    class Runner(LanguageModelSAETrainingRunner):  # type: ignore[misc]
        def run_trainer_with_interruption_handling(self, trainer: Any) -> Any:
            self.go_on(trainer)
            save_in_place = trainer.save_checkpoint

            def save(checkpoint_name: str) -> None:
                place = checkpoints / checkpoint_name
                with new_folder(place) as unfinished, written(place):
                    save_in_place(unfinished.name)

            trainer.save_checkpoint = save
            # SAELens takes over the signal handlers, and on an interrupt saves no weights; a whole checkpoint is worth
            # the second that it takes.
            try:
                return trainer.fit()
            except KeyboardInterrupt:
                trainer.save_checkpoint(str(trainer.n_training_samples))
                raise

        def go_on(self, trainer: Any) -> None:
            """Take the state of the newest checkpoint that can be read, if there is any at all."""
            refusals = []
            for folder in _newest_first(checkpoints):
                try:
                    trainer.load_trainer_state(folder)
                    self.sae.load_weights_from_checkpoint(folder)
                    self.activations_store.load_from_checkpoint(folder)
                except loading_errors() as problem:
                    refusals.append(
                        f"the checkpoint {folder} is damaged ({reason_of(problem)}): delete {checkpoints} to begin anew"
                    )
                    continue
                for refusal in refusals:
                    log.warning(f"the last checkpoint is left out, and the one before it gone on from: {refusal}")
                return
            if refusals:
                raise CapacityError(refusals[0])

    mean, scale, d_in = _activation_mean(hooked, hook_in_model, rows[: 2 * config.batch_rows], special, config.device)
    warmup = config.steps // 20
    sae_config_class = get_sae_training_class(config.architecture)[1]
    wanted = {
        "k": config.k,
        "l1_coefficient": config.l1_coefficient,
        "l0_coefficient": config.l0_coefficient,
        "l1_warm_up_steps": warmup,
        "l0_warm_up_steps": warmup,
    }
    own = {field.name for field in fields(sae_config_class)}
    checkpoints = _checkpoints(config)
    runner_config = LanguageModelSAERunnerConfig(
        sae=sae_config_class(
            d_in=d_in,
            d_sae=config.d_sae,
            device=config.device,
            normalize_activations="expected_average_only_in",  # SAELens folds the scale into the weights at the end
            **{name: value for name, value in wanted.items() if name in own},
        ),
        model_name=config.model,
        model_class_name="HookedTransformer",
        model_from_pretrained_kwargs={},
        hook_name=hook_in_model,
        dataset_path=source,
        is_dataset_tokenized=True,
        streaming=False,
        context_size=config.context,
        store_batch_size_prompts=config.batch_rows,
        n_batches_in_buffer=config.buffer_rows,
        training_tokens=config.steps * config.batch_tokens,
        train_batch_size_tokens=config.batch_tokens,
        exclude_special_tokens=special,
        n_batches_for_norm_estimate=NORM_BATCHES,
        lr=config.lr,
        lr_warm_up_steps=warmup,
        lr_decay_steps=config.steps // 5,
        dead_feature_window=max(1, config.dead_after_tokens // config.batch_tokens),
        feature_sampling_window=max(1, config.dead_after_tokens // config.batch_tokens),
        n_checkpoints=config.checkpoints,
        output_path=None,
        device=config.device,
        seed=config.seed,
        logger=LoggingConfig(log_to_wandb=False),
        verbose=False,
    )
    runner_config.checkpoint_path = str(
        checkpoints
    )  # SAELens had appended a random name, under which nothing could be found again
    make_folder(checkpoints)
    write_json(checkpoints / "settings.json", _settings(config))
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="The training dataset contains fewer samples"
        )  # it compares rows with tokens
        warnings.filterwarnings("ignore", message="To copy construct from a tensor")
        runner = Runner(runner_config, override_dataset=Dataset.from_dict({"input_ids": rows}), override_model=hooked)
        with torch.no_grad():
            runner.sae.b_dec.copy_(scale * mean)  # from zero, Adam would need most of a short run to get there
        try:
            sae = runner.run()
        except KeyboardInterrupt as problem:
            raise CapacityError(
                f"training was interrupted and its state kept in {checkpoints}: run the same command again to go on"
            ) from problem
    if hook_in_model != config.hook:
        sae.cfg.metadata.hook_name, sae.cfg.metadata.hf_hook_name = config.hook, hook_in_model
    return sae


def _activation_mean(
    hooked: Any, hook: str, rows: NDArray[np.int32], special: list[int], device: str
) -> tuple[Any, float, int]:
    """Mean activation [d_in], the factor that brings activations to the norm √d_in, and d_in, from a few rows."""
    import torch
    from sae_lens.util import extract_stop_at_layer_from_tlens_hook_name

    tokens = torch.from_numpy(rows.astype(np.int64)).to(device)
    with torch.no_grad():
        stop = extract_stop_at_layer_from_tlens_hook_name(hook)
        activations = hooked.run_with_cache(tokens, names_filter=[hook], stop_at_layer=stop, prepend_bos=False)[1][
            hook
        ].float()
    if activations.ndim != 3:
        raise HookPointError(
            f"{hook} has shape {list(activations.shape)}, but one vector per token is needed: choose a residual, MLP or"
            " attention output"
        )
    vectors = activations[~torch.isin(tokens, torch.tensor(special, device=device))]
    if not bool(torch.isfinite(vectors).all()):
        raise CapacityError(f"{hook} has NaN or infinite activations: check the model's weights")
    d_in = int(vectors.shape[-1])
    return vectors.mean(0), d_in**0.5 / float(vectors.norm(dim=-1).mean()), d_in


def _save(sae: Any, folder: Path, save_dtype: str) -> None:
    """Write the inference form with decoder vectors of norm 1, so that a latent's size is the size
    of what it writes.
    """
    import torch
    from sae_lens import SAE
    from safetensors.torch import load_file, save_file

    sae.save_inference_model(folder)
    folded = SAE.load_from_disk(folder, fold_W_dec_norm=True)
    if hasattr(folded.cfg, "rescale_acts_by_decoder_norm"):
        folded.cfg.rescale_acts_by_decoder_norm = False  # by 1, from here on
    folded.save_model(folder)
    if save_dtype == "float32":
        return
    path = folder / "sae_weights.safetensors"
    # cfg.json keeps saying float32: SAELens converts to what it says on loading, and computes in that.
    weights = {name: value.to(getattr(torch, save_dtype)) for name, value in load_file(path).items()}
    if any(not bool(torch.isfinite(value).all()) for value in weights.values()):
        raise CapacityError(f"the weights exceed the range of {save_dtype}: save them as bfloat16 or float32")
    save_file(weights, path)


def _check(config: TrainSAEConfig) -> None:
    if config.architecture not in ARCHITECTURES:
        raise CapacityError(
            f"{config.architecture!r} is no architecture to train: choose one of {', '.join(ARCHITECTURES)}"
        )
    if config.save_dtype not in SAVE_DTYPES:
        raise CapacityError(f"{config.save_dtype!r} is no dtype to save in: choose one of {', '.join(SAVE_DTYPES)}")
    if not 1 <= config.k <= config.d_sae:
        raise CapacityError(f"k = {config.k} must lie between 1 and d_sae = {config.d_sae}")
    if not 1 <= config.batch_tokens <= config.tokens:
        raise CapacityError(f"batch_tokens = {config.batch_tokens} must lie between 1 and tokens = {config.tokens}")
    if config.heldout_tokens < 1 or config.lr <= 0 or config.checkpoints < 0 or config.batch_rows < 1:
        raise CapacityError("heldout_tokens, lr and batch_rows must be positive and checkpoints not negative")
    if config.out.exists():
        raise CapacityError(f"{config.out} exists already: choose another --out, or delete it first")
    make_folder(config.out.parent)
    kept = _checkpoints(config) / "settings.json"
    if kept.is_file() and (before := read_kept(kept)) != _settings(config):
        changed = ", ".join(f"{name} = {before[name]}" for name in changed_fields(_settings(config), before))
        raise CapacityError(
            f"{kept.parent} holds a run with other settings ({changed}): use those to go on with it, or delete the"
            " folder to begin anew"
        )


def _settings(config: TrainSAEConfig) -> dict[str, Any]:
    """What a run that goes on must have in common with the one before."""
    return {
        name: value
        for name, value in asdict(config).items()
        if name not in ("out", "device", "save_dtype", "checkpoints")
    }


def _checkpoints(config: TrainSAEConfig) -> Path:
    return config.out.with_name(f"{config.out.name}.checkpoints")


def _newest_first(checkpoints: Path) -> list[Path]:
    """The checkpoints, which SAELens names by their tokens."""
    return sorted(
        (path for path in checkpoints.glob("*") if path.is_dir() and path.name.isdecimal()),
        key=lambda path: int(path.name),
        reverse=True,
    )


if __name__ == "__main__":
    run_file(main)
