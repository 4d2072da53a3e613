"""Files that somebody or something has changed: whatever a loader meets, it loads, or it raises `CapacityError` and
nothing else.
"""

from __future__ import annotations

import gzip
import json
import lzma
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import HOOK, Cli
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from measurements import measurement_of_counts

from tl_capacity import CapacityError, Measurement
from tl_capacity.dictionaries.loading import load_sae
from tl_capacity.distillation import checkpoint
from tl_capacity.distillation.run import DistillationRun
from tl_capacity.errors import PluginError
from tl_capacity.measure.job import measure
from tl_capacity.measure.settings import MeasureSettings
from tl_capacity.models.loading import load_folder
from tl_capacity.plan import Plan, plan
from tl_capacity.predict.curve import Curve
from tl_capacity.probing.concepts import load_concepts
from tl_capacity.probing.recoverability import Recoverability
from tl_capacity.probing.saved_probes import Probes
from tl_capacity.report.results import Results
from tl_capacity.storage.checkpoints import Checkpoint
from tl_capacity.storage.files import SEAL, previous, read_kept
from tl_capacity.text.streams import documents
from tl_capacity.toy.result import SweepResult
from tl_capacity.toy.sweep import SweepSettings
from tl_capacity.toy.training import train

EXAMPLES = 110
"""Of each kind of file whose loader is quick; with those that are measured more than 2,000."""
MEASURED_EXAMPLES = 40
"""Of each kind that is measured with, which takes far longer."""

SWEEP = SweepSettings(
    features=(4,), alphas=(0.7,), teacher_widths=(2,), seeds=1, steps=2, evaluation_rows=16, distilled=False
)


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        path: where a whole one lies, in the folder of samples.
        load: what reads it, given the folder that it lies in.
        examples: how many changed files are tried, fewer where a loader is slow.
    """

    path: str
    load: Callable[[Path], object]
    examples: int = EXAMPLES


def text(name: str) -> Callable[[Path], object]:
    return lambda folder: list(documents(str(folder / name)))


def measured(model: str, sae: str) -> Callable[[Path], object]:
    """Measures what loads, for a field that a loader lets pass may be none that a model can be run with."""

    def load(folder: Path) -> object:
        places = {"FOLDER": str(folder), "SAMPLES": str(folder.parent / "samples")}
        model_, sae_ = (re.sub("FOLDER|SAMPLES", lambda found: places[found[0]], spec) for spec in (model, sae))
        text_, out = folder.parent / "samples" / "text" / "words.txt", folder.parent / "measured"
        shutil.rmtree(out, ignore_errors=True)
        return measure(
            MeasureSettings(model_, out, (sae_,), tokens=50, source=str(text_), max_fvu=float("inf"), progress=False)
        )

    return load


def planned(folder: Path) -> object:
    found = Plan.load(folder)
    return found.to_json(), found.to_frame(), found.cost_cells(), found.hook_cells()


def reported(folder: Path) -> object:
    found = Results.load([folder])
    probes, recoverability = Probes.from_json(found.probes), Recoverability.from_json(found.recoverability)
    return probes.titles, probes.to_json(), recoverability.to_json()


KINDS = {
    "measurement": Kind("m/measurement.json", Measurement.load),
    "statistics": Kind("m/statistics.safetensors", Measurement.load),
    "distillation": Kind("d/distillation.json", DistillationRun.load),
    "distillation checkpoint": Kind("d/checkpoint.json", checkpoint.read),
    "students' weights": Kind("d/checkpoint.safetensors", checkpoint.read),
    "sweep": Kind("t/sweep.json", SweepResult.load),
    "sweep's students": Kind("t/students.safetensors", SweepResult.load),
    "sweep's checkpoint": Kind(
        "c/state.safetensors", lambda folder: Checkpoint(folder / "state.safetensors", SWEEP.to_json())
    ),
    "curve": Kind("curve/curve.json", lambda folder: Curve.load(folder / "curve.json").floors([1, 2])),
    "plan": Kind("plan/plan.json", planned),
    "probes": Kind("r/probes.json", reported),
    "recoverability": Kind("r/recoverability.json", reported),
    "settings of pythia-floor": Kind("p/settings.json", lambda folder: read_kept(folder / "settings.json")),
    "concept": Kind("concept/concept.jsonl", lambda folder: load_concepts([str(folder / "concept.jsonl")])),
    "SAE configuration": Kind("sae/cfg.json", measured("SAMPLES/model", "FOLDER"), MEASURED_EXAMPLES),
    "SAE weights": Kind("sae/sae_weights.safetensors", measured("SAMPLES/model", "FOLDER"), MEASURED_EXAMPLES),
    "TopK SAE configuration": Kind("topk/cfg.json", measured("SAMPLES/model", "FOLDER"), MEASURED_EXAMPLES),
    "sparsify configuration": Kind("sparsify/cfg.json", measured("SAMPLES/model", f"{HOOK}=FOLDER"), MEASURED_EXAMPLES),
    "dictionary_learning configuration": Kind(
        "dictionary_learning/config.json", measured("SAMPLES/model", "FOLDER"), MEASURED_EXAMPLES
    ),
    "dictionary_learning weights": Kind("dictionary_learning/ae.pt", lambda folder: load_sae(str(folder))),
    "model configuration": Kind("model/config.json", measured("FOLDER", "SAMPLES/sae"), MEASURED_EXAMPLES),
    "model weights": Kind("model/model.safetensors", measured("FOLDER", "SAMPLES/sae"), MEASURED_EXAMPLES),
    "tokenizer": Kind("model/tokenizer.json", measured("FOLDER", "SAMPLES/sae"), MEASURED_EXAMPLES),
    "tokenizer configuration": Kind(
        "model/tokenizer_config.json", measured("FOLDER", "SAMPLES/sae"), MEASURED_EXAMPLES
    ),
    "text": Kind("text/text.txt", text("text.txt"), 2 * EXAMPLES),
    "jsonl": Kind("text/text.jsonl", text("text.jsonl"), 2 * EXAMPLES),
    "gzip": Kind("text/text.jsonl.gz", text("text.jsonl.gz"), 2 * EXAMPLES),
    "xz": Kind("text/text.txt.xz", text("text.txt.xz"), 2 * EXAMPLES),
    "parquet": Kind("text/text.parquet", text("text.parquet"), 2 * EXAMPLES),
}


def test_there_are_two_thousand_files() -> None:
    assert sum(kind.examples for kind in KINDS.values()) >= 2_000


@pytest.fixture(scope="session")
def samples(setup: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole file of each kind."""
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path_factory.mktemp("samples")
    for name in ("model", "sae"):
        shutil.copytree(setup / name, folder / name)
    measure(
        MeasureSettings(
            model=str(setup / "model"),
            saes=(str(setup / "sae"),),
            source=str(setup / "text.jsonl"),
            tokens=200,
            out=folder / "m",
            progress=False,
        )
    )
    _rename_tensors(folder / "m" / "measurement.json", "statistics", "statistics.safetensors")
    _distil(setup, folder / "d")
    _rename_tensors(folder / "d" / "checkpoint.json", "file", "checkpoint.safetensors")
    from tl_capacity.toy.result import run as run_sweep

    run_sweep(SWEEP).save(folder / "t")
    (folder / "c").mkdir()
    train(SWEEP, folder / "c" / "state.safetensors")
    (folder / "curve").mkdir()
    (folder / "curve" / "curve.json").write_text(
        json.dumps({"sorted_importance": [4.0, 2.0, 1.0], "alpha": 0.9, "F_alive": 3, "d_model": 8})
    )
    (folder / "plan").mkdir()
    answer = plan(measurement_of_counts(np.full(100, 640)), keep=0.5, widths=[2, 4])
    (folder / "plan" / "plan.json").write_text(json.dumps(answer.to_json()))
    _dictionaries(folder)
    _results(folder)
    passages = [f"passage {i} of a text, with words – and 字 – in it.\n\n" for i in range(30)]
    (folder / "text").mkdir()
    plain = "".join(passages).encode()
    lines = "".join(json.dumps({"text": passage}) + "\n" for passage in passages).encode()
    (folder / "text" / "text.txt").write_bytes(plain)
    (folder / "text" / "words.txt").write_text(
        "\n\n".join(" ".join(f"w{2 + (i * j) % 60}" for j in range(20)) for i in range(5))
    )
    (folder / "text" / "text.txt.xz").write_bytes(lzma.compress(plain))
    (folder / "text" / "text.jsonl").write_bytes(lines)
    (folder / "text" / "text.jsonl.gz").write_bytes(gzip.compress(lines))
    pyarrow.parquet.write_table(pyarrow.table({"text": passages}), folder / "text" / "text.parquet")
    return folder


def _dictionaries(folder: Path) -> None:
    """One of each trainer, which fit the model."""
    import torch
    from sae_lens import TopKSAE, TopKSAEConfig
    from sae_lens.saes.sae import SAEMetadata
    from safetensors.torch import save_file

    weight, bias, origin = (
        torch.randn(64, 32, generator=torch.Generator().manual_seed(0)),
        torch.zeros(64),
        torch.zeros(32),
    )
    sae = TopKSAE(
        TopKSAEConfig(d_in=32, d_sae=64, k=4, metadata=SAEMetadata(hook_name=HOOK, context_size=16, prepend_bos=True))
    )
    sae.W_enc.data, sae.W_dec.data = weight.T.contiguous(), weight
    sae.save_model(folder / "topk")
    for name in ("sparsify", "dictionary_learning"):
        (folder / name).mkdir()
    (folder / "sparsify" / "cfg.json").write_text(
        json.dumps({"activation": "topk", "num_latents": 64, "k": 4, "transcode": False, "d_in": 32})
    )
    save_file(
        {"encoder.weight": weight, "encoder.bias": bias, "W_dec": weight.clone(), "b_dec": origin},
        folder / "sparsify" / "sae.safetensors",
    )
    trainer = {
        "dict_class": "AutoEncoderTopK",
        "activation_dim": 32,
        "dict_size": 64,
        "k": 4,
        "layer": 1,
        "submodule_name": "resid_post_layer_1",
    }
    (folder / "dictionary_learning" / "config.json").write_text(
        json.dumps({"trainer": trainer, "buffer": {"ctx_len": 16, "d_submodule": 32}})
    )
    state = {"encoder.weight": weight, "encoder.bias": bias, "decoder.weight": weight.T.contiguous(), "b_dec": origin}
    torch.save(state, folder / "dictionary_learning" / "ae.pt")


def _results(folder: Path) -> None:
    """What recipes wrote, and a concept."""
    shutil.copytree(folder / "m", folder / "r")
    probe = {
        "concept": "few",
        "kind": "trained",
        "model": "teacher",
        "baseline": False,
        "width": 32,
        "accuracy": 0.8,
        "low": 0.7,
        "high": 0.9,
        "majority": 0.5,
    }
    probe |= {
        "auroc": 0.9,
        "auroc_low": 0.8,
        "auroc_high": 0.95,
        "selectivity": 0.2,
        "selectivity_low": 0.1,
        "selectivity_high": 0.3,
        "control_accuracy": 0.6,
    }
    probes = {
        "schema": 1,
        "concepts": [{"name": "few", "classes": ["few", "many"]}],
        "settings": {"concepts": ["few"]},
        "probes": [probe],
    }
    (folder / "r" / "probes.json").write_text(json.dumps(probes))
    row = {
        "schema": 1,
        "student": "width8-seed0",
        "width": 8,
        "hook": HOOK,
        "tau": 0.5,
        "n_features": 64,
        "n_judged": 40,
        "kept": 12,
        "kept_teacher": 38,
    }
    row |= {
        "intervals": {"student": [10, 14]},
        "overlap": {"predicted": 0.6},
        "readouts": {"student": {"r2": 0.4}},
        "by_tau": {"0.5": {"student": 12}},
    }
    (folder / "r" / "recoverability.json").write_text(json.dumps([row]))
    (folder / "p").mkdir()
    (folder / "p" / "settings.json").write_text(
        json.dumps({"teacher": "embedded", "widths": [16, 32], "seeds": [0], "measure_tokens": 16_000, "lr": 3e-3})
    )
    (folder / "concept").mkdir()
    rows = [
        {"text": f"w{i} w{i + 1}", "label": "few" if i % 2 else "many", "document": f"document {i}"} for i in range(200)
    ]
    (folder / "concept" / "concept.jsonl").write_text("\n".join(map(json.dumps, rows)))


def _rename_tensors(record: Path, field: str, name: str) -> None:
    """A name that does not depend on the content, and a record without the hash of itself, so that
    changes get past it.
    """
    content = json.loads(record.read_bytes())
    previous(record).unlink(missing_ok=True)
    record.with_name(content[field]).rename(record.with_name(name))
    del content[SEAL]
    record.write_text(json.dumps({**content, field: name}))


def _distil(setup: Path, out: Path) -> None:
    """A distillation that keeps its last checkpoint."""
    import torch

    from tl_capacity.distillation import DistillSettings, distill

    rows = torch.arange(64).repeat(8, 1) % 60 + 2
    model, _ = load_folder(setup / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "remove", lambda folder: None)
        small = DistillSettings(tokens=60, batch_rows=2, evaluations=1, heldout_tokens=30, repeat=True)
        distill(model, [8], rows[:, :32], settings=small, out=out, progress=False)


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([2**63, -(2**63), 1e308, 10**400, "../../etc/passwd", "\ud800"]),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=4), children, max_size=3),
    max_leaves=4,
)


@st.composite
def changed_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """Bits flipped, and parts cut out, repeated or replaced."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, max(0, len(data) - 1)))
        stop = draw(st.integers(start, min(len(data), start + 64)))
        kind = draw(st.sampled_from(["flip", "truncate", "cut", "repeat", "replace", "insert"]))
        if kind == "flip" and data:
            data = data[:start] + bytes([data[start] ^ 1 << draw(st.integers(0, 7))]) + data[start + 1 :]
        elif kind == "truncate":
            data = data[:start]
        elif kind == "cut":
            data = data[:start] + data[stop:]
        elif kind == "repeat":
            data = data[:stop] + data[start:]
        else:
            data = data[:start] + draw(st.binary(max_size=16)) + data[stop if kind == "replace" else start :]
    return data


@st.composite
def changed_json(draw: st.DrawFn, data: bytes) -> bytes:
    """A value somewhere in it replaced, or a field taken away."""
    content = json.loads(data)
    place: Any = {"root": content}
    key: Any = "root"
    for _ in range(draw(st.integers(0, 5))):
        inner = place[key]
        if not isinstance(inner, (dict, list)) or not inner:
            break
        place, key = inner, draw(st.sampled_from(sorted(inner) if isinstance(inner, dict) else range(len(inner))))
    if draw(st.booleans()) and place is not None and key != "root":
        del place[key]
    else:
        place[key] = draw(values)
        content = place["root"] if key == "root" else content
    return json.dumps(content).encode()


def as_many(examples: int) -> int:
    """How many examples to try: so many in the suite, and more where the profile asks for more than Hypothesis does by
    itself; whether they are the same each time, the profile says too.
    """
    return examples * settings().max_examples // 100


@pytest.mark.slow
@pytest.mark.hypothesis
@pytest.mark.parametrize("name", KINDS)
def test_no_loader_raises_anything_else(
    name: str, samples: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    kind = KINDS[name]
    folder = tmp_path / "changed"
    shutil.copytree(samples / Path(kind.path).parent, folder)
    (tmp_path / "samples").symlink_to(samples)
    file = folder / Path(kind.path).name
    whole = file.read_bytes()
    kind.load(folder)
    changes, loaded, said = changed_bytes(whole), 0, list[str]()
    if file.suffix == ".json":
        changes |= changed_json(whole)

    @settings(max_examples=as_many(kind.examples), suppress_health_check=list(HealthCheck))
    @given(data=changes)
    def try_it(data: bytes) -> None:
        nonlocal loaded
        file.write_bytes(data)
        try:
            kind.load(folder)
            loaded += 1
        except PluginError:
            raise  # from a source that did not refuse by itself
        except CapacityError as problem:
            said.append(str(problem))
        assert file.read_bytes() == data

    try_it()
    record_property("kinds of files", 1)
    record_property("changed files that load, and then measure if they are of that kind", loaded)
    record_property("changed files that are refused", len(said))
    assert said
    assert not [sentence for sentence in said if "\n" in sentence]


COMMANDS: dict[str, list[str]] = {
    "measurement": ["budget", "FOLDER"],
    "statistics": ["floor", "FOLDER", "--widths", "4"],
    "distillation": ["decompose", "SAMPLES/m", "FOLDER"],
    "sweep": ["run", "toy-sweep", "--out", "FOLDER"],
    "sweep's students": ["run", "toy-sweep", "--out", "FOLDER"],
    "curve": ["floor", "FOLDER/curve.json", "--widths", "2"],
    "SAE configuration": ["doctor", "--model", "SAMPLES/model", "--sae", "FOLDER", "--source", "SAMPLES/text/text.txt"],
    "SAE weights": ["doctor", "--model", "SAMPLES/model", "--sae", "FOLDER", "--source", "SAMPLES/text/text.txt"],
    "model configuration": ["doctor", "--model", "FOLDER", "--sae", "SAMPLES/sae", "--source", "SAMPLES/text/text.txt"],
    "model weights": ["doctor", "--model", "FOLDER", "--sae", "SAMPLES/sae", "--source", "SAMPLES/text/text.txt"],
    "jsonl": ["doctor", "--model", "SAMPLES/model", "--sae", "SAMPLES/sae", "--source", "FOLDER/text.jsonl"],
    "parquet": ["doctor", "--model", "SAMPLES/model", "--sae", "SAMPLES/sae", "--source", "FOLDER/text.parquet"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_truncated_file_on_the_command_line(name: str, samples: Path, tmp_path: Path, cli: Cli) -> None:
    """One sentence, exit code 2, and every file as it was."""
    kind = KINDS[name]
    folder = tmp_path / "cut"
    shutil.copytree(samples / Path(kind.path).parent, folder)
    file = folder / Path(kind.path).name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    code, _, err = cli(
        *(part.replace("FOLDER", str(folder)).replace("SAMPLES", str(samples)) for part in COMMANDS[name])
    )
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


RECORDS = ("measurement", "distillation", "sweep")


@pytest.mark.hypothesis
@pytest.mark.parametrize("name", RECORDS)
def test_every_flipped_bit_is_seen(name: str, samples: Path, tmp_path: Path) -> None:
    """In a record as it is written, with the hash of itself: whichever bit flips, the file is refused, or means what it
    meant.
    """
    load = KINDS[name].load
    folder = tmp_path / "record"
    shutil.copytree(samples / Path(KINDS[name].path).parent, folder)
    written: Any = load(folder)
    if name != "sweep":  # the samples are without the hash
        written.save(folder)
    file = folder / Path(KINDS[name].path).name
    whole = file.read_bytes()
    assert SEAL.encode() in whole

    @settings(max_examples=as_many(200), suppress_health_check=list(HealthCheck))
    @given(place=st.integers(0, 8 * len(whole) - 1))
    def flip(place: int) -> None:
        data = bytearray(whole)
        data[place // 8] ^= 1 << place % 8
        file.write_bytes(bytes(data))
        try:
            found = load(folder)
        except CapacityError:
            return
        assert _json(found) == _json(written)

    flip()


def _json(found: Any) -> Any:
    return (
        found.to_json()
        if hasattr(found, "to_json")
        else {**found.settings.to_json(), "seconds": found.seconds, "machine": found.machine}
    )


@pytest.mark.parametrize("name", RECORDS)
def test_a_newer_schema(name: str, samples: Path, tmp_path: Path) -> None:
    folder = tmp_path / "record"
    shutil.copytree(samples / Path(KINDS[name].path).parent, folder)
    file = folder / Path(KINDS[name].path).name
    file.write_text(json.dumps({**json.loads(file.read_bytes()), "schema": 99}))
    with pytest.raises(CapacityError, match=r"has schema 99, and this version reads up to [12]: upgrade"):
        KINDS[name].load(folder)


@pytest.mark.parametrize("name", ["statistics", "students' weights", "sweep's students", "sweep's checkpoint"])
def test_a_wrong_hash(name: str, samples: Path, tmp_path: Path) -> None:
    """The last bit of the tensors, which no format checks."""
    kind = KINDS[name]
    folder = tmp_path / "hash"
    shutil.copytree(samples / Path(kind.path).parent, folder)
    file = folder / Path(kind.path).name
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(CapacityError, match="SHA-256"):
        kind.load(folder)
