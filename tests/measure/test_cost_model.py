"""The cost model of many machines against the sums, the models and the records that there are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tl_capacity.measure.statistics import FeatureStatistics

ROOT = Path(__file__).parents[2]


@pytest.fixture
def costs(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import cost_model

    return cost_model


def test_sums_are_as_large_as_they_are(costs: Any) -> None:
    job = costs.Job(32, 3, 2, 640, 100, l0=6, batch=64, tokens=1)
    statistics = FeatureStatistics.empty(640, 32, torch.ones(640), torch.device("cpu"))
    sent = {name: tensor for name, tensor in statistics.tensors().items() if name != "decoder_norm"}
    assert costs.sums_bytes(job) == sum(tensor.nbytes for tensor in sent.values())


def test_weights_are_as_many_as_a_model_has(costs: Any) -> None:
    """But for biases and norms, which are 1% at this width."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=500, hidden_size=256, num_hidden_layers=3, num_attention_heads=4, intermediate_size=1024
    )
    with torch.device("meta"):
        model = GPTNeoXForCausalLM(config)
    job = costs.Job(256, 3, 2, 1, 500, l0=0, batch=64, tokens=1)
    weights = costs.memory(job, 1) - costs.memory(replace(job, blocks=0, vocabulary=0), 1)
    assert weights == pytest.approx(sum(4 * parameter.numel() for parameter in model.parameters()), rel=0.02)


def test_processes_divide_what_they_can(costs: Any) -> None:
    job, machine = costs.GEMMA, costs.H100
    spread = replace(job, spread=True)
    assert costs.rate(job, machine, 64) == pytest.approx(64 * costs.rate(job, machine, 1))
    assert costs.rate(job, replace(machine, parallel=2), 4) == costs.rate(job, machine, 2)
    assert costs.rate(spread, machine, 1) == costs.rate(job, machine, 1)
    assert costs.rate(spread, machine, 64) < costs.rate(job, machine, 64)
    head = 2 * job.d * job.vocabulary / machine.model_flops
    with_head = costs.token_seconds(replace(job, heads=1), machine)
    assert with_head - costs.token_seconds(job, machine) == pytest.approx(head)
    assert costs.end_bytes(job, 1) == costs.pass_bytes(spread, 1) == costs.pass_bytes(job, 8) == 0
    assert costs.end_bytes(job, 2) == costs.sums_bytes(job)
    assert costs.memory(spread, 64) < costs.memory(spread, 8) < costs.memory(job, 8)


def test_the_page_has_what_the_model_says(costs: Any, capsys: pytest.CaptureFixture[str]) -> None:
    costs.main()
    page = (ROOT / "docs" / "results" / "many-machines.md").read_text(encoding="utf-8")
    for line in capsys.readouterr().out.splitlines():
        assert line in page
