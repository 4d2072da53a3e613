"""The life of a handle: modes of torch, copies and files of the model, and handles that nobody keeps."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BOS, HUGGING_FACE, VOCAB, all_hooks

import tl_capacity as tlc
from tl_capacity.errors import CapacityError

HOOK = "blocks.1.hook_resid_post"
WAYS = ["HookedTransformer", "TransformerBridge", "gpt_neox"]


@pytest.fixture
def tokens() -> torch.Tensor:
    ids = torch.randint(1, VOCAB, (3, 9), generator=torch.Generator().manual_seed(1))
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
    @pytest.mark.parametrize("way", [copy.deepcopy, pickled, saved_and_loaded])
    @pytest.mark.parametrize("kind", [*WAYS, "SAETransformerBridge", "HookedSAETransformer"])
    def test_a_copy_does_not_add_to_the_handle(
        self,
        make_model: Callable[..., Any],
        make_sae: Callable[..., Any],
        tokens: torch.Tensor,
        kind: str,
        way: Callable[[Any], Any],
    ) -> None:
        if way is not copy.deepcopy and kind not in ("HookedTransformer", *HUGGING_FACE):
            pytest.skip("TransformerLens and SAELens keep local functions in this kind, which pickle refuses")
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

    def test_a_saved_model_does_not_need_this_package(self, neox: Any, make_sae: Callable[..., Any]) -> None:
        with tlc.add_capacity_hooks(neox, make_sae("standard", HOOK)):
            assert b"tl_capacity" not in pickle.dumps(neox)


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

    def test_a_removed_one_is_not_entered(self, model: Any, make_sae: Callable[..., Any]) -> None:
        capacity = tlc.add_capacity_hooks(model, make_sae("standard", HOOK))
        with capacity:
            pass
        with pytest.raises(CapacityError, match="were removed: attach new ones with add_capacity_hooks"), capacity:
            pass
