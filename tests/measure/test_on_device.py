"""Counting as on an accelerator, on the CPU: the sums of the path that picks out active latents, without a single
question to the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import Cli, arguments, same
from conftest import BOS, D_MODEL, SAES, VOCAB
from place import device, on_cpu, placed
from pretended import Machine, OnDevice, moved, pretended_device

from tl_capacity.dictionaries import dense, reducing
from tl_capacity.dictionaries.adapter import NamedDictionary
from tl_capacity.errors import CapacityError
from tl_capacity.measure import layout
from tl_capacity.measure.attach import attach
from tl_capacity.measure.session import CapacityHooks
from tl_capacity.runtime.compiling import COMPILE
from tl_capacity.text.counting import CountingRule
from tl_capacity.text.streams import PADDING, TokenBatch

MakeSAE = Callable[..., Any]
HOOK = "blocks.1.hook_resid_post"
EXACT = ("counts", "incidence", "tokens", "documents", "masked", "fvu_tokens")


def attached(model: Any, sae: Any, on_device: bool | None, hook: str = HOOK, fvu_every: int = 3) -> CapacityHooks:
    rule = CountingRule.without([BOS])
    return attach(model, [NamedDictionary(hook, "sae", sae)], rule, None, 1e-5, fvu_every, on_device=on_device)


def sums(model: Any, sae: Any, stream: Any, on_device: bool | None, **options: Any) -> dict[str, np.ndarray]:
    with attached(model, sae, on_device, **options) as capacity:
        measurement = capacity.run(stream, progress=False).measurement()
    return dict(measurement.hooks[0].summary.arrays)


def assert_same_sums(model: Any, sae: Any, stream: Any, **options: Any) -> dict[str, np.ndarray]:
    entries, device = (sums(model, sae, stream, way, **options) for way in (False, True))
    assert entries.keys() == device.keys()
    assert entries["counts"].sum() > 0
    for name, array in entries.items():
        if name in EXACT:
            np.testing.assert_array_equal(device[name], array, err_msg=name)
        else:
            # FVU's sums are of float32 reconstructions, whose terms are added in another order. On a GPU the latents of
            # the checked tokens are rounded to TF32 before, each by up to 2⁻¹¹, and products of other sizes are made by
            # other kernels.
            loose = (1e-5 if name == "residual" else 1e-6) if on_cpu() else (2**-11 if name == "residual" else 1e-5)
            np.testing.assert_allclose(device[name], array, rtol=loose, atol=1e-7, err_msg=name)
    return device


def uneven() -> list[TokenBatch]:
    """Rows of a few documents that go on over batches, with padding and a row of nothing that counts."""
    random = np.random.default_rng(4)
    batches = []
    for documents in ([0, 0, 1, 5], [5, 6, 6, 9], [70, 71, 9, 72]):
        rows = random.integers(1, VOCAB, (4, 24))
        for row, end in enumerate(random.integers(0, 24, 4)):
            rows[row, end:] = PADDING if row % 2 else BOS
        rows[3] = BOS
        batches.append(TokenBatch(rows, np.array(documents), np.zeros(4, dtype=np.int64)))
    return batches


@pytest.mark.parametrize("architecture", SAES)
def test_the_same_sums(neox: Any, make_sae: MakeSAE, tokens: torch.Tensor, architecture: str) -> None:
    assert_same_sums(neox, make_sae(architecture), tokens.split(5))


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "topk", "gated"])
@pytest.mark.parametrize("at_once", [1, 64 * 40, 2**28])
def test_layouts_blocks_and_chunks(
    neox: Any, make_sae: MakeSAE, architecture: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Documents of every length, over several batches, in blocks of features and chunks of few pieces; some decoder
    vectors are zero.
    """
    monkeypatch.setattr(dense, "DENSE_AT_ONCE", at_once)
    monkeypatch.setattr(dense, "DENSE_FEATURES", 24)
    monkeypatch.setattr(layout, "LENGTHS", (8, 4) if at_once > 1 else (5,))
    sae = make_sae(architecture)
    with torch.no_grad():
        sae.W_dec[7] = sae.W_dec[30] = 0
    found = assert_same_sums(neox, sae, uneven(), fvu_every=2)
    assert found["counts"][:, 7].sum() == 0


@pytest.mark.parametrize("architecture", ["transcoder", "jumprelu_skip_transcoder"])
def test_transcoders(hooked: Any, make_sae: MakeSAE, tokens: torch.Tensor, architecture: str) -> None:
    hook, written = "blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"
    assert_same_sums(hooked, make_sae(architecture, hook, written), tokens.split(5), hook=hook)


def test_topk_that_rescales_by_the_decoder(neox: Any, make_sae: MakeSAE, tokens: torch.Tensor) -> None:
    assert_same_sums(neox, make_sae("topk", rescale_acts_by_decoder_norm=True), tokens.split(5))


def test_an_sae_in_float64(neox: Any, make_sae: MakeSAE, tokens: torch.Tensor) -> None:
    assert_same_sums(neox, make_sae().double(), tokens.split(5))


@pytest.mark.parametrize(("width", "k"), [(256, 4), (256, 5), (250, 3), (64, 1), (640, 7)])
def test_the_largest_in_two_steps(width: int, k: int) -> None:
    """Ties and NaN included, the values are those of `torch.topk`, and from places that hold them."""
    random = torch.Generator().manual_seed(width + k)
    for latents in (
        torch.randn(9, width, generator=random),
        torch.randint(-2, 3, (9, width), generator=random).float(),
        torch.where(torch.rand(9, width, generator=random) < 0.01, torch.nan, torch.randn(9, width, generator=random)),
    ):
        values, features = dense.Largest()(dense.LatentsOf(latents), k)
        own = latents.topk(k).values
        same_values = {"rtol": 0, "atol": 0, "equal_nan": True}
        torch.testing.assert_close(values.sort(-1).values, own.sort(-1).values, **same_values)
        torch.testing.assert_close(latents.gather(1, features), values, **same_values)
        assert all(len(set(row)) == k for row in features.tolist())


def test_what_is_compiled_writes_to_none_of_its_arguments() -> None:
    """As `Compiled` demands."""
    products, bias, scale, least = (placed(torch.randn(size)) for size in ((8, 256), 256, 256, 256))
    of, group = dense.LatentsOf(products, bias, scale), placed(torch.tensor([[0, 3]]).expand(8, -1))
    dense.largest_of_groups(of)
    dense.members_of_groups(of, group)
    reducing.sums_at_once(products, bias, least, 4)
    assert [each._version for each in (products, bias, scale, least, group)] == [0] * 5


def test_moments_are_those_of_float64(neox: Any, make_sae: MakeSAE) -> None:
    """float32 sums of pieces are off by less than a millionth, whatever the length of the text."""
    sae, ids = make_sae("standard", d_sae=32), torch.from_numpy(np.random.default_rng(7).integers(1, VOCAB, (64, 32)))
    found = sums(neox, sae, [placed(ids)] * 3, True)
    layer = neox.gpt_neox.layers[1]
    seen: list[torch.Tensor] = []
    handle = layer.register_forward_hook(lambda _, args, out: seen.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        neox(placed(ids))
    handle.remove()
    latents = (seen[0].reshape(-1, D_MODEL).double() @ sae.W_enc.double() + sae.b_enc.double()).clamp(min=0).detach()
    own = {"sums": latents.sum(0), "squares": latents.square().sum(0)}
    for name, sum_ in own.items():
        # One latent's float32 rounding is 1e-6 of its terms, which may cancel; its sum over thousands of tokens is not.
        np.testing.assert_allclose(found[name].sum(0), 3 * sum_.numpy(force=True), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("architecture", ["standard", "topk", "gated"])
def test_nan_is_reported_with_its_first_batch_and_never_saved(
    neox: Any, make_sae: MakeSAE, tokens: torch.Tensor, architecture: str
) -> None:
    """Weights turn NaN in the third batch; the error comes at the end, and from then on nothing can be saved."""
    sae, batches = make_sae(architecture), tokens.split(5)

    def spoiled() -> Iterator[torch.Tensor]:
        yield from batches[:2]
        with torch.no_grad():
            (sae.b_enc if architecture != "gated" else sae.b_mag)[3] = float("nan")
        yield from batches[2:]

    with attached(neox, sae, True) as capacity:
        with pytest.raises(CapacityError, match=rf"SAE at {HOOK} gives NaN or infinite latents in batch 3: check"):
            capacity.run(spoiled(), progress=False)
        for save in (capacity.checkpoint, capacity.measurement):
            with pytest.raises(CapacityError, match="in batch 3"):
                save()


def test_activations_that_are_not_finite(neox: Any, make_sae: MakeSAE, tokens: torch.Tensor) -> None:
    handle = neox.gpt_neox.layers[0].register_forward_hook(
        lambda _, args, out: (out[0] / 0, *out[1:]) if isinstance(out, tuple) else out / 0
    )
    refused = pytest.raises(CapacityError, match=rf"{HOOK} has NaN or infinite activations in batch 1")
    with attached(neox, make_sae(), True) as capacity, refused:
        capacity.run(tokens.split(5), progress=False)
    handle.remove()


@pytest.mark.cpu_only("the device is pretended")
@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "topk", "gated", "layer_norm"])
def test_no_batch_waits_for_the_device(
    make_model: Callable[..., Any], make_sae: MakeSAE, tokens: torch.Tensor, architecture: str, unchecked: None
) -> None:
    """After the first batch, on which the short cut is compared with the SAE's own `encode`, the host asks the device
    for nothing; a checkpoint asks for its sums.
    """
    batches, seen = tokens.split(5), []
    wanted = sums(make_model("gpt_neox"), make_sae(architecture), batches, False)
    with pretended_device(float64=True):
        model, sae = moved(make_model("gpt_neox")), moved(make_sae(architecture))
        with attached(model, sae, True) as capacity:
            capacity.run(batches, progress=False, after_batch=lambda _: seen.append(list(Machine.waits)))
            Machine.waits.clear()
            found = capacity.measurement().hooks[0].summary.arrays
    later = seen[-1][len(seen[0]) :]
    assert later == []
    assert 0 < len(Machine.waits) < 40
    for name, array in wanted.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-3, atol=1e-4, err_msg=name)


def test_a_question_to_the_device_is_noticed() -> None:
    """The pretended device notes each way to wait for it."""
    ways: list[Callable[[torch.Tensor], object]] = [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.cpu(),
        lambda x: torch.ones(3).to(x.device),
        lambda x: x[[0, 1]],
    ]
    for way in ways:
        with pretended_device():
            x = OnDevice(torch.ones(3))
            way(x)
            assert len(Machine.waits) >= 1
            Machine.waits.clear()
            torch.ones(3).to(x.device, non_blocking=True)
            assert Machine.waits == []


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "gated", "topk", "float64"])
def test_compiled_sums(
    neox: Any,
    make_sae: MakeSAE,
    tokens: torch.Tensor,
    architecture: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    unchecked: None,
) -> None:
    monkeypatch.setenv(COMPILE, "1")
    monkeypatch.setattr(dense, "DENSE_FEATURES", 24)
    if architecture == "topk":
        sae = make_sae("topk", rescale_acts_by_decoder_norm=True, k=2)
    else:
        sae = make_sae().double() if architecture == "float64" else make_sae(architecture)
    assert_same_sums(neox, sae, [*tokens.split(5), *uneven()])
    assert "torch.compile" not in caplog.text


def test_sums_without_a_compiler(
    neox: Any,
    make_sae: MakeSAE,
    tokens: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Where compiling fails, sums are made without it, and that is said once."""

    def fails(*_: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setenv(COMPILE, "1")
    monkeypatch.setattr(torch, "compile", lambda *_, **__: fails)
    assert_same_sums(neox, make_sae(), tokens.split(5))
    assert caplog.text.count("torch.compile does not work here (RuntimeError)") == 1


@pytest.mark.slow
def test_too_little_memory_is_a_sentence_and_the_checkpoint_stays(
    setup: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device runs out of memory in the midst; from the checkpoint the run goes on to what it would have been."""
    whole, out, products = tmp_path / "whole", tmp_path / "m", []
    options = ("--batch-rows", "4", "--checkpoint-seconds", 0)
    assert cli(*arguments(setup, whole, *options))[0] == 0
    product = torch.mm

    def scarce(*args: Any, **more: Any) -> torch.Tensor:
        products.append(1)
        if len(products) == 20:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has none")
        return product(*args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "mm", scarce)
        code, _, err = cli(*arguments(setup, out, *options))
    assert code == 2
    assert (
        "tokens does not fit into the memory of the device, where 2.00 GiB more were asked for: choose a smaller" in err
    )
    assert cli(*arguments(setup, out, *options, "--resume"))[0] == 0
    same(whole, out)


@pytest.mark.cpu_only("the device is pretended")
@pytest.mark.parametrize("where", ["model", "sae"])
def test_a_model_and_an_sae_on_two_devices(
    make_model: Callable[..., Any], make_sae: MakeSAE, tokens: torch.Tensor, unchecked: None, where: str
) -> None:
    """Sums are where the SAE is; what the model gives is copied there."""
    wanted = sums(make_model("gpt_neox"), make_sae(), tokens.split(5), False)
    with pretended_device(float64=True):
        model, sae = make_model("gpt_neox"), make_sae()
        model, sae = (moved(model), sae) if where == "model" else (model, moved(sae))
        found = sums(model, sae, tokens.split(5), None)
    for name, array in wanted.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-3, atol=1e-4, err_msg=name)


def test_half_precision_beneath_autocast(
    make_model: Callable[..., Any], make_sae: MakeSAE, tokens: torch.Tensor
) -> None:
    """A bfloat16 model with a float32 SAE: what is active is decided in float32, also beneath autocast."""
    model, sae = make_model("gpt_neox").to(torch.bfloat16), make_sae("jumprelu")
    wanted = assert_same_sums(model, sae, tokens.split(5))
    with torch.autocast(device(), dtype=torch.bfloat16):
        found = assert_same_sums(model, sae, tokens.split(5))
    np.testing.assert_array_equal(found["tokens"], wanted["tokens"])
    seen: list[torch.Tensor] = []
    handle = model.gpt_neox.layers[1].register_forward_hook(
        lambda _, args, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        model(tokens)
    handle.remove()
    counted = tokens.flatten() != BOS
    latents = sae.encode(seen[0].reshape(-1, D_MODEL)[counted].float()).detach()
    np.testing.assert_array_equal(wanted["counts"].sum(0), (latents != 0).sum(0).numpy(force=True))
