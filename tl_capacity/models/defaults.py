"""Defaults for a model: how long its rows are, and at which hook point it is read."""

from __future__ import annotations

from typing import Any

from tl_capacity.errors import CapacityError

USUAL_CONTEXT = 256
"""Positions in a row that models and SAEs are trained and judged on, if neither the user, an SAE nor the model says
otherwise.
"""
MEASURED_CONTEXT = 512
"""The same of a row that is measured or probed, where no gradient takes memory."""


def longest_row(config: Any) -> int:
    """The most positions that a model takes, according to its configuration; 2³¹ if that gives no limit."""
    names = ("n_ctx", "max_position_embeddings")
    return next((int(value) for name in names if (value := getattr(text_config(config), name, None))), 2**31)


def row_length(config: Any, asked: int | None = None, usual: int = USUAL_CONTEXT) -> int:
    """Positions in a row: those asked for, else the usual number, but no more than the model has.

    Raises:
        CapacityError: where more are asked for than the model has.
    """
    limit = longest_row(config)
    if asked is not None and asked > limit:
        raise CapacityError(f"--context {asked} is longer than the model's {limit:,} positions: choose at most {limit}")
    return min(usual, limit) if asked is None else asked


def middle_hook(config: Any) -> str:
    """The residual stream after a model's middle layer."""
    return f"blocks.{int(text_config(config).num_hidden_layers) // 2}.hook_resid_post"


def layers_of(model: Any) -> int | None:
    """How many layers a model has, according to its configuration; None if that does not say."""
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
            f"a model of type {config.model_type!r} is more than a text model: pass its text part alone, saved as "
            f"{text_config(config).model_type!r}"
        )
    return int(width)


def text_config(config: Any) -> Any:
    """The configuration of a model's text part. A model of text and images keeps it inside its own configuration."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config
