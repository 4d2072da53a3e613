"""The life of a handle: modes of torch, copies and files of the model, and handles that nobody keeps."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BOS, HUGGING_FACE, KINDS, VOCAB, all_hooks
from place import placed

import tl_capacity as tlc
from tl_capacity.errors import CapacityError, HookPointError

HOOK = "blocks.1.hook_resid_post"
WAYS = ["HookedTransformer", "TransformerBridge", "gpt_neox"]


@pytest.fixture
def tokens() -> torch.Tensor:
    ids = placed(torch.randint(1, VOCAB, (3, 9), generator=torch.Generator().manual_seed(1)))
    ids[:, 0] = BOS
    return ids


@pytest.fixture(params=WAYS)
def model(request: pytest.FixtureRequest, models_by_kind: dict[str, Any]) -> Any:
    return models_by_kind[request.param]


def assert_same_sums(capacity: Any, expected: Any) -> None:
    counted, wanted = (handle.measurement()[HOOK].summary.arrays for handle in (capacity, expected))
    assert counted.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(counted[name], array, err_msg=name)


class TestInferenceMode:
    @pytest.mark.parametrize("attached_inside", [False, True])
    @pytest.mark.parametrize("first", ["call", "run", "checkpoint"])
    def test_then_a_plain_call(
        self, model: Any, make_sae: Callable[..., Any], tokens: torch.Tensor, first: str, attached_inside: bool
    ) -> None:
        """What is counted under it can be added to outside of it, and is the same as what is counted outside."""
        sae = make_sae("standard", HOOK)
        with tlc.add_capacity_hooks(model, sae, fvu_every=1) as expected:
            model(tokens) if first == "call" else expected.run(tokens)
            model(tokens.flip(1))
            expected.run(tokens)
        with torch.inference_mode(attached_inside):
            capacity = tlc.add_capacity_hooks(model, sae, fvu_every=1)
        with capacity:
            with torch.inference_mode():
                model(tokens) if first == "call" else capacity.run(tokens)
                if first == "checkpoint":
                    capacity.resume(*capacity.checkpoint())
                    capacity.run(tokens)  # goes over what was counted, and adds nothing
            model(tokens.flip(1))
            capacity.run(tokens)
        assert_same_sums(capacity, expected)

    def test_a_transcoder(self, neox: Any, make_sae: Callable[..., Any], tokens: torch.Tensor) -> None:
        sae = make_sae("transcoder", HOOK, "blocks.2.hook_resid_post")
        with tlc.add_capacity_hooks(neox, sae, fvu_every=1) as expected:
            expected.run(tokens).run(tokens.flip(1))
        with tlc.add_capacity_hooks(neox, sae, fvu_every=1) as capacity:
            with torch.inference_mode():
                capacity.run(tokens)
            capacity.run(tokens.flip(1))
        assert_same_sums(capacity, expected)

    def test_gradients_still_flow_after_it(self, neox: Any, make_sae: Callable[..., Any], tokens: torch.Tensor) -> None:
        with tlc.add_capacity_hooks(neox, make_sae("standard", HOOK)):
            with torch.inference_mode():
                assert neox(tokens).logits.is_inference()
            assert neox(tokens).logits.requires_grad


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def saved_and_loaded(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


class TestCopies:
    @pytest.mark.parametrize(
        ("kind", "way"),
        [
            *((kind, copy.deepcopy) for kind in KINDS),
            # The other kinds keep local functions of TransformerLens' and SAELens' own, which pickle refuses.
            *((kind, way) for kind in ("HookedTransformer", *HUGGING_FACE) for way in (pickled, saved_and_loaded)),
        ],
    )
    def test_a_copy_does_not_add_to_the_handle(
        self,
        make_model: Callable[..., Any],
        make_sae: Callable[..., Any],
        tokens: torch.Tensor,
        kind: str,
        way: Callable[[Any], Any],
    ) -> None:
        model = make_model(kind)
        # Without gradients, because a bridge keeps its last activations, and only leaves of a graph can be copied.
        with torch.no_grad():
            model(tokens)  # at its first call a bridge leaves hooks of its own
            before = all_hooks(model)
            with tlc.add_capacity_hooks(model, make_sae("standard", HOOK)) as capacity:
                model(tokens)
                counted = capacity.n_tokens
                other = way(model)
                other(tokens)
                assert capacity.n_tokens == counted > 0
                model(tokens)
                assert capacity.n_tokens == 2 * counted
            other(tokens)
            assert capacity.n_tokens == 2 * counted
            assert all_hooks(model) == before
            with tlc.add_capacity_hooks(other, make_sae("standard", HOOK)) as of_the_copy:
                other(tokens)
            assert (capacity.n_tokens, of_the_copy.n_tokens) == (2 * counted, counted)

    @pytest.mark.parametrize("kind", ["HookedTransformer", "gpt_neox"])
    def test_a_saved_model_does_not_need_this_package(
        self, make_model: Callable[..., Any], make_sae: Callable[..., Any], kind: str
    ) -> None:
        model = make_model(kind)
        with tlc.add_capacity_hooks(model, make_sae("standard", HOOK)):
            assert b"tl_capacity" not in pickle.dumps(model)


class TestHandles:
    def test_one_that_nobody_keeps_takes_its_hooks_away(
        self, model: Any, make_sae: Callable[..., Any], tokens: torch.Tensor
    ) -> None:
        before = all_hooks(model)
        capacity = tlc.add_capacity_hooks(model, make_sae("standard", HOOK))
        model(tokens)
        assert all_hooks(model) != before
        measurement = capacity.measurement()
        del capacity
        assert all_hooks(model) == before
        assert measurement[HOOK].summary.n_tokens > 0

    def test_one_without_a_name_lives_as_long_as_the_line(
        self, model: Any, make_sae: Callable[..., Any], tokens: torch.Tensor
    ) -> None:
        before = all_hooks(model)
        sae = make_sae("standard", HOOK)
        measurement = tlc.add_capacity_hooks(model, sae).run(tokens).measurement()
        assert measurement[HOOK].summary.n_tokens == int((tokens != BOS).sum())
        assert all_hooks(model) == before

    def test_a_batch_that_was_interrupted_is_not_measured(
        self, model: Any, make_sae: Callable[..., Any], tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Ctrl-C between the tokens of a batch and its latents, as anything else that ends counting there."""
        with tlc.add_capacity_hooks(model, make_sae("standard", HOOK)) as capacity:
            capacity.run(tokens)
            statistics = capacity.taps[0].statistics

            def interrupted(*_: object, **__: object) -> None:
                raise KeyboardInterrupt

            with monkeypatch.context() as patch:
                patch.setattr(statistics, "update_masked", interrupted)
                with pytest.raises(KeyboardInterrupt):
                    model(tokens)
            for save in (capacity.measurement, capacity.checkpoint):
                with pytest.raises(CapacityError, match=f"{HOOK} ended in the midst of batch 2, and its sums"):
                    save()

    def test_of_blocks_inside_each_other_the_outermost_ends(
        self, model: Any, make_sae: Callable[..., Any], tokens: torch.Tensor
    ) -> None:
        with tlc.add_capacity_hooks(model, make_sae("standard", HOOK), mask_token_ids=()) as capacity:
            with capacity:
                model(tokens)
            model(tokens)
        model(tokens)
        assert capacity.n_tokens == 2 * tokens.numel()

    def test_a_removed_one_is_not_entered(self, model: Any, make_sae: Callable[..., Any]) -> None:
        capacity = tlc.add_capacity_hooks(model, make_sae("standard", HOOK))
        with capacity:
            pass
        with pytest.raises(CapacityError, match="were removed: attach new ones with add_capacity_hooks"), capacity:
            pass


class TestGeneratingWithoutACache:
    """Each step then runs over the whole sequence again."""

    def test_tokens_that_are_counted_again_are_said_once(
        self, models_by_kind: dict[str, Any], make_sae: Callable[..., Any], tokens: torch.Tensor
    ) -> None:
        model = models_by_kind["gpt_neox"]
        options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": BOS}
        with tlc.add_capacity_hooks(model, make_sae("standard", HOOK)) as capacity:
            with pytest.warns(UserWarning, match="counts them again .*use the cache"):
                model.generate(tokens, use_cache=False, **options)
            model.generate(tokens, use_cache=False, **options)  # warnings are errors in tests
            counted = capacity.n_tokens
            model.generate(tokens, use_cache=True, **options)
        assert counted > 2 * (capacity.n_tokens - counted)

    def test_a_hooked_transformer_shows_new_tokens_alone_and_says_what_to_do(
        self, hooked: Any, make_sae: Callable[..., Any], tokens: torch.Tensor
    ) -> None:
        options = {"max_new_tokens": 3, "stop_at_eos": False, "verbose": False, "do_sample": False}
        says = r"has 10 positions, but only 1 .*use_past_kv_cache=True"
        with (
            tlc.add_capacity_hooks(hooked, make_sae("standard", HOOK), mask_token_ids=[]),
            pytest.raises(HookPointError, match=says),
        ):
            hooked.generate(tokens, use_past_kv_cache=False, **options)
        with tlc.add_capacity_hooks(hooked, make_sae("standard", HOOK), mask_token_ids=[]) as capacity:
            hooked.generate(tokens, use_past_kv_cache=True, **options)
        assert capacity.n_tokens == tokens.numel() + 2 * len(tokens)


class TestEndedEarly:
    def test_a_text_that_ends_before_the_tokens_asked_for_says_so(
        self, neox: Any, make_sae: Callable[..., Any], tokens: torch.Tensor, caplog: pytest.LogCaptureFixture
    ) -> None:
        counted = int((tokens != BOS).sum())
        with tlc.add_capacity_hooks(neox, make_sae("standard", HOOK)) as capacity:
            capacity.run(tokens, max_tokens=counted)
            assert not caplog.records
            capacity.run(tokens, max_tokens=1_000)
        assert f"the text ended after {counted} tokens, but 1,000 were asked for" in caplog.text


class TestThreads:
    """Each thread is in a forward pass of its own, even where all of them are in the model at once."""

    def test_calls_of_several_threads_are_all_counted(
        self, model: Any, make_sae: Callable[..., Any], tokens: torch.Tensor
    ) -> None:
        hook, later = HOOK, "blocks.2.hook_resid_pre"
        saes = [make_sae("standard", hook), make_sae("topk", later)]
        batches = [tokens.roll(n, 1) for n in range(4)]
        masks = [
            torch.ones_like(tokens).index_fill(1, torch.arange(5, 5 + n, device=tokens.device), 0) for n in range(4)
        ]
        with tlc.add_capacity_hooks(model, saes) as expected, torch.no_grad():
            for batch, mask in zip(batches, masks, strict=True):
                model(batch, attention_mask=mask)
        together = threading.Barrier(4, timeout=20)

        def meet(*_: Any) -> None:
            together.wait()

        def call(batch: torch.Tensor, mask: torch.Tensor) -> None:
            with torch.no_grad():
                model(batch, attention_mask=mask)

        with tlc.add_capacity_hooks(model, saes) as capacity, ThreadPoolExecutor(4) as pool:
            norm = next(module for name, module in model.named_modules() if "ln1" in name or "layernorm" in name)
            meeting = norm.register_forward_pre_hook(meet)
            try:
                list(pool.map(call, batches, masks))
            finally:
                meeting.remove()
        counted = sum(int(((batch != BOS) & (mask == 1)).sum()) for batch, mask in zip(batches, masks, strict=True))
        assert capacity.n_tokens == expected.n_tokens == counted
        for mine, theirs in zip(capacity.measurement(), expected.measurement(), strict=True):
            assert mine.summary.masked == theirs.summary.masked
            assert mine.summary.n_documents == theirs.summary.n_documents
            for name in ("counts", "sums", "squares"):  # by group of documents, which come in any order here
                np.testing.assert_allclose(
                    mine.summary.arrays[name].sum(0), theirs.summary.arrays[name].sum(0), rtol=1e-5, atol=1e-6
                )
            np.testing.assert_array_equal(mine.summary.arrays["incidence"], theirs.summary.arrays["incidence"])

    def test_sequences_that_several_threads_generate_are_a_document_each(
        self, neox: Any, make_sae: Callable[..., Any], tokens: torch.Tensor
    ) -> None:
        sae, beginnings = make_sae("topk", HOOK), [tokens.roll(n, 1) for n in range(3)]

        def generate(beginning: torch.Tensor) -> None:
            with torch.no_grad():
                neox.generate(beginning, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=BOS)

        with tlc.add_capacity_hooks(neox, sae) as expected:
            for beginning in beginnings:
                generate(beginning)
        together = threading.Barrier(3, timeout=20)

        def meet(*_: Any) -> None:
            together.wait()

        with tlc.add_capacity_hooks(neox, sae) as capacity, ThreadPoolExecutor(3) as pool:
            meeting = neox.gpt_neox.layers[0].register_forward_pre_hook(meet)
            try:
                list(pool.map(generate, beginnings))
            finally:
                meeting.remove()
        mine, theirs = (handle.measurement()[HOOK].summary for handle in (capacity, expected))
        assert (mine.n_tokens, mine.n_documents) == (theirs.n_tokens, theirs.n_documents)
        np.testing.assert_array_equal(mine.arrays["incidence"], theirs.arrays["incidence"])

    def test_no_other_thread_calls_the_model_while_a_stream_is_counted(
        self, model: Any, make_sae: Callable[..., Any], tokens: torch.Tensor
    ) -> None:
        said: list[str] = []

        def elsewhere(capacity: Any) -> None:
            with ThreadPoolExecutor(1) as pool:
                for function in (model, capacity.run):
                    said.append(str(pool.submit(function, tokens).exception()))

        with tlc.add_capacity_hooks(model, make_sae("standard", HOOK)) as capacity:
            capacity.run(tokens, after_batch=elsewhere)
            assert capacity.n_tokens == int((tokens != BOS).sum())
            assert len(said) == 2
            assert all("are running over a stream in another thread" in sentence for sentence in said)
            with ThreadPoolExecutor(1) as pool:
                pool.submit(model, tokens).result()
            assert capacity.n_tokens == 2 * int((tokens != BOS).sum())
