"""The report in a real browser, its figures against the figures of the result, its snippets against a dense
computation, and whatever may be missing or odd.
"""

from __future__ import annotations

import csv
import io
import json
import re
import shlex
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chromium import BROWSER, DRIVER, MISSING, opened, started
from commands import HOOK, Cli, parse
from hypothesis import given, settings
from hypothesis import strategies as st
from measurements import curve_at, measurement_of_counts
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tl_capacity import add_capacity_hooks, theory
from tl_capacity.dictionaries.loading import load_sae
from tl_capacity.distillation.curves import StudentCurve
from tl_capacity.distillation.decomposition import Decomposition, decompose
from tl_capacity.distillation.observed import observed_floors
from tl_capacity.distillation.run import DistillationRun
from tl_capacity.errors import CapacityError, DictionaryError, MeasurementError
from tl_capacity.measure.job import measure
from tl_capacity.measure.settings import MeasureSettings
from tl_capacity.measurement.measurement import Measurement
from tl_capacity.models.hook_points import find_tap_point
from tl_capacity.models.loading import load_model
from tl_capacity.plan import plan
from tl_capacity.plugins import plugins
from tl_capacity.predict.record import record_of
from tl_capacity.predict.spliced import Spliced
from tl_capacity.probing.recoverability import Recoverability
from tl_capacity.probing.saved_probes import Probes
from tl_capacity.report import ReportSettings, Results, find_snippets, report_page, write_report
from tl_capacity.report import figures as drawn
from tl_capacity.report.edges import Edge, edges, shown_features
from tl_capacity.report.snippets import stream_of, token_texts, top_snippets, whole_characters
from tl_capacity.report.story import latents_around, report_widths, shown_latents
from tl_capacity.results.estimate import Estimate
from tl_capacity.results.hook import HookMeasurement
from tl_capacity.show import figures as kit
from tl_capacity.show.palette import COLOURS

pytestmark = pytest.mark.usefixtures("few_replicates")

EVIL = "</script><script>document.title='taken'</script>"
WIDTHS = (4, 8, 12, 16, 24)
ORDER = [
    "layers",
    "importance",
    "firing-rates",
    "suite",
    "floors",
    "spliced",
    "effective",
    "training",
    "probes",
    "recoverability",
    "placement",
    "beside",
    "features",
    "method",
]


@pytest.fixture(scope="module")
def folder(setup: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A measurement of three SAEs, two of them at one hook point, on text in which markup is a word."""
    folder = tmp_path_factory.mktemp("report")
    shutil.copytree(setup / "model", folder / "model")
    words = {"<s>": 0, "<unk>": 1, EVIL: 2, "<b>&amp;</b>": 3, **{f"w{i}": i for i in range(4, 64)}}
    whole = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=whole, bos_token="<s>", eos_token="<s>", unk_token="<unk>"
    ).save_pretrained(folder / "model")
    draw, text = np.random.default_rng(0), list(words)
    documents = [" ".join(text[i] for i in draw.zipf(1.2, size=60) % 62 + 2) for _ in range(150)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in documents))
    saes = (f"{HOOK}={setup / 'sae'}", str(setup / "sae0"), f"{HOOK}={setup / 'scaled'}")
    measure(
        MeasureSettings(
            str(folder / "model"),
            folder / "measurement",
            saes,
            tokens=2_500,
            source=str(folder / "text.jsonl"),
            context=20,
            fvu_every=1,
            progress=False,
        )
    )
    return folder


@pytest.fixture(scope="module")
def measurement(folder: Path) -> Measurement:
    return Measurement.load(folder / "measurement")


@pytest.fixture(scope="module")
def lone(measurement: Measurement) -> Measurement:
    """Of one hook point and one SAE, for pages on which others would show nothing more."""
    return replace(measurement, hooks=measurement.hooks[1:2])


def distilled(teacher: str, widths: Sequence[int] = WIDTHS, evaluations: int = 12) -> DistillationRun:
    """A run whose curves are power laws, with a control that began at its floor."""
    tokens = np.arange(evaluations + 1) * 500

    def curve(width: int, start: str) -> StudentCurve:
        floor, fall = (0.01, 0.0) if start == "teacher" else (0.1 + 4 / width, 2.0)
        losses = floor + fall * np.concatenate([[2.0], np.linspace(0, 1, evaluations + 1)[1:] ** -0.7]) / 2
        name = "control" if start == "teacher" else f"width{width}-seed0"
        return StudentCurve(
            name,
            width,
            0,
            start,
            100 * width,
            20 * width,
            tuple(tokens.tolist()),
            tuple(losses.tolist()),
            (1.0,) * evaluations,
        )

    students = (*(curve(w, "random") for w in widths), curve(32, "teacher"))
    return DistillationRun(students, teacher, 32, source="text", heldout_tokens=400, settings={"lr": 1e-3})


RECOVERABILITY = [
    {
        "width": w,
        "hook": HOOK,
        "kept": 2 * w,
        "kept_random": w,
        "kept_teacher": 60,
        "budget": 1.6 * w,
        "n_features": 64,
        "tau": 0.8,
        "intervals": {"student": [2 * w - 1, 2 * w + 1], "random": None},
        "overlap": {"predicted": 30, "kept_of_predicted": 0.6, "kept_of_all": 0.25, "ordered": None},
        "by_tau": {
            f"{tau:.2f}": {"student": 3 * w - 100 * tau, "random": w, "teacher": 62} for tau in (0.8, 0.85, 0.9)
        },
        "readouts": {
            name: {"average_precision": value, "r2": None}
            for name, value in (("student", 0.31), ("random", 0.07), ("teacher", 0.93))
        },
    }
    for w in WIDTHS
]
PROBES = {
    "schema": 1,
    "probes": [
        {
            "kind": kind,
            "baseline": kind != "trained",
            "concept": "<i>topic</i>",
            "width": w,
            "accuracy": accuracy,
            "low": accuracy - 0.1,
            "high": accuracy + 0.1,
            "auroc": accuracy + 0.05,
            "auroc_low": accuracy - 0.02,
            "auroc_high": accuracy + 0.09,
            "control_accuracy": 0.55 if kind == "trained" else None,
        }
        for w in WIDTHS
        for kind, accuracy in (("trained", 0.5 + w / 100), ("random weights", 0.5))
    ],
}


@pytest.fixture(scope="module")
def full(measurement: Measurement, folder: Path) -> Results:
    curve = curve_at(measurement.hooks[1], lambda kept: 0.05 + 3 * (1 - np.log1p(kept) / np.log1p(64)))
    return Results(
        measurement,
        str(folder / "measurement"),
        distilled(measurement.provenance.model),
        PROBES,
        RECOVERABILITY,
        spliced=Spliced((curve,)),
    )


@pytest.fixture(scope="module")
def page(full: Results, tmp_path_factory: pytest.TempPathFactory) -> Path:
    chosen = ReportSettings()
    found, note = find_snippets(full, chosen, tokens=1_000)
    assert not note
    return write_report(tmp_path_factory.mktemp("page") / "report.html", full, chosen, found)


# In a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if BROWSER is None or DRIVER is None:
        pytest.skip(MISSING)
    driver = started()
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def desktop(browser: Any, page: Path) -> Any:
    """The page in a wide window; the tests that share it leave nothing behind that another would mind."""
    return opened(browser, page)


OVERLAPPING = """
const cover = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
  && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 5;
return [...document.querySelectorAll(".plot")].flatMap(plot => ["xtick", "ytick"].flatMap(axis => {
  const labels = [...plot.querySelectorAll(`.${axis} text`)], box = label => label.getBoundingClientRect();
  return labels.flatMap((a, i) => labels.slice(i + 1).filter(b => cover(box(a), box(b)))
    .map(b => `${plot.id}: ${a.textContent} and ${b.textContent}`));
}));"""
"""The labels of an axis that lie on each other."""
CRAMPED = """
const height = (plot, part) => plot.querySelector(part)?.getBoundingClientRect().height ?? 0;
return [...document.querySelectorAll(".plot")]
  .filter(plot => height(plot, ".gridlayer") < 90 || height(plot, ".legend .scrollbar") > 0).map(plot => plot.id);"""
"""The figures whose legend is cut, or leaves them little room."""


def assert_drawn(browser: Any, width: int, scheme: str) -> None:
    """No complaint, every figure drawn, nothing wider than the window, nothing fetched, and the colours asked for."""
    assert [entry for entry in browser.get_log("browser") if entry["level"] != "INFO"] == []
    plots = browser.find_elements("css selector", ".plot")
    assert len(plots) >= 10
    assert all(plot.find_elements("css selector", "svg.main-svg .trace") for plot in plots)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert (
        browser.execute_script(
            "return performance.getEntriesByType('resource').filter(r => !r.name.startsWith('data:')).length"
        )
        == 0
    )
    assert browser.execute_script(OVERLAPPING) == []
    assert browser.execute_script(CRAMPED) == []
    ink, paper = (
        browser.execute_script(f"return getComputedStyle(document.body).{name}")
        for name in ("color", "backgroundColor")
    )
    lightness = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ink, paper)]
    assert (lightness[0] > lightness[1]) == (scheme == "dark")
    axis = browser.execute_script("return getComputedStyle(document.querySelector('.plot .xtick text')).fill")
    assert axis == ink


@pytest.mark.slow
def test_it_is_drawn_without_an_error_and_fits_a_desktop(desktop: Any) -> None:
    assert_drawn(desktop, 1280, "light")


@pytest.mark.slow
def test_the_slider_changes_the_lists(desktop: Any, full: Results) -> None:
    from selenium.webdriver.common.keys import Keys

    browser = desktop
    slider = browser.find_element("id", "width")
    around = edges(full.measurement.hooks[1], WIDTHS, "second_moment", plugins().capacity_laws["compressed_sensing"])
    for key, edge in ((Keys.HOME, around[0]), (Keys.ARROW_RIGHT, around[1]), (Keys.END, around[-1])):
        slider.send_keys(key)
        assert browser.find_element("id", "chosen").text == str(edge.width)
        for side, latents in (("kept", edge.kept), ("lost", edge.lost)):
            listed = [e.text for e in browser.find_elements("css selector", f"#{side} .head span:first-of-type")]
            assert listed == [f"latent {latent}" for latent in latents]
        assert browser.find_element("id", "lost-title").text == f"First lost, of {edge.n_lost}"
    browser.find_element("css selector", "#hook option:first-child").click()
    other = edges(full.measurement.hooks[0], WIDTHS, "second_moment", plugins().capacity_laws["compressed_sensing"])[-1]
    assert browser.find_element("css selector", "#kept .head span").text == f"latent {other.kept[0]}"


@pytest.mark.slow
def test_tables_sort(desktop: Any) -> None:
    table = desktop.find_element("css selector", "#floors table")
    heads = table.find_elements("css selector", "th")
    column = next(i for i, head in enumerate(heads) if head.text.startswith("predicted floor"))

    def values() -> list[float]:
        return [
            float(cell.get_attribute("data-order"))
            for cell in table.find_elements("css selector", f"tbody td:nth-child({column + 1})")
        ]

    before = values()
    heads[column].find_element("css selector", "button").click()
    assert values() == sorted(before) != before
    assert heads[column].get_attribute("aria-sort") == "ascending"
    heads[column].find_element("css selector", "button").click()
    assert values() == sorted(before, reverse=True)


@pytest.mark.slow
def test_features_are_found_by_number_and_by_text(desktop: Any, full: Results) -> None:
    hook = full.measurement.hooks[1]
    law = plugins().capacity_laws["compressed_sensing"]
    listed = latents_around(edges(hook, WIDTHS, "second_moment", law))
    ranked = hook.ranked("second_moment").tolist()
    search = desktop.find_element("id", "search")
    desktop.find_element("css selector", "#hook option:nth-child(2)").click()

    def found(text: str) -> list[str]:
        search.clear()
        search.send_keys(text)
        return [e.text for e in desktop.find_elements("css selector", "#kept .feature .head span:first-of-type")]

    try:
        assert found(str(listed[3]))[0] == f"latent {listed[3]}"
        unlisted = next((latent for latent in ranked if latent not in listed), None)
        if unlisted is not None:
            assert found(f"#{unlisted}") == [f"latent {unlisted}"]
            head = desktop.find_element("css selector", "#kept .head").text
            assert f"#{ranked.index(unlisted) + 1}" in head
        assert found("999999") == ["latent 999999"]
        assert "no latent of this dictionary" in desktop.find_element("id", "kept").text
        hits = found("W7 ")
        texts = [e.text for e in desktop.find_elements("css selector", "#kept .feature")]
        assert hits
        assert all("w7 " in text for text in texts)
        assert found("zzz") == []
        assert not desktop.find_elements("css selector", "#lost .feature")
    finally:
        search.clear()
        search.send_keys(" ")
        search.clear()
    assert desktop.find_elements("css selector", "#lost .feature")


DOWNLOADED = """
const [button, done] = arguments, create = URL.createObjectURL, click = HTMLAnchorElement.prototype.click;
URL.createObjectURL = blob => { blob.text().then(done); return create(blob); };
HTMLAnchorElement.prototype.click = () => {};
button.click();
URL.createObjectURL = create;
HTMLAnchorElement.prototype.click = click;
"""
"""Presses a button, and gives the text that it would save instead of saving it."""


@pytest.mark.slow
def test_tables_and_features_are_downloaded_as_csv(desktop: Any, full: Results) -> None:
    def rows(selector: str) -> list[list[str]]:
        text = desktop.execute_async_script(DOWNLOADED, desktop.find_element("css selector", selector))
        return list(csv.reader(io.StringIO(text.removeprefix("\ufeff"))))

    header, *body = rows("#layers button.csv")
    assert header[:2] == ["hook point", ""]
    for row, hook in zip(body, full.measurement, strict=True):
        assert row[2] == f"{hook.summary.n_alive.value:,.0f}"
    hook = full.measurement.hooks[1]
    desktop.find_element("css selector", "#hook option:nth-child(2)").click()
    header, *body = rows("#features-csv")
    assert [int(row[1]) for row in body] == [
        latent for latent in hook.ranked() if latent in set(latents_around(_edges_of(hook)))
    ]
    importance = dict(zip(np.flatnonzero(hook.summary.alive).tolist(), hook.importance(), strict=True))
    for row in body:
        assert float(row[4]) == pytest.approx(importance[int(row[1])], rel=0.01)
    evil = desktop.execute_script("return ['=1+1', '+A1', '-2', '-2.5', 'x'].map(safe)")
    assert evil == ["'=1+1", "'+A1", "-2", "-2.5", "x"]


def _edges_of(hook: HookMeasurement) -> list[Edge]:
    return edges(hook, WIDTHS, "second_moment", plugins().capacity_laws["compressed_sensing"])


@pytest.mark.slow
def test_markup_in_a_token_is_shown_as_text(desktop: Any, page: Path) -> None:
    browser = desktop
    assert browser.title == f"Feature capacity of {page_model(page)}"
    slider = browser.find_element("id", "width")
    shown = ""
    for place in range(len(WIDTHS)):
        browser.execute_script(
            "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))", slider, place
        )
        shown += browser.find_element("css selector", ".sides").text
    assert EVIL in shown
    assert "<b>&amp;</b>" in shown
    assert not browser.find_elements("css selector", ".sides b b, .sides script")
    assert "<i>topic</i>" in browser.find_element("css selector", "#probes figcaption").text


@pytest.mark.slow
def test_it_is_drawn_without_an_error_and_fits_a_phone_in_the_dark(browser: Any, page: Path) -> None:
    assert_drawn(opened(browser, page, 390, "dark"), 390, "dark")


def page_model(page: Path) -> str:
    found = re.search(r"<title>Feature capacity of (.*)</title>", page.read_text())
    assert found is not None
    return found[1]


# What is in it


def test_the_story_is_told_in_order(page: Path) -> None:
    text = page.read_text()
    assert re.findall(r'<section id="([^"]+)"', text) == ORDER
    assert page.stat().st_size < 6e6
    assert not re.search(r'(?:src|href)="(?!#|data:|https://arxiv\.org/)', text[: text.index('id="figure-data"')])


def test_the_verdict_says_what_was_computed(page: Path, full: Results) -> None:
    head = re.sub(r"<[^>]+>", "", page.read_text().split('<ul class="tiles">')[0].split("<header>")[1])
    hook = full.measurement.hooks[1]
    assert f"F = {hook.summary.n_alive.brief(',.0f')}" in head
    assert f"d* = {hook.summary.critical_width.brief(',.1f')}" in head
    floor = next(f for f in full.measurement.floors([16]) if f.hook.startswith(hook.hook) or hook.sae in f.hook)
    assert "By the theorem, a student of width 16 keeps" in head
    assert f"{floor.features_kept.value / hook.summary.n_alive.value:.1%}" in head


def head_of(text: str) -> str:
    """The verdict, without markup."""
    return " ".join(re.sub(r"<[^>]+>", "", text.split('<ul class="tiles">')[0].split("<header>")[1]).split())


def test_the_verdict_names_a_width(lone: Measurement, full: Results) -> None:
    hook = lone.hooks[0]
    needs = plan(lone, keep=0.95, max_fvu=None)
    text = report_page(Results(lone))
    assert f"To keep 95% of the features at every hook point, choose width {needs.width}" in head_of(text)
    assert f"<b>{needs.width}</b>" in text
    for target in (0.2, 0.5, 1.0):
        spliced = Results(lone, spliced=full.spliced)
        asked = plan(lone, target_loss=target, max_fvu=None, spliced=full.spliced)
        said = head_of(report_page(spliced, ReportSettings(target_loss=target)))
        assert f"For at most {target:g} nats per token, choose width {asked.deciding.width.brief(',.0f')}" in said
        assert "The teacher itself, with no more features than width" in said
        assert "by the method “splice of second_moment, compressed_sensing” at" in said
        record = record_of("splice", "second_moment", "compressed_sensing")
        assert record is not None
        assert f"Where such forecasts were checked, {record.sentence()}" in said
    said = head_of(report_page(Results(lone, spliced=full.spliced), ReportSettings(target_loss=1e-9)))
    assert "No width can be named: no width is known to reach 1e-09 nats per token" in said
    assert hook.hook in said


@pytest.mark.slow
def test_the_verdict_holds_students_against_the_prediction(full: Results) -> None:
    assert full.run is not None
    assert full.spliced is not None
    reached = {f.width: f for f in observed_floors(full.run) if f.start == "random"}
    floor, row = reached[16], next(row for row in RECOVERABILITY if row["width"] == 16)
    target = round((reached[8].last_tenth + reached[12].last_tenth) / 2, 3)
    text = report_page(full, ReportSettings(target_loss=target))
    said = head_of(text)
    assert f"A student of width 16 lost {floor.taken_as('last_tenth').brief('.3g')} nats per token" in said
    assert f"choose width {plan_of(full, target)}" in said
    assert "as the students here show" in said
    tiles = re.sub(r"<[^>]+>", " ", text.split('<ul class="tiles">')[1].split("</ul>")[0])
    assert f"{floor.last_tenth:.3g}" in tiles
    if full.measurement.hooks[1].hook == HOOK:
        assert f"readouts find {row['kept']}" in said
    there = report_page(full, ReportSettings(hook=HOOK))
    assert f"readouts find {row['kept']} [{2 * 16 - 1}, {2 * 16 + 1}] of 64 features in it" in head_of(there)
    assert "16 with random weights, 60 in the teacher itself" in head_of(there)
    assert re.search(rf"<b>{row['kept']}</b><small>random weights 16, teacher 60</small>", there)


def plan_of(results: Results, target: float) -> str:
    made = plan(results.measurement, target_loss=target, max_fvu=None, spliced=results.spliced, students=results.run)
    assert made.decides is not None
    assert made.decides.corrected is not None
    assert 8 < made.decides.corrected.value <= 12
    return made.decides.corrected.brief(",.0f")


def test_what_is_missing_says_how_to_get_it(lone: Measurement) -> None:
    text = report_page(Results(lone, "runs/some folder"))
    blocks = re.findall(r"<pre><code>(.*?)</code></pre>", text, re.DOTALL)
    commands = [line.replace("&#39;", "'") for block in blocks for line in block.splitlines()]
    assert len(commands) >= 7
    assert len(re.findall(r'<(?:div|details) class="missing">\s*<(?:p|summary)>', text)) == len(ORDER) - 5
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "tl-capacity"
        parse(arguments)
    runs = {arguments[2]: arguments[3:] for arguments in map(shlex.split, commands) if arguments[1] == "run"}
    hook = lone.hooks[0].hook
    expected = [
        "--model",
        lone.provenance.model,
        "--model",
        "runs/students",
        "--hook",
        hook,
        "--measurement",
        "runs/some folder",
        "--out",
        "runs/probes",
    ]
    assert runs["probe"] == expected
    assert runs["recover"] == ["runs/some folder", "runs/students", "--hook", hook, "--out", "runs/recover"]


def test_no_snippets_says_so(lone: Measurement, tmp_path: Path, cli: Cli) -> None:
    moved = Results(replace(lone, provenance=replace(lone.provenance, model="no-such/model")))
    found, note = find_snippets(moved, ReportSettings())
    assert not found
    assert "--model" in note
    with pytest.raises(CapacityError, match="cannot be loaded"):
        find_snippets(moved, ReportSettings(), model="no-such/model")
    code, out, _ = cli(
        "report", lone.save(tmp_path / "measurement"), "--no-snippets", "-o", tmp_path / "deep" / "report.html"
    )
    assert (code, "left out with --no-snippets" in out) == (0, True)
    assert "left out with --no-snippets" in (tmp_path / "deep" / "report.html").read_text()


# Figures


@pytest.fixture(scope="module")
def decomposition(full: Results) -> Decomposition:
    assert full.run is not None
    return decompose(full.measurement, full.run, max_fvu=None)


def all_figures(full: Results, decomposition: Decomposition) -> dict[str, Any]:
    m, run = full.measurement, distilled(full.measurement.provenance.model, widths=(4, 8))
    rows = [{"series": "a", "width": w, "value": 0.1 * w, "low": None, "high": None, "baseline": False} for w in WIDTHS]
    return {
        "importance": m.plot_importance(WIDTHS),
        "floors": m.budget(WIDTHS).plot(),
        "rates": drawn.firing_rate_figure(m),
        "suite": drawn.suite_figure(m),
        "observed": run.plot_floors(),
        "decomposed": decomposition.plot(),
        "curves": run.plot(),
        "series": drawn.series_figure(rows, "score"),
    }


def test_every_axis_has_a_title_and_every_colour_is_of_the_palette(full: Results, decomposition: Decomposition) -> None:
    for name, figure in all_figures(full, decomposition).items():
        assert figure.layout.xaxis.title.text, name
        assert figure.layout.yaxis.title.text, name
        for trace in figure.data:
            colour = trace.line.color or trace.marker.color
            assert colour is None or colour in (*COLOURS, kit.GREY), name


def test_the_importance_curve_is_the_sorted_importance(measurement: Measurement) -> None:
    figure = measurement.plot_importance(WIDTHS)
    lines = [trace for trace in figure.data if trace.mode == "lines" and trace.fill is None]
    markers = [trace for trace in figure.data if trace.mode == "markers"]
    for hook, line, marks in zip(measurement, lines, markers, strict=True):
        values = np.sort(hook.importance())[::-1]
        np.testing.assert_array_equal(np.asarray(line.y), values[np.asarray(line.x) - 1])
        kept = theory.kept_features(np.array(WIDTHS), hook.summary.alpha.value, len(values))
        np.testing.assert_array_equal(marks.x, [k for k in kept if k < len(values)])


def test_floors_and_their_intervals_are_drawn(measurement: Measurement) -> None:
    budget = measurement.budget(WIDTHS)
    for trace, hook in zip(budget.plot().data, dict.fromkeys(f.hook for f in budget.floors), strict=True):
        mine = [f for f in budget.floors if f.hook == hook and f.predicted_floor.value > 0]
        assert list(trace.x) == [f.width for f in mine]
        assert list(trace.y) == [f.predicted_floor.value for f in mine]
        assert list(trace.error_y.array) == pytest.approx(
            [(f.predicted_floor.high or 0) - f.predicted_floor.value for f in mine]
        )
        assert list(trace.error_y.arrayminus) == pytest.approx(
            [f.predicted_floor.value - (f.predicted_floor.low or 0) for f in mine]
        )
    with pytest.raises(CapacityError, match="ask for widths"):
        measurement.budget().plot()


def test_every_firing_latent_is_in_the_histogram(measurement: Measurement) -> None:
    figure = drawn.firing_rate_figure(measurement)
    for trace, hook in zip(figure.data, measurement, strict=True):
        assert sum(trace.y) == int((hook.summary.firing_rates > 0).sum())


def test_a_short_axis_is_linear(measurement: Measurement) -> None:
    """Within half a decade the labels of a logarithmic axis overlap."""
    floors = [replace(f, predicted_floor=Estimate(f.width / 4)) for f in measurement.floors(WIDTHS)]
    assert drawn.floors_figure(floors).layout.yaxis.type == "log"
    short = [f for f in floors if f.width in (8, 12, 16)]
    assert short
    assert drawn.floors_figure(short).layout.yaxis.type is None


def test_seeds_of_a_width_are_not_joined() -> None:
    rows = [
        {"series": "a", "width": w, "value": v, "low": v - 1, "high": v + 1} for w, v in ((8, 1.0), (8, 3.0), (16, 4.0))
    ]
    line, seeds = drawn.series_figure(rows, "score").data
    assert (list(line.x), list(line.y), line.showlegend) == ([8, 16], [2.0, 4.0], None)
    assert (list(seeds.x), list(seeds.y), seeds.mode, seeds.marker.symbol) == (
        [8, 8],
        [1.0, 3.0],
        "markers",
        "circle-open",
    )
    assert list(line.error_y.array) == [0, 1]
    (alike,) = drawn.series_figure([rows[0]] * 2, "score").data
    assert list(alike.x) == [8]


def test_the_width_of_a_hook_point_is_labelled_where_curves_are_not(measurement: Measurement) -> None:
    labels = [
        note for note in drawn.suite_figure(measurement).layout.annotations if "width of the hook point" in note.text
    ]
    assert {note.xanchor for note in labels} == {"left"}


def test_curves_end_where_they_are_fitted_to(full: Results, decomposition: Decomposition) -> None:
    assert full.run is not None
    figure, floors = drawn.curves_figure(full.run, decomposition.observed), {f.name: f for f in decomposition.observed}
    for student in full.run:
        mine = [
            t
            for t in figure.data
            if t.legendgroup == f"width {student.width}{' (control)' if student.start == 'teacher' else ''}"
        ]
        assert list(mine[0].y) == list(student.heldout_kl[1:])
        if student.start == "teacher":
            assert len(mine) == 1
        else:
            assert set(mine[-1].y) == {floors[student.name].value}


def test_students_of_one_width_share_a_colour_and_a_name(full: Results, decomposition: Decomposition) -> None:
    assert full.run is not None
    again = replace(full.run.students[0], seed=1, name="width4-seed1")
    figure = drawn.curves_figure(replace(full.run, students=(*full.run.students, again)), decomposition.observed)
    mine = [trace for trace in figure.data if trace.legendgroup == "width 4"]
    assert len({trace.line.color for trace in mine}) == 1
    assert [trace.name for trace in mine if trace.showlegend] == ["width 4, 2 seeds"]
    assert sum(bool(trace.showlegend) for trace in figure.data) == len(WIDTHS) + 1


def test_the_suite_lies_on_its_formula(measurement: Measurement) -> None:
    figure = drawn.suite_figure(measurement)
    points = [(x, y) for trace in figure.data if trace.mode == "markers" for x, y in zip(trace.x, trace.y, strict=True)]
    expected = [
        (h.summary.l0.value, h.summary.l0.value * np.log(h.summary.n_alive.value / h.summary.l0.value))
        for h in measurement
    ]
    np.testing.assert_allclose(sorted(points), sorted(expected))


@given(st.integers(1, 100_000), st.integers(2, 300))
@settings(max_examples=50, deadline=None)
def test_thinning_keeps_both_ends(n: int, points: int) -> None:
    ranks = kit.decimated(n, points)
    assert (ranks[0], ranks[-1]) == (1, n)
    assert len(ranks) <= max(points, 1)
    assert (np.diff(ranks) > 0).all()


@given(st.text(max_size=300), st.integers(5, 60))
@settings(max_examples=50, deadline=None)
def test_long_names_keep_their_ends(name: str, longest: int) -> None:
    short = kit.shortened(name, longest)
    assert len(short) <= max(longest, len(name) if len(name) <= longest else longest)
    assert name == short or (name.startswith(short.split("…")[0]) and name.endswith(short.rsplit("…", 1)[-1]))


@pytest.mark.parametrize(("value", "text"), [(1e-5, "10⁻⁵"), (100.0, "10²"), (0.0, "0"), (1.0, "1"), (3e-4, "0.0003")])
def test_powers_of_ten(value: float, text: str) -> None:
    assert kit.power_of_ten(value) == text


# Features and their text


def test_edges_are_the_two_sides_of_the_budget(measurement: Measurement) -> None:
    hook, law = measurement.hooks[1], plugins().capacity_laws["compressed_sensing"]
    importance = dict(zip(np.flatnonzero(hook.summary.alive).tolist(), hook.importance(), strict=True))
    for edge in edges(hook, (1, *WIDTHS, 1_000), "second_moment", law, shown=5):
        assert edge.n_kept == theory.kept_features(edge.width, hook.summary.alpha.value, len(importance))
        assert edge.n_kept + edge.n_lost == len(importance)
        order = sorted(importance, key=lambda latent: -importance[latent])
        assert list(edge.kept) == order[max(0, edge.n_kept - 5) : edge.n_kept]
        assert list(edge.lost) == order[edge.n_kept : edge.n_kept + 5]


def test_a_rank_is_as_uncertain_as_the_documents(measurement: Measurement) -> None:
    hook = measurement.hooks[1]
    importance = dict(zip(np.flatnonzero(hook.summary.alive).tolist(), hook.importance(), strict=True))
    for latent, feature in shown_features(hook, list(importance), "second_moment").items():
        assert feature.rank.value == 1 + sum(other > importance[latent] for other in importance.values())
        assert 1 <= (feature.rank.low or 0) <= feature.rank.value <= (feature.rank.high or 0)
    alike = measurement_of_counts(np.arange(64, 0, -1) * 64).hooks[0]  # every document group is the same
    ranks = [feature.rank for feature in shown_features(alike, range(64), "second_moment").values()]
    assert all(rank.low == rank.value == rank.high for rank in ranks)


def test_snippets_are_where_a_dense_computation_finds_them(folder: Path, measurement: Measurement) -> None:
    loaded = load_model(str(folder / "model"))
    stream = stream_of(measurement, loaded.tokenizer)
    place, hook = 1, measurement.hooks[1]
    latents = hook.ranked("second_moment")[::7].tolist()
    found = top_snippets(loaded, measurement, {place: latents}, stream, 700, progress=False)
    _, sae = load_sae(hook.sae)
    best: dict[int, list[tuple[float, int]]] = {latent: [] for latent in latents}
    counted_tokens = 0
    for batch in stream:
        counted = (batch.tokens > 1) & (batch.tokens != -1)  # neither special nor padding
        seen: list[torch.Tensor] = []
        remove = find_tap_point(loaded.model, hook.hook).watch(seen.append)
        with torch.no_grad():
            loaded.model(torch.from_numpy(np.maximum(batch.tokens, 0)))
            latent_values = sae.encode(seen[0]).abs().numpy(force=True) * counted[:, :, None]
        remove()
        for row in range(len(batch.tokens)):
            for latent in latents:
                if latent_values[row, :, latent].max() > 0:
                    best[latent].append((float(latent_values[row, :, latent].max()), int(batch.documents[row])))
        counted_tokens += int(counted.sum())
        if counted_tokens >= 700:
            break
    for latent in latents:
        expected = sorted(best[latent], reverse=True)[:4]
        got = found[place, latent]
        np.testing.assert_allclose([s.strength for s in got], [strength for strength, _ in expected], rtol=1e-4)
        for s in got:  # rows that begin alike are equally strong, so any of them will do
            assert any(
                document == s.document and strength == pytest.approx(s.strength, rel=1e-4)
                for strength, document in best[latent]
            )
        for snippet in got:
            assert max(share for _, share in snippet.pieces) == 1.0
            assert 0 < len(snippet.pieces) <= 22


def test_the_texts_of_tokens_are_the_text(folder: Path) -> None:
    tokenizer = load_model(str(folder / "model")).tokenizer
    assert "".join(token_texts(tokenizer, [2, 5, 3, 9])) == tokenizer.decode([2, 5, 3, 9])
    assert token_texts(tokenizer, []) == []


def test_a_character_of_several_tokens_comes_with_the_last() -> None:
    tokenizer = bytes_tokenizer()
    ids = tokenizer("aé€ 🙂b")["input_ids"]
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert texts == ["a", "", "é", "", "", "€", " ", "", "", "", "🙂", "b"]


def test_a_piece_of_a_character_is_shown_as_the_whole() -> None:
    assert whole_characters(["a", "", "", "€", "b"], [0.0, 1.0, 0.5, 0.0, 0.0]) == (("a", 0.0), ("€", 1.0), ("b", 0.0))
    assert whole_characters(["\ufffd a", " b", "\ufffd"], [0.2, 1.0, 0.0]) == ((" a", 0.2), (" b", 1.0))
    assert whole_characters(["a", "\ufffd"], [0.0, 1.0]) == (("a", 0.0), ("\ufffd", 1.0))
    assert whole_characters(["a", ""], [0.5, 1.0]) == (("a", 1.0),)
    assert whole_characters(["", ""], [0.5, 1.0]) == (("", 1.0),)
    assert whole_characters([], []) == ()


@given(st.text("aé€🙂 ", min_size=1, max_size=12), st.data())
@settings(max_examples=30, deadline=None)
def test_a_marked_piece_is_a_character_of_the_text(text: str, data: Any) -> None:
    """Whichever byte of a character is the most active one, the character is marked, and the text stays what it is."""
    tokenizer = bytes_tokenizer()
    ids = tokenizer(text)["input_ids"]
    peak = data.draw(st.integers(0, len(ids) - 1))
    pieces = whole_characters(token_texts(tokenizer, ids), [float(place == peak) for place in range(len(ids))])
    assert "".join(piece for piece, _ in pieces) == text
    (marked,) = [piece for piece, share in pieces if share == 1]
    ends = np.cumsum([len(letter.encode()) for letter in text])
    assert marked == text[int(np.searchsorted(ends, peak, side="right"))]


@cache
def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """Of which each token is a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    whole = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    whole.pre_tokenizer, whole.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=whole)


def test_another_model_or_sae_is_refused(setup: Path, folder: Path, measurement: Measurement) -> None:
    loaded = load_model(str(folder / "model"))
    stream = stream_of(measurement, loaded.tokenizer)
    other = replace(measurement, provenance=replace(measurement.provenance, revision="0" * 40))
    with pytest.raises(MeasurementError, match="no longer the model"):
        top_snippets(loaded, other, {0: [1]}, stream, 100)
    hook = replace(measurement.hooks[0], sae=measurement.hooks[2].sae)
    with pytest.raises(DictionaryError, match="other weights"):
        top_snippets(loaded, replace(measurement, hooks=(hook,)), {0: [1]}, stream, 100)


# What is given


def test_results_are_found_wherever_they_are(folder: Path, full: Results, tmp_path: Path) -> None:
    assert full.run is not None
    full.run.save(tmp_path / "out" / "distillation")
    shutil.copytree(folder / "measurement", tmp_path / "out" / "measurement")
    (tmp_path / "out" / "probes.json").write_text(json.dumps(PROBES))
    (tmp_path / "recoverability.json").write_text(json.dumps(RECOVERABILITY))
    found = Results.load([tmp_path / "recoverability.json", tmp_path / "out"])
    assert found.run is not None
    assert found.run.widths == WIDTHS
    assert (found.probes, found.recoverability) == (PROBES, RECOVERABILITY)
    assert found.folder == str(tmp_path / "out" / "measurement")


def test_what_cannot_be_shown_is_refused(folder: Path, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "measurement.json").write_text("{")
    twice = [tmp_path / name for name in ("one", "two")]
    for path in twice:
        path.mkdir()
        (path / "probes.json").write_text(json.dumps(PROBES))
    (tmp_path / "bad" / "probes.json").write_text("{")
    for arguments, says in (
        ([tmp_path / "nowhere"], "holds no result"),
        ([tmp_path / "bad" / "probes.json"], "there is no measurement"),
        ([folder / "measurement", *twice], "are both given"),
        ([folder / "measurement", tmp_path / "bad"], "cannot be read"),
        ([folder / "measurement", "--widths", "0"], "below 1"),
        ([folder / "measurement", "--target-loss", "-1"], "is not a loss"),
        ([folder / "measurement", "--target-loss", "nan"], "is not a loss"),
        ([folder / "measurement", tmp_path / "damaged"], "is truncated, altered"),
        ([folder / "measurement", "--hook", "blocks.9.hook_resid_post"], "was not measured"),
        ([folder / "measurement", "--importance", "gradient"], "measure again with --importance gradient"),
        ([folder / "measurement", "--law", "laws"], "there is no capacity law"),
        ([folder / "measurement", "--snippet-tokens", "0"], "tokens show no feature"),
        (
            [folder / "measurement", "--observed", "bogus"],
            "'bogus' is not a way to read the observed floor: choose one of fit, last_tenth",
        ),
        (
            [folder / "measurement", "--observed", "bogus", "--no-snippets"],
            "'bogus' is not a way to read the observed floor",
        ),
    ):
        code, out, err = cli("report", *arguments, "-o", tmp_path / "report.html")
        assert (code, out, err.count("\n")) == (2, "", 1), arguments
        assert says in err
        assert not (tmp_path / "report.html").exists()


@pytest.mark.slow
def test_two_measurements_stand_side_by_side(
    folder: Path, lone: Measurement, tmp_path: Path, cli: Cli, browser: Any
) -> None:
    twice = replace(lone.hooks[0].summary, arrays=dict(lone.hooks[0].summary.arrays))
    wider = replace(lone.hooks[0], width=2 * lone.hooks[0].width, summary=twice, hook="blocks.7.hook_resid_post")
    other = Measurement((lone.hooks[0], wider), replace(lone.provenance, model="an <i>other</i>")).save(tmp_path / "b")
    out = tmp_path / "report.html"
    code, _, err = cli("report", folder / "measurement", other, "--no-snippets", "-o", out)
    assert code == 0, err
    text = out.read_text(encoding="utf-8")
    section = text.partition('<section id="beside">')[2].partition("</section>")[0]
    assert "an &lt;i&gt;other&lt;/i&gt;" in section
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", section)[1:]]
    everything = [*Measurement.load(folder / "measurement"), lone.hooks[0], wider]
    assert len(rows) == len(everything)
    for hook in everything:
        share = hook.summary.critical_width.value / hook.width
        layer = f"layer {hook.hook.split('.')[1]}<"
        mine = [row for row in rows if row[0].startswith(layer) and row[2] == f"{hook.width:,}"]
        assert any(row[-1].startswith(f"{100 * share:.3g}"[:4]) for row in mine), (share, mine)
    assert f"{hook.summary.critical_width.value:,.1f}" in head_of(text)
    assert "so d* is compared as a share of them" in section
    drawn_series = json.loads(text.split('id="figure-data">')[1].split("</script>")[0])["beside"]["data"]
    assert [trace["x"] for trace in drawn_series] == [[0, 1], [0, 7]]
    assert [entry for entry in opened(browser, out).get_log("browser") if entry["level"] != "INFO"] == []
    same = Results.load([folder / "measurement", other, other / "measurement.json"])
    assert list(same.beside) == [str(other)]


def test_no_alive_feature_is_said_so() -> None:
    text = report_page(Results(measurement_of_counts(np.zeros(32, dtype=np.int64))))
    assert "0 alive features at L0 = 0.00" in text
    assert "undefined" in text
    assert "enough alive features to rank" in text
    assert "No latent fired on the text that was read" in text
    assert 'data-figure="firing-rates"' not in text


def test_a_layer_without_alive_features_does_not_hide_the_others() -> None:
    counts = (np.arange(1, 65) * 64)[::-1].copy()
    text = report_page(
        Results(measurement_of_counts(counts, np.zeros(64, dtype=np.int64), counts)),
        ReportSettings(hook="blocks.0.hook_resid_post"),
    )
    features = json.loads(text.split('id="feature-data">')[1].split("</script>")[0])
    assert [hook["name"] for hook in features["hooks"]] == ["layer 0", "layer 2"]
    assert "Layer 0 (blocks.0.hook_resid_post)" in text


def test_one_width_is_enough(lone: Measurement) -> None:
    run = distilled(lone.provenance.model, widths=(8,))
    text = report_page(Results(lone, run=run))
    assert "1 width is too few to say which law holds" in text
    assert report_widths(Results(lone, run=run), ReportSettings()) == (8,)
    found = decompose(lone, run, max_fvu=None)
    lines = [trace for trace in found.plot().data if trace.line.color and trace.mode != "markers"]
    assert [(list(trace.x), trace.mode) for trace in lines] == [([8], "lines+markers")] * len(lines)
    assert len(lines) == 1  # nothing is ranked, so it is the prediction asked for


def test_an_unfinished_or_unevaluated_distillation_is_said_so(lone: Measurement) -> None:
    unfinished = replace(distilled(lone.provenance.model, widths=(8,)), complete=False)
    assert "the distillation has not ended" in report_page(Results(lone, run=unfinished))
    started = distilled(lone.provenance.model)
    started = replace(
        started,
        complete=False,
        students=tuple(replace(s, tokens=(0,), heldout_kl=(3.0,), train_loss=()) for s in started),
    )
    assert "No student was evaluated" in report_page(Results(lone, run=started))


def test_very_long_and_odd_names() -> None:
    name = "blocks." + "x" * 3_000 + "<script>alert(1)</script>\ud800\x00"
    text = report_page(
        Results(measurement_of_counts(np.arange(64, 0, -1) * 64, hook=name.replace("{", "").replace("}", "")))
    )
    text.encode("utf-8")
    before_scripts = text[: text.index('id="figure-data"')]
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert" in before_scripts
    data = json.loads(text.split('id="figure-data">')[1].split("</script>")[0])
    names = [trace["name"] for figure in data.values() for trace in figure["data"] if trace.get("name")]
    assert max(map(len, names)) < 200


def test_nan_and_nonsense_in_probes_and_recoverability() -> None:
    nan = float("nan")
    rows = Probes.from_json(
        {"probes": [{"width": 8, "accuracy": nan}, {"width": 16, "accuracy": 0.7, "low": nan}, {"no": "width"}, None]}
    ).rows
    assert [(r.width, r.accuracy.value, r.accuracy.low) for r in rows] == [(16, 0.7, None)]
    row = Recoverability.from_json([{**RECOVERABILITY[0], "kept_random": nan, "tau": None}]).rows[0]
    assert set(row.counts) == {"kept", "kept_teacher"}
    assert set(row.budgets) == {"compressed_sensing"}
    assert (row.counts["kept"].low, row.counts["kept"].high) == (7, 9)
    for content in (
        [],
        {},
        "text",
        None,
        [None],
        [{"width": 8}],
        [{"width": "8", "kept": 1}],
        [{"width": 8, "kept": nan}],
    ):
        with pytest.raises(MeasurementError):
            Recoverability.from_json(content)
    with pytest.raises(MeasurementError):
        Probes.from_json({"probes": [{"width": 8, "accuracy": nan}]})
    text = report_page(Results(measurement_of_counts(np.arange(64, 0, -1) * 64), probes={"rows": []}, recoverability=7))
    assert "has no accuracy at any width" in text
    assert "is not a list of students" in text


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"width": 0}, "has the width 0, which is not a whole number of dimensions"),
        ({"width": -8}, "has the width -8"),
        ({"width": 8.5}, "has the width 8.5"),
        ({"width": True}, "has the width True"),
        ({"width": [8]}, r"has the width \[8\]"),
        ({"low": 1e308}, r"has the number 1e\+308, which cannot be a result"),
        ({"high": 10**400}, r"has the number 10{19}…, which cannot be a result"),
        ({"width": 10**400}, "of dimensions|cannot be a result"),
    ],
)
def test_altered_rows_are_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(MeasurementError, match=rf"^probes\.json {says}" if "|" not in says else says):
        Probes.from_json({"probes": [{"width": 8, "accuracy": 0.7, **change}]})
    changed = (
        {"kept": change["low"]}
        if "low" in change
        else {"by_tau": {"0.80": {"student": change["high"]}}}
        if "high" in change
        else change
    )
    with pytest.raises(MeasurementError, match=rf"^recoverability\.json {says}" if "|" not in says else says):
        Recoverability.from_json([{**RECOVERABILITY[0], **changed}])


def test_files_of_another_kind_or_version_are_refused() -> None:
    with pytest.raises(MeasurementError, match=r"recoverability\.json is not a list of students"):
        Recoverability.from_json(RECOVERABILITY[0])
    with pytest.raises(
        MeasurementError, match=r"recoverability\.json has schema 2, and this version reads up to 1: upgrade"
    ):
        Recoverability.from_json([{"schema": 2, "found": []}])
    with pytest.raises(MeasurementError, match=r"probes\.json has schema 9, and this version reads up to 1: upgrade"):
        Probes.from_json({"schema": 9})
    with pytest.raises(MeasurementError, match="has no accuracy at any width"):
        Probes.from_json({"probes": {"width": 8, "accuracy": 0.7}})
    (row,) = Recoverability.from_json(
        [{**RECOVERABILITY[0], "overlap": [], "readouts": 3, "by_tau": {"x": 3, "0.80": {"student": "many"}}}]
    ).rows
    assert (row.overlap, row.by_tau) == ({}, {0.8: {}})
    text = report_page(
        Results(
            measurement_of_counts(np.arange(64, 0, -1) * 64),
            probes={"schema": 9},
            recoverability=[{**RECOVERABILITY[0], "width": -1}],
        )
    )
    assert "Probes.json has schema 9" in text or "probes.json has schema 9" in text
    assert "has the width -1, which is not a whole number of dimensions" in text


@pytest.mark.slow
def test_probes_and_recoverability_show_floor_and_ceiling(full: Results) -> None:
    text = report_page(full)
    sections = dict(re.findall(r'<section id="([^"]+)">(.*?)</section>', text, re.DOTALL))
    probes = re.sub(r"<[^>]+>", "|", sections["probes"])
    assert "AUROC" in probes
    assert re.search(r"0\.590\|+\[0\.520, 0\.630\]", probes)  # of the narrowest student
    assert "control task" in probes
    kept = re.sub(r"<[^>]+>", "|", sections["recoverability"])
    assert re.search(r"60%\|+25% by chance", kept)
    assert re.search(r"0\.31\|+random weights 0\.07, teacher 0\.93", kept)
    data = json.loads(text.split('id="figure-data">')[1].split("</script>")[0])
    by_tau = {trace["name"]: trace for trace in data["thresholds-0"]["data"]}
    assert list(by_tau) == [*(f"width {w}" for w in WIDTHS), "the teacher", "random weights, width 24"]
    assert (by_tau["width 8"]["x"], by_tau["width 8"]["y"]) == ([0.8, 0.85, 0.9], pytest.approx([-56, -61, -66]))
    assert [trace["name"] for trace in data["probes-0"]["data"]] == ["trained", "random weights", "control task"]


@pytest.mark.slow
def test_a_large_page_stays_below_six_megabytes(tmp_path: Path, browser: Any, unchecked: None) -> None:
    counts = (2e6 / np.arange(1, 32_769) ** 1.1 / 64 + 1).astype(np.int64) * 64
    found = measurement_of_counts(counts, counts, counts, tokens=20_000_000)
    path = write_report(tmp_path / "large.html", Results(found), ReportSettings(widths=(2, 3, 4, 6, 8, 12, 16)))
    assert path.stat().st_size < 6e6
    assert opened(browser, path).get_log("browser") == []


# Neuronpedia


def test_features_link_to_the_page_that_saelens_opens(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sae_lens.analysis.neuronpedia_integration import open_neuronpedia_feature_dashboard

    loaded = load_model(str(folder / "model"))
    _, sae = load_sae(str(Measurement.load(folder / "measurement").hooks[1].sae))
    opened_pages: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened_pages.append)
    for name in ("gpt2-small/8-res-jb", None):
        sae.cfg.metadata.neuronpedia_id = name
        with add_capacity_hooks(loaded.model, {HOOK: sae}) as capacity:
            capacity.run([torch.arange(2, 20)[None]], progress=False)
        measured = Measurement.load(capacity.measurement().save(tmp_path / str(bool(name)))).hooks[0]
        assert measured.neuronpedia_id == name
        open_neuronpedia_feature_dashboard(sae, 650)
        assert opened_pages == ([measured.feature_pages + "650"] if name else opened_pages)
    odd = replace(measured, neuronpedia_id='a b/"><script>?#')
    assert odd.feature_pages == "https://neuronpedia.org/a%20b/%22%3E%3Cscript%3E%3F%23/"
    text = report_page(Results(Measurement((odd,))))
    assert (
        json.loads(text.split('id="feature-data">')[1].split("</script>")[0])["hooks"][0]["pages"] == odd.feature_pages
    )


def test_an_interval_that_rounds_to_the_figure_is_not_printed(measurement: Measurement) -> None:
    assert Estimate(24.0, 23.999, 24.001).brief(".2f") == "24.00"
    assert Estimate(24.0, 23.99, 24.001).brief(".2f") == "24.00 [23.99, 24.00]"
    assert Estimate(24.0).brief(".2f") == "24.00"
    alike = measurement_of_counts(np.arange(64, 0, -1) * 64)  # every document group is the same
    text = report_page(Results(alike))
    assert not re.search(r"(\d[\d,.]*)</?[^>]*>\[\1, \1\]", text[: text.index('id="figure-data"')])


# In a notebook


def test_results_show_themselves_in_a_notebook(full: Results, decomposition: Decomposition) -> None:
    assert full.run is not None
    found = decomposition
    for shown in (full.measurement, full.measurement.budget(WIDTHS), full.run):
        assert shown._repr_html_().startswith("<table>")
    assert found._repr_html_().startswith("<p>by the mean of the last tenth, candidates that")
    frame = full.run.to_frame()
    assert len(frame) == sum(len(s.tokens) for s in full.run)
    assert set(frame.width) == {*WIDTHS, 32}
    candidates = found.to_frame()
    assert list(candidates.name) == [f.candidate.name for f in found.fits]
    first = found.fits[0]
    assert candidates.B[0] == first.b.value
    assert candidates["B low"][0] == first.b.low


def test_shown_latents_are_those_of_the_edges(full: Results) -> None:
    shown = shown_latents(full.measurement, ReportSettings(), WIDTHS)
    law = plugins().capacity_laws["compressed_sensing"]
    for place, hook in enumerate(full.measurement):
        assert set(shown[place]) == {
            latent for e in edges(hook, WIDTHS, "second_moment", law) for latent in (*e.kept, *e.lost)
        }
