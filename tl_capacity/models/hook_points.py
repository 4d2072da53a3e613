"""Hook points: found in a model by name, watched, and edited."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from tl_capacity.errors import HookPointError
from tl_capacity.models.carried import carried_saes, is_hook_point, replaces_hook_point
from tl_capacity.models.hooks import Change, Hook, edit_hook_point, edit_input, edit_output
from tl_capacity.models.places import (
    hugging_face_hooks,
    hugging_face_place,
    lens_name,
    model_type_of,
    side_of_block,
    walk,
)
from tl_capacity.plugins import plugins

_STREAM = re.compile(r"blocks\.\d+\.(hook_resid_pre|hook_resid_post|hook_in|hook_out)")


@dataclass(frozen=True)
class TapPoint:
    """A place in a model where activations can be watched.

    Attributes:
        name: the hook point's name, as asked for.
        find: finds the module that is there now; SAELens puts an SAE in the place of a hook point.
        module: the module to watch.
        side: "output", or "input" for a module that is watched before it runs; a TransformerLens hook point changes
            nothing, so that both are the same there.
        width: dimensions per token, where the model's configuration tells.
        centred: activations are shown without their mean over the last dimension, which the model goes on with.
        heads: joined heads are shown cut into so many, [row, position, head, d_head], as TransformerLens shows them.
        head: of heads, only this one is shown, [row, position, d_head].
        carried: gives the SAEs that are in the model now.
    """

    name: str
    find: Callable[[], Any]
    module: nn.Module
    side: str = "output"
    width: int | None = None
    centred: bool = False
    heads: int | None = None
    head: int | None = None
    carried: Callable[[], Sequence[Any]] = tuple

    @property
    def carries_the_stream(self) -> bool:
        """Whether the whole residual stream passes here, between two blocks."""
        return _STREAM.fullmatch(self.name) is not None

    def again(self) -> TapPoint:
        """The same place in the model as it is now.

        Raises:
            HookPointError: where the hook point is gone.
        """
        module = self.find()
        if module is self.module:
            return self
        if not isinstance(module, nn.Module):
            raise HookPointError(
                f"the hook point {self.name} was removed after the capacity hooks were attached (by reset_saes?): "
                "attach them again, at a hook point that the model has"
            )
        return replace(self, module=module)

    def watch(self, callback: Callable[[Tensor], None], differentiable: bool = False) -> Hook:
        """Call `callback` with each activation. Returns a function that removes this hook and nothing else.

        A bridge shows some hooks a view of their own (`hook_z`, cut into heads) and goes on with the activation itself,
        so that the view has no gradient. With `differentiable`, what was seen is handed back unchanged, and the model
        goes on with that.
        """

        def see(activation: Tensor) -> Tensor | None:
            callback(activation)
            return activation if differentiable else None

        return self.edit(see)

    def edit(self, change: Change) -> Hook:
        """Replace each activation by what `change` returns, unless that is None. Returns a function that removes this
        hook and nothing else.
        """
        if self.centred:
            change = about_the_mean(change)
        if self.head is not None:
            change = of_one_head(change, self.head, self.name)
        if self.heads is not None:
            change = cut_into_heads(change, self.heads)
        if hasattr(self.module, "fwd_hooks"):
            return edit_hook_point(self.module, change)
        return (edit_input if self.side == "input" else edit_output)(self.module, change)


def about_the_mean(change: Change) -> Change:
    """A change applied to activations minus their mean over the last dimension. The mean is added again afterwards."""

    def changed(activation: Tensor) -> Tensor | None:
        # In half precision a sum of a thousand entries, or a large mean taken from small entries, loses what matters.
        exact = activation.float()
        mean = exact.mean(-1, keepdim=True)
        after = change((exact - mean).to(activation.dtype))
        return None if after is None else (after + mean).to(activation.dtype)

    return changed


def cut_into_heads(change: Change, heads: int) -> Change:
    """A change of heads [..., head, d_head], made into a change of heads that are joined to one vector."""

    def changed(activation: Tensor) -> Tensor | None:
        after = change(activation.unflatten(-1, (heads, -1)))
        return None if after is None else after.flatten(-2)

    return changed


def of_one_head(change: Change, head: int, name: str) -> Change:
    """A change of one head of [row, position, head, d_head]. The others stay.

    Raises, when activations come:
        HookPointError: where there is no such head.
    """

    def changed(activation: Tensor) -> Tensor | None:
        if activation.ndim != 4 or not 0 <= head < activation.shape[2]:
            count = f"{activation.shape[2]} heads" if activation.ndim == 4 else "no heads"
            raise HookPointError(
                f"the SAE's metadata says that it reads head {head} of {name}, which has {count} in this model: "
                "choose an SAE of this model"
            )
        after = change(activation[:, :, head])
        if after is None:
            return None
        others = activation.expand(len(after), *activation.shape[1:])  # one row may come back as several
        return torch.cat([others[:, :, :head], after[:, :, None], others[:, :, head + 1 :]], dim=2)

    return changed


def find_tap_point(model: Any, name: str) -> TapPoint:
    """The place in a model that a hook name means.

    Besides TransformerLens' names, one side of a module of the Hugging Face model is a name: `model.layers.3.mlp` is
    its output, `model.layers.3.mlp.input` its input. Of a block's modules, both sides have a name in every form of the
    model: `blocks.3.mlp.hook_out` is what the MLP gives, before any norm that stands behind it.

    Raises:
        HookPointError: where the model has no such hook point.
    """
    if not isinstance(model, nn.Module):
        raise HookPointError(f"{type(model).__name__} is not a model: pass a TransformerLens or Hugging Face model")
    return _of_hooked_model(model, name) if hasattr(model, "hook_dict") else _of_hugging_face_model(model, name)


def _of_hooked_model(model: Any, name: str) -> TapPoint:
    sought = lens_name(model, name)

    def find() -> Any:
        known = model.hook_dict
        module = known[sought] if sought in known else walk(model, sought)
        if not is_hook_point(module) or module.name is None:
            return module
        # Once an SAE was there, an alias of a bridge leads to the hook point that was there before.
        now = walk(model, module.name)
        return now if replaces_hook_point(now) or (now is not None and now is known.get(module.name)) else module

    # A bridge ignores names it does not know, and an SAE bridge lacks the aliases: so the name is resolved here,
    # once.
    module = find()
    if not (is_hook_point(module) or replaces_hook_point(module)):
        place = side_of_block(sought)
        if place is not None and isinstance(inside := walk(model, place.path), nn.Module):
            return TapPoint(name, lambda: walk(model, place.path), inside, place.side, int(model.cfg.d_model))
        known = hook_names(model)
        raise HookPointError(f"{name!r} is not a hook point of this model: {_nearest(name, known)}")
    # Of an SAE in the place of a hook point, what the model gives it is watched.
    width = _hook_width(model, sought)
    return TapPoint(name, find, module, "input", width, carried=lambda: tuple(carried_saes(model).values()))


def _of_hugging_face_model(model: Any, name: str) -> TapPoint:
    place = hugging_face_place(model, name)
    if place is None:
        kind = model_type_of(model)
        if plugins().family_of(kind) is None:
            raise HookPointError(
                f"no model family covers {kind!r}: register one (docs/families.md), or wrap the model in a"
                " TransformerBridge"
            )
        near = get_close_matches(name, hook_names(model), n=3, cutoff=0.5)
        instead = f"choose another, such as {' or '.join(near)}" if near else "choose a residual-stream hook"
        raise HookPointError(
            f"{name!r} is not a hook point that the family of {kind!r} has a place for: {instead}, or wrap the model in"
            " a TransformerBridge"
        )
    module = walk(model, place.path)
    if not isinstance(module, nn.Module):
        raise HookPointError(f"{name!r} is not a hook point of this model: {_nearest(name, hook_names(model))}")
    heads = int(model.config.num_attention_heads) if name.endswith(".hook_z") else None
    return TapPoint(
        name, lambda: walk(model, place.path), module, place.side, _side_width(model, name, heads), heads=heads
    )


def hook_names(model: Any) -> list[str]:
    """The hook points of a model that can be tapped."""
    if hasattr(model, "hook_dict"):
        return list(model.hook_dict)
    return hugging_face_hooks(model)


def _side_width(model: Any, name: str, heads: int | None) -> int | None:
    config = model.config
    if heads is not None:
        return heads * int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    return int(config.hidden_size) if name.startswith("blocks.") and not name.endswith(".hook_post") else None


def _hook_width(model: Any, name: str) -> int | None:
    config, last = model.cfg, name.rsplit(".", 1)[-1]
    if last in (
        "hook_resid_pre",
        "hook_resid_mid",
        "hook_resid_post",
        "hook_mlp_out",
        "hook_attn_out",
        "hook_embed",
    ) or (name.count(".") == 2 and last in ("hook_in", "hook_out")):
        return int(config.d_model)
    return int(config.n_heads * config.d_head) if last == "hook_z" else None


def residual_width(model: Any) -> int | None:
    """Dimensions of a model's residual stream, if its configuration says."""
    config: Any = getattr(model, "cfg", None) or getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    width = getattr(text, "d_model", None) or getattr(text, "hidden_size", None)
    return None if width is None else int(width)


def _nearest(name: str, known: Sequence[str]) -> str:
    near = get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"it has {len(known):,}, see `tl-capacity hooks --model …`"
