"""The SAE training recipe: what it writes, that it learns, that it goes on after an interruption, and that every kind
of hook can be trained on; and how the embedded teacher's training goes on.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from place import placed
from safetensors.torch import load_file
from tl_capacity.recipes import embedded_teacher
from tl_capacity.recipes.sae_config import TrainSAEConfig
from tl_capacity.recipes.train_sae import main, split_rows

from tl_capacity.errors import CapacityError, HookPointError, TokenSourceError
from tl_capacity.hookspecs import hookimpl
from tl_capacity.interfaces import NamedModel
from tl_capacity.plugins import register_plugin, unregister_plugin
from tl_capacity.text.streams import TokenStream

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture
def forwards() -> list[tuple[int, ...]]:
    """The shapes of the token batches that the model was run on."""
    return []


@pytest.fixture
def config(
    tmp_path: Path, make_model: Callable[..., Any], tokenizer: Any, forwards: list[Any]
) -> Iterator[TrainSAEConfig]:
    """A run of seconds, on a model that a plugin registers."""

    def load() -> tuple[Any, Any]:
        model = make_model("gpt_neox")
        model.get_input_embeddings().register_forward_pre_hook(lambda _, args: forwards.append(tuple(args[0].shape)))
        return model, tokenizer

    class Plugin:
        @hookimpl
        def register_models(self, register: Callable[[NamedModel], None]) -> None:
            register(NamedModel("tiny", load, corpus=str(tmp_path / "corpus.jsonl"), revision="one"))

    random = np.random.default_rng(0)
    with open(tmp_path / "corpus.jsonl", "w") as file:
        for _ in range(200):
            file.write(
                json.dumps({"text": " ".join(f"w{i}" for i in random.integers(1, 100, size=random.integers(10, 70)))})
                + "\n"
            )
    register_plugin(Plugin(), "tiny-plugin")
    yield TrainSAEConfig(
        model="tiny",
        hook=HOOK,
        out=tmp_path / "sae",
        tokens=12_000,
        heldout_tokens=500,
        d_sae=64,
        k=8,
        lr=3e-3,
        batch_tokens=128,
        context=24,
        dead_after_tokens=3_000,
        checkpoints=0,
    )
    unregister_plugin("tiny-plugin")


def trained(config: TrainSAEConfig) -> tuple[Any, dict[str, Any]]:
    """Train, then load the result as anybody would."""
    from sae_lens import SAE

    main(config)
    return SAE.load_from_disk(config.out), json.loads((config.out / "training.json").read_text())


def test_what_is_written(config: TrainSAEConfig, make_model: Callable[..., Any], tokenizer: Any) -> None:
    sae, record = trained(config)
    assert sorted(path.name for path in config.out.iterdir()) == [
        "cfg.json",
        "sae_weights.safetensors",
        "training.json",
    ]
    assert [path.name for path in config.out.parent.iterdir() if "sae" in path.name] == ["sae"]
    assert sae.cfg.architecture() == "topk"
    assert (sae.cfg.d_in, sae.cfg.d_sae, sae.cfg.k, sae.cfg.normalize_activations) == (32, 64, 8, "none")
    assert sae.cfg.metadata.hook_name == HOOK
    assert sae.cfg.metadata.model_name == "tiny"
    assert sae.cfg.metadata.context_size == 24
    assert sae.cfg.metadata.exclude_special_tokens == [0]
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(64))
    assert record["tokens"] == 93 * 128
    assert record["settings"]["seed"] == 0
    assert record["model_revision"] == "one"
    assert record["versions"].keys() >= {"torch", "sae-lens"}

    # The record's figures again, by dense computation over the held-out rows.
    _, heldout = split_rows(TokenStream(record["source"], tokenizer, context=24), config, [0])
    tokens = placed(torch.from_numpy(heldout).long())
    with torch.no_grad():
        # GPT-NeoX gives the embedding, each block's input but the first, and the normalised last output.
        x = make_model("gpt_neox")(tokens, output_hidden_states=True).hidden_states[2][tokens != 0].to(sae.W_dec.device)
        latents = sae.encode(x)
        fvu = (x - sae.decode(latents)).square().sum() / (x - x.mean(0)).square().sum()
    assert record["heldout"]["tokens"] == len(x) >= 500
    assert record["heldout"]["explained_variance"]["value"] == pytest.approx(1 - float(fvu), abs=1e-4)
    assert record["heldout"]["l0"]["value"] == pytest.approx(float((latents != 0).sum(1).float().mean()))
    assert record["heldout"]["latents_that_fired"] == int((latents != 0).any(0).sum())


@pytest.mark.slow
def test_training_explains_more(config: TrainSAEConfig) -> None:
    _, start = trained(replace(config, lr=1e-9, out=config.out.with_name("start")))
    _, end = trained(config)
    before, after = (record["heldout"]["explained_variance"]["value"] for record in (start, end))
    assert after > before + 0.2
    assert after > 0.5


def test_the_same_seed_gives_the_same_sae(config: TrainSAEConfig) -> None:
    short = replace(config, tokens=2_000)
    weights = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        main(replace(short, out=config.out.with_name(name), seed=seed))
        weights.append(load_file(config.out.with_name(name) / "sae_weights.safetensors")["W_dec"])
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("architecture", "saved_as", "hook"),
    [
        ("topk", "topk", "blocks.2.hook_resid_pre"),
        ("topk", "topk", "blocks.0.hook_resid_pre"),
        ("standard", "standard", "blocks.1.hook_mlp_out"),
        ("gated", "gated", HOOK),
        ("jumprelu", "jumprelu", HOOK),
        ("batchtopk", "jumprelu", HOOK),
    ],
)
def test_every_architecture_and_kind_of_hook(
    config: TrainSAEConfig, architecture: str, saved_as: str, hook: str
) -> None:
    sae, record = trained(replace(config, architecture=architecture, hook=hook, tokens=4_000))
    assert sae.cfg.architecture() == saved_as
    assert sae.cfg.metadata.hook_name == hook
    assert record["heldout"]["explained_variance"]["value"] > 0
    assert record["heldout"]["l0"]["value"] > 0
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(64))


@pytest.mark.slow
def test_a_module_of_transformers(config: TrainSAEConfig) -> None:
    sae, record = trained(replace(config, architecture="standard", hook="gpt_neox.layers.1.mlp", tokens=4_000))
    assert sae.cfg.metadata.hook_name == "gpt_neox.layers.1.mlp"
    assert record["heldout"]["explained_variance"]["value"] > 0


def test_the_residual_streams_names_agree(config: TrainSAEConfig) -> None:
    """What a block reads is what the block before it wrote, so the two SAEs are one."""
    short = replace(config, tokens=2_000)
    main(replace(short, hook="blocks.1.hook_resid_post", out=config.out.with_name("post")))
    main(replace(short, hook="blocks.2.hook_resid_pre", out=config.out.with_name("pre")))
    post, pre = (load_file(config.out.with_name(name) / "sae_weights.safetensors") for name in ("post", "pre"))
    assert all(torch.equal(post[name], pre[name]) for name in post)


@pytest.mark.slow
def test_kept_activations_give_the_same_sae_and_run_the_model_once(
    config: TrainSAEConfig, forwards: list[Any], tmp_path: Path
) -> None:
    """Of two SAEs of one hook point the second only has the model run to be measured; a damaged file is made again."""
    keeping = replace(config, tokens=3_000, activations=tmp_path / "activations")
    plain, _ = trained(replace(config, tokens=3_000, out=tmp_path / "plain"))
    forwards.clear()
    first, record = trained(keeping)
    ran = len(forwards)
    files = sorted(keeping.activations.glob("*.safetensors"))  # type: ignore[union-attr]
    files[0].write_bytes(files[0].read_bytes()[:100])
    forwards.clear()
    again, _ = trained(replace(keeping, out=tmp_path / "again"))
    measured = ran - len(files)
    assert len(forwards) == measured + 1 < ran
    forwards.clear()
    trained(replace(keeping, k=4, out=tmp_path / "sparser"))
    assert len(forwards) == measured
    for sae in (first, again):
        for name, weights in plain.state_dict().items():
            torch.testing.assert_close(sae.state_dict()[name], weights, rtol=0, atol=0)
    assert "activations" not in record["settings"]
    with pytest.raises(CapacityError, match=f"holds other activations .hook = {HOOK}.: choose"):
        main(replace(keeping, hook="blocks.0.hook_resid_post", out=tmp_path / "elsewhere"))


def test_half_precision_on_disk_is_float32_in_use(config: TrainSAEConfig) -> None:
    main(replace(config, tokens=2_000))
    sae, _ = trained(replace(config, tokens=2_000, save_dtype="float16", out=config.out.with_name("half")))
    full, half = (load_file(config.out.with_name(name) / "sae_weights.safetensors") for name in ("sae", "half"))
    assert all(half[name].dtype == torch.float16 and torch.equal(half[name], full[name].half()) for name in full)
    assert sae.cfg.dtype == "float32"
    assert sae.encode(torch.randn(3, 32)).dtype == torch.float32
    torch.testing.assert_close(sae.W_enc.detach(), full["W_enc"].half().float())


def test_special_tokens_are_kept_out(config: TrainSAEConfig, make_model: Callable[..., Any], tokenizer: Any) -> None:
    """A BOS activation a thousand times as large as any other leaves no trace in the SAE."""

    def load_loud() -> tuple[Any, Any]:
        model = make_model("gpt_neox")

        def amplify(_: Any, args: Any, output: Any) -> Any:
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            hidden[:, 0] *= 1e3
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        model.gpt_neox.layers[1].register_forward_hook(amplify)
        return model, tokenizer

    class Plugin:
        @hookimpl
        def register_models(self, register: Callable[[NamedModel], None]) -> None:
            register(NamedModel("loud", load_loud, corpus=str(config.out.parent / "corpus.jsonl")))

    short = replace(config, tokens=2_000)
    register_plugin(Plugin(), "loud-plugin")
    try:
        main(replace(short, model="loud", out=config.out.with_name("loud")))
    finally:
        unregister_plugin("loud-plugin")
    main(short)
    loud, quiet = (load_file(config.out.with_name(name) / "sae_weights.safetensors") for name in ("loud", "sae"))
    assert all(torch.equal(loud[name], quiet[name]) for name in quiet)


@contextmanager
def interrupted(
    config: TrainSAEConfig, forwards: list[Any], make_model: Callable[..., Any], tokenizer: Any, share: float
) -> Iterator[TrainSAEConfig]:
    """A run that was interrupted after a share of its forward passes and left its checkpoints; inside, the same command
    goes on.
    """
    main(replace(config, out=config.out.with_name("whole")))
    stop: int | None = int(share * len(forwards))
    forwards.clear()

    def load() -> tuple[Any, Any]:
        model = make_model("gpt_neox")

        def interrupt(*_: Any) -> None:
            forwards.append(())
            if len(forwards) == stop:
                raise KeyboardInterrupt

        model.get_input_embeddings().register_forward_pre_hook(interrupt)
        return model, tokenizer

    class Plugin:
        @hookimpl
        def register_models(self, register: Callable[[NamedModel], None]) -> None:
            register(NamedModel("stopping", load, corpus=str(config.out.parent / "corpus.jsonl")))

    stopped = replace(config, model="stopping", checkpoints=2)
    register_plugin(Plugin(), "stopping-plugin")
    try:
        with pytest.raises(
            CapacityError, match=r"training was interrupted, and its state is kept in .*run the same command again"
        ):
            main(stopped)
        stop = None
        forwards.clear()
        yield stopped
    finally:
        unregister_plugin("stopping-plugin")


@pytest.mark.slow
def test_an_interrupted_run_goes_on(
    config: TrainSAEConfig, forwards: list[Any], make_model: Callable[..., Any], tokenizer: Any
) -> None:
    with interrupted(config, forwards, make_model, tokenizer, share=0.5) as stopped:
        assert not config.out.exists()
        with pytest.raises(CapacityError, match=r"holds a run with other settings \(d_sae = 64\)"):
            main(replace(stopped, d_sae=128))
        forwards.clear()
        _, record = trained(stopped)
    gone_on = len(forwards)
    forwards.clear()
    main(replace(config, out=config.out.with_name("again")))
    assert gone_on < 0.8 * len(forwards)
    assert record["heldout"]["explained_variance"]["value"] > 0.5
    assert not config.out.with_name("sae.checkpoints").exists()


@pytest.mark.slow
def test_damaged_checkpoints_are_left_out(
    config: TrainSAEConfig,
    forwards: list[Any],
    make_model: Callable[..., Any],
    tokenizer: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def cut(path: Path) -> None:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    checkpoints = config.out.with_name("sae.checkpoints")
    with interrupted(config, forwards, make_model, tokenizer, share=0.95) as stopped:
        oldest, middle, newest = sorted(
            (path for path in checkpoints.iterdir() if path.is_dir()), key=lambda path: int(path.name)
        )
        whole = checkpoints.with_name("copy")
        shutil.copytree(checkpoints, whole)
        cut(newest / "trainer_state.pt")
        cut(middle / "sae_weights.safetensors")
        with caplog.at_level(logging.WARNING, "tl_capacity"):
            main(stopped)
        said = [
            record.message
            for record in caplog.records
            if "the last checkpoint cannot be used, so the run continues from the one before it" in record.message
        ]
        assert [str(newest) in said[0], str(middle) in said[1], len(said)] == [True, True, 2]
        assert not checkpoints.exists()

        shutil.rmtree(config.out)
        shutil.copytree(whole, checkpoints)
        for folder in (newest, middle, oldest):
            cut(folder / "activations_store_state.safetensors")
        with pytest.raises(
            CapacityError, match=rf"the checkpoint {newest} is damaged \(.*\): delete .*sae.checkpoints to start again"
        ):
            main(stopped)
        (checkpoints / "settings.json").write_text("{")
        with pytest.raises(CapacityError, match=r"settings\.json is truncated or was altered .*delete its folder"):
            main(stopped)


def test_the_teachers_checkpoint_before_the_last_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    small = {
        "vocabulary": 50,
        "context": 8,
        "d_model": 16,
        "layers": 1,
        "heads": 2,
        "batch_rows": 2,
        "warmup_tokens": 16,
    }
    once = embedded_teacher.TeacherConfig(**small, cycles=(160,))
    twice = replace(once, cycles=(160, 320))
    rows = np.random.default_rng(0).integers(0, 50, size=(40, 8))
    last, before = tmp_path / "checkpoint.pt", tmp_path / "checkpoint.previous.pt"
    for config in (once, twice):
        embedded_teacher.train(config, rows, rows[:4], tmp_path)
    whole = embedded_teacher.read_checkpoint(last)
    assert [embedded_teacher.read_checkpoint(before)["step"], whole["step"]] == [10, 20]
    last.write_bytes(last.read_bytes()[:1000])
    embedded_teacher.train(twice, rows, rows[:4], tmp_path)
    assert f"so the run continues from the one before it: the checkpoint {last} is damaged" in caplog.text
    again = embedded_teacher.read_checkpoint(last)
    assert all(torch.equal(value, again["model"][name]) for name, value in whole["model"].items())
    for path in (last, before):
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(
        CapacityError, match=rf"the checkpoint {last} is damaged \(.*\): delete it to train from the beginning"
    ):
        embedded_teacher.train(twice, rows, rows[:4], tmp_path)


def test_a_tokenizer_with_more_words_than_the_model(
    config: TrainSAEConfig, make_model: Callable[..., Any], tmp_path: Path, tokenizer: Any
) -> None:
    larger = tokenizer.__class__(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )
    larger.add_tokens(["one-more"])
    make_model("gpt_neox").save_pretrained(tmp_path / "model")
    larger.save_pretrained(tmp_path / "model")
    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps({"text": f"w1 w2 one-more w{i}"}) + "\n" for i in range(50))
    )
    with pytest.raises(
        CapacityError,
        match=("the text has token id 100, but the model's vocabulary has 100: use the model's own tokenizer"),
    ):
        main(replace(config, model=str(tmp_path / "model"), source=str(tmp_path / "texts.jsonl")))


def test_rows_of_a_document_stay_together(config: TrainSAEConfig, tokenizer: Any) -> None:
    texts = [" ".join([f"w{n}"] * 40) for n in range(1, 100)]
    train, heldout = split_rows(TokenStream(texts, tokenizer, context=24), replace(config, heldout_tokens=200), [0])
    words_trained, words_held = set(np.unique(train)) - {0}, set(np.unique(heldout)) - {0}
    assert words_trained.isdisjoint(words_held)
    assert len(words_held) == 5
    assert words_trained | words_held == set(range(1, 100))
    again, _ = split_rows(TokenStream(texts, tokenizer, context=24), replace(config, heldout_tokens=200), [0])
    assert np.array_equal(train, again)
    assert not np.array_equal(train, np.sort(train, axis=0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "magic"}, "'magic' is not an architecture"),
        ({"save_dtype": "int4"}, "'int4' is not a dtype to save in"),
        ({"k": 65}, "k = 65 must lie between 1 and d_sae = 64"),
        ({"tokens": 100}, "batch_tokens = 128 must lie between 1 and tokens = 100"),
        ({"lr": 0.0}, "lr = 0 trains nothing"),
    ],
)
def test_settings_that_do_not_fit(config: TrainSAEConfig, change: dict[str, Any], message: str) -> None:
    with pytest.raises(CapacityError, match=message):
        main(replace(config, **change))
    assert [path.name for path in config.out.parent.iterdir()] == ["corpus.jsonl"]


def test_a_hook_that_does_not_exist(config: TrainSAEConfig) -> None:
    for hook in ("blocks.7.hook_resid_post", "blocks.0.hook_nothing"):
        with pytest.raises(HookPointError, match="is not a hook point of this model"):
            main(replace(config, hook=hook))


def test_sources_that_do_not_do(config: TrainSAEConfig, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("w1 w2 w3\n")
    with pytest.raises(TokenSourceError, match="has 1 usable document: at least two are needed"):
        main(replace(config, source=str(tmp_path / "one.txt")))
    with pytest.raises(TokenSourceError, match="there is no file"):
        main(replace(config, source=str(tmp_path / "none.txt")))


def test_what_is_there_is_not_overwritten(config: TrainSAEConfig) -> None:
    config.out.mkdir()
    (config.out / "precious").write_text("keep")
    with pytest.raises(CapacityError, match="exists already"):
        main(config)
    assert (config.out / "precious").read_text() == "keep"
