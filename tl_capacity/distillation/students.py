"""Students: models like the teacher in family, vocabulary and depth, but narrower.

They are plain Hugging Face modules: a model inside TransformerLens' bridge would train other parameters than its own.
Wrap them afterwards.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from tl_capacity.distillation.curves import StudentCurve
from tl_capacity.distillation.losses import Output
from tl_capacity.distillation.settings import DistillSettings
from tl_capacity.distillation.truncation import truncate
from tl_capacity.errors import CapacityError, plugin_code
from tl_capacity.models.defaults import width_of
from tl_capacity.models.forward import at_places, device_of
from tl_capacity.models.head import head_of, last_hidden
from tl_capacity.models.hook_points import TapPoint, find_tap_point
from tl_capacity.plugins import plugins
from tl_capacity.runtime.seeds import seeded

STARTS = ("random", "truncated", "teacher")


def new_student(
    teacher: Any, width: int, seed: int = 0, start: str = "random", tokens: Int[Tensor, "row position"] | None = None
) -> Any:
    """A student in float32, in training mode but without dropout, so that a step depends only on weights and tokens.

    Args:
        teacher: a Hugging Face causal language model.
        width: d_S.
        seed: of the initial weights.
        start: "random"; "truncated", the teacher's weights in the leading directions of its stream, which `tokens` show
            (see `truncation`); or "teacher", the control of the teacher's own width that begins with its weights, at KL
            0.

    Raises:
        CapacityError: where the teacher's family has no students of that width; names the nearest that it has.
    """
    check_teacher(teacher)
    if start not in STARTS:
        raise CapacityError(f"{start!r} is not a way to start a student: choose one of {', '.join(STARTS)}")
    if start == "teacher" and width != teacher.config.hidden_size:
        raise CapacityError(
            f"a student of width {width:,} cannot start from all of the teacher's weights, whose width is"
            f" {teacher.config.hidden_size:,}: choose random or truncated"
        )
    if width > teacher.config.hidden_size:
        warnings.warn(
            f"the student of width {width:,} is wider than its teacher, {teacher.config.hidden_size:,}", stacklevel=2
        )
    with seeded(seed):
        student = type(teacher)(student_config(teacher.config, width)).float()
    if start == "teacher":
        student.load_state_dict(teacher.state_dict())
    student.to(device_of(teacher))
    if start == "truncated":
        if tokens is None:
            raise CapacityError(
                "a student that starts truncated needs text on which its teacher's stream is seen: pass tokens"
            )
        truncate(teacher, student, tokens.to(device_of(teacher)))
    return student.requires_grad_(True).train()


def new_students(
    teacher: Any, widths: Sequence[int], settings: DistillSettings, tokens: Int[Tensor, "row position"]
) -> tuple[tuple[StudentCurve, ...], list[Any]]:
    """The untrained students, and their entries in the run. A truncated start needs the teacher's stream on `tokens`.

    Raises:
        CapacityError: where there are none of these widths, or seeds make no difference.
    """
    if len(set(widths)) < len(widths) or not (widths or settings.control):
        raise CapacityError(
            f"widths = {','.join(map(str, widths))} name no students, or one twice: pass different widths such as 32,64"
        )
    if unknown := set(settings.seeded_widths) - set(widths):
        raise CapacityError(
            f"seeded_widths = {','.join(map(str, sorted(unknown)))} are not among the widths"
            f" {','.join(map(str, widths))}: name some of these"
        )
    seeded = set(settings.seeded_widths or widths)
    wanted = [
        (f"width{width}-seed{seed}", width, seed, settings.start)
        for width in widths
        for seed in (settings.seeds if width in seeded else settings.seeds[:1])
    ]
    if settings.control:
        wanted.append(("control", int(teacher.config.hidden_size), settings.seeds[0], "teacher"))
    curves, models = [], []
    for name, width, seed, start in wanted:
        models.append(new_student(teacher, width, seed, start, tokens))
        curves.append(StudentCurve(name, width, seed, start, *parameters_of(models[-1])))
        if seed != settings.seeds[0] and all(map(torch.equal, models[-1].parameters(), models[-2].parameters())):
            raise CapacityError(
                f"students of width {width:,} start alike with every seed, as all of their weights are the teacher's:"
                " name other widths as seeded_widths"
            )
    return tuple(curves), models


def student_config(config: Any, width: int) -> Any:
    """The configuration of a student of some width, by the rule of its family.

    Raises:
        CapacityError: where no family has a rule for the architecture, or its rule has no such width.
        PluginError: where the rule fails.
    """
    changes = _changes(config, width)
    if changes is None:
        shown = " and ".join(f"{nearest:,}" for nearest in _nearest(config, width))
        raise CapacityError(
            f"the family {_family(config).name} cannot build a student of width {width:,}: the nearest widths are"
            f" {shown}"
        )
    values = {
        k: v
        for k, v in config.to_dict().items()
        if k not in ("_name_or_path", "architectures", "dtype", "transformers_version", "model_type")
    }
    no_dropout = {name: 0.0 for name in values if "dropout" in name or name.endswith(("pdrop", "layerdrop"))}
    return type(config)(**(values | no_dropout | dict(changes)))


def nearest_widths(config: Any, widths: Sequence[int]) -> tuple[int, ...]:
    """The widths in ascending order, each once; a width that the family cannot build becomes the nearest that it can.

    Raises:
        CapacityError: where no family has a rule for the architecture.
    """
    able = {
        width if _changes(config, width) is not None else min(_nearest(config, width), key=lambda w: abs(w - width))
        for width in widths
    }
    return tuple(sorted(able))


def _family(config: Any) -> Any:
    """The family that knows how to build students of an architecture."""
    family = plugins().family_of(config.model_type)
    if family is None or family.student is None:
        able = ", ".join(f.name for f in plugins().model_families if f.student is not None)
        raise CapacityError(
            f"no model family knows how to build students of {config.model_type!r}: register one (docs/families.md);"
            f" {able} can"
        )
    return family


def _changes(config: Any, width: int) -> Mapping[str, Any] | None:
    """What differs from the teacher in a student of some width; None if the family has no student of that width."""
    width_of(config)
    family = _family(config)
    with plugin_code("model family", family.name, family.student):
        changes: Mapping[str, Any] | None = family.student(config, width) if width >= 1 else None
    return changes


def _nearest(config: Any, width: int) -> list[int]:
    """The nearest widths below and above that the family can build.

    Above, the teacher's own width or a multiple always works.
    """
    below, above = range(width - 1, 0, -1), range(max(1, width + 1), max(0, width) + width_of(config) + 1)
    near = (next((w for w in side if _changes(config, w) is not None), None) for side in (below, above))
    return [w for w in near if w is not None]


def check_teacher(teacher: Any) -> None:
    """Refuse a model that cannot be distilled.

    Raises:
        CapacityError: where it is no Hugging Face causal language model, holds one beside others, or is partly in CPU
            memory or on disk.
    """
    from transformers import PreTrainedModel

    model: Any = teacher
    if not isinstance(teacher, PreTrainedModel) or model.get_output_embeddings() is None:
        raise CapacityError(
            f"{type(teacher).__name__} cannot be distilled: pass a Hugging Face causal language model, unwrapped"
        )
    width_of(model.config)
    if hasattr(model, "hf_device_map") and any(parameter.is_meta for parameter in model.parameters()):
        raise CapacityError(
            "the teacher is partly in CPU memory or on disk, where its device map put it, and students are built from"
            " all of its weights: load it without a device map"
        )


def output_of(
    model: Any,
    tokens: Int[Tensor, "row position"],
    places: Int[Tensor, " token"],
    hooks: Sequence[str] = (),
    points: Mapping[str, TapPoint] | None = None,
) -> Output:
    """Hidden states at some places and hook points, and the head.

    Rows are padded on the right, where causal models do not look.

    Args:
        places: of all rows together, one after the other.
        hooks: hook points, by whose names the states there are kept.
        points: places that were found already, by the names under which the states there are kept.

    Raises:
        HookPointError: where the model has no such hook point.
    """
    states: dict[str, Tensor] = {}
    with ExitStack() as watching:
        watched = {hook: find_tap_point(model, hook) for hook in hooks} | dict(points or {})
        for name, point in watched.items():
            watching.callback(point.watch(partial(_keep, states, name, places)))
        hidden = at_places(last_hidden(model, tokens), places)
    return Output(hidden, head_of(model), states)


def parameters_of(model: nn.Module) -> tuple[int, int]:
    """Number of parameters: all, and without embeddings and head."""
    hf: Any = model
    embeddings = {
        id(p) for module in (hf.get_input_embeddings(), hf.get_output_embeddings()) for p in module.parameters()
    }
    return sum(p.numel() for p in model.parameters()), sum(
        p.numel() for p in model.parameters() if id(p) not in embeddings
    )


def _keep(states: dict[str, Tensor], name: str, places: Tensor, activation: Tensor) -> None:
    states[name] = at_places(activation, places)
