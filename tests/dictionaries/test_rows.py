"""Rows as SAEs were trained on them: with BOS or without, and some of their positions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import HOOK, Cli

from tl_capacity import Measurement, TokenStream, add_capacity_hooks
from tl_capacity.dictionaries.rows import counted_positions, default_bos, positions_in
from tl_capacity.errors import DictionaryError
from tl_capacity.text.counting import CountingRule, Positions

SLICES: list[tuple[int | None, ...]] = [(None,), (5,), (-4,), (3, None), (2, -3), (1, 20, 4), (None, None, 3), (0, 32)]


@pytest.fixture
def trained_on(make_sae: Callable[..., Any]) -> Callable[..., Any]:
    """`trained_on(prepend_bos=…, seqpos_slice=…)`: an SAE whose metadata says so."""

    def make(hook: str = HOOK, d_sae: int = 64, **said: Any) -> Any:
        sae = make_sae("topk", hook, d_sae=d_sae)
        for name, value in said.items():
            sae.cfg.metadata[name] = value
        return sae

    return make


@pytest.mark.parametrize("seqpos_slice", SLICES)
def test_positions_are_those_that_sae_lens_trains_on(seqpos_slice: tuple[int | None, ...]) -> None:
    rows = np.arange(64).reshape(2, 32)
    counted = CountingRule().at(positions_in(seqpos_slice, 32)).counted(rows)
    np.testing.assert_array_equal(rows[counted], rows[:, slice(*seqpos_slice)].ravel())


@pytest.mark.parametrize("wrong", ["ab", [1, 2, 3, 4], [5, 5], ["a"], [3, None, -1], 7, [None, None, 0]])
def test_a_slice_that_is_none_is_refused(wrong: Any) -> None:
    with pytest.raises(DictionaryError, match="seqpos_slice"):
        positions_in(wrong, 32)


def test_several_saes_share_the_positions_that_all_were_trained_on(trained_on: Callable[..., Any]) -> None:
    two = [trained_on(seqpos_slice=(2, 30), prepend_bos=False), trained_on(seqpos_slice=(5, None))]
    assert counted_positions(None, two) == Positions(5, 30)
    assert counted_positions(1, two) == Positions(1)
    assert default_bos(two)
    assert not default_bos(two[:1])
    assert default_bos([])
    assert Positions(6, 20, 4).are_among(Positions(2, None, 2))
    assert not Positions(6, 20, 3).are_among(Positions(2, None, 2))


@pytest.mark.fidelity(
    source="SAELens",
    says="prepend_bos, seqpos_slice",
    obeyed="rows begin with BOS if the SAE's did; only positions that it was trained on are counted",
)
@pytest.mark.parametrize("by", ["measure", "run"])
def test_counts_are_of_the_rows_that_the_sae_was_trained_on(
    by: str, trained_on: Callable[..., Any], setup: Path, cli: Cli, tmp_path: Path
) -> None:
    from tl_capacity.models.loading import load_model

    sae = trained_on(prepend_bos=False, seqpos_slice=(2, -3), context_size=12)
    loaded, text = load_model(str(setup / "model")), tmp_path / "text.jsonl"
    text.write_text("".join((setup / "text.jsonl").read_text().splitlines(keepends=True)[:12]))
    if by == "measure":
        sae.save_model(tmp_path / "sae")
        options = ("--model", setup / "model", "--sae", tmp_path / "sae", "--source", text, "--max-fvu", "inf")
        code, out, err = cli("measure", *options, "--out", tmp_path / "out", "--tokens", 10_000)
        assert code == 0, out + err
        measurement = Measurement.load(tmp_path / "out")
    else:
        loaded.model.tokenizer = loaded.tokenizer
        with add_capacity_hooks(loaded.model, sae) as capacity:
            capacity.run(str(text), progress=False)
        measurement = capacity.measurement()
    assert (measurement.provenance.settings["bos"], measurement.provenance.settings["stop_position"]) == (None, 9)
    assert not measurement.hooks[0].notes
    counts = torch.zeros(64, dtype=torch.int64)
    special = torch.tensor(loaded.tokenizer.all_special_ids)
    for batch in TokenStream(str(text), loaded.tokenizer, 12, prepend_bos=False, batch_rows=1):
        ids = torch.from_numpy(batch.tokens)
        with torch.no_grad():
            hidden = loaded.model(ids, output_hidden_states=True).hidden_states[2].to(sae.W_dec.device)
            latents = sae.encode(hidden[:, slice(2, 9)]).cpu()
        wanted = ~torch.isin(ids[:, 2:9], special)
        counts += (latents[wanted] != 0).sum(0)
    assert measurement.hooks[0].summary.arrays["counts"].sum(0).tolist() == counts.tolist()


@pytest.mark.fidelity(
    source="SAELens",
    says="prepend_bos, seqpos_slice, context_size",
    obeyed="an option that asks for other rows is obeyed, and the measurement names it",
)
def test_options_that_differ_are_named(trained_on: Callable[..., Any], setup: Path, cli: Cli, tmp_path: Path) -> None:
    trained_on(prepend_bos=False, seqpos_slice=(2, 9), context_size=12).save_model(tmp_path / "sae")
    options = ("--model", setup / "model", "--sae", tmp_path / "sae", "--source", setup / "text.jsonl")
    more = ("--bos", "--skip-first-positions", 1, "--context", 16)
    code, out, err = cli("measure", *options, *more, "--max-fvu", "inf", "--tokens", 200, "--out", tmp_path / "out")
    assert code == 0, out + err
    bos, context, positions = Measurement.load(tmp_path / "out").hooks[0].notes
    assert "trained on rows without BOS, and these begin with it" in bos
    assert "rows of 12 positions, and these have 16" in context
    assert "trained on positions from 2 to 8 of each row" in positions
    code, out, err = cli("doctor", *options, *more, "--max-fvu", "inf", "--out", tmp_path / "other")
    assert "positions from 1 on are counted, but the SAE at" in out + err


@pytest.mark.fidelity(source="SAELens", says="dataset_path", obeyed="its text is offered if no source was given")
def test_the_saes_own_text_is_offered(trained_on: Callable[..., Any], setup: Path, cli: Cli, tmp_path: Path) -> None:
    trained_on(dataset_path="Skylion007/openwebtext").save_model(tmp_path / "sae")
    options = ("--model", setup / "model", "--sae", tmp_path / "sae")
    for verb in ("measure", "doctor"):
        code, out, err = cli(verb, *options, "--out", tmp_path / "out")
        assert code == 2
        assert "the SAEs were trained on --source Skylion007/openwebtext" in " ".join((out + err).split())


def test_a_rule_is_recorded_whole() -> None:
    rule = CountingRule.without([0, 7]).at(Positions(2, 30, 2))
    assert CountingRule.recorded(rule.settings) == rule
    assert CountingRule.without([3], 4).settings == {"masked_token_ids": [3], "skip_first_positions": 4}
    assert CountingRule.recorded({"masked_token_ids": [3]}) == CountingRule((3,))
