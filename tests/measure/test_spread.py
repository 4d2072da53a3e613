"""Measuring a model that fits on no device: spread over processes (FSDP), or over memory and disk (a device map). What
is counted is what one process counts with the whole model.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from commands import CHILDREN, Cli, alone, arguments, free_port, launch, launched_as
from measurements import assert_same_sums

from tl_capacity import Measurement

EVERYTHING = 10**6
LAYER_0 = "blocks.0.hook_resid_post"
pytestmark = pytest.mark.slow


def equal(one: Path, other: Path) -> None:
    """The same sums in two folders, moments to 1e-10."""
    assert_same_sums(Measurement.load(one), Measurement.load(other), rtol=1e-10)


@pytest.fixture(scope="module")
def uneven(setup: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of which one process gets most of the rows: the other runs out of text long before."""
    path = tmp_path_factory.mktemp("texts") / "uneven.jsonl"
    texts = [json.loads(line)["text"] for line in (setup / "text.jsonl").read_text().splitlines()[:8]]
    long = [text if number % 2 else " ".join([text] * 5) for number, text in enumerate(texts)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in long))
    return path


@pytest.mark.parametrize("importance", ["second_moment", "gradient"])
def test_a_model_in_two_processes(importance: str, setup: Path, uneven: Path, tmp_path: Path) -> None:
    more = ("--sae", setup / "sae0", "--source", uneven, "--dtype", "float64", "--importance", importance)
    alone(arguments(setup, tmp_path / "one", *more, tokens=EVERYTHING))
    command = arguments(setup, tmp_path / "two", *more, "--shard-model", tokens=EVERYTHING)
    assert launch([command, command]) == [0, 0]
    equal(tmp_path / "one", tmp_path / "two")


def test_a_process_without_text_beside_a_model_in_two(setup: Path, uneven: Path, tmp_path: Path) -> None:
    single = tmp_path / "single.jsonl"
    single.write_text(uneven.read_text().splitlines()[0] + "\n")
    more = ("--source", single, "--dtype", "float64")
    alone(arguments(setup, tmp_path / "one", *more, tokens=EVERYTHING))
    command = arguments(setup, tmp_path / "two", *more, "--shard-model", tokens=EVERYTHING)
    assert launch([command, command]) == [0, 0]
    equal(tmp_path / "one", tmp_path / "two")


def test_a_device_map_in_each_of_two_processes(setup: Path, uneven: Path, tmp_path: Path) -> None:
    places = {"gpt_neox.embed_in": "cpu", "gpt_neox.rotary_emb": "cpu", "gpt_neox.layers.0": "disk"}
    places |= {f"gpt_neox.layers.{layer}": "cpu" for layer in (1, 2)}
    places |= {"gpt_neox.final_layer_norm": "cpu", "lm_head": "disk"}
    (tmp_path / "map.json").write_text(json.dumps(places))
    more = ("--source", uneven, "--dtype", "float64")
    alone(arguments(setup, tmp_path / "one", *more, tokens=EVERYTHING))
    command = arguments(setup, tmp_path / "two", *more, "--device-map", tmp_path / "map.json", tokens=EVERYTHING)
    assert launch([command, command]) == [0, 0]
    equal(tmp_path / "one", tmp_path / "two")


def spread_and_measure(environment: dict[str, str], setup: Path, source: Path, answers: Any) -> None:
    """What one process does that holds a part of a model of its own making: count, with a hook point inside a block."""
    os.environ.update(environment)
    import torch
    from sae_lens import SAE
    from torch import distributed
    from torch.distributed.tensor import DTensor
    from torch.utils._python_dispatch import TorchDispatchMode

    from tl_capacity import add_capacity_hooks
    from tl_capacity.models.loading import load_model
    from tl_capacity.models.sharding import spread_blocks
    from tl_capacity.text.streams import TokenStream

    gathers: list[str] = []

    class Traffic(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), named: Any = None) -> Any:
            gathers.extend([str(function)] if "allgather" in str(function) else [])
            return function(*args, **(named or {}))

    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    loaded = load_model(str(setup / "model"), dtype="float64")
    whole = sum(parameter.nbytes for parameter in loaded.model.gpt_neox.layers.parameters())
    spread_blocks(loaded.model, torch.device("cpu"), 2)
    mine = [p for p in loaded.model.gpt_neox.layers.parameters() if isinstance(p, DTensor)]
    held = sum(parameter.to_local().nbytes for parameter in mine)
    sae = SAE.load_from_disk(str(setup / "sae"))
    stream = TokenStream(str(source), loaded.tokenizer, context=32, shard=(distributed.get_rank(), 2))
    before = sorted(type(p).__name__ for p in loaded.model.parameters())
    with Traffic(), add_capacity_hooks(loaded.model, {"blocks.1.mlp.hook_out": sae}) as capacity:
        counts = capacity.run(stream, progress=False).measurement().hooks[0].summary.arrays["counts"]
        passes = capacity._passes.begun
    after = sorted(type(p).__name__ for p in loaded.model.parameters())
    answers.put((distributed.get_rank(), int(counts.sum()), passes, len(gathers), whole, held, before == after))
    distributed.barrier()


def test_each_process_holds_and_gathers_a_part(setup: Path, uneven: Path) -> None:
    """Both run as many passes, gather the two blocks below the hook point in each, and give them back."""
    answers, port = CHILDREN.Queue(), free_port()
    children = [
        CHILDREN.Process(target=spread_and_measure, args=(launched_as(rank, 2, port), setup, uneven, answers))
        for rank in range(2)
    ]
    for child in children:
        child.start()
    (_, first, passes, gathers, whole, held, same), (_, second, *others) = sorted(
        answers.get(timeout=120) for _ in children
    )
    for child in children:
        child.join(60)
    assert others == [passes, gathers, whole, others[3], True]
    assert same
    assert held + others[3] == pytest.approx(whole, rel=0.01)
    assert first > second > 0
    assert gathers == 2 * passes


def test_bad_input(setup: Path, tmp_path: Path, cli: Cli) -> None:
    code, _, error = cli(*arguments(setup, tmp_path / "out", "--shard-model"))
    assert (code, error.count("\n")) == (2, 1)
    assert "a single process has nobody to share the teacher with" in error
    code, _, error = cli(*arguments(setup, tmp_path / "out", "--shard-model", "--device-map", "auto"))
    assert (code, error.count("\n")) == (2, 1)
    assert "give one of them" in error
    hook = f"blocks.1.attn.hook_q={setup / 'sae'}"
    command = arguments(setup, tmp_path / "out", "--shard-model")
    command[command.index("--sae") + 1] = hook
    assert launch([command, command]) == [2, 2]
