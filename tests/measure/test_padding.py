"""Batches as users have them: padded on the left, without a mask, and generated token by token. Each is compared with
its rows run one by one without padding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BOS, VOCAB
from place import placed

import tl_capacity as tlc
from tl_capacity.errors import CapacityError

HOOK = "blocks.1.hook_resid_post"
WAYS = ["HookedTransformer", "TransformerBridge", "gpt_neox", "gpt2"]
LENGTHS = (3, 9, 5, 12)


@pytest.fixture
def rows() -> list[torch.Tensor]:
    random = np.random.default_rng(3)
    return [placed(torch.from_numpy(np.append(BOS, random.integers(1, VOCAB, size=n - 1)))) for n in LENGTHS]


@pytest.fixture(params=WAYS)
def model(request: pytest.FixtureRequest, models_by_kind: dict[str, Any]) -> Any:
    return models_by_kind[request.param]


def padded(rows: list[torch.Tensor], side: str, filler: int = 5) -> dict[str, torch.Tensor]:
    """As a tokenizer of transformers gives them, with `padding_side`."""
    longest = max(map(len, rows))
    ids, mask = (placed(torch.full((len(rows), longest), value)) for value in (filler, 0))
    for place, row in enumerate(rows):
        inside = slice(longest - len(row), None) if side == "left" else slice(len(row))
        ids[place, inside], mask[place, inside] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


def sums(capacity: Any) -> dict[str, Any]:
    return dict(capacity.measurement()[HOOK].summary.arrays)


def assert_same_sums(counted: dict[str, Any], wanted: dict[str, Any], but: tuple[str, ...] = ()) -> None:
    assert counted.keys() == wanted.keys()
    for name, array in wanted.items():
        if name not in but:
            rtol = 0 if array.dtype == np.int64 else 1e-4
            np.testing.assert_allclose(counted[name], array, rtol=rtol, atol=10 * rtol, err_msg=name)


class TestPaddingOnTheLeft:
    @pytest.mark.parametrize("skip", [0, 2])
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_run(
        self, model: Any, make_sae: Callable[..., Any], rows: list[torch.Tensor], side: str, skip: int
    ) -> None:
        sae, options = make_sae("topk", HOOK), {"fvu_every": 1, "skip_first_positions": skip}
        with tlc.add_capacity_hooks(model, sae, **options) as capacity:
            wanted = sums(capacity.run([row[None] for row in rows]))
        with tlc.add_capacity_hooks(model, sae, **options) as capacity:
            counted = sums(capacity.run(padded(rows, side)))
        assert int(counted["tokens"].sum()) == sum(max(0, len(row) - max(1, skip)) for row in rows)
        assert_same_sums(counted, wanted, but=("masked",))

    @pytest.mark.parametrize("skip", [0, 2])
    def test_a_call(self, model: Any, make_sae: Callable[..., Any], rows: list[torch.Tensor], skip: int) -> None:
        """With the mask, and with the positions that Hugging Face's own models would take from nowhere else."""
        batch, sae = padded(rows, "left"), make_sae("topk", HOOK)
        if not hasattr(model, "hook_dict"):
            batch["position_ids"] = positions(batch["attention_mask"])
        ids = batch.pop("input_ids")
        with tlc.add_capacity_hooks(model, sae, fvu_every=1, skip_first_positions=skip) as capacity, torch.no_grad():
            model(ids, **batch)
            counted = sums(capacity)
        with tlc.add_capacity_hooks(model, sae, fvu_every=1, skip_first_positions=skip) as capacity:
            assert_same_sums(counted, sums(capacity.run([row[None] for row in rows])), but=("masked",))

    @pytest.mark.parametrize(
        ("kind", "called"),
        [
            ("HookedTransformer", "run_with_cache"),
            ("TransformerBridge", "run_with_cache"),
            ("TransformerBridge", "run_with_hooks"),
            ("gpt_neox", "forward"),
            ("gpt_neox", "base_model"),
            ("gpt2", "base_model"),
        ],
    )
    def test_a_call_past_the_hooks_of_the_model_itself(
        self, models_by_kind: dict[str, Any], make_sae: Callable[..., Any], kind: str, called: str, rows: Any
    ) -> None:
        model, batch = models_by_kind[kind], padded(rows, "left")
        with tlc.add_capacity_hooks(model, make_sae("topk", HOOK)) as capacity, torch.no_grad():
            getattr(model, called)(batch["input_ids"], attention_mask=batch["attention_mask"])
        assert capacity.n_tokens == sum(LENGTHS) - len(rows)
        assert capacity.measurement()[HOOK].summary.masked["padding"] == batch["attention_mask"].eq(0).sum()

    @pytest.mark.parametrize("kind", ["gpt_neox", "gpt2"])
    def test_embeddings_of_the_models_own(
        self, models_by_kind: dict[str, Any], make_sae: Callable[..., Any], kind: str, rows: Any
    ) -> None:
        """Each is counted with its own mask."""
        model, batch = models_by_kind[kind], padded(rows, "left")
        ids, embed = batch["input_ids"], model.get_input_embeddings()
        with tlc.add_capacity_hooks(model, make_sae("topk", HOOK), mask_token_ids=()) as capacity, torch.no_grad():
            model(inputs_embeds=embed(ids), attention_mask=batch["attention_mask"])
            assert capacity.n_tokens == sum(LENGTHS)
            model(inputs_embeds=embed(ids), attention_mask=torch.ones_like(ids))
            assert capacity.n_tokens == sum(LENGTHS) + ids.numel()
            embed(ids)  # for something else
            model(ids[:2])
            assert capacity.n_tokens == sum(LENGTHS) + ids.numel() + ids[:2].numel()
            with pytest.raises(CapacityError, match=r"inputs_embeds \[4, 12, 32\] that its own embedding did not just"):
                model(inputs_embeds=embed.weight[ids])

    @pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
    def test_a_mask_of_queries_and_keys(
        self, neox: Any, make_sae: Callable[..., Any], rows: list[torch.Tensor], dtype: torch.dtype
    ) -> None:
        batch = padded(rows, "left")
        ids, present = batch["input_ids"], batch["attention_mask"].bool()
        lets = present[:, None, None] & torch.ones(12, 12, dtype=torch.bool, device=ids.device).tril()
        mask = lets if dtype == torch.bool else torch.zeros(lets.shape).to(ids.device).masked_fill(~lets, -1e30)
        with tlc.add_capacity_hooks(neox, make_sae("topk", HOOK)) as capacity, torch.no_grad():
            neox(ids, attention_mask=mask)
            assert capacity.n_tokens == sum(LENGTHS) - len(rows)
            with pytest.warns(UserWarning, match=r"an attention mask of shape \[4, 1, 1, 12\], which does not say"):
                neox(ids, attention_mask=mask[:, :, -1:])

    def test_a_cache_of_fixed_size(self, neox: Any, make_sae: Callable[..., Any], rows: list[torch.Tensor]) -> None:
        """Its masks are of queries and keys, most of which are still empty."""
        batch, options = padded(rows, "left"), {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
        found = []
        for kind in (None, "static"):
            with tlc.add_capacity_hooks(neox, make_sae("topk", HOOK), mask_token_ids=()) as capacity:
                neox.generate(**batch, **options, pad_token_id=5, cache_implementation=kind)
            found.append(sums(capacity))
        assert found[0]["tokens"].sum() == sum(LENGTHS) + 2 * len(rows)
        assert_same_sums(*found)

    def test_importances_in_nats(self, neox: Any, make_sae: Callable[..., Any], rows: list[torch.Tensor]) -> None:
        found = []
        for stream in (padded(rows, "left"), [row[None] for row in rows]):
            with tlc.add_capacity_hooks(neox, make_sae("topk", HOOK), importance=["gradient"]) as capacity:
                found.append(sums(capacity.run(stream)))
        assert any("gradient" in name for name in found[0])
        assert_same_sums(*found, but=("masked",))

    @pytest.mark.parametrize("kind", ["HookedTransformer", "gpt_neox"])
    def test_what_is_not_finite_at_padding_alone_is_none_of_the_text(
        self, make_model: Callable[..., Any], make_sae: Callable[..., Any], rows: list[torch.Tensor], kind: str
    ) -> None:
        model, hook, filler = make_model(kind), "blocks.0.hook_resid_pre", 77
        rows = [torch.where(row == filler, 1, row) for row in rows]
        with torch.no_grad():
            (model.embed.W_E if kind == "HookedTransformer" else model.get_input_embeddings().weight)[filler] = np.nan
        batch, sae = padded(rows, "left", filler), make_sae("topk", hook)
        with tlc.add_capacity_hooks(model, sae, fvu_every=1) as capacity, torch.no_grad():
            model(batch["input_ids"], attention_mask=batch["attention_mask"])
            assert capacity.n_tokens == sum(LENGTHS) - len(rows)
            assert np.isfinite(capacity.measurement()[hook].summary.fvu.value)

            def measured_without_a_mask() -> None:
                model(batch["input_ids"])
                capacity.measurement()  # until when a GPU is not waited for

            with pytest.raises(CapacityError, match=f"{hook} has NaN or infinite activations in batch 2"):
                measured_without_a_mask()


class TestPaddingWithoutAMask:
    """EOS is a usual filler, and BOS in many models: what is assumed of rows of it is said."""

    LEFT = placed(torch.tensor([[BOS, BOS, BOS, 5, 9], [BOS, 7, 2, 8, 4]]))
    SAYS = "begins with 3 tokens of id 0, and no attention mask came with it: they are read as text"

    def test_run(self, model: Any, make_sae: Callable[..., Any]) -> None:
        with tlc.add_capacity_hooks(model, make_sae("topk", HOOK)) as capacity:
            with pytest.warns(UserWarning, match=self.SAYS):
                capacity.run([self.LEFT, self.LEFT])
            capacity.run({"input_ids": self.LEFT, "attention_mask": torch.ones_like(self.LEFT)})

    def test_a_call(self, model: Any, make_sae: Callable[..., Any]) -> None:
        """Once for each handle, and not where the caller has said what is padding."""
        with tlc.add_capacity_hooks(model, make_sae("topk", HOOK)) as capacity, torch.no_grad():
            model(self.LEFT, attention_mask=torch.ones_like(self.LEFT))
            with pytest.warns(UserWarning, match=self.SAYS):
                model(self.LEFT)
            model(self.LEFT)
        assert capacity.n_tokens == 3 * 6

    def test_behind_a_row(self, neox: Any, make_sae: Callable[..., Any]) -> None:
        """Nothing depends on it there, unless it is counted."""
        rows = self.LEFT.flip(1)
        with tlc.add_capacity_hooks(neox, make_sae("topk", HOOK)) as capacity:
            assert capacity.run(rows).n_tokens == 6
        with (
            tlc.add_capacity_hooks(neox, make_sae("topk", HOOK), mask_token_ids=[]) as capacity,
            pytest.warns(UserWarning, match=r"ends with 3 tokens of id 0, .* so they count like others"),
        ):
            capacity.run(rows)


class TestGeneration:
    @pytest.mark.parametrize("skip", [0, 3])
    def test_a_sequence_is_a_document(self, model: Any, make_sae: Callable[..., Any], skip: int) -> None:
        """Tokens that a model generates with a cache are counted as they are where it reads the whole at once."""
        prompts, new = placed(torch.tensor([[BOS, 5, 9], [BOS, 7, 2]])), 6
        sae, options = make_sae("topk", HOOK), {"fvu_every": 1, "skip_first_positions": skip}
        generation = (
            {"verbose": False, "stop_at_eos": False, "return_type": "tokens"}
            if hasattr(model, "hook_dict")
            else {"attention_mask": torch.ones_like(prompts), "min_new_tokens": new, "pad_token_id": BOS}
        )
        with tlc.add_capacity_hooks(model, sae, **options) as capacity:
            model(prompts)
            text = model.generate(prompts, max_new_tokens=new, do_sample=False, **generation)
            assert capacity.rows == 4
            counted = capacity.measurement()[HOOK].summary
        assert text.shape == (2, 3 + new)
        with tlc.add_capacity_hooks(model, sae, **options) as capacity:
            read = capacity.run([prompts, text[:, :-1]]).measurement()[HOOK].summary
        assert counted.n_documents == read.n_documents == (4 if skip == 0 else 2)
        assert_same_sums(counted.arrays, read.arrays)

    def test_prompts_that_are_padded_on_the_left(self, make_sae: Callable[..., Any], models_by_kind: Any) -> None:
        model, batch = (
            models_by_kind["gpt2"],
            padded([placed(torch.tensor(row)) for row in ([BOS, 5], [BOS, 7, 2, 8])], "left"),
        )
        sae, options = make_sae("topk", HOOK), {"fvu_every": 1, "skip_first_positions": 3}
        with tlc.add_capacity_hooks(model, sae, **options) as capacity:
            text = model.generate(**batch, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=BOS)
            counted = sums(capacity)
        mask = torch.cat([batch["attention_mask"], batch["attention_mask"].new_ones(2, 5)], 1)
        with tlc.add_capacity_hooks(model, sae, **options) as capacity:
            read = sums(capacity.run({"input_ids": text[:, :-1], "attention_mask": mask[:, :-1]}))
        assert_same_sums(counted, read)

    def test_a_loop_of_ones_own(self, neox: Any, make_sae: Callable[..., Any]) -> None:
        """The cache that a call gives back is that of its rows, and another text between the steps is another."""
        text, other = placed(torch.tensor([[BOS, 5, 9, 4, 8]])), placed(torch.tensor([[BOS, 3, 3]]))
        sae = make_sae("topk", HOOK)
        with tlc.add_capacity_hooks(neox, sae, fvu_every=1) as capacity, torch.no_grad():
            cache = neox(text[:, :2], use_cache=True).past_key_values
            for place in (2, 3, 4):
                cache = neox(text[:, place : place + 1], past_key_values=cache).past_key_values
            neox(other)
            counted = sums(capacity)
        with tlc.add_capacity_hooks(neox, sae, fvu_every=1) as capacity:
            assert_same_sums(counted, sums(capacity.run([text, other])))

    def test_two_loops_by_turns(self, neox: Any, make_sae: Callable[..., Any]) -> None:
        from transformers import DynamicCache

        texts = placed(torch.tensor([[BOS, 5, 9, 4]])), placed(torch.tensor([[BOS, 3, 3, 8]]))
        caches = [DynamicCache(config=neox.config) for _ in texts]
        with tlc.add_capacity_hooks(neox, make_sae("topk", HOOK)) as capacity, torch.no_grad():
            for place in range(4):
                for text, cache in zip(texts, caches, strict=True):
                    neox(text[:, place : place + 1], past_key_values=cache)
            summary = capacity.measurement()[HOOK].summary
        with tlc.add_capacity_hooks(neox, make_sae("topk", HOOK)) as capacity:
            read = capacity.run(list(texts)).measurement()[HOOK].summary
        np.testing.assert_array_equal(summary.arrays["tokens"], read.arrays["tokens"])
        np.testing.assert_array_equal(summary.arrays["counts"], read.arrays["counts"])

    def test_a_state_space_model(self, make_sae: Callable[..., Any]) -> None:
        from tiny_families import teacher

        model, sae = placed(teacher("mamba")), make_sae("topk", "blocks.0.hook_resid_post")
        prompts = placed(torch.tensor([[3, 5, 9], [4, 7, 2]]))
        with tlc.add_capacity_hooks(model, sae, fvu_every=1) as capacity:
            text = model.generate(
                prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=4, min_new_tokens=4, do_sample=False
            )
            counted = capacity.measurement().hooks[0].summary.arrays
        with tlc.add_capacity_hooks(model, sae, fvu_every=1) as capacity:
            read = capacity.run(text[:, :-1]).measurement().hooks[0].summary.arrays
        assert_same_sums(dict(counted), dict(read))
