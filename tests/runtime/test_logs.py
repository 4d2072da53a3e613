"""What is said on standard error: text for people, JSON lines for programs, nothing but errors where quiet was asked
for, and no colour into a file.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import Cli, arguments

from tl_capacity import plugins
from tl_capacity.runtime import logs, progress


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Whatever a test configures is taken back."""
    with warnings.catch_warnings():
        yield
        logs.configure(as_json=False, quiet=False)


def test_json_lines(cli: Cli, setup: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    code, out, err = cli("--log", "json", *arguments(setup, tmp_path / "m", "--checkpoint-seconds", 0))
    assert code == 0
    lines = [json.loads(line) for line in err.splitlines()]
    assert all({"time", "level", "message"} <= line.keys() for line in lines)
    counted = [line["done"] for line in lines if "done" in line]
    assert counted == sorted(counted)
    assert counted[-1] >= 3000
    assert {line["total"] for line in lines if "done" in line} == {3000}
    assert [line for line in lines if line["message"] == "checkpoint saved"]
    assert lines[-1]["message"] == "done"
    assert lines[-1]["peak_memory_bytes"] > 10**8
    assert "peak memory" in out


def test_errors_and_warnings_are_lines_too(cli: Cli, tmp_path: Path) -> None:
    code, _, err = cli("--log", "json", "budget", tmp_path)
    assert code == 2
    assert json.loads(err)["level"] == "error"
    assert json.loads(err)["exit_code"] == 2
    logs.configure(as_json=True, quiet=False)
    handler = logs.log.handlers[0]
    record = logging.LogRecord("py.warnings", logging.WARNING, "x.py", 1, "something\nodd", None, None)
    assert json.loads(handler.format(record))["message"] == "something\nodd"
    assert logging.getLogger("py.warnings").handlers == [handler]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["measure"], "Missing option '--model'."),
        (["budget", "m", "--widthz", "3"], "No such option: --widthz"),
        (["run", "train-sae", "--tokens", "many"], "Invalid value for '--tokens'"),
    ],
)
def test_usage_errors_are_lines_too(cli: Cli, arguments: list[str], says: str) -> None:
    code, out, err = cli("--log", "json", *arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    line = json.loads(err)
    assert (line["level"], line["exit_code"]) == ("error", 2)
    assert says in line["message"]


@pytest.mark.parametrize("how", [["--log", "json"], ["--log", "json", "--quiet"]])
def test_a_plugin_file_that_fails_is_a_line_too(cli: Cli, tmp_path: Path, how: list[str]) -> None:
    failing = tmp_path / "failing.py"
    failing.write_text("1 / 0")
    try:
        code, _, err = cli(*how, "--plugin", failing, "plugins", "--json")
    finally:
        plugins.unregister_plugin(str(failing))
    assert code == 0
    lines = [json.loads(line) for line in err.splitlines()]
    assert lines[0]["level"] == "error"
    assert (
        lines[0]["message"]
        == f"the plugin file {failing} failed and was left out (ZeroDivisionError: division by zero)"
    )
    assert [line["message"] for line in lines[1:]] == ([] if "--quiet" in how else ["done"])


def test_quiet(cli: Cli, setup: Path, tmp_path: Path) -> None:
    code, out, err = cli("--quiet", *arguments(setup, tmp_path / "m"))
    assert (code, err) == (0, "")
    assert "written to" in out  # results are on standard output, and stay
    assert not logs.bar_allowed()
    code, _, err = cli("--quiet", "budget", tmp_path)
    assert code == 2
    assert err.startswith("error: ")


def test_the_next_command_is_not_quiet(cli: Cli) -> None:
    cli("--quiet", "--log", "json", "plugins")
    code, _, err = cli("plugins")
    assert (code, err) == (0, "")
    assert logs.bar_allowed()


def test_another_kind_of_log(cli: Cli) -> None:
    code, _, err = cli("--log", "xml", "plugins")
    assert code == 2
    assert "choose text or json" in err


@pytest.mark.slow
def test_no_colour_and_no_bar_into_a_file(setup: Path, tmp_path: Path) -> None:
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("HF_HUB_DISABLE_PROGRESS_BARS", "FORCE_COLOR", "NO_COLOR")
    }
    command = [sys.executable, "-m", "tl_capacity", *map(str, arguments(setup, tmp_path / "m", tokens=500))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    assert "\r" not in done.stdout


def test_trackers_are_accelerates_and_off_by_default(setup: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the user's own sees every evaluation; one that is not installed is refused."""
    import torch
    from accelerate.tracking import GeneralTracker

    from tl_capacity import CapacityError
    from tl_capacity.distillation import DistillSettings, distill
    from tl_capacity.models.loading import load_folder

    class Mine(GeneralTracker):
        name = "mine"
        requires_logging_directory = False

        def __init__(self) -> None:
            super().__init__()
            self.seen: list[tuple[int | None, dict[str, float]]] = []
            self.finished = False

        @property
        def tracker(self) -> list[tuple[int | None, dict[str, float]]]:
            return self.seen

        def store_init_configuration(self, values: dict[str, str]) -> None:
            self.configuration = values

        def log(self, values: dict[str, float], step: int | None = None, **_: object) -> None:
            self.seen.append((step, values))

        def finish(self) -> None:
            self.finished = True

    rows = (torch.arange(40 * 16) * 7 % 60 + 2).view(40, 16)
    model, _ = load_folder(setup / "model")
    settings = DistillSettings(tokens=300, evaluations=2, heldout_tokens=100)
    mine = Mine()
    run = distill(model, [8], rows, settings=settings, trackers=[mine], progress=False)
    student = run.students[0]
    assert [step for step, _ in mine.seen] == list(student.tokens)
    assert [values[f"{student.name}/heldout_kl"] for _, values in mine.seen] == list(student.heldout_kl)
    assert mine.configuration["lr"] == str(settings.lr)
    assert mine.finished
    assert len(distill(model, [8], rows, settings=settings, progress=False).students) == 1
    with pytest.raises(CapacityError, match="the tracker 'dvclive' is not installed"):
        distill(model, [8], rows, settings=settings, trackers=["dvclive"], progress=False)
