"""A language model's head, and the hidden states that it turns into logits, for any model that can be tapped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor
from torch.nn import functional as F

from tl_capacity.errors import CapacityError
from tl_capacity.models.forward import NothingMoreToSeeError, evaluating
from tl_capacity.runtime.devices import exact, exact_device

LOGIT_TOKENS = 128
"""Tokens whose logits exist at one time on a CPU, where nothing else is said."""
CHUNK_LOGITS = 2**25
"""Logits that exist at one time on a CPU, however large the vocabulary: 134 MB in float32."""
DEVICE_LOGITS = 2**26
"""Logits that exist at one time on an accelerator, which waits for its next order if there are fewer: 268 MB in
float32.
"""
CACHED_LOGITS = 2**17
"""Logits that a processor core works on at once between two matrix products, so that they stay in its cache."""
CHECKED_TOKENS = 8
"""Tokens on which a head is compared with the model's own logits."""


@dataclass(frozen=True)
class Head:
    """A language model's head: logits = cap · tanh((h Wᵀ + b) / cap), or without the tanh if there is no cap. Gemma 2
    has one.
    """

    weight: Float[Tensor, "vocabulary d_model"]
    bias: Float[Tensor, " vocabulary"] | None = None
    cap: float | None = None

    def logits(
        self,
        hidden: Float[Tensor, "token d_model"],
        out: Float[Tensor, "token vocabulary"],
        temperature: float = 1.0,
    ) -> Float[Tensor, "token vocabulary"]:
        """Logits of some tokens, divided by the temperature and written into `out`. If `out` has another dtype, the
        head still computes in its own.
        """
        hidden, weight = hidden.to(self.weight.dtype), self.weight
        # Within the product it costs nothing. A pass over the logits costs as much as an exponential.
        scale = 1 / temperature if self.cap is None and weight.dtype == out.dtype else 1.0
        if weight.dtype != out.dtype:
            out.copy_(F.linear(hidden, weight, self.bias))
        elif self.bias is None:
            torch.addmm(out, hidden, weight.T, beta=0, alpha=scale, out=out)
        else:
            torch.addmm(self.bias, hidden, weight.T, beta=scale, alpha=scale, out=out)
        if self.cap is not None:
            out.mul_(1 / self.cap).tanh_().mul_(self.cap)
        return out if scale * temperature == 1 else out.mul_(1 / temperature)


def head_of(model: Any) -> Head:
    """The head of a Hugging Face or TransformerLens causal language model.

    Raises:
        CapacityError: where a device map keeps its weights off every device.
    """
    if hasattr(model, "hook_dict"):
        cap = getattr(model.cfg, "output_logits_soft_cap", None)
        bias = getattr(model, "b_U", None)
        return Head(model.W_U.T, bias, cap if cap is not None and cap > 0 else None)
    linear = model.get_output_embeddings()
    if linear.weight.is_meta and hasattr(model, "hf_device_map"):
        raise CapacityError(
            "the model's head is in CPU memory or on disk, where its device map put it, and is needed on a device: load"
            " the model without a device map, or with the head on a device"
        )
    return Head(linear.weight, linear.bias, getattr(model.config, "final_logit_softcapping", None))


def last_hidden(model: Any, tokens: Int[Tensor, "row position"]) -> Float[Tensor, "rows position d_model"]:
    """Hidden states after a model's last norm, the input of its head. Rows are padded on the right, where causal models
    do not look.

    There are more rows than in `tokens` where a hook adds some on the way.
    """
    if not hasattr(model, "hook_dict"):
        hidden: Tensor = model.base_model(tokens, use_cache=False)[0]
        return hidden
    return head_input(model, tokens)


def head_input(
    model: Any, tokens: Int[Tensor, "row position"], **options: Any
) -> Float[Tensor, "rows position d_model"]:
    """The input that a model's own forward pass gives its head. The pass ends there.

    Args:
        options: of the pass.
    """
    seen: list[Tensor] = []

    def keep(hidden: Tensor) -> None:
        seen.append(hidden)
        raise NothingMoreToSeeError

    with before_head(model, keep), suppress(NothingMoreToSeeError):
        model(tokens, **options)
    return seen[0]


@contextmanager
def before_head(model: Any, see: Callable[[Tensor], None]) -> Iterator[None]:
    """Inside the block, pass the input of a model's head to `see`, for Hugging Face and TransformerLens models."""

    def hand_on(_: Any, positional: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        see(positional[0] if positional else next(iter(named.values())))

    module = model.unembed if hasattr(model, "hook_dict") else model.get_output_embeddings()
    handle = module.register_forward_pre_hook(hand_on, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def check_head(model: Any, tokens: Int[Tensor, "row position"], doing: str = "distilled") -> None:
    """Check that a model's own logits are its head applied to its last hidden state.

    Raises:
        CapacityError: where they are not, as in architectures that scale them.
    """
    few = tokens[:1, :CHECKED_TOKENS]
    with evaluating(model):
        output = model(few)
        logits = getattr(output, "logits", output)[0].float()
        from_head = head_of(model).logits(last_hidden(model, few)[0], torch.empty_like(logits))
    if not torch.allclose(logits, from_head, rtol=1e-2, atol=1e-2):
        kind = getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__
        raise CapacityError(
            f"the logits of {kind!r} are not its head applied to its last hidden state (they differ by up to"
            f" {float((logits - from_head).abs().max()):.2g}): this architecture cannot be {doing} yet"
        )


@torch.no_grad()
def divergences(
    head: Head,
    clean: Float[Tensor, "token d_model"],
    others: Float[Tensor, "variant token d_model"],
) -> Float64[Tensor, "variant token"]:
    """KL(clean ‖ other) of the next-token distributions at T = 1, in nats, for several variants of the hidden states.

    Logits exist for a chunk of tokens at a time, those of the clean states once for all variants.
    """
    found = torch.zeros(others.shape[:2], dtype=torch.float64, device=exact_device(others.device))
    vocabulary = len(head.weight)
    size = tokens_at_once(len(clean), vocabulary, clean.device)
    log_p, p, logits = clean.new_empty(3, size, vocabulary, dtype=torch.float32)
    for start in range(0, len(clean), size):
        rows = slice(start, min(start + size, len(clean)))
        count = rows.stop - start
        log_and_probabilities(head.logits(clean[rows], log_p[:count]), p[:count])
        for variant, hidden in enumerate(others):
            head.logits(hidden[rows], logits[:count])
            for some in cached_pieces(count, vocabulary, logits.device):
                log_q = torch.log_softmax(logits[some], -1)
                found[variant, start + some.start : start + some.stop] = exact(
                    torch.linalg.vecdot(p[some], torch.sub(log_p[some], log_q, out=log_q))
                )
    return found


def log_and_probabilities(
    logits: Float[Tensor, "token vocabulary"], p: Float[Tensor, "token vocabulary"]
) -> tuple[Float[Tensor, "token vocabulary"], Float[Tensor, "token vocabulary"]]:
    """`(log p, p)` of some logits. log p takes the place of the logits, p is written into `p`.

    On a CPU, where an exponential costs most, each is computed once: the logarithm of what they add up to follows from
    the likeliest token, whose logit and p are known. On an accelerator, where memory is what is waited for, that would
    be more passes over it.
    """
    if logits.device.type != "cpu":
        logits.copy_(torch.log_softmax(logits, -1, out=p))
        return logits, p.exp_()
    for some in cached_pieces(len(logits), logits.shape[1], logits.device):
        torch.softmax(logits[some], -1, out=p[some])
        log_sum = logits[some].amax(-1, keepdim=True).sub_(p[some].amax(-1, keepdim=True).log_())
        logits[some].sub_(log_sum)
    return logits, p


def tokens_at_once(tokens: int, vocabulary: int, device: torch.device, chunk: int = LOGIT_TOKENS) -> int:
    """How many of some tokens have logits at one time, at least one, so that all chunks are of nearly one length.

    Args:
        chunk: how many at most on a CPU.
    """
    most = min(chunk, CHUNK_LOGITS // vocabulary) if device.type == "cpu" else DEVICE_LOGITS // vocabulary
    chunks = -(-tokens // max(1, most))
    return max(1, -(-tokens // max(1, chunks)))


def cached_pieces(tokens: int, vocabulary: int, device: torch.device) -> Iterator[slice]:
    """Pieces of some tokens, each small enough for its logits to stay in the cache; on an accelerator one piece."""
    at_once = max(1, cached_tokens(tokens, vocabulary, device))
    for start in range(0, tokens, at_once):
        yield slice(start, min(start + at_once, tokens))


def cached_tokens(tokens: int, vocabulary: int, device: torch.device) -> int:
    """How many of some tokens are in such a piece."""
    if device.type != "cpu":
        return tokens
    return min(tokens, torch.get_num_threads() * max(1, CACHED_LOGITS // vocabulary))
