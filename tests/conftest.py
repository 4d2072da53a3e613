"""Tiny real models, SAEs of every architecture, and the type checks that hold while tests run.

Every function of the package is checked against its annotations (jaxtyping's import hook with beartype), so a wrong
type anywhere fails a test.
"""

from __future__ import annotations

import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Asked otherwise whether there is a GPU, CUDA cannot be used in processes that are forked later.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import jaxtyping

jaxtyping.install_import_hook("tl_capacity", "beartype.beartype")

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Heavy libraries are imported by the fixtures that need them: the process that hands tests out imports this file too,
# and the others wait for it.
import numpy as np
import place
import pytest
from commands import HOOK, Cli
from hypothesis import HealthCheck, settings

BOS = 0
"""GPT-NeoX' own id, chosen because code that tests it for truth gets it wrong."""
D_MODEL, LAYERS, VOCAB, CONTEXT = 32, 3, 100, 32
HEADS = 4

# The suite tries the same examples each time, so that a change fails by its own fault. `make fuzz` tries others.
settings.register_profile(
    "ci", derandomize=True, database=None, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile(
    "fuzz", deadline=None, max_examples=1000, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("ci")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        default=place.device(),
        help="where models, SAEs and tokens of the tests are, and what `auto` finds there (default: cpu)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """The device holds for helpers and child processes too. Where it is the CPU, no GPU is seen, so that `auto` finds
    the CPU on every machine.
    """
    device = config.getoption("device")
    os.environ[place.VARIABLE] = device
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        return
    from tl_capacity.errors import CapacityError
    from tl_capacity.runtime.devices import device_named

    try:
        device_named(device)
    except CapacityError as problem:
        raise pytest.UsageError(str(problem)) from problem


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if place.on_cpu():
        return
    for item in items:
        for mark in item.iter_markers("cpu_only"):
            item.add_marker(pytest.mark.skip(reason=f"is about the CPU: {mark.args[0]}"))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Several processes share the cores."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def device() -> str:
    """Where the tests run."""
    return place.device()


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<|endoftext|>": BOS, **{f"w{i}": i for i in range(1, VOCAB)}}
    whole = Tokenizer(models.WordLevel(words, unk_token=f"w{VOCAB - 1}"))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=whole,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        name_or_path="local",
        add_bos_token=True,
    )


def _hugging_face(kind: str) -> Any:
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        GPTNeoXConfig,
        GPTNeoXForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
    )

    shared = {"vocab_size": VOCAB, "bos_token_id": BOS, "eos_token_id": BOS}
    if kind == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(n_embd=D_MODEL, n_layer=LAYERS, n_head=HEADS, n_positions=CONTEXT, n_inner=64, **shared)
        )
    sizes = {
        "hidden_size": D_MODEL,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": 64,
        "max_position_embeddings": CONTEXT,
    }
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes, **shared))
    return GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, **shared, hidden_dropout=0.1))


@pytest.fixture(scope="session")
def make_model(tokenizer: Any) -> Callable[..., Any]:
    """`make_model(kind, seed=0)`: a fresh tiny model in eval mode, the same for the same arguments."""
    import torch
    from sae_lens.analysis.hooked_sae_transformer import HookedSAETransformer
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.model_bridge import TransformerBridge

    def make(kind: str, seed: int = 0) -> Any:
        torch.manual_seed(seed)
        if kind in ("HookedTransformer", "HookedSAETransformer"):
            config = HookedTransformerConfig(
                n_layers=LAYERS,
                d_model=D_MODEL,
                n_ctx=CONTEXT,
                d_head=D_MODEL // HEADS,
                d_vocab=VOCAB,
                act_fn="gelu",
                normalization_type="LN",
                seed=seed,
                device="cpu",  # moved below: the weights are drawn alike for every device
            )
            model = (HookedTransformer if kind == "HookedTransformer" else HookedSAETransformer)(
                config, tokenizer=tokenizer
            )
        elif kind in ("TransformerBridge", "SAETransformerBridge"):
            bridge = TransformerBridge if kind == "TransformerBridge" else SAETransformerBridge
            model = bridge.boot_transformers(
                "local/x",
                hf_model=place.placed(_louder(_hugging_face("gpt_neox"))),
                tokenizer=tokenizer,
                device=place.device(),
            )
            return model.eval()
        else:
            model = _hugging_face(kind)
        return place.placed(_louder(model).eval())

    return make


def _louder(model: Any) -> Any:
    """Initial weights of size 0.02 leave activations almost the same everywhere; larger ones make features fire here
    and not there.
    """
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model


KINDS = (
    "HookedTransformer",
    "TransformerBridge",
    "HookedSAETransformer",
    "SAETransformerBridge",
    "gpt_neox",
    "gpt2",
    "llama",
)
HOOKED = KINDS[:4]
HUGGING_FACE = KINDS[4:]


@pytest.fixture(scope="session")
def models_by_kind(make_model: Callable[..., Any]) -> dict[str, Any]:
    """One model of each kind for the tests that leave models as they were; `unchanged_models` holds them to it."""
    import torch

    found = {kind: make_model(kind) for kind in KINDS}
    for model in found.values():  # at the first such run transformers leaves recorders of its own on the blocks
        once = place.placed(torch.tensor([[BOS, 1]]))
        model.run_with_cache(once) if hasattr(model, "run_with_cache") else model(once, output_hidden_states=True)
    return found


@pytest.fixture(params=KINDS)
def any_model(request: pytest.FixtureRequest, models_by_kind: dict[str, Any]) -> Any:
    return models_by_kind[request.param]


@pytest.fixture
def hooked(models_by_kind: dict[str, Any]) -> Any:
    return models_by_kind["HookedTransformer"]


@pytest.fixture
def bridge(models_by_kind: dict[str, Any]) -> Any:
    return models_by_kind["TransformerBridge"]


@pytest.fixture
def neox(models_by_kind: dict[str, Any]) -> Any:
    return models_by_kind["gpt_neox"]


def all_hooks(model: Any) -> dict[str, list[int]]:
    """The identity of every hook on every module of a model."""
    found = {}
    for name, module in model.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values(), *module._backward_hooks.values()]
        found[name] = [
            id(hook) for hook in [*hooks, *getattr(module, "fwd_hooks", []), *getattr(module, "bwd_hooks", [])]
        ]
    return found


@pytest.fixture(scope="session")
def hooks_by_kind(models_by_kind: dict[str, Any]) -> dict[str, dict[str, list[int]]]:
    """The hooks that the shared models have before any test; each test is held to them."""
    return {kind: all_hooks(model) for kind, model in models_by_kind.items()}


@pytest.fixture(autouse=True)
def unchanged_models(request: pytest.FixtureRequest) -> Iterator[None]:
    """No test may leave a hook on a shared model."""
    if "models_by_kind" not in request.fixturenames:
        yield
        return
    models_by_kind, before = request.getfixturevalue("models_by_kind"), request.getfixturevalue("hooks_by_kind")
    yield
    after = {kind: all_hooks(model) for kind, model in models_by_kind.items()}
    changed = [kind for kind in after if after[kind] != before[kind]]
    before.update(after)  # the next test is not blamed for it
    assert not changed, f"hooks of the shared {', '.join(changed)} are others than before"


SAES: dict[str, tuple[str, dict[str, Any]]] = {
    "standard": ("StandardSAE", {}),
    "standard_with_input_bias": ("StandardSAE", {"apply_b_dec_to_input": True}),
    "layer_norm": ("StandardSAE", {"normalize_activations": "layer_norm"}),
    "constant_norm_rescale": ("StandardSAE", {"normalize_activations": "constant_norm_rescale"}),
    "gated": ("GatedSAE", {}),
    "topk": ("TopKSAE", {"k": 6}),
    "abstopk": ("AbsTopKSAE", {"k": 6}),
    "jumprelu": ("JumpReLUSAE", {}),
    "matching_pursuit": ("MatchingPursuitSAE", {"max_iterations": 5}),
}
TRANSCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "transcoder": ("Transcoder", {"d_out": D_MODEL}),
    "skip_transcoder": ("SkipTranscoder", {"d_out": D_MODEL}),
    "jumprelu_transcoder": ("JumpReLUTranscoder", {"d_out": D_MODEL}),
    "jumprelu_skip_transcoder": ("JumpReLUSkipTranscoder", {"d_out": D_MODEL}),
}


@pytest.fixture(scope="session")
def make_sae() -> Callable[..., Any]:
    """`make_sae(architecture, hook, hook_out=None, d_sae=64, seed=0, **config)`: an SAE whose every weight matters."""
    import sae_lens
    import torch
    from sae_lens.saes.sae import SAEMetadata

    def make(
        architecture: str = "standard",
        hook: str | None = "blocks.1.hook_resid_post",
        hook_out: str | None = None,
        d_sae: int = 64,
        seed: int = 0,
        **more: Any,
    ) -> Any:
        name, options = (SAES | TRANSCODERS)[architecture]
        torch.manual_seed(seed)
        metadata = SAEMetadata(hook_name=hook, hook_name_out=hook_out, context_size=CONTEXT, prepend_bos=True)
        config = getattr(sae_lens, f"{name}Config")(
            **{"d_in": D_MODEL, "d_sae": d_sae, "apply_b_dec_to_input": False, "metadata": metadata, **options, **more}
        )
        sae = getattr(sae_lens, name)(config)
        with torch.no_grad():
            for parameter in sae.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
            for bias in ("b_enc", "b_gate"):
                if getattr(sae, bias, None) is not None:
                    getattr(sae, bias).sub_(0.8)
            if hasattr(sae, "threshold"):
                sae.threshold.copy_(torch.rand_like(sae.threshold))
        return place.placed(sae.eval())

    return make


@pytest.fixture
def tokens() -> Any:
    """24 rows of token ids that begin with BOS, and hold it here and there besides."""
    import torch

    ids = torch.from_numpy(np.random.default_rng(0).integers(0, VOCAB, size=(24, 20)))
    ids[:, 0] = BOS
    ids[3, 5:9] = BOS
    return place.placed(ids)


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """40 documents of 1 to 70 words each, so that some need several rows and some do not fill one."""
    random = np.random.default_rng(1)
    return [" ".join(f"w{i}" for i in random.integers(1, VOCAB, size=n)) for n in random.integers(1, 70, size=40)]


@pytest.fixture(scope="session")
def published_curve() -> Path:
    """The importance curve published for layer 12 of Pythia-410M; its licence is not stated, so it is not in the
    repository but beside it.
    """
    path = Path(__file__).resolve().parents[2] / "shared" / "data" / "pythia410m_layer12.json"
    if not path.exists():
        pytest.skip(f"the published curve is not at {path}")
    return path


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Without type checks: as a user calls it, and faster."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def few_replicates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Intervals from fewer resamples, for tests of other things: they cost more than all the rest there."""
    from tl_capacity.results import estimate

    monkeypatch.setattr(estimate, "REPLICATES", 20)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Iterator[Cli]:
    """Runs `tl-capacity` in this process and returns exit code, standard output and standard error."""
    from tl_capacity.runtime.logs import configure

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        from tl_capacity.cli import main

        with pytest.raises(SystemExit) as stopped:
            main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    yield run
    configure(as_json=False, quiet=False)  # `--quiet` would be heeded by the tests that come after


@pytest.fixture(scope="session")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and tokenizer, two SAEs that fit it, one of another width, and text."""
    import torch
    from sae_lens import StandardSAE, StandardSAEConfig
    from sae_lens.saes.sae import SAEMetadata
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("setup")
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
        bos_token_id=0,
        eos_token_id=0,
    )
    GPTNeoXForCausalLM(config).save_pretrained(folder / "model")
    words = Tokenizer(models.WordLevel({"<s>": 0, "<unk>": 1, **{f"w{i}": i for i in range(2, 64)}}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="<s>", unk_token="<unk>"
    ).save_pretrained(folder / "model")
    for name, width, hook in (("sae", 32, HOOK), ("sae0", 32, "blocks.0.hook_resid_post"), ("wide", 48, HOOK)):
        sae = StandardSAE(StandardSAEConfig(d_in=width, d_sae=64, metadata=SAEMetadata(hook_name=hook)))
        # An orthogonal pair ±w reconstructs x exactly, so the SAE fits the model; a bias makes it sparse.
        w = torch.linalg.qr(torch.randn(width, width)).Q[:, : min(32, width)]
        sae.W_enc.data = torch.cat([w, -w], dim=1)[:, :64]
        sae.W_dec.data = sae.W_enc.data.T.contiguous()
        sae.b_enc.data.fill_(-0.01)
        sae.save_model(folder / name)
        if name == "sae":
            sae.W_dec.data *= 1.01
            sae.save_model(folder / "scaled")
    draw = np.random.default_rng(0)
    texts = [" ".join(f"w{i}" for i in draw.zipf(1.3, size=70) % 62 + 2) for _ in range(400)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return folder


@pytest.fixture(scope="session")
def hub_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models, SAEs and a text under the ids that the documentation names, as `tiny_hub` lays them out."""
    import tiny_hub

    folder = tmp_path_factory.mktemp("hub")
    tiny_hub.fill(folder)
    return folder


@pytest.fixture
def hub(hub_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, in the place of the hub's cache and of that of the datasets library."""
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub_folder / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", hub_folder / "datasets")
    return hub_folder
