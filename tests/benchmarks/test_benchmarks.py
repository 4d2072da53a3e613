"""What the benchmarks share: statistics on planted figures, when timing ends, the page that they write, and that each
runs.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch

ROOT = Path(__file__).parent.parent.parent
sys.path.append(str(ROOT / "benchmarks"))
import common  # noqa: E402
import machine  # noqa: E402
import memory  # noqa: E402
import page  # noqa: E402

NAMES = (
    "measure",
    "distill",
    "keep",
    "importance",
    "probe",
    "report",
    "toy",
    "observe",
    "splice",
    "rest",
    "start",
    "demo",
)


@pytest.fixture(autouse=True)
def as_many_threads_as_before() -> Iterator[None]:
    """A benchmark sets two."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("number", "least"), [(3, 0.93), (5, 0.93), (6, 0.9), (15, 0.9)])
def test_an_interval_covers_the_planted_median(number: int, least: float) -> None:
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        low, high = common.median_interval(list(1.07 * np.exp(random.normal(0, 0.02, number)))) or (0, 0)
        covered += low <= 1.07 <= high
    assert least <= covered / 300 < 1


def test_the_interval_is_that_of_scipys_bootstrap() -> None:
    values = np.random.default_rng(1).lognormal(0, 0.05, 41)
    theirs = scipy.stats.bootstrap(
        (values,), np.median, method="percentile", n_resamples=20_000, rng=np.random.default_rng(2)
    ).confidence_interval
    assert common.median_interval(list(values)) == pytest.approx(tuple(theirs), rel=0.005)


def test_too_few_values_have_no_interval_and_reach_no_goal() -> None:
    few = common.row("ratio", [0.5, 0.5], common.at_most(1))
    assert (few.value, few.low, few.high, few.holds) == (0.5, None, None, False)
    assert few.note == "only 2 of at least 3 turns"


WIDE = [1.00, 1.01, 1.02, 1.03, 1.04, 1.05, 1.06]


def test_a_goal_is_held_against_the_unfavourable_end() -> None:
    row = common.row("ratio", WIDE)
    assert row.value == 1.03
    assert row.low is not None
    assert row.high is not None
    assert row.low < 1.03 < row.high
    assert not common.row("", WIDE, common.at_most(1.04)).holds  # the median is below, the upper end above
    assert common.row("", WIDE, common.at_most(1.03, end=1.06)).holds
    assert not common.row("", WIDE, common.at_most(1.02, end=1.06)).holds
    assert not common.row("", WIDE, common.at_least(1.02)).holds  # the median is above, the lower end below
    assert common.row("", WIDE, common.at_least(1.02, end=1.0)).holds
    assert common.row("", WIDE).holds is None


def test_memory_is_judged_by_the_largest_process() -> None:
    assert not common.spread("", [90, 100, 130], common.at_most(120)).holds
    row = common.spread("", [90, 100, 110], common.at_most(120))
    assert (row.value, row.low, row.high, row.holds) == (100, 90, 110, True)


class Machine:
    """A clock, and candidates that take planted seconds of it."""

    def __init__(self) -> None:
        self.now, self.turns = 0.0, list[str]()

    def __call__(self) -> float:
        return self.now

    def candidate(self, name: str, seconds: Callable[[int], float]) -> Callable[[], None]:
        def turn() -> None:
            self.now += seconds(self.turns.count(name))
            self.turns.append(name)

        return turn


def timed(
    clock: Machine, limit: common.Limit, claims: Sequence[common.Claim], **seconds: Any
) -> dict[str, list[float]]:
    return common.take_turns(
        {name: clock.candidate(name, taken) for name, taken in seconds.items()}, claims, limit, clock, clock
    )


RATIO = common.Claim("a / b", ("a",), ("b",))


def test_timing_ends_as_soon_as_the_interval_is_narrow() -> None:
    """A machine that slows down to half of its speed leaves the ratio of a turn as it is."""
    clock = Machine()
    seconds = timed(clock, common.Limit(1e9), [RATIO], a=lambda turn: 3 + turn / 2, b=lambda turn: 2 + turn / 3)
    assert len(seconds["a"]) == common.ENOUGH
    assert RATIO.ratios(seconds) == pytest.approx([1.5] * common.ENOUGH)
    assert clock.turns == ["a", "b"] + ["a", "b", "b", "a"] * (common.ENOUGH // 2)  # the first is not counted


def test_a_ratio_that_stays_wide_is_timed_until_the_limit() -> None:
    noise = np.random.default_rng(0).lognormal(0, 0.3, 1000)
    seconds = timed(Machine(), common.Limit(100), [RATIO], a=lambda turn: noise[turn], b=lambda _: 1.0)
    assert 30 < len(seconds["a"]) < 60
    assert len(timed(Machine(), common.Limit(1e9, most=20), [RATIO], a=lambda t: noise[t], b=lambda _: 1.0)["a"]) == 20


def test_slow_turns_are_enough_for_an_interval_unless_the_limit_is_hard() -> None:
    slow: dict[str, Any] = {"a": lambda _: 100.0, "b": lambda _: 100.0}
    assert len(timed(Machine(), common.Limit(10), [RATIO], **slow)["a"]) == common.FEWEST
    assert len(timed(Machine(), common.Limit(10, hard=True), [RATIO], **slow)["a"]) == 0


def test_a_settled_candidate_drops_out() -> None:
    noise = np.random.default_rng(0).lognormal(0, 0.3, 1000)
    seconds = timed(
        Machine(),
        common.Limit(1e9, most=30),
        [RATIO, common.Claim("c / b", ("c",), ("b",))],
        a=lambda _: 2.0,
        b=lambda _: 1.0,
        c=lambda turn: noise[turn],
    )
    assert {name: len(values) for name, values in seconds.items()} == {"a": common.ENOUGH, "b": 30, "c": 30}


def test_a_claim_adds_up_several_candidates() -> None:
    seconds = {"all": [6.0, 9.0], "one": [2.0, 2.0], "two": [2.0, 4.0]}
    assert common.Claim("", ("all",), ("one", "two", "two")).ratios(seconds) == [1.0, 0.9]
    assert common.Claim("", ("one",), scale=30).ratios(seconds) == [60.0, 60.0]


def test_own_work_does_not_make_a_machine_busy() -> None:
    assert machine.shares(worked=100, stolen=0, own=98, total=200) == {"others": 0.01, "steal": 0.0, "busy": False}
    assert machine.shares(worked=100, stolen=0, own=80, total=200)["busy"]
    assert machine.shares(worked=100, stolen=3, own=100, total=200) == {"others": 0.0, "steal": 0.015, "busy": True}
    summary = machine.Load().summary()
    assert set(summary) == {"seconds", "load_before", "others", "steal", "busy"}


@pytest.mark.skipif(sys.platform != "linux", reason="Linux says what a process's memory was at its peak")
def test_the_growth_of_memory_is_the_candidates_own() -> None:
    megabytes = 64
    before = np.ones(2**20 * megabytes // 8)
    growth = memory.peak_growth_mb(lambda: np.ones(2**20 * megabytes // 8))
    assert before.nbytes == 2**20 * megabytes
    assert growth == pytest.approx(megabytes, abs=8)


def record(**changes: Any) -> dict[str, Any]:
    """A result as `--out` writes it."""
    rows = [
        common.row("slow / fast", WIDE, common.at_most(1.1)),
        common.fact("size, MB", 5.609, common.at_most(5)),
        common.absent("beside a peer", "not installed", common.at_most(1)),
    ]
    asked = common.arguments("", 1.0, tiny=True, arguments=[])
    sitting = common.Sitting("measure", asked, rows, {"fast": 0.123456}, {"growth": 1234.5})
    return json.loads(json.dumps(sitting.record())) | changes


PAGE = f"before\n\n{page.marks(record())[0]}\n\nearlier figures\n\n{page.marks(record())[1]}\n\nafter\n"


def test_a_table_is_written_between_its_marks() -> None:
    result = record()
    text = page.inserted(PAGE, result)
    first = "<!-- benchmark measure on cpu: written by python benchmarks/measure.py --write -->"
    assert text.startswith(f"before\n\n{first}\n\nMeasured with `python benchmarks/measure.py` on ")
    assert text.endswith("\n<!-- end of benchmark measure on cpu -->\n\nafter\n")
    assert "earlier" not in text
    assert "| slow / fast | 1.03 | 1.01 to 1.05 | 7 | ≤ 1.1 | yes |\n" in text
    assert "| size, MB | 5.609 |  |  | ≤ 5 | no |\n" in text
    assert "| beside a peer | not installed |  |  | ≤ 1 |  |\n" in text
    assert "| fast | 0.1235 |\n" in text
    assert "| growth | 1,234 |\n" in text
    assert page.inserted(text, result) == text


def test_a_page_without_marks_is_left_as_it_is(tmp_path: Path) -> None:
    place = tmp_path / "page.md"
    place.write_text(PAGE)
    with pytest.raises(SystemExit, match=r"no place for python benchmarks/measure\.py --device cuda: write <!--"):
        page.write(record(device="cuda"), place)
    assert place.read_text() == PAGE
    page.write(record(), place)
    assert [path.name for path in tmp_path.iterdir()] == ["page.md"]
    assert "| slow / fast |" in place.read_text()


def test_a_file_that_is_no_result_is_refused(tmp_path: Path) -> None:
    broken, tiny = tmp_path / "broken.json", tmp_path / "tiny.json"
    broken.write_text('{"rows": []}')
    tiny.write_text(json.dumps(record(settings={"tiny": True})))
    with pytest.raises(SystemExit, match=r"is no result of a benchmark .*: pass a file that --out wrote"):
        page.read(broken)
    with pytest.raises(SystemExit, match="measured with --tiny"):
        page.read(tiny)


def test_a_benchmark_that_breaks_off_keeps_its_rows_but_not_on_the_page(tmp_path: Path) -> None:
    out, before = tmp_path / "out.json", page.PAGE.read_text(encoding="utf-8")
    asked = common.arguments("", 1.0, arguments=["--out", str(out), "--write"])
    sitting = common.Sitting("start", asked, [common.fact("one", 1.0)])
    with pytest.raises(ZeroDivisionError), sitting:
        print(1 / 0)
    written = json.loads(out.read_text())
    assert [row["name"] for row in written["rows"]] == ["one"]
    assert written["notes"] == ["It broke off: ZeroDivisionError: division by zero"]
    assert page.PAGE.read_text(encoding="utf-8") == before


@pytest.mark.parametrize("name", NAMES)
def test_every_benchmark_has_help_and_a_place_on_the_page(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    main = importlib.import_module(name).main
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert f"python benchmarks/{name}.py" in shown
    text = page.PAGE.read_text(encoding="utf-8")
    for device in ("cpu", "cuda") if "{cpu,cuda}" in shown else ("cpu",):
        first, last = page.marks({"benchmark": name, "device": device})
        assert text.count(first) == text.count(last) == 1
        assert text.index(first) < text.index(last)


def test_a_gpu_is_needed_where_one_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(SystemExit):
        common.arguments("", 1.0, {"cuda": 1.0}, arguments=["--device", "cuda"])
    assert "--device cuda needs a GPU, and torch sees none" in capsys.readouterr().err


def test_the_heads_loss_is_right_where_it_is_timed() -> None:
    from heads import HeadShapes, gradient_error, ours, peers

    shapes = HeadShapes(tokens=33, teacher=16, student=8, vocabulary=64)
    assert gradient_error(ours(), shapes) < 1e-5
    for name, loss, why in peers():
        assert name in ("liger-kernel", "TRL")
        assert (loss is None) == bool(why)


def test_synchronisations_are_those_of_one_batch() -> None:
    from measure import synchronisations

    def run(batches: int) -> None:
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)  # once a run
        for _ in range(batches):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
            warnings.warn("something else", stacklevel=1)

    assert synchronisations(run).total() == 1


def test_what_is_timed_is_what_it_is_said_to_be() -> None:
    """The cut forward pass against transformers' own hidden states, and an SAE's share of active latents."""
    from measure import limit
    from neox import CPU, cut_forward, hugging_face, sharing, sparse_autoencoder, tiny, tokens

    shapes = tiny(CPU)
    model = hugging_face(shapes)
    cut, seen = cut_forward(model, shapes), list[Any]()
    model.gpt_neox.layers[0].register_forward_hook(lambda *_: seen.append(None))
    activation = cut()
    assert not seen
    with torch.no_grad():
        expected = model(tokens(shapes), output_hidden_states=True).hidden_states[shapes.tapped]
    assert torch.equal(activation, expected)
    assert all(map(torch.equal, model.state_dict().values(), sharing(model).state_dict().values()))
    assert {p.data_ptr() for p in sharing(model).parameters()} == {p.data_ptr() for p in model.parameters()}
    for kind in ("standard", "topk", "jumprelu"):
        sae = sparse_autoencoder(kind, model, shapes)
        latents = sae.encode(activation.flatten(0, 1))
        assert float((latents != 0).double().mean()) == pytest.approx(shapes.active, rel=0.1)
    bare = limit(model, sae, shapes)()
    assert isinstance(bare, torch.Tensor)
    torch.testing.assert_close(bare, activation.flatten(0, 1) @ sae.W_enc)


def test_the_bare_parts_of_a_step_are_those_of_a_step() -> None:
    """The gradient of the student's head is of the products that are timed, up to the clipping of its length."""
    from distill import bare_step, student_of, teacher, token_ids
    from neox import CPU, tiny

    shapes = tiny(CPU)
    of, ids = teacher(shapes), token_ids(shapes)
    [of_weight] = bare_step(of, (16,), ids, shapes)()
    student = student_of(of, 16, shapes)
    hidden = student.gpt_neox(ids)[0][:, :-1].flatten(0, 1)
    logits = hidden @ student.get_output_embeddings().weight.T
    expected = hidden.T @ logits
    torch.testing.assert_close(of_weight / of_weight.norm(), expected / expected.norm())


def test_what_is_beyond_a_limit_is_the_difference_of_each_operation(capsys: pytest.CaptureFixture[str]) -> None:
    from rest import compare, own_seconds

    one, rows = torch.ones(300, 300), torch.ones(300, 300)
    whole = own_seconds(lambda: [one @ rows, torch.exp(one)], 3)
    assert {"matrix products", "exp", "Python"} <= set(whole)
    sitting = common.Sitting("rest", common.arguments("", 1.0, tiny=True, arguments=[]))
    compare(sitting, "both", whole, own_seconds(lambda: one @ rows, 3))
    assert "both, beyond the limit: exp" in sitting.seconds
    assert sitting.rows[0].value == pytest.approx(
        sum(sitting.seconds.values()) / (sum(whole.values()) - sum(sitting.seconds.values()))
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "device"), [*product(("measure", "distill"), ("cpu", "cuda")), ("rest", "cpu"), ("splice", "cpu")]
)
def test_what_will_run_on_a_device_runs(name: str, device: str, tmp_path: Path) -> None:
    """The same code path with tiny shapes, on the CPU where there is no GPU."""
    out = tmp_path / "out.json"
    command = [sys.executable, f"benchmarks/{name}.py", "--tiny", "--device", device, "--seconds", "4"]
    done = subprocess.run(
        [*command, "--out", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert (result["benchmark"], result["device"]) == (name, device)
    missing = {row["name"]: row["note"] for row in result["rows"] if row["value"] is None}
    assert set(missing.values()) <= {"no GPU", "not installed"}
    assert len(result["rows"]) - len(missing) >= (2 if name == "splice" else 5)
    with pytest.raises(SystemExit, match="measured with --tiny"):
        page.read(out)
