"""The bound against every student that is committed: those of the embedded teacher whose floors are published, and the
small ones that version 0.1 saved.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from tl_capacity.models.loading import load_model
from tl_capacity.rivals import rank_bound

RESULTS = Path(__file__).parent.parent.parent / "docs" / "results"


def test_no_published_student_is_below_its_bound() -> None:
    rows = json.loads((RESULTS / "rivals.json").read_text(encoding="utf-8"))
    bounds = {row["width"]: row["value"] for row in rows if row["predictor"] == "rank_bound"}
    page = (RESULTS / "embedded_floor.md").read_text(encoding="utf-8")
    students = [
        (int(width), float(loss)) for width, loss in re.findall(r"^\| (\d+) \| \d+ \| ([\d.]+) \|", page, re.MULTILINE)
    ]
    earlier = json.loads((RESULTS / "embedded_floor_4m.json").read_text(encoding="utf-8"))
    students += [(row["width"], row["last_tenth"]) for row in earlier]
    assert len(students) >= 20
    assert all(bounds[width] < loss for width, loss in students)
    values = [bounds[width] for width in sorted(bounds)]
    assert values == sorted(values, reverse=True)


def test_no_student_of_version_0_1_is_below_its_bound() -> None:
    """On any text: here, random token ids."""
    folder = Path(__file__).parent.parent / "fixtures" / "v0_1"
    teacher = load_model(str(folder / "teacher")).model
    ids = np.random.default_rng(0).integers(0, teacher.config.vocab_size, size=(40, 16))
    students = sorted((folder / "floors" / "distillation" / "students").iterdir())
    widths = [int(re.findall(r"width(\d+)", student.name)[0]) for student in students]
    bounds = rank_bound(teacher, ids, widths, progress=False).floors("rank_bound")
    with torch.no_grad():
        p = teacher(torch.from_numpy(ids)).logits[:, :-1].double().log_softmax(-1)
        for student, width in zip(students, widths, strict=True):
            q = load_model(str(student)).model(torch.from_numpy(ids)).logits[:, :-1].double().log_softmax(-1)
            kl = float(F.kl_div(q, p, log_target=True, reduction="sum") / p[..., 0].numel())
            assert bounds[width].value < kl
