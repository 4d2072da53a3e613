"""What `observe` prints around its table: the title, the notes, and the figures as JSON."""

from __future__ import annotations

from typing import Any

from tl_capacity.distillation.run import DistillationRun


def judged_title(run: DistillationRun) -> str:
    """The title of the table."""
    judged = next((student.judged for student in run if student.judged is not None), None)
    if judged is None:
        return f"No student of {run.teacher} was judged as it came"
    own = judged.figures["teacher_cross_entropy"].show(".4f")
    return (
        f"Students beside {run.teacher}, d={run.teacher_width:,}, on {run.heldout_tokens:,} tokens of"
        f" {len(judged.documents):,} documents of {run.heldout_source} [95% interval over documents]; the teacher's own"
        f" cross-entropy is {own}"
    )


def judged_notes(run: DistillationRun) -> list[str]:
    """What a reader must know before believing the figures."""
    notes = [
        "these students were judged as they came: their loss is not a floor, as more training may lower it; it is too"
        " low if they were trained on this text"
    ]
    logits, common = run.settings.get("logits", {}), run.settings.get("compared_logits")
    if wider := [f"{name} has {size:,}" for name, size in logits.items() if size != common]:
        notes.append(f"models are compared on the first {common:,} logits: {', '.join(wider)}")
    judged = next((student.judged for student in run if student.judged is not None), None)
    if judged is not None and judged.figures["kl"].low is None:
        notes.append(f"{len(judged.documents)} documents are too few for an interval: judge on more text")
    return notes


def judged_json(run: DistillationRun) -> dict[str, Any]:
    """The figures as JSON, without those of each document; the folder holds these."""
    students = [
        {
            "name": student.name,
            "place": student.place,
            "revision": student.revision,
            "width": student.width,
            "parameters": student.parameters,
            **{name: figure.to_json() for name, figure in student.judged.figures.items()},
        }
        for student in run
        if student.judged is not None
    ]
    about = {name: getattr(run, name) for name in ("teacher", "teacher_width", "heldout_source", "heldout_tokens")}
    return {"schema": 1, **about, "students": students, "settings": run.settings, "notes": judged_notes(run)}
