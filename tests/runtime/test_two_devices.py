"""What meets on two devices: a model and its SAE, a head and the tokens that a device map left elsewhere, sums that a
device without float64 cannot keep; and a setting that threads share.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pretended import DEVICE, OnDevice, moved, pretended_device

import tl_capacity as tlc
from tl_capacity.dictionaries import loading
from tl_capacity.dictionaries.chosen import ChosenLatents
from tl_capacity.dictionaries.encoding import decoder_vectors_add_up
from tl_capacity.distillation.comparison import Compared
from tl_capacity.distillation.keeping import Kept
from tl_capacity.distillation.settings import KeepFeatures
from tl_capacity.errors import DeviceFullError
from tl_capacity.measure.ending import slopes_at_head
from tl_capacity.models.head import Head
from tl_capacity.models.hook_points import find_tap_point
from tl_capacity.rivals.projection import Spectrum
from tl_capacity.runtime import compiling, devices, precision
from tl_capacity.runtime.compiling import Compiled
from tl_capacity.runtime.out_of_memory import within_device_memory

pytestmark = [pytest.mark.usefixtures("unchecked"), pytest.mark.cpu_only("the device is pretended")]
HOOK = "blocks.1.hook_resid_post"
MakeSAE = Callable[..., Any]


def drawn(*size: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size)))


@pytest.mark.parametrize("where", ["SAE", "model"])
def test_an_sae_and_activations(make_sae: MakeSAE, where: str) -> None:
    sae, inputs = make_sae("standard", HOOK), drawn(9, 32)
    with pretended_device(float64=True):
        there = moved(sae) if where == "SAE" else sae
        assert decoder_vectors_add_up(there, inputs if where == "SAE" else OnDevice(inputs)) is True


def test_a_head_and_tokens() -> None:
    hidden, weight = drawn(2, 6, 8), drawn(50, 8)
    ids = torch.randint(50, (2, 6), generator=torch.Generator().manual_seed(0))
    arguments = ids, torch.ones(2, 6, dtype=torch.bool), ("cross_entropy", "sampled"), torch.Generator().manual_seed(3)
    wanted = slopes_at_head(Head(weight, None), hidden, *arguments)
    with pretended_device(float64=True):
        arguments[-1].manual_seed(3)
        found: Any = slopes_at_head(Head(OnDevice(weight), None), OnDevice(hidden), *arguments)
    for here, there in zip(wanted, found, strict=True):
        torch.testing.assert_close(there.held, here, rtol=1e-5, atol=1e-6)


def test_students_and_the_dictionary_whose_features_they_keep(neox: Any, make_sae: MakeSAE) -> None:
    rates, means = torch.tensor([30, 5]), torch.tensor([1.5, 0.5], dtype=torch.float64)
    chosen = torch.tensor([1, 4])
    latents = ChosenLatents(
        make_sae("standard", HOOK), chosen, None, 1.0, 100, rates, means, means.square(), means, 2.0
    )
    kept = Kept(KeepFeatures(HOOK, (1, 4), 2.0), find_tap_point(neox, HOOK), latents)
    readout, told = drawn(30, 4), drawn(30, 2).clamp(min=0)
    wanted = kept.loss(readout, told, 30)
    with pretended_device(float64=True):
        found: Any = kept.loss(OnDevice(readout), told, 30)
    torch.testing.assert_close(found.held, wanted)


def test_a_device_without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "WITHOUT_FLOAT64", (DEVICE.type,))
    zeros = torch.zeros(1, 3, dtype=torch.float64)
    x, spectrum = drawn(4, 3), Spectrum(None, drawn(3).double(), zeros[0], torch.eye(3, dtype=torch.float64))  # type: ignore[arg-type]
    wanted = spectrum.projected(x, 2)
    with pretended_device():
        agreement: Any = OnDevice(torch.tensor([[True, False, True]]))
        figures = Compared(zeros, zeros, zeros[0], agreement).figures()
        projected: Any = spectrum.projected(OnDevice(x), 2)
    assert figures[3].tolist() == [[1.0, 0.0, 1.0]]
    torch.testing.assert_close(projected.held, wanted)


def test_a_full_device_without_a_class_for_it() -> None:
    with (
        pytest.raises(DeviceFullError, match="this does not fit into the memory of the device"),
        within_device_memory("this", "try less"),
    ):
        raise RuntimeError("MPS backend out of memory (MPS allocated: 17.60 GB, other allocations: 1.20 GB)")
    with pytest.raises(RuntimeError, match="another"), within_device_memory("this", "try less"):
        raise RuntimeError("another")


def test_a_device_that_is_full_while_an_sae_is_loaded(
    setup: Any, monkeypatch: pytest.MonkeyPatch, make_sae: MakeSAE
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.nn.Module, "to", full)
    with pytest.raises(torch.OutOfMemoryError):
        loading.load_sae(str(setup / "sae"))


def test_rounding_ends_with_the_last_that_wants_it() -> None:
    products, device = torch.backends.mkldnn.matmul, torch.device("cpu")
    if not hasattr(products, "fp32_precision"):
        pytest.skip("this PyTorch rounds nothing")
    before = products.fp32_precision
    one, other = precision.rounded_products(device), precision.rounded_products(device)
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert products.fp32_precision == "bf16"
    other.__exit__(None, None, None)
    assert products.fp32_precision == before


@pytest.mark.slow
def test_a_function_of_too_many_forms_is_not_run_as_if_it_were_compiled(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compiling, "GRAPHS", 1)
    twice, cpu = Compiled(lambda x: x * 2, "1"), torch.device("cpu")
    assert np.array_equal(twice(cpu, torch.ones(2)), [2, 2])
    assert twice(cpu, torch.ones(2, dtype=torch.float64)) is None
    assert "torch.compile does not work here" in caplog.text
    assert not twice.due(cpu)


def test_splicing_where_the_sae_is_elsewhere(
    make_model: Callable[..., Any], make_sae: MakeSAE, tokens: torch.Tensor
) -> None:
    model, sae = make_model("gpt_neox"), make_sae("standard", HOOK)
    with tlc.add_capacity_hooks(model, sae) as capacity:
        measurement = capacity.run(tokens.split(8)).measurement()
    wanted = tlc.splice(model, measurement, tokens, [8], saes={HOOK: sae}, progress=False)
    with pretended_device(float64=True):
        found = tlc.splice(model, measurement, tokens, [8], saes={HOOK: moved(sae)}, progress=False)
    np.testing.assert_allclose(found.curves[0].kl, wanted.curves[0].kl, rtol=1e-3, atol=1e-5)
