"""The headline figures: each is declared once, and every list of them, that of a page too, is a selection."""

from __future__ import annotations

from pathlib import Path

from tl_capacity.plugins import plugins
from tl_capacity.predict import budget, suite
from tl_capacity.results import columns

ROOT = Path(__file__).parents[2]


def test_what_a_measurement_records_in_its_order() -> None:
    assert [column.key for column in columns.RECORDED] == [
        "tokens",
        "documents",
        "masked",
        "masked_norm_share",
        "n_alive",
        "alive_at",
        "features_chao2",
        "l0",
        "alpha",
        "capacity",
        "critical_width",
        "heterogeneous_critical_width",
        "dense_latents",
        "fvu",
        "explained_variance",
    ]


def test_every_list_of_figures_is_a_selection_of_the_declared_ones() -> None:
    declared = {value.name: value for value in vars(columns).values() if isinstance(value, columns.Column)}
    law = plugins().capacity_laws.default
    shown = (*budget.frame_columns(law), *budget.table_columns(law), *suite.COLUMNS)
    assert {column.name for column in shown} - {"budget"} < declared.keys()
    assert all(column.value is declared[column.name].value for column in shown if column.name != "budget")


def test_the_docs_explain_the_figures_of_the_table_in_the_same_words() -> None:
    explained = [c for c in budget.table_columns(plugins().capacity_laws.default) if c.formula]
    names = {"alpha": "α", "g": "g(α)"}
    rows = [f"| {names.get(c.name, c.name)} | {c.formula} | {c.meaning} |".replace("*", r"\*") for c in explained]
    page = (ROOT / "docs" / "about-counting.md").read_text(encoding="utf-8")
    table = page[page.index("## What each figure means") :]
    missing = [row for row in rows if row.replace("d\\*_het", "d\\*\\_het") not in table]
    assert len(rows) == 8
    assert not missing, "the table of docs/about-counting.md and tl_capacity/results/columns.py differ"
