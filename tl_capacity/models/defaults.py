"""What fits a model where nothing was asked for: how long its rows are, and where it is looked at."""

from __future__ import annotations

from typing import Any

from tl_capacity.errors import CapacityError

USUAL_CONTEXT = 256
"""Positions in a row, where neither a user, an SAE nor the model says otherwise."""


def longest_row(config: Any) -> int:
    """The most positions that a model takes, by its configuration; 2³¹ where that names no limit."""
    names = ("n_ctx", "max_position_embeddings")
    return next((int(value) for name in names if (value := getattr(text_config(config), name, None))), 2**31)


def row_length(config: Any, asked: int | None = None, usual: int = USUAL_CONTEXT) -> int:
    """Positions in a row: those asked for, else the usual ones or as many as the model has.

    Raises:
        CapacityError: where more are asked for than the model has.
    """
    limit = longest_row(config)
    if asked is not None and asked > limit:
        raise CapacityError(f"--context {asked} is longer than the model's {limit} positions: choose at most that")
    return min(usual, limit) if asked is None else asked


def middle_hook(config: Any) -> str:
    """The residual stream after a model's middle layer."""
    return f"blocks.{int(text_config(config).num_hidden_layers) // 2}.hook_resid_post"


def layers_of(model: Any) -> int | None:
    """How many layers a model has, by its configuration; None where that does not say."""
    config = getattr(model, "cfg", None) or text_config(getattr(model, "config", None))
    layers = next((n for name in ("n_layers", "num_hidden_layers") if (n := getattr(config, name, None))), None)
    return None if layers is None else int(layers)


def width_of(config: Any) -> int:
    """Dimensions of a model's residual stream.

    Raises:
        CapacityError: where the model is of several, such as one of text and one of images.
    """
    width = getattr(config, "hidden_size", None)
    if width is None:
        raise CapacityError(
            f"a model of type {config.model_type!r} holds more than a text model: pass its text model alone, saved as"
            f" {text_config(config).model_type!r}"
        )
    return int(width)


def text_config(config: Any) -> Any:
    """The configuration of a model's text; a model of text and images keeps it inside its own."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config
