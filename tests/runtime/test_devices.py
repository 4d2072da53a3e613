"""Which device is meant; no float64 on MPS; models and SAEs on different devices; revisions and device maps."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from commands import Cli, arguments, same
from conftest import SAES
from pretended import DEVICE, OnDevice, moved, pretended_device

import tl_capacity as tlc
from tl_capacity.distillation import distill
from tl_capacity.distillation.losses import Output, chunked_losses
from tl_capacity.distillation.settings import LogitLoss
from tl_capacity.errors import CapacityError
from tl_capacity.models import head as head_module
from tl_capacity.models.head import Head, divergences
from tl_capacity.models.loading import load_model
from tl_capacity.runtime import devices
from tl_capacity.runtime.devices import AUTO, device_named, exact, exact_device

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture
def without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pretended device stands in for MPS."""
    monkeypatch.setattr(devices, "WITHOUT_FLOAT64", (DEVICE.type,))


class TestWhichDevice:
    @pytest.mark.parametrize(
        ("cuda", "mps", "meant"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]
    )
    def test_auto(self, monkeypatch: pytest.MonkeyPatch, cuda: bool, mps: bool, meant: str) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        assert device_named(AUTO) == meant

    def test_a_device_that_is_not_there(self) -> None:
        with pytest.raises(CapacityError, match=r"the device 'nowhere' cannot be used \(.*\): pass auto, cpu"):
            device_named("nowhere")

    def test_sums_of_a_device_without_float64(self) -> None:
        assert exact_device(torch.device("mps")) == torch.device("cpu")
        assert exact_device(torch.device("cuda", 1)) == torch.device("cuda", 1)

    def test_values_of_a_device_without_float64(self, without_float64: None) -> None:
        with pretended_device():
            values = torch.ones(3, device=DEVICE)
            with pytest.raises(TypeError, match="float64"):
                values.double()
            assert torch.equal(exact(values), torch.ones(3, dtype=torch.float64))


def test_float64_where_there_is_none(without_float64: None) -> None:
    with pytest.raises(CapacityError, match=r"the device 'meta' has no float64: choose another --dtype"):
        tlc.load_model("embedded", device="meta", dtype="float64")


def test_divergences_without_float64(without_float64: None) -> None:
    draw = torch.Generator().manual_seed(0)
    weight, clean, others = (torch.randn(size, generator=draw) for size in ((50, 8), (6, 8), (2, 6, 8)))
    wanted = divergences(Head(weight, None, None), clean, others)
    log_p, log_q = ((states @ weight.T).double().log_softmax(-1) for states in (clean, others))
    torch.testing.assert_close(wanted, (log_p.exp() * (log_p - log_q)).sum(-1), rtol=1e-4, atol=1e-5)
    with pretended_device():
        found = divergences(Head(OnDevice(weight), None, None), OnDevice(clean), OnDevice(others))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ce_weight", [0.0, 0.5])
def test_losses_of_a_distillation_without_float64(
    without_float64: None, unchecked: None, monkeypatch: pytest.MonkeyPatch, ce_weight: float
) -> None:
    monkeypatch.setattr(head_module, "DEVICE_LOGITS", 4 * 50)
    draw = torch.Generator().manual_seed(0)
    sizes = ((9, 8), (50, 8), (9, 4), (50, 4))
    numbers = [torch.randn(size, generator=draw) for size in sizes]
    labels = torch.randint(50, (9,), generator=draw)

    def losses(place: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        hidden, weight, student, student_weight = map(place, numbers)
        teacher = Output(hidden, Head(weight, None))
        students = [Output(student, Head(student_weight, None))]
        with torch.no_grad():
            return chunked_losses(teacher, students, place(labels), LogitLoss(ce_weight=ce_weight))

    wanted = losses(lambda tensor: tensor)
    with pretended_device():
        found = losses(OnDevice)
    assert wanted.dtype == found.dtype == torch.float64
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.cpu_only("it computes for a device that is pretended")
class TestWithoutFloat64:
    """What is counted is the same as on the CPU, and no tensor on the device was asked for float64."""

    @pytest.mark.parametrize("where", ["both", "model", "sae"])
    @pytest.mark.parametrize("architecture", ["standard", "topk", "gated", "jumprelu", "layer_norm"])
    def test_counting(
        self,
        make_model: Callable[..., Any],
        make_sae: Callable[..., Any],
        tokens: torch.Tensor,
        unchecked: None,
        without_float64: None,
        architecture: str,
        where: str,
    ) -> None:
        assert architecture in SAES
        model, sae = make_model("gpt_neox"), make_sae(architecture, HOOK)
        with tlc.add_capacity_hooks(model, sae, fvu_every=1) as capacity:
            wanted = capacity.run(tokens.split(12)).measurement()
        with pretended_device():
            model, sae = copy.deepcopy(model), copy.deepcopy(sae)
            model = moved(model) if where in ("both", "model") else model
            sae = moved(sae) if where in ("both", "sae") else sae
            with tlc.add_capacity_hooks(model, sae, fvu_every=1) as capacity:
                found = capacity.run(tokens.split(12)).measurement()
        assert isinstance(next(model.parameters()), OnDevice) == (where != "sae")
        for name, array in wanted[HOOK].summary.arrays.items():
            # The pretended device attends in other steps, so that a model's rounding is another.
            np.testing.assert_allclose(found[HOOK].summary.arrays[name], array, rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.mark.cpu_only("its devices are memory and disk, and it is held to the CPU bit for bit")
class TestSpreadOverDevices:
    """Accelerate's device maps, as far as a machine without a GPU has devices: its memory and its disk."""

    MAP: ClassVar = {
        "gpt_neox.embed_in": "cpu",
        "gpt_neox.rotary_emb": "cpu",
        "gpt_neox.layers.0": "disk",
        "gpt_neox.layers.1": "disk",
        "gpt_neox.layers.2": "cpu",
        "gpt_neox.final_layer_norm": "cpu",
        "lm_head": "disk",
    }

    def test_counts_as_the_model_in_one_piece(self, setup: Path, tmp_path: Path, cli: Cli) -> None:
        (tmp_path / "map.json").write_text(json.dumps(self.MAP))
        for name, device_map in (("whole", None), ("spread", tmp_path / "map.json"), ("auto", "auto")):
            more = () if device_map is None else ("--device-map", device_map)
            code, _, error = cli(*arguments(setup, tmp_path / name, *more, tokens=300))
            assert code == 0, error
            same(tmp_path / "whole", tmp_path / name)
        spread = load_model(str(setup / "model"), device_map=self.MAP)
        assert spread.model.gpt_neox.layers[0].mlp.dense_h_to_4h.weight.is_meta, "it is on disk"
        with pytest.raises(
            CapacityError, match=r"is spread over devices by a device map, which .* bridge does not support"
        ):
            _ = spread.bridge

    def test_what_needs_weights_that_are_on_disk_is_refused(self, setup: Path, tmp_path: Path) -> None:
        spread = load_model(str(setup / "model"), device_map=self.MAP).model
        rows, hook = np.ones((4, 8), dtype=np.int64), "blocks.1.hook_resid_post"
        with tlc.add_capacity_hooks(spread, {hook: tlc.load_sae(str(setup / "sae"))[1]}) as capacity:
            measurement = capacity.run(np.arange(2, 34).reshape(4, 8), progress=False).measurement()
        with pytest.raises(CapacityError, match="the model's head is in CPU memory or on disk"):
            tlc.splice(spread, measurement, rows, saes={hook: tlc.load_sae(str(setup / "sae"))[1]}, progress=False)
        with pytest.raises(CapacityError, match="the teacher is partly in CPU memory or on disk"):
            distill(spread, [8], rows, progress=False)

    def test_a_model_that_cannot_be_loaded_leaves_nothing_on_disk(
        self, setup: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        damaged = shutil.copytree(setup / "model", tmp_path / "model")
        [weights] = damaged.glob("*.safetensors")
        weights.write_bytes(weights.read_bytes()[:-100])
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
        (tmp_path / "temporary").mkdir()
        with pytest.raises(CapacityError, match="cannot be loaded"):
            load_model(str(damaged), device_map=self.MAP)
        assert not list((tmp_path / "temporary").iterdir())

    @pytest.mark.parametrize(
        ("device_map", "says"),
        [("nowhere.json", "the device map 'nowhere.json' cannot be read"), ("[]", "cannot be read")],
    )
    def test_what_is_no_map(self, setup: Path, device_map: str, says: str) -> None:
        with pytest.raises(CapacityError, match=re.escape(says)):
            load_model(str(setup / "model"), device_map=device_map)

    def test_of_a_plugin_s_model(self) -> None:
        with pytest.raises(CapacityError, match="'embedded' is placed on devices by its plugin"):
            load_model("embedded", device_map="auto")


class TestWhereTestsRun:
    """`pytest --device`, of which `tests/place.py` knows."""

    @pytest.mark.slow
    def test_on_a_device_that_is_not_there(self) -> None:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "--device",
            "nowhere",
            str(Path(__file__).with_name("test_seeds.py")),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == pytest.ExitCode.USAGE_ERROR
        [said] = (done.stdout + done.stderr).strip().splitlines()
        assert said.startswith("ERROR: the device 'nowhere' cannot be used (")

    @pytest.mark.cpu_only("no GPU is hidden from a test on one")
    def test_no_gpu_is_seen_on_the_cpu(self) -> None:
        assert not torch.cuda.is_available()
        assert device_named(AUTO) in ("cpu", "mps")
