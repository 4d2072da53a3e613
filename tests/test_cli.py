"""The command line: the main job from files on disk, kill and resume, published curves, and one clear sentence for every bad input."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tl_capacity import Measurement
from tl_capacity.cli import main

HOOK = "blocks.1.hook_resid_post"
Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs `tl-capacity` in this process and returns exit code, standard output and standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return run


@pytest.fixture(scope="session")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and tokenizer, two SAEs that fit it, one of another width, and text."""
    from sae_lens import StandardSAE, StandardSAEConfig
    from sae_lens.saes.sae import SAEMetadata
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("setup")
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
        bos_token_id=0,
        eos_token_id=0,
    )
    GPTNeoXForCausalLM(config).save_pretrained(folder / "model")
    words = Tokenizer(models.WordLevel({"<s>": 0, "<unk>": 1, **{f"w{i}": i for i in range(2, 64)}}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="<s>", unk_token="<unk>").save_pretrained(folder / "model")
    for name, width, hook in (("sae", 32, HOOK), ("sae0", 32, "blocks.0.hook_resid_post"), ("wide", 48, HOOK)):
        sae = StandardSAE(StandardSAEConfig(d_in=width, d_sae=64, metadata=SAEMetadata(hook_name=hook)))
        # An orthogonal pair ±w reconstructs x exactly, so the SAE fits the model; a bias makes it sparse.
        w = torch.linalg.qr(torch.randn(width, width)).Q[:, : min(32, width)]
        sae.W_enc.data = torch.cat([w, -w], dim=1)[:, :64]
        sae.W_dec.data = sae.W_enc.data.T.contiguous()
        sae.b_enc.data.fill_(-0.01)
        sae.save_model(folder / name)
        if name == "sae":
            sae.W_dec.data *= 1.01
            sae.save_model(folder / "scaled")
    draw = np.random.default_rng(0)
    texts = [" ".join(f"w{i}" for i in draw.zipf(1.3, size=70) % 62 + 2) for _ in range(400)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return folder


def arguments(setup: Path, out: Path, *more: object, tokens: int = 3000, sae: str = "sae") -> list[object]:
    return ["measure", "--model", setup / "model", "--sae", setup / sae, "--source", setup / "text.jsonl", "--tokens", tokens, "--out", out, *more]


def same(one: Path, other: Path) -> None:
    """Both folders hold the same measurement, bit for bit, but for the time that it took."""
    a, b = Measurement.load(one), Measurement.load(other)
    for mine, theirs in zip(a, b, strict=True):
        for name, array in mine.summary.arrays.items():
            np.testing.assert_array_equal(array, theirs.summary.arrays[name], err_msg=name)
    mine_json, theirs_json = a.to_json(), b.to_json()
    for content in (mine_json, theirs_json):
        del content["provenance"]["seconds"]
    assert mine_json == theirs_json


def test_measure_then_budget_then_floor(cli: Cli, setup: Path, tmp_path: Path) -> None:
    code, out, _ = cli(*arguments(setup, tmp_path / "m", "--sae", setup / "sae0", "--widths", "4,8"))
    assert code == 0
    assert HOOK in out
    assert "blocks.0.hook_resid_post" in out
    measurement = Measurement.load(tmp_path / "m")
    assert measurement.complete
    assert measurement.hooks[0].summary.n_tokens >= 3000
    assert measurement.provenance.model == str(setup / "model")
    code, out, _ = cli("floor", tmp_path / "m", "--widths", "4,8,400", "--json", "--hook", HOOK)
    assert code == 0
    floors = json.loads(out)
    assert [f["width"] for f in floors] == [4, 8, 400]
    summary = measurement[HOOK].summary
    alive = int(summary.n_alive.value)
    for f in floors:
        assert f["features_kept"] == min(int(f["width"] * summary.capacity.value), alive)
        assert f["features_kept"] + f["features_lost"] == alive
        importance = np.sort(measurement[HOOK].importance())[::-1]
        assert f["predicted_floor"] == pytest.approx(importance[f["features_kept"] :].sum(), rel=1e-9)
        assert f["predicted_low"] <= f["predicted_floor"] <= f["predicted_high"]
    assert floors[2]["predicted_floor"] == 0
    code, out, _ = cli("budget", tmp_path / "m", "--json")
    row = json.loads(out)[0]
    assert row["d*"]["value"] == pytest.approx(summary.l0.value * np.log(alive / summary.l0.value), rel=1e-9)


def test_floor_of_the_published_curve(cli: Cli, published_curve: Path) -> None:
    code, out, _ = cli("floor", published_curve, "--widths", "128,256,384,512,768,1024", "--json")
    assert code == 0
    printed = {128: "0.07949", 256: "0.04004", 384: "0.02166", 512: "0.01109", 768: "0.00159", 1024: "0.0000686"}
    kept = {128: 3446, 256: 6892, 384: 10338, 512: 13784, 768: 20676, 1024: 27568}
    for f in json.loads(out):
        digits = len(printed[f["width"]].split(".")[1])
        assert f"{f['predicted_floor']:.{digits}f}" == printed[f["width"]]
        assert f["features_kept"] == kept[f["width"]]


def test_shards_merge_to_the_whole(cli: Cli, setup: Path, tmp_path: Path) -> None:
    everything = 10**6
    cli(*arguments(setup, tmp_path / "whole", tokens=everything))
    for i in range(3):
        assert cli(*arguments(setup, tmp_path / f"part{i}", "--shard", f"{i}/3", tokens=everything))[0] == 0
    code, _, err = cli("merge", *(tmp_path / f"part{i}" for i in (2, 0, 1)), "--out", tmp_path / "joined")
    assert (code, err) == (0, "")
    whole, joined = Measurement.load(tmp_path / "whole").hooks[0].summary, Measurement.load(tmp_path / "joined").hooks[0].summary
    np.testing.assert_array_equal(whole.arrays["counts"], joined.arrays["counts"])
    np.testing.assert_allclose(whole.arrays["squares"], joined.arrays["squares"], rtol=1e-6)  # float32 activations depend on the batch they are in
    code, _, err = cli("merge", tmp_path / "part0", tmp_path / "part0", "--out", tmp_path / "twice")
    assert code == 2
    assert "twice" in err


KILLED_TOKENS = 12_000


@pytest.fixture(scope="module")
def killed(setup: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run leaves that was killed (SIGKILL) right after its first checkpoint."""
    out = tmp_path_factory.mktemp("killed") / "m"
    command = [str(a) for a in arguments(setup, out, "--checkpoint-seconds", 0, tokens=KILLED_TOKENS)]
    process = subprocess.Popen([sys.executable, "-m", "tl_capacity", *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (out / "measurement.json").exists() and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    return out


def test_killed_and_resumed_equals_uninterrupted(cli: Cli, setup: Path, killed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(killed, tmp_path / "killed"))
    left = Measurement.load(folder)
    assert not left.complete
    assert 0 < left.hooks[0].summary.n_tokens < KILLED_TOKENS
    code, _, err = cli(*arguments(setup, folder, tokens=KILLED_TOKENS))
    assert code == 2
    assert "--resume" in err
    assert cli(*arguments(setup, folder, "--resume", tokens=KILLED_TOKENS))[0] == 0
    assert cli(*arguments(setup, tmp_path / "whole", tokens=KILLED_TOKENS))[0] == 0
    same(tmp_path / "whole", folder)


FULL_DISK = """
set -e
mount -t tmpfs -o size=8m tmpfs "$DISK"
cp -r "$KILLED" "$DISK/m"
(cd "$DISK/m" && sha256sum *) > "$RESULTS/before"
head -c 100000000 /dev/zero > "$DISK/filler" 2> /dev/null || true
"$@" 2> "$RESULTS/error" > /dev/null && exit 90 || echo $? > "$RESULTS/code"
(cd "$DISK/m" && find . -type f | sed 's,^./,,' | sort | xargs sha256sum) > "$RESULTS/after"
rm "$DISK/filler"
"$@" > /dev/null 2>&1
cp -r "$DISK/m" "$RESULTS/m"
"""


def test_a_disk_that_fills_up_keeps_the_last_checkpoint(cli: Cli, setup: Path, killed: Path, tmp_path: Path) -> None:
    """On a real file system with no space left, mounted in a namespace of the test's own; with space again, the run goes on from there."""
    namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*namespace, "mount", "-t", "tmpfs", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("no user namespaces here, so no small file system can be mounted")
    disk, results = tmp_path / "disk", tmp_path / "results"
    disk.mkdir()
    results.mkdir()
    command = [sys.executable, "-m", "tl_capacity", *map(str, arguments(setup, disk / "m", "--resume", "--checkpoint-seconds", 0, tokens=KILLED_TOKENS))]
    places = {"DISK": str(disk), "KILLED": str(killed), "RESULTS": str(results)}
    done = subprocess.run([*namespace, "bash", "-c", FULL_DISK, "bash", *command], env={**os.environ, **places}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    error = (results / "error").read_text()
    assert (results / "code").read_text().strip() == "2"
    assert "cannot be written (No space left on device): free space or choose another folder; what was there before is whole" in error
    assert "Traceback" not in error
    assert (results / "after").read_text() == (results / "before").read_text()
    assert cli(*arguments(setup, tmp_path / "whole", tokens=KILLED_TOKENS))[0] == 0
    same(tmp_path / "whole", results / "m")


def test_resume_refuses_what_is_not_the_same_run(cli: Cli, setup: Path, killed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(killed, tmp_path / "killed"))
    before = (folder / "measurement.json").read_bytes()
    code, _, err = cli(*arguments(setup, folder, "--resume", "--skip-first-positions", 1))
    assert code == 2
    assert "settings" in err
    other = tmp_path / "other.jsonl"
    other.write_text((setup / "text.jsonl").read_text().replace("w5", "w6"))
    code, _, err = cli("measure", "--model", setup / "model", "--sae", setup / "sae", "--source", other, "--out", folder, "--resume")
    assert code == 2
    assert "source" in err
    code, _, err = cli(*arguments(setup, folder, "--resume", sae="scaled"))
    assert code == 2
    assert "other weights" in err
    (setup / "text.jsonl").rename(setup / "text.away")
    try:
        (setup / "text.jsonl").write_text(other.read_text())
        code, _, err = cli(*arguments(setup, folder, "--resume"))
        assert code == 2
        assert "does not begin with the tokens counted before" in err
    finally:
        (setup / "text.away").replace(setup / "text.jsonl")
    assert (folder / "measurement.json").read_bytes() == before


BAD_INPUT = [
    (["--sae", "SETUP/sae", "--source", "SETUP/text.jsonl", "--tokens", "0"], "--tokens 0"),
    (["--sae", "SETUP/wide", "--source", "SETUP/text.jsonl"], "d_in is 48"),
    (["--sae", "blocks.9.hook_resid_post=SETUP/sae", "--source", "SETUP/text.jsonl"], "did you mean blocks.[012].hook_resid_post"),
    (["--sae", "SETUP/nothing", "--source", "SETUP/text.jsonl"], "nothing"),
    (["--source", "SETUP/text.jsonl"], "no SAE was given"),
    (["--sae", "SETUP/sae"], "no text to measure"),
    (["--sae", "SETUP/sae", "--source", "SETUP/missing.txt"], "there is no file"),
    (["--sae", "SETUP/sae", "--source", "SETUP/empty.txt"], "is empty"),
    (["--sae", "SETUP/sae", "--source", "SETUP/binary.txt"], "binary|cannot be read"),
    (["--sae", "SETUP/sae", "--source", "SETUP/table.csv"], "no token source knows"),
    (["--sae", "SETUP/sae", "--source", "SETUP/text.jsonl", "--shard", "4/4"], "shard 4 of 4"),
    (["--sae", "SETUP/sae", "--source", "SETUP/text.jsonl", "--shard", "x"], "INDEX/OF"),
    (["--sae", "SETUP/sae", "--source", "SETUP/text.jsonl", "--context", "4096"], "longer than the model's 32"),
    (["--sae", "SETUP/sae", "--source", "SETUP/text.jsonl", "--importance", "second_momen"], "did you mean 'second_moment'"),
    (["--sae", "SETUP/sae", "--source", "SETUP/text.jsonl", "--widths", "8,x"], "--widths"),
    (["--sae", "SETUP/sae", "--source", "SETUP/text.jsonl", "--alive-threshold", "2"], "alive_threshold"),
    (["--sae", "SETUP/sae", "--source", "SETUP/text.jsonl", "--max-fvu", "1e-9"], "wrong hook or wrong model"),
]


@pytest.mark.parametrize(("options", "message"), BAD_INPUT)
def test_bad_input_is_one_sentence_and_writes_nothing(cli: Cli, setup: Path, tmp_path: Path, options: list[str], message: str) -> None:
    (setup / "empty.txt").write_text("")
    (setup / "binary.txt").write_bytes(bytes(range(256)) * 10)
    (setup / "table.csv").write_text("text\nhello\n")
    given = [option.replace("SETUP", str(setup)) for option in options]
    code, out, err = cli("measure", "--model", setup / "model", "--out", tmp_path / "out", *given)
    assert code == 2
    assert out == ""
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "Traceback" not in err
    assert re.search(message, last), last
    assert not (tmp_path / "out" / "measurement.json").exists()


@pytest.mark.parametrize(
    ("arguments_", "message"),
    [
        (["floor", "CURVE", "--widths", "0"], "width below 1"),
        (["floor", "CURVE", "--widths", ""], "no width"),
        (["floor", "CURVE", "--widths", "8", "--law", "compresed_sensing"], "did you mean 'compressed_sensing'"),
        (["floor", "TMP/none.json", "--widths", "8"], "cannot be read"),
        (["floor", "TMP", "--widths", "8"], "no measurement"),
        (["floor", "TMP/bad.json", "--widths", "8"], "no importance curve"),
        (["floor", "TMP/short.json", "--widths", "8"], "truncated or altered"),
        (["budget", "TMP"], "no measurement"),
        (["run", "no-such-recipe"], "no recipe named"),
        (["--plugin", "TMP/none.py", "plugins"], "no plugin file"),
    ],
)
def test_other_commands_refuse_in_one_sentence(cli: Cli, published_curve: Path, tmp_path: Path, arguments_: list[str], message: str) -> None:
    (tmp_path / "bad.json").write_text('{"sorted_importance": ["x"], "alpha": 0.9}')
    (tmp_path / "short.json").write_text('{"sorted_importance": [1.0], "alpha": 0.9, "F_alive": 2}')
    code, _, err = cli(*(a.replace("CURVE", str(published_curve)).replace("TMP", str(tmp_path)) for a in arguments_))
    assert code == 2
    assert err.startswith("error: ")
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_unknown_command_is_a_usage_error(cli: Cli) -> None:
    code, _, err = cli("frobnicate")
    assert code == 2
    assert "No such command" in err


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys, tl_capacity.cli as c\ntry:\n c.main(['--help'])\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'sae_lens' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_import_does_not_import_saelens_or_reach_for_the_network() -> None:
    code = (
        "import socket, sys\ndef refuse(*a, **k): raise AssertionError('network at import')\nsocket.socket.connect = refuse\n"
        "import tl_capacity\nfrom tl_capacity import add_capacity_hooks\nassert 'sae_lens' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_hooks_lists_names(cli: Cli, setup: Path) -> None:
    code, out, _ = cli("hooks", "--model", setup / "model", "--matching", "resid_post")
    assert code == 0
    assert HOOK in out.split()
