"""No network: importing asks nobody, and neither does a command that names only what lies on this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import HOOK, arguments, concept_of

WATCHED = """
import os, sys

def refuse(event, details):
    if event == "socket.connect" and not isinstance(details[1], tuple):
        return  # a socket of this machine, which has a path for an address
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        sys.stderr.write(f"asked the network: {event} {details}\\n")
        os._exit(99)

sys.addaudithook(refuse)
"""


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run Python, without any setting that says offline, in a namespace that has no network where there can be one;
    anything that asks ends with code 99.
    """
    environment = {name: value for name, value in os.environ.items() if "OFFLINE" not in name}
    namespace = ["unshare", "--user", "--map-root-user", "--net"]
    if shutil.which("unshare") is None or subprocess.run([*namespace, "true"], capture_output=True).returncode:
        namespace = []
    command = [*namespace, sys.executable, "-c", WATCHED + code, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


COMMAND = "from tl_capacity.cli import main\nmain(sys.argv[1:])"


def test_what_asks_is_noticed() -> None:
    assert run("import socket; socket.create_connection(('192.0.2.1', 80), timeout=1)").returncode == 99


@pytest.mark.slow
def test_import() -> None:
    names = (
        "tl_capacity, tl_capacity.cli, tl_capacity.measure.session, tl_capacity.doctor, tl_capacity.distillation,"
        " tl_capacity.toy, sae_lens, transformer_lens"
    )
    assert run(f"import {names}\nfrom tl_capacity.plugins import plugins; plugins()").returncode == 0


@pytest.mark.slow
def test_commands_on_this_machine(setup: Path, tmp_path: Path) -> None:
    """One after another in one process, because most of the time goes into starting."""
    model, text, few = (
        ["--model", setup / "model"],
        ["--source", setup / "text.jsonl"],
        ["--tokens", 300, "--heldout-tokens", 100],
    )
    teacher = ["--teacher", setup / "model", *text, "--context", 32]
    m, d, r = tmp_path / "m", tmp_path / "d", tmp_path / "r"
    chain: list[list[object]] = [
        arguments(setup, m, tokens=500),
        ["budget", m],
        ["floor", m, "--widths", "4"],
        ["plan", m, "--keep", "0.9", "--widths", "4"],
        ["merge", m, "--out", tmp_path / "joined"],
        ["doctor", *model, "--sae", setup / "sae", *text],
        ["doctor", m],
        ["hooks", *model],
        ["plugins"],
        ["measure", "--model", "embedded", "--tokens", "500", "--out", tmp_path / "embedded"],
        ["run", "distill", *teacher, "--widths", 8, *few, "--out", d],
        ["decompose", m, d],
        ["run", "recover", m, d, "--tokens", 4000, "--out", r],
        ["report", m, d, r, "-o", tmp_path / "report.html"],
        [
            "run",
            "probe",
            *model,
            "--model",
            d,
            "--hook",
            HOOK,
            "--concepts",
            concept_of(setup),
            "--measurement",
            m,
            "--out",
            tmp_path / "p",
        ],
        [
            "run",
            "check-importance",
            *model,
            "--hook",
            HOOK,
            "--sae",
            setup / "sae",
            *text,
            "--context",
            32,
            "--rows",
            2,
            "--latents",
            3,
        ],
        [
            "run",
            "train-sae",
            *model,
            "--hook",
            HOOK,
            *text,
            "--context",
            32,
            "--d-sae",
            64,
            "--k",
            4,
            "--tokens",
            2000,
            "--out",
            tmp_path / "s",
        ],
        [
            "run",
            "pythia-floor",
            *teacher,
            "--sae",
            setup / "sae",
            "--widths",
            8,
            *few,
            "--measure-tokens",
            300,
            "--evaluations",
            1,
            "--out",
            tmp_path / "f",
        ],
        [
            "run",
            "toy-sweep",
            "--features",
            6,
            "--alphas",
            0.8,
            "--teacher-widths",
            2,
            "--steps",
            3,
            "--seeds",
            1,
            "--out",
            tmp_path / "t",
        ],
    ]
    code = f"""
from tl_capacity.cli import main
for arguments in {[[str(a) for a in command] for command in chain]!r}:
    try:
        main(arguments)
    except SystemExit as end:
        assert end.code == 0, (arguments, end.code)
"""
    done = run(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [["--help"], ["--version"], ["run"]])
def test_help(command: list[str]) -> None:
    assert run(COMMAND, *command).returncode == 0
