"""SAELens' training runner for the recipe train-sae: its inputs, its checkpoints, and how the result is saved."""

from __future__ import annotations

import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tl_capacity.recipes.sae_config import TrainSAEConfig

from tl_capacity.errors import CapacityError, HookPointError
from tl_capacity.runtime.hub import loading_errors, reason_of
from tl_capacity.runtime.logs import log
from tl_capacity.storage.files import make_folder, write_json
from tl_capacity.storage.folders import new_folder, written

NORM_BATCHES = 8
"""Batches from which SAELens estimates the scale of the activations."""


def train(
    config: TrainSAEConfig, hooked: Any, hook_in_model: str, source: str, rows: NDArray[np.int32], special: list[int]
) -> Any:
    """The SAE, trained to the end. Training resumes from the newest checkpoint.

    Args:
        hooked: a model that SAELens can read activations from.
        hook_in_model: the hook point's name in it.
        source: what the text is, for SAELens' record.
        rows: token ids [row, position], in the order in which they are trained on.
        special: ids of tokens that are not trained on.

    Raises:
        CapacityError: when interrupted, or where all checkpoints are damaged.
    """
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
            """Load the newest checkpoint that can be read, if there is one."""
            refusals = []
            for folder in _newest_first(checkpoints):
                try:
                    trainer.load_trainer_state(folder)
                    self.sae.load_weights_from_checkpoint(folder)
                    self.activations_store.load_from_checkpoint(folder)
                except loading_errors() as problem:
                    refusals.append(
                        f"the checkpoint {folder} is damaged ({reason_of(problem)}): delete {checkpoints} to start"
                        " again"
                    )
                    continue
                for refusal in refusals:
                    log.warning(
                        f"the last checkpoint cannot be used, so the run continues from the one before it: {refusal}"
                    )
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
    accepted = {field.name for field in fields(sae_config_class)}
    checkpoints = config.checkpoints_folder
    runner_config = LanguageModelSAERunnerConfig(
        sae=sae_config_class(
            d_in=d_in,
            d_sae=config.d_sae,
            device=config.device,
            normalize_activations="expected_average_only_in",  # SAELens folds the scale into the weights at the end
            **{name: value for name, value in wanted.items() if name in accepted},
        ),
        model_name=config.model,
        model_class_name="HookedTransformer",
        model_from_pretrained_kwargs={},
        hook_name=hook_in_model,
        dataset_path=source,
        is_dataset_tokenized=True,
        streaming=False,
        context_size=config.positions,
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
    # SAELens had appended a random name, under which nothing could be found again.
    runner_config.checkpoint_path = str(checkpoints)
    make_folder(checkpoints)
    write_json(checkpoints / "settings.json", config.decisive())
    with warnings.catch_warnings():
        # It compares rows with tokens.
        warnings.filterwarnings("ignore", message="The training dataset contains fewer samples")
        warnings.filterwarnings("ignore", message="To copy construct from a tensor")
        runner = Runner(runner_config, override_dataset=Dataset.from_dict({"input_ids": rows}), override_model=hooked)
        with torch.no_grad():
            runner.sae.b_dec.copy_(scale * mean)  # from zero, Adam would need most of a short run to get there
        try:
            sae = runner.run()
        except KeyboardInterrupt as problem:
            raise CapacityError(
                f"training was interrupted, and its state is kept in {checkpoints}: run the same command again to"
                " resume"
            ) from problem
    if hook_in_model != config.hook:
        sae.cfg.metadata.hook_name, sae.cfg.metadata.hf_hook_name = config.hook, hook_in_model
    return sae


def _activation_mean(
    hooked: Any, hook: str, rows: NDArray[np.int32], special: list[int], device: str
) -> tuple[Any, float, int]:
    """Mean activation [d_in], the factor to norm √d_in, and d_in, from a few rows."""
    import torch
    from sae_lens.util import extract_stop_at_layer_from_tlens_hook_name

    from tl_capacity.text.counting import CountingRule

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
    counted = torch.from_numpy(CountingRule.without(special).counted(rows)).to(device)
    vectors = activations[counted]
    if not bool(torch.isfinite(vectors).all()):
        raise CapacityError(f"{hook} has NaN or infinite activations: check the model's weights")
    d_in = int(vectors.shape[-1])
    return vectors.mean(0), d_in**0.5 / float(vectors.norm(dim=-1).mean()), d_in


def save_unit_norm(sae: Any, folder: Path, save_dtype: str) -> None:
    """Write the inference form with decoder vectors of norm 1.

    So a latent's size is the size of what it writes.
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


def _newest_first(checkpoints: Path) -> list[Path]:
    """The checkpoints, newest first. SAELens names them by their tokens."""
    return sorted(
        (path for path in checkpoints.glob("*") if path.is_dir() and path.name.isdecimal()),
        key=lambda path: int(path.name),
        reverse=True,
    )
