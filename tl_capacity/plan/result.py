"""Plan: the smallest student width for a goal, what each hook point needs, and what widths cost in parameters.

It is saved as plan.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tl_capacity.errors import CapacityError, MeasurementError
from tl_capacity.plan.answers import OBSERVED_ALONE, MethodPlan, decisive, method_cells
from tl_capacity.plan.fields import estimate_field, field, width_field
from tl_capacity.results.estimate import Estimate, significant
from tl_capacity.runtime.checks import checked
from tl_capacity.runtime.units import per_token
from tl_capacity.show.notebook import ShownInNotebooks
from tl_capacity.show.tables import html_notes, html_table, said_once, table
from tl_capacity.storage.files import file_in, read_result, save_into, write_record

JSON_NAME = "plan.json"
SCHEMA = 1


@dataclass(frozen=True)
class HookPlan:
    """What one hook point needs of a student.

    Attributes:
        hook, teacher_width: the hook point and its width d_T.
        features: features that must be kept, of `alive`.
        width: the smallest d_S that keeps them, a whole number, with its 95% interval over documents.
    """

    hook: str
    teacher_width: int
    features: int
    alive: int
    width: Estimate


@dataclass(frozen=True)
class WidthCost:
    """What a student of one width keeps, and what it costs.

    Attributes:
        kept: share of the features at the deciding hook point that it keeps.
        floor: its predicted floor there, in the importance's unit per token.
        parameters, body_parameters: their number, and without embeddings and head; None where the model is not known or
            its family has no such width.
        share: `parameters` as a share of the teacher's.
        corrected: the floor in nats per token as observed students correct it; None without students, or where they
            say nothing.
    """

    width: int
    kept: Estimate
    floor: Estimate
    parameters: int | None = None
    body_parameters: int | None = None
    share: float | None = None
    corrected: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object, with the corrected floor if there is one."""
        fields = {name: value for name, value in vars(self).items() if name != "corrected" or value is not None}
        return {**fields, "kept": self.kept.to_json(), "floor": self.floor.to_json()}


@dataclass(frozen=True)
class Plan(ShownInNotebooks):
    """The answer of a plan. It shows itself in a terminal and in a notebook.

    Attributes:
        goal: in words.
        hooks: of each hook point; the one that needs the widest student decides. Empty where the prediction that was
            asked for says nothing in nats.
        width: the narrowest student that satisfies all and that the model's family can build.
        costs: of that width and of others around it.
        remarks: what a reader must know of the measurement.
        caveat: where the law must not be trusted.
        methods: of a goal in nats, what every method says of it.
        headline: of such a goal, the answer in words.
    """

    goal: str
    unit: str
    importance: str
    law: str
    hooks: tuple[HookPlan, ...]
    width: int
    costs: tuple[WidthCost, ...]
    remarks: tuple[str, ...] = ()
    caveat: str = ""
    methods: tuple[MethodPlan, ...] = ()
    headline: str = ""

    @property
    def deciding(self) -> HookPlan:
        """The hook point that needs the widest student.

        Raises:
            CapacityError: where the prediction that was asked for says nothing in nats, so that students decided.
        """
        if not self.hooks:
            raise CapacityError(
                f"{self.importance} is in {self.unit} and says nothing in nats, so no hook point decided: look at"
                " methods"
            )
        return max(self.hooks, key=lambda h: h.width.value)

    @property
    def decides(self) -> MethodPlan | None:
        """The method that decided the width for a goal in nats; None if none did, or for another goal."""
        own = next((each for each in self.methods if each.method == OBSERVED_ALONE), None)
        return decisive([each for each in self.methods if each is not own], own)

    def answer(self) -> str:
        """The answer in one sentence. A goal in nats adds sentences for its doubts."""
        if self.headline:
            return self.headline
        needed = self.deciding
        built = (
            f"; the next width that its family can build is {self.width:,}" if self.width != needed.width.value else ""
        )
        narrower = (
            ""
            if needed.width.value <= needed.teacher_width
            else f"; that is wider than the teacher's {needed.teacher_width:,}"
        )
        return (
            f"{self.goal}, the smallest student width is {needed.width.show(',.0f')}, decided at"
            f" {needed.hook}{built}{narrower}"
        )

    def notes(self) -> list[str]:
        """What a reader must know before building on it."""
        return [*self.remarks, *([f"{self.law}: {self.caveat}"] if self.caveat else [])]

    def to_json(self) -> dict[str, Any]:
        """The whole plan as a JSON object."""
        return {
            "schema": SCHEMA,
            "goal": self.goal,
            "width": self.width,
            "answer": self.answer(),
            "importance": self.importance,
            "unit": self.unit,
            "law": self.law,
            "hooks": [{**vars(h), "width": h.width.to_json()} for h in self.hooks],
            "costs": [cost.to_json() for cost in self.costs],
            **({"methods": [method.to_json() for method in self.methods]} if self.methods else {}),
            "notes": self.notes(),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Plan:
        """The checked plan that `to_json` gave.

        Raises:
            KeyError, TypeError, ValueError: where it lacks or garbles something.
        """
        of_law = f"{content['law']}: "
        notes = [note for note in field(content, "notes", list) if isinstance(note, str)]
        hooks = tuple(
            HookPlan(
                field(saved, "hook", str),
                width_field(saved, "teacher_width"),
                field(saved, "features", int),
                field(saved, "alive", int),
                estimate_field(saved, "width"),
            )
            for saved in field(content, "hooks", list)
        )
        costs = tuple(
            WidthCost(
                width_field(saved, "width"),
                estimate_field(saved, "kept"),
                estimate_field(saved, "floor"),
                field(saved, "parameters", (int, type(None))),
                field(saved, "body_parameters", (int, type(None))),
                field(saved, "share", (float, int, type(None))),
                field({"corrected": None, **saved}, "corrected", (float, int, type(None))),
            )
            for saved in field(content, "costs", list)
        )
        methods = tuple(map(MethodPlan.from_json, field({"methods": [], **content}, "methods", list)))
        if not (hooks or methods) or not costs:
            raise ValueError("hooks or costs, of which it has none")
        return cls(
            goal=field(content, "goal", str),
            unit=field(content, "unit", str),
            importance=field(content, "importance", str),
            law=field(content, "law", str),
            hooks=hooks,
            width=width_field(content, "width"),
            costs=costs,
            remarks=tuple(note for note in notes if not note.startswith(of_law)),
            caveat="".join(note.removeprefix(of_law) for note in notes if note.startswith(of_law)),
            methods=methods,
            headline=field(content, "answer", str) if methods else "",
        )

    @checked
    def save(self, folder: str | Path) -> Path:
        """Write `plan.json` into a folder.

        Raises:
            CapacityError: where it cannot be written.
        """
        return save_into(folder, JSON_NAME, self.to_json(), write_record)

    @classmethod
    @checked
    def load(cls, path: str | Path) -> Plan:
        """Read the file, or the one in a folder.

        Raises:
            MeasurementError: where it cannot be read, is of a newer version, or was altered.
        """
        file = file_in(path, JSON_NAME)
        content = read_result(file, SCHEMA, "plan again", "cannot be read as a plan")
        try:
            return cls.from_json(content)
        except (KeyError, TypeError, ValueError, AttributeError) as problem:
            raise MeasurementError(f"{file} lacks or garbles {problem}: it was altered, plan again") from problem

    def plot(self) -> Any:
        """A plotly figure of the predicted floors against the student's width, with the planned width marked."""
        from tl_capacity.predict.figures import costs_figure

        widths, floors = [cost.width for cost in self.costs], [cost.floor for cost in self.costs]
        return costs_figure(widths, floors, self.unit, self.width)

    def to_frame(self) -> Any:
        """The widths and their costs as a pandas DataFrame."""
        import pandas

        flat = [
            {
                "width": c.width,
                **{
                    f"{name}{suffix}": getattr(e, part)
                    for name, e in (("kept", c.kept), ("floor", c.floor))
                    for part, suffix in _PARTS
                },
                "parameters": c.parameters,
                "body_parameters": c.body_parameters,
                "share_of_teacher": c.share,
            }
            for c in self.costs
        ]
        return pandas.DataFrame(flat)

    def __rich_console__(self, console: Any, options: Any) -> Any:
        from rich.text import Text

        yield Text(f"{self.answer()}\n")
        for title, header, rows in self.tables():
            yield table(title, header, rows)
        for note in said_once(self.notes()):
            yield Text(f"note: {note}")

    def _repr_html_(self) -> str:
        from html import escape

        notes = html_notes(self.notes())
        tables = "".join(f"<p>{escape(title)}</p>{html_table(header, rows)}" for title, header, rows in self.tables())
        return f"<p>{escape(self.answer())}</p>{tables}{notes}"

    def tables(self) -> list[tuple[str, list[str], list[list[str]]]]:
        """Title, header and rows of each table, as text."""
        at = f"; features and floor at {self.deciding.hook}" if self.hooks else ""
        tables = [(f"What each width costs{at}", *self.cost_cells())]
        if self.hooks:
            tables.insert(0, ("What each hook point asks [95% interval over documents]", *self.hook_cells()))
        if self.methods:
            tables.insert(0, ("What each method says [95% interval over documents]", *method_cells(self.methods)))
        return tables

    def hook_cells(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of the hook points, as text."""
        return ["hook", "features to keep", "alive", "smallest width"], [
            [h.hook, f"{h.features:,}", f"{h.alive:,}", h.width.show(",.0f")] for h in self.hooks
        ]

    def cost_cells(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of the widths, as text."""
        unit = f" ({per_token(self.unit)})" if self.unit else ""
        header = [
            "width",
            "features kept",
            f"predicted floor{unit}",
            "parameters",
            "without embeddings",
            "of the teacher's",
        ]
        corrected = any(c.corrected is not None for c in self.costs)
        if corrected:
            header.insert(3, "corrected by students (nats per token)")
        return header, [
            [
                f"{c.width:,}{' ←' if c.width == self.width else ''}",
                c.kept.show(".1%"),
                c.floor.show(significant(c.floor.value)),
                *([_number(c.corrected)] if corrected else []),
                "unknown" if c.parameters is None else f"{c.parameters:,}",
                "unknown" if c.body_parameters is None else f"{c.body_parameters:,}",
                "unknown" if c.share is None else f"{c.share:.1%}",
            ]
            for c in self.costs
        ]


_PARTS = (("value", ""), ("low", "_low"), ("high", "_high"))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:{significant(value)}}"
