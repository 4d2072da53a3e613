"""What tests of the command line share: the options of the main job, whether a command exists, and when two
measurements are the same.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import typing
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import place
import pytest
import typer

from tl_capacity import Measurement, plugins, recipe

HOOK = "blocks.1.hook_resid_post"
Cli = Callable[..., tuple[int, str, str]]
"""What the fixture `cli` gives: exit code, standard output and standard error."""


def arguments(setup: Path, out: Path, *more: object, tokens: int = 3000, sae: str = "sae") -> list[object]:
    return [
        "measure",
        "--model",
        setup / "model",
        "--sae",
        setup / sae,
        "--source",
        setup / "text.jsonl",
        "--tokens",
        tokens,
        "--out",
        out,
        *more,
    ]


def same(one: Path, other: Path) -> None:
    """Both folders hold the same measurement, but for the time that it took: on the CPU bit for bit, on a GPU, which
    adds in no fixed order, whole numbers exactly and sums to rounding.
    """
    a, b = Measurement.load(one), Measurement.load(other)
    for mine, theirs in zip(a, b, strict=True):
        for name, array in mine.summary.arrays.items():
            if place.on_cpu() or array.dtype.kind in "iub":
                np.testing.assert_array_equal(array, theirs.summary.arrays[name], err_msg=name)
            else:
                largest = float(np.abs(array).max(initial=0))
                np.testing.assert_allclose(
                    array, theirs.summary.arrays[name], rtol=1e-6, atol=1e-6 * largest, err_msg=name
                )
    same_written(a, b)


def same_written(one: Measurement, other: Measurement) -> None:
    """The JSON files of two measurements say the same, but for the time that they took; on a GPU to rounding."""
    if place.on_cpu():
        assert written(one) == written(other)
    else:
        alike(written(one), written(other))


def alike(one: Any, other: Any) -> None:
    """Two JSON values are equal but for the rounding of numbers."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key, value in one.items():
            if "sha" not in key and "digest" not in key:  # of bytes that are rounded otherwise
                alike(value, other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for mine, theirs in zip(one, other, strict=True):
            alike(mine, theirs)
    else:
        assert one == (pytest.approx(other, rel=1e-5, abs=1e-9) if isinstance(one, float) else other)


def written(measurement: Measurement) -> dict[str, Any]:
    """All that a measurement's JSON file says, but for the time that it took."""
    content = measurement.to_json()
    del content["provenance"]["seconds"]
    return content


def students_of(setup: Path) -> Path:
    """A distillation of the model in `setup`, made when it is first asked for."""
    from tl_capacity.distillation import DistillSettings, distill
    from tl_capacity.models.loading import load_model
    from tl_capacity.text.streams import TokenStream

    out = setup / "students-of-model"
    if not out.exists():
        teacher = load_model(str(setup / "model"), device=place.device())
        stream = TokenStream(str(setup / "text.jsonl"), teacher.tokenizer, context=32)
        distill(
            teacher,
            [8, 16],
            stream,
            settings=DistillSettings(tokens=500, evaluations=1, heldout_tokens=100),
            out=out,
            progress=False,
        )
    return out


def concept_of(setup: Path) -> Path:
    """Labelled texts in words of the model in `setup`: two a document, and one class says small numbers more often."""
    path = setup / "few.jsonl"
    if not path.exists():
        draw = np.random.default_rng(0)
        rows = []
        for number in range(200):
            words = draw.zipf(1.3 if number % 2 else 1.6, size=draw.integers(4, 40)) % 62 + 2
            rows.append(
                {
                    "text": " ".join(f"w{word}" for word in words),
                    "label": "few" if number % 2 else "many",
                    "document": f"document {number // 2}",
                }
            )
        path.write_text("\n".join(map(json.dumps, rows)))
    return path


# A server that has imported everything once; each child is forked from it, begins at once, and dies alone.
CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload(
    [
        "commands",
        "torch",
        "transformers",
        "sae_lens",
        "tl_capacity.cli",
        "tl_capacity.measure.job",
        "tl_capacity.distillation",
        "accelerate",
    ]
)


def run_in_a_child(
    arguments: Sequence[object], environment: Mapping[str, str] | None = None, folder: Path | None = None
) -> None:
    """What a child process does: run the command, and save a checkpoint whenever one can be saved."""
    import torch

    from tl_capacity.cli import main
    from tl_capacity.storage import checkpoints

    os.environ.update(environment or {})
    os.chdir(folder or ".")
    torch.set_num_threads(1)
    checkpoints.SECONDS = 0.0
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        main([str(a) for a in arguments])


def alone(command: Sequence[object]) -> None:
    """Run a command in a child, with one thread as each process of a launch has."""
    child = CHILDREN.Process(target=run_in_a_child, args=([str(a) for a in command],))
    child.start()
    child.join()
    assert child.exitcode == 0


def launched_as(rank: int, count: int, port: int) -> dict[str, str]:
    """The environment that `torchrun` gives a process."""
    return {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "ACCELERATE_USE_CPU": "true",
    }


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def launch(commands: Sequence[Sequence[object]], folders: Sequence[Path | None] = ()) -> list[int | None]:
    """Run a command in each of several processes as `torchrun` would start them; returns their exit codes.

    Args:
        folders: where each is run.
    """
    if not place.on_cpu():
        pytest.skip("is about the CPU: processes of one machine, without a GPU for each")
    port, children = free_port(), []
    for rank, command in enumerate(commands):
        environment = launched_as(rank, len(commands), port)
        folder = folders[rank] if folders else None
        children.append(CHILDREN.Process(target=run_in_a_child, args=([str(a) for a in command], environment, folder)))
        children[-1].start()
    for child in children:
        child.join(300)
        if child.exitcode is None:
            child.kill()
    return [child.exitcode for child in children]


def parse(arguments: list[str]) -> None:
    """Have the command line take the arguments, without doing what they say.

    Raises:
        Exception: typer's own, where a command or an option does not exist or has no such value.
    """
    from tl_capacity.cli import app

    command: Any = typer.main.get_command(app)
    for each in (command, *command.commands.values()):
        each.callback = lambda **_: None
    command.main(arguments, prog_name="tl-capacity", standalone_mode=False)
    if arguments[0] == "run" and len(arguments) > 1:
        function = recipe.load(plugins.plugins().recipes[arguments[1]])

        def nothing(config: Any) -> None: ...

        nothing.__annotations__ = typing.get_type_hints(function)
        recipe.run(nothing, arguments[2:], arguments[1])
