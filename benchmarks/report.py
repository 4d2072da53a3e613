"""How large a report is, how long writing it takes, and how soon it answers, in headless Chromium.

python benchmarks/report.py: the embedded teacher at three hook points, each with a random TopK SAE of 32,768 latents of
which 24 are active; measured and searched for examples on 20,000 tokens; six widths with three students each, whose
curves are power laws, and probes of 13 concepts. It has answered when a moved slider's list is painted.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from common import Sitting, arguments, at_most, fact, row

sys.path.append(str(Path(__file__).parent.parent / "tests"))
from chromium import BROWSER, DRIVER, MISSING, opened, started

from tl_capacity.distillation.curves import StudentCurve
from tl_capacity.distillation.run import DistillationRun
from tl_capacity.measure.job import measure
from tl_capacity.measure.settings import MeasureSettings
from tl_capacity.measurement.measurement import Measurement
from tl_capacity.models.loading import load_model
from tl_capacity.report import ReportSettings, Results, find_snippets, write_report

LATENTS, ACTIVE, WIDTHS, SEEDS, EVALUATIONS = 32_768, 24, (8, 16, 24, 32, 64, 96), 3, 40
ANSWERED = """
addEventListener("DOMContentLoaded", () => new MutationObserver(() => { window.drawn = performance.now(); })
  .observe(document.documentElement, {attributeFilter: ["data-ready"]}));
addEventListener("DOMContentLoaded", () => setTimeout(() => {
  const slider = document.getElementById("width"), before = document.getElementById("lost").textContent;
  slider.value = 0;
  slider.dispatchEvent(new Event("input"));
  if (document.getElementById("lost").textContent === before) throw new Error("the list did not change");
  requestAnimationFrame(() => setTimeout(() => { window.answered = performance.now(); }, 0));
}, 0));
"""
"""Moves the slider as soon as a reader could. Notes when the list below has been painted, and when the last figure has
been drawn.
"""


def saes(folder: Path) -> tuple[str, ...]:
    """Random SAEs on disk, as `HOOK=FOLDER`."""
    import torch
    from sae_lens import TopKSAE, TopKSAEConfig

    teacher, specs = load_model("embedded").named, []
    assert teacher is not None
    for place, hook in enumerate(teacher.saes):
        sae = TopKSAE(TopKSAEConfig(d_in=128, d_sae=LATENTS, k=ACTIVE))
        decoder = torch.randn(LATENTS, 128, generator=torch.Generator().manual_seed(place))
        sae.W_dec.data = decoder / decoder.norm(dim=1, keepdim=True)
        sae.W_enc.data = sae.W_dec.data.T.contiguous()
        sae.save_model(folder / str(place))
        specs.append(f"{hook}={folder / str(place)}")
    return tuple(specs)


def students() -> DistillationRun:
    tokens = np.arange(EVALUATIONS + 1) * 100_000

    def curve(width: int, seed: int) -> StudentCurve:
        losses = 4 / width + np.concatenate([[2.0], np.linspace(0, 1, EVALUATIONS + 1)[1:] ** -0.7]) / 2
        noisy = losses + np.random.default_rng((width, seed)).normal(0, 0.003, len(losses))
        return StudentCurve(
            f"width{width}-seed{seed}",
            width,
            seed,
            "random",
            9_000 * width,
            2_000 * width,
            tuple(tokens.tolist()),
            tuple(noisy.tolist()),
            (1.0,) * EVALUATIONS,
        )

    return DistillationRun(
        tuple(curve(w, s) for w in WIDTHS for s in range(SEEDS)), "embedded", 128, source="text", heldout_tokens=20_000
    )


def probes() -> dict[str, Any]:
    kinds = (("trained", 0.5), ("random weights", 0.3), ("teacher's principal components", 0.4))
    return {
        "probes": [
            {
                "concept": f"concept {n}",
                "kind": kind,
                "baseline": height < 0.5,
                "width": w,
                "accuracy": a,
                "low": a - 0.05,
                "high": a + 0.05,
                "majority": 0.5,
            }
            for n in range(13)
            for kind, height in kinds
            for w in WIDTHS
            for _ in range(SEEDS)
            for a in [0.5 + height * (1 - 4 / w)]
        ]
    }


def page(folder: Path, tokens: int, writes: int) -> tuple[Path, dict[str, list[float]]]:
    """A report, and how many seconds it took to measure, to find examples, and to write it each of several times."""
    seconds: dict[str, list[float]] = {}

    @contextmanager
    def timed(what: str) -> Iterator[None]:
        started_at = time.perf_counter()
        yield
        seconds.setdefault(what, []).append(time.perf_counter() - started_at)

    with timed("measuring"):
        measure(
            MeasureSettings(
                "embedded",
                folder / "measurement",
                saes(folder),
                tokens=tokens,
                source="embedded",
                max_fvu=float("inf"),
                progress=False,
            )
        )
    for number in range(writes):
        # Loaded anew, so that nothing is kept from the one before.
        measurement = Measurement.load(folder / "measurement")
        results, chosen = Results(measurement, "runs/measurement", students(), probes()), ReportSettings()
        if not number:
            with timed("looking for examples"):
                snippets, why_none = find_snippets(results, chosen, tokens=tokens)
            assert not why_none
        with timed("writing the page"):
            path = write_report(folder / "report.html", results, chosen, snippets)
    return path, seconds


def loads(path: Path, repetitions: int) -> dict[str, list[float]]:
    """Seconds from the start of loading. The first load, in a browser that has just started, is not counted."""
    browser = started()
    browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": ANSWERED})
    times: dict[str, list[float]] = {
        "document interactive": [],
        "load event over": [],
        "slider answered": [],
        "all figures drawn": [],
    }
    for repetition in range(repetitions + 1):
        opened(browser, path)
        timing = browser.execute_script(
            "const entry = performance.getEntriesByType('navigation')[0]; return [entry.domInteractive,"
            " entry.loadEventEnd, answered, drawn]"
        )
        if repetition:
            for name, milliseconds in zip(times, timing, strict=True):
                times[name].append(milliseconds / 1000)
    problems = [entry["message"] for entry in browser.get_log("browser") if entry["level"] != "INFO"]
    browser.quit()
    assert not problems, problems
    return times


def benchmark(sitting: Sitting) -> None:
    """Write and open one report."""
    asked = sitting.asked
    with tempfile.TemporaryDirectory() as folder:
        path, seconds = page(Path(folder), asked.tokens, asked.writes)
        size, loading = path.stat().st_size / 1e6, loads(path, asked.loads)
    sitting.rows += [
        fact("size of the page, MB", size, at_most(6)),
        row("seconds to write the page", seconds["writing the page"], at_most(3)),
        row("seconds until the document is interactive", loading["document interactive"], at_most(2)),
        row("seconds until a moved slider is answered", loading["slider answered"], at_most(2)),
    ]
    sitting.seconds |= {name: statistics.median(values) for name, values in (seconds | loading).items()}


def main() -> None:
    asked = arguments(__doc__, 0, tokens=20_000, loads=9, writes=3)
    if BROWSER is None or DRIVER is None:
        raise SystemExit(MISSING)
    with Sitting("report", asked) as sitting:
        benchmark(sitting)


if __name__ == "__main__":
    main()
