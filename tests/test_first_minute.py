"""The README: what a reader of a minute can rely on, and what its first lines say where something is missing."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_docs import blocks

from tl_capacity import CapacityError

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
GEMMA_SCOPE = "gemma-scope-2b-pt-res-canonical/layer_12/width_16k/canonical"


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


def test_the_first_block_installs_and_the_next_needs_nothing_else() -> None:
    (_, installs), *_ = blocks(README, "sh", "console", "python")
    assert installs == "pip install tl-capacity\n"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {re.split(r"[<>=\[]", one)[0].replace("-", "_") for one in project["dependencies"]}
    _, code = next(blocks(README, "python"))
    assert len([line for line in code.splitlines() if line]) == 8
    imported = {
        name.partition(".")[0]
        for node in ast.walk(ast.parse(code))
        for name in (
            [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in getattr(node, "names", [])]
        )
    }
    assert imported - sys.stdlib_module_names <= names | {"tl_capacity"}


@pytest.fixture
def gpt2(hub: Path) -> Any:
    from sae_lens import HookedSAETransformer

    return HookedSAETransformer.from_pretrained_no_processing("gpt2", center_writing_weights=True)


@pytest.mark.slow
class TestWhatIsMissing:
    """One sentence, which says what to do next."""

    def test_a_model_without_saes(self, gpt2: Any) -> None:
        with pytest.raises(CapacityError) as refusal:
            gpt2.add_capacity_hooks()
        assert one_sentence(refusal)
        assert "'gpt2-small-res-jb/blocks.6.hook_resid_pre'" in str(refusal.value)

    def test_an_sae_of_another_model(self, gpt2: Any, hub: Path) -> None:
        from sae_lens import SAE

        other = SAE.from_pretrained(*GEMMA_SCOPE.split("/", 1))
        for sae, says in (
            (other, "is not a hook point of this model: did you mean"),
            ({"blocks.8.hook_resid_pre": other}, "width"),
        ):
            with pytest.raises(CapacityError) as refusal:
                gpt2.add_capacity_hooks(sae)
            assert one_sentence(refusal)
            assert says in str(refusal.value)
        assert "has width 64, but the SAE's d_in is 2,304" in str(refusal.value)
        assert str(refusal.value).endswith("so pass an SAE that was trained on this one")

    @pytest.mark.parametrize("name", ["blocks.9.hook_resid_pre", "blocks.8.hook_resid_post"])
    def test_an_sae_that_is_not_there(self, gpt2: Any, name: str) -> None:
        """One that the cache lacks, and one that the release has never had."""
        with pytest.raises(CapacityError, match=r"pass a folder|the nearest") as refusal:
            gpt2.add_capacity_hooks(f"gpt2-small-res-jb/{name}")
        assert one_sentence(refusal)

    def test_a_text_without_a_network(self, gpt2: Any) -> None:
        with (
            gpt2.add_capacity_hooks("gpt2-small-res-jb/blocks.8.hook_resid_pre") as capacity,
            pytest.raises(
                CapacityError, match=r"the data set 'NeelNanda/c4-10k' cannot be read .*pass a local file"
            ) as refusal,
        ):
            capacity.run("NeelNanda/c4-10k", max_tokens=1000)
        assert one_sentence(refusal)

    def test_on_the_command_line(self, cli: Callable[..., Any], hub: Path, tmp_path: Path) -> None:
        sae = "gpt2-small-res-jb/blocks.8.hook_resid_pre"
        common = [
            "measure",
            "--source",
            "NeelNanda/pile-10k",
            "--tokens",
            500,
            "--out",
            tmp_path / "out",
            "--device",
            "cpu",
        ]
        for more, says in (
            (["--model", "gpt2-medium", "--sae", sae], "no hub can be reached and the local cache does not have it"),
            (["--model", "gpt2"], "gpt2-small-res-jb/blocks.6.hook_resid_pre"),
            (
                ["--model", "gpt2", "--sae", f"blocks.8.hook_resid_pre={GEMMA_SCOPE}"],
                "d_in is 2,304: it belongs to another",
            ),
        ):
            code, _, error = cli(*common, *more)
            assert code == 2
            assert says in error
            assert "Traceback" not in error
            assert error.startswith("error: ")


def one_sentence(refusal: pytest.ExceptionInfo[CapacityError]) -> bool:
    return "\n" not in str(refusal.value) and ". " not in re.sub(r"\(.*?\)", "", str(refusal.value))
