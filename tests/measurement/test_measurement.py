"""Measurements on disk and in parts: whatever happens to the files, a reader gets the figures that were saved or one
sentence.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import same_written
from conftest import BOS
from place import on_cpu
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

import tl_capacity as tlc
from tl_capacity.errors import CapacityError, DictionaryError, MeasurementError
from tl_capacity.interfaces import FeatureSums, ImportanceEstimator, LatentBatch
from tl_capacity.measurement.folder import JSON_NAME, SCHEMA, read_folder, write_folder
from tl_capacity.measurement.measurement import Measurement
from tl_capacity.storage import files as storage
from tl_capacity.storage.digests import digest
from tl_capacity.text.streams import TokenStream

HOOK, EARLY = "blocks.1.hook_resid_post", "blocks.0.hook_resid_pre"


class MeanActivation(ImportanceEstimator):
    """An estimator with sums of its own, to see them through files and merges."""

    name, unit = "mean_activation", "latent"

    def start(self, sae: Any, groups: int, device: torch.device) -> dict[str, torch.Tensor]:
        return {"total": torch.zeros(groups, len(sae.W_dec), dtype=torch.float64, device=device)}

    def update(self, state: dict[str, torch.Tensor], batch: LatentBatch) -> None:
        state["total"].view(-1).index_add_(0, batch.groups * state["total"].shape[1] + batch.features, batch.values)

    def compute(self, sums: FeatureSums) -> np.ndarray:
        return np.maximum(sums.state["total"] / sums.tokens, 0)


@pytest.fixture(scope="module")
def measure(
    make_model: Callable[..., Any], make_sae: Callable[..., Any], tokenizer: Any, texts: list[str]
) -> Callable[..., Measurement]:
    """`measure(shard=, seed=, context=, …)`: a measurement of the texts in float64, whose sums do not depend on the
    batches they came in.
    """
    model = make_model("gpt_neox").double()

    def run(
        shard: tuple[int, int] = (0, 1), seed: int = 0, context: int = 16, max_tokens: int | None = None, **options: Any
    ) -> Measurement:
        saes = [make_sae("topk", HOOK, seed=seed, dtype="float64"), make_sae("standard", EARLY, dtype="float64")]
        options.setdefault("importance", ["second_moment", MeanActivation()])
        stream = TokenStream(texts, tokenizer, context=context, batch_rows=4, shard=shard)
        with tlc.add_capacity_hooks(model, saes, fvu_every=2, **options) as capacity:
            return capacity.run(stream, max_tokens).measurement()

    return run


@pytest.fixture(scope="module")
def whole(measure: Callable[..., Measurement]) -> Measurement:
    return measure()


@pytest.fixture(scope="module")
def shards(measure: Callable[..., Measurement]) -> list[Measurement]:
    return [measure(shard=(i, 4)) for i in range(4)]


@pytest.fixture(scope="module")
def saved(whole: Measurement, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return whole.save(tmp_path_factory.mktemp("saved") / "measurement")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of a saved measurement, to be spoilt."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def assert_same_sums(one: Measurement, other: Measurement, tolerance: float = 0.0) -> None:
    assert [(h.hook, h.sae, h.sae_digest, h.architecture, h.width, h.estimators) for h in one] == [
        (h.hook, h.sae, h.sae_digest, h.architecture, h.width, h.estimators) for h in other
    ]
    for mine, theirs in zip(one, other, strict=True):
        assert mine.summary.arrays.keys() == theirs.summary.arrays.keys()
        assert "state/mean_activation/total" in mine.summary.arrays
        for name, array in mine.summary.arrays.items():
            found = theirs.summary.arrays[name]
            assert array.dtype == found.dtype
            if tolerance and name == "masked":
                array, found = array[1:], found[1:]  # how much padding there is depends on which rows share a batch
            rounding = tolerance if on_cpu() else max(tolerance, 1e-12)  # a GPU adds in no fixed order
            if rounding and array.dtype == np.float64:
                np.testing.assert_allclose(found, array, rtol=rounding, atol=rounding, err_msg=name)
            else:
                np.testing.assert_array_equal(found, array, err_msg=name)


class TestRoundTrip:
    def test_bit_equal(self, whole: Measurement, saved: Path) -> None:
        loaded = Measurement.load(saved)
        assert_same_sums(whole, loaded)
        assert loaded.provenance == whole.provenance
        assert loaded.complete is True
        assert [h.summary.alive_threshold for h in loaded] == [h.summary.alive_threshold for h in whole]
        for mine, theirs in zip(whole, loaded, strict=True):
            for name in (
                "n_alive",
                "l0",
                "alpha",
                "critical_width",
                "heterogeneous_critical_width",
                "fvu",
                "features_chao2",
            ):
                assert getattr(theirs.summary, name) == getattr(mine.summary, name)
            for estimator in ("second_moment", "decoder_weighted"):
                np.testing.assert_array_equal(theirs.importance(estimator), mine.importance(estimator))

    def test_saved_again_it_is_the_same_file(self, saved: Path, tmp_path: Path) -> None:
        again = Measurement.load(str(saved)).save(str(tmp_path / "deep" / "down"))
        assert sorted(p.name for p in again.iterdir()) == sorted(p.name for p in saved.iterdir())
        assert all((again / p.name).read_bytes() == p.read_bytes() for p in saved.iterdir())

    def test_readable_without_the_package(self, whole: Measurement, saved: Path) -> None:
        def refuse(constant: str) -> None:
            raise AssertionError(f"{constant} is no JSON")

        content = json.loads((saved / JSON_NAME).read_text("utf-8"), parse_constant=refuse)
        assert content["schema"] == SCHEMA
        assert content["provenance"]["model"] == whole.provenance.model
        for hook, described in zip(whole, content["hooks"], strict=True):
            assert described["figures"]["l0"] == hook.summary.l0.to_json()
            assert described["figures"]["tokens"] == hook.summary.n_tokens
            assert described["figures"]["masked"] == hook.summary.masked

    def test_overwriting_leaves_no_litter(self, shards: list[Measurement], folder: Path) -> None:
        shards[0].save(folder)
        assert len(list(folder.iterdir())) == 2
        assert_same_sums(Measurement.load(folder), shards[0])

    def test_a_file_of_before_that_names_a_seed(self, whole: Measurement, folder: Path) -> None:
        content = storage.read_record(folder / JSON_NAME, SCHEMA)
        assert "seed" not in content["provenance"]
        content["provenance"]["seed"] = 0
        storage.write_record(folder / JSON_NAME, content)
        assert Measurement.load(folder).provenance == whole.provenance

    def test_undefined_figures(self, whole: Measurement, tmp_path: Path) -> None:
        """A dictionary that never fires has no α; it is still saved, with nulls."""
        silent = whole.hooks[0]
        arrays = {
            name: array if name in ("tokens", "documents", "decoder_norm", "masked") else np.zeros_like(array)
            for name, array in silent.summary.arrays.items()
        }
        dead = replace(whole, hooks=(replace(silent, summary=replace(silent.summary, arrays=arrays)),))
        loaded = Measurement.load(dead.save(tmp_path / "dead"))
        assert loaded.hooks[0].summary.n_alive.value == 0
        assert json.loads((tmp_path / "dead" / JSON_NAME).read_text())["hooks"][0]["figures"]["alpha"] == {
            "value": None,
            "low": None,
            "high": None,
        }


class TestMerge:
    @pytest.mark.parametrize("order", list(permutations(range(4)))[::5])
    def test_shards_in_any_order_are_the_whole(
        self, whole: Measurement, shards: list[Measurement], order: tuple[int, ...]
    ) -> None:
        merged = Measurement.merge([shards[i] for i in order])
        assert_same_sums(whole, merged, tolerance=1e-12)
        assert (merged.provenance.shards, merged.provenance.shard_count) == ((0,), 1)
        assert merged.provenance.cursor == whole.provenance.cursor
        assert merged.complete
        for mine, theirs in zip(whole, merged, strict=True):
            assert theirs.summary.n_tokens == mine.summary.n_tokens
            assert theirs.summary.l0.value == pytest.approx(mine.summary.l0.value, rel=1e-12)
            assert theirs.summary.fvu.value == pytest.approx(mine.summary.fvu.value, rel=1e-9)

    def test_in_steps_and_through_files(self, whole: Measurement, shards: list[Measurement], tmp_path: Path) -> None:
        halves = [
            Measurement.load(Measurement.merge(pair).save(tmp_path / str(i)))
            for i, pair in enumerate((shards[::2], shards[1::2]))
        ]
        merged = Measurement.merge(halves)
        assert_same_sums(whole, merged, tolerance=1e-12)
        assert (merged.provenance.shards, merged.provenance.shard_count) == ((0,), 1)

    def test_a_part_that_is_in_a_part_already(self, shards: list[Measurement]) -> None:
        some = Measurement.merge(shards[:3])
        for other in (shards[1], shards[2], some):
            with pytest.raises(MeasurementError, match="is given twice: merge each shard once"):
                Measurement.merge([some, other])
        assert some.provenance.shards == (0, 1, 2)
        assert Measurement.merge([some, shards[3]]).provenance.shard_count == 1

    def test_one_is_itself(self, whole: Measurement, shards: list[Measurement]) -> None:
        for single in (whole, shards[2]):
            assert_same_sums(Measurement.merge([single]), single)

    def test_nothing(self) -> None:
        with pytest.raises(MeasurementError, match="nothing to merge"):
            Measurement.merge([])

    def test_the_same_shard_twice(self, whole: Measurement, shards: list[Measurement]) -> None:
        for parts in ([shards[0], shards[1], shards[0]], [whole, whole]):
            with pytest.raises(MeasurementError, match="is given twice: merge each shard once"):
                Measurement.merge(parts)

    def test_cut_otherwise(self, measure: Callable[..., Measurement], shards: list[Measurement]) -> None:
        with pytest.raises(MeasurementError, match="shard_count is 4 in one and 3 in another"):
            Measurement.merge([shards[0], measure(shard=(1, 3))])

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ({"seed": 1}, "other hook points, SAE weights, estimators or thresholds"),
            ({"importance": ["second_moment"]}, "other hook points, SAE weights, estimators or thresholds"),
            ({"alive_threshold": 1e-4}, "other hook points, SAE weights, estimators or thresholds"),
            ({"context": 12}, "settings is"),
            ({"skip_first_positions": 1}, "settings is"),
            ({"mask_token_ids": [BOS, 5]}, "settings is"),
        ],
    )
    def test_measured_otherwise(
        self, measure: Callable[..., Measurement], shards: list[Measurement], options: dict[str, Any], says: str
    ) -> None:
        with pytest.raises(MeasurementError, match=says):
            Measurement.merge([shards[0], measure(shard=(1, 4), **options)])

    @pytest.mark.parametrize("name", ["model", "revision", "dtype", "source"])
    def test_another_origin(self, shards: list[Measurement], name: str) -> None:
        other = replace(shards[1], provenance=replace(shards[1].provenance, **{name: "something else"}))
        with pytest.raises(MeasurementError, match=f"{name} is .* 'something else'"):
            Measurement.merge([shards[0], other])

    def test_an_incomplete_part_makes_an_incomplete_whole(self, shards: list[Measurement]) -> None:
        assert not Measurement.merge([shards[0], replace(shards[1], complete=False)]).complete


def spoil(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the JSON of a measurement."""
    content = json.loads((folder / JSON_NAME).read_text())
    changed = change(content)
    (folder / JSON_NAME).write_text(json.dumps(content if changed is None else changed))


def respoil(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the arrays of a measurement and record the hash as if they had been saved so."""
    content = json.loads((folder / JSON_NAME).read_text())
    arrays = load_arrays((folder / content["statistics"]).read_bytes())
    change(arrays)
    data = save_arrays(arrays)
    (folder / content["statistics"]).write_bytes(data)
    spoil(folder, lambda content: content.update(statistics_sha256=digest(data)))


class TestDamage:
    def test_no_folder_and_no_file(self, folder: Path, tmp_path: Path) -> None:
        for missing in (tmp_path / "nowhere", tmp_path, folder / JSON_NAME):
            with pytest.raises(MeasurementError, match="is not a measurement"):
                Measurement.load(missing)

    def test_missing_arrays(self, folder: Path) -> None:
        next(folder.glob("*.safetensors")).unlink()
        with pytest.raises(MeasurementError, match=r"statistics-.* cannot be read .*copy the whole measurement folder"):
            Measurement.load(folder)

    @pytest.mark.parametrize("schema", [SCHEMA + 1, 10**9])
    def test_a_newer_schema(self, folder: Path, schema: int) -> None:
        spoil(folder, lambda content: content.update(schema=schema))
        with pytest.raises(
            MeasurementError, match=f"has schema {schema}, and this version reads up to {SCHEMA}: upgrade"
        ):
            Measurement.load(folder)

    @pytest.mark.parametrize(
        "content",
        [
            "",
            "{",
            "[]",
            "null",
            "3",
            '"text"',
            "{}",
            '{"schema": "1"}',
            '{"schema": 1}',
            '{"schema": 1, "statistics": 3}',
            "[" * 10**5,
            "\ufeff{}",
        ],
    )
    def test_another_json(self, folder: Path, content: str) -> None:
        (folder / JSON_NAME).write_text(content)
        with pytest.raises(MeasurementError):
            Measurement.load(folder)

    @pytest.mark.parametrize(
        "name",
        ["", ".", "..", "../statistics.safetensors", "/etc/passwd", "a\0b", "\ud800", "x" * 5000, "measurement.json"],
    )
    def test_another_statistics_file(self, folder: Path, name: str) -> None:
        spoil(folder, lambda content: content.update(statistics=name))
        with pytest.raises(MeasurementError):
            Measurement.load(folder)

    def test_every_truncation(self, folder: Path) -> None:
        for path in folder.iterdir():
            data = path.read_bytes()
            for length in sorted({0, 1, 7, 8, 9, len(data) - 1, *random.Random(0).choices(range(len(data)), k=60)}):
                path.write_bytes(data[:length])
                if data[length:].strip():  # a file without its last line break is whole
                    with pytest.raises(MeasurementError):
                        Measurement.load(folder)
            path.write_bytes(data)
        Measurement.load(folder)

    def test_any_flipped_bit_of_the_arrays(self, folder: Path) -> None:
        path = next(folder.glob("*.safetensors"))
        data, chance = path.read_bytes(), random.Random(1)
        for place in [*range(10), *chance.choices(range(len(data)), k=60)]:
            path.write_bytes(data[:place] + bytes([data[place] ^ 1 << chance.randrange(8)]) + data[place + 1 :])
            with pytest.raises(MeasurementError, match="truncated or altered"):
                Measurement.load(folder)

    def test_any_flipped_bit_of_the_arrays_whose_hash_was_mended(self, folder: Path) -> None:
        """Then only the format and the sums themselves can tell."""
        path = next(folder.glob("*.safetensors"))
        data, chance = path.read_bytes(), random.Random(2)
        for place in [*range(10), *chance.choices(range(3000), k=200)]:
            flipped = data[:place] + bytes([data[place] ^ 1 << chance.randrange(8)]) + data[place + 1 :]
            path.write_bytes(flipped)
            spoil(folder, lambda content, flipped=flipped: content.update(statistics_sha256=digest(flipped)))
            loads_or_says_why(folder)

    def test_any_flipped_bit_of_the_json(self, unchecked: None, folder: Path) -> None:
        path = folder / JSON_NAME
        data, chance = path.read_bytes(), random.Random(3)
        for place in chance.choices(range(len(data)), k=200):
            path.write_bytes(data[:place] + bytes([data[place] ^ 1 << chance.randrange(8)]) + data[place + 1 :])
            loads_or_says_why(folder)

    def test_any_value_replaced(self, unchecked: None, folder: Path) -> None:
        """Each value of the JSON by every third of these, or gone; what is loaded all the same must be fit for use."""
        original = json.loads((folder / JSON_NAME).read_text())
        odd = [
            None,
            True,
            -1,
            0,
            3,
            1e300,
            float("nan"),
            float("inf"),
            "",
            "text",
            [],
            [1, 2, 3],
            ["a", "b"],
            {},
            {"a": 1},
        ]
        for number, path in enumerate(places(original)):
            for value in [*odd[number % 3 :: 3], "gone"]:
                content = json.loads(json.dumps(original))
                holder = content
                for key in path[:-1]:
                    holder = holder[key]
                if value == "gone":
                    del holder[path[-1]]
                else:
                    holder[path[-1]] = value
                (folder / JSON_NAME).write_text(json.dumps(content))
                loads_or_says_why(folder)

    def test_a_hook_removed_or_added(self, folder: Path) -> None:
        original = json.loads((folder / JSON_NAME).read_text())["hooks"]
        for hooks in ([], original[:1], original * 2):
            spoil(folder, lambda content, hooks=hooks: content.update(hooks=hooks))
            with pytest.raises(MeasurementError):
                Measurement.load(folder)

    @pytest.mark.parametrize(
        "change",
        [
            lambda arrays: arrays.pop("0/counts"),
            lambda arrays: arrays.update({"0/counts": arrays["0/counts"].astype(np.float64)}),
            lambda arrays: arrays.update({"0/counts": -arrays["0/counts"]}),
            lambda arrays: arrays.update({"0/counts": arrays["0/counts"][:, :-1]}),
            lambda arrays: arrays.update({"1/squares": np.full_like(arrays["1/squares"], np.inf)}),
            lambda arrays: arrays.update({"1/tokens": np.zeros_like(arrays["1/tokens"])}),
            lambda arrays: arrays.update({"1/incidence": arrays["1/incidence"][None]}),
            lambda arrays: arrays.update({"0/counts": arrays["0/counts"] + arrays["0/tokens"][:, None]}),
            lambda arrays: arrays.update({"0/state/mean_activation/total": np.zeros((3, 5))}),
            lambda arrays: arrays.update({"0/state/mean_activation/total": np.full((64, 64), np.nan)}),
            lambda arrays: arrays.update({"1/incidence": arrays["1/incidence"] + 1000}),
            lambda arrays: arrays.clear(),
        ],
    )
    def test_arrays_that_do_not_fit(self, folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
        respoil(folder, change)
        with pytest.raises(MeasurementError):
            Measurement.load(folder)


def places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value of a JSON document but the figures, which are there for other readers and read by nothing
    here.
    """
    children = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in children:
        yield (*path, key)
        if key not in ("figures", "versions"):
            yield from places(value, (*path, key))


def loads_or_says_why(folder: Path) -> None:
    try:
        measurement = Measurement.load(folder)
    except MeasurementError:
        return
    assert all(isinstance(h.hook, str) and h.width > 0 and h.summary.n_tokens > 0 for h in measurement)
    assert all(0 <= shard < measurement.provenance.shard_count for shard in measurement.provenance.shards)
    json.dumps(measurement.to_json()["provenance"], allow_nan=False)


class TestFailingWrites:
    """A disk that fills up, at either of the two files."""

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
    @pytest.mark.parametrize("which", ["arrays", "json"])
    def test_the_earlier_measurement_stays(
        self, whole: Measurement, shards: list[Measurement], folder: Path, tmp_path: Path, which: str
    ) -> None:
        name = JSON_NAME if which == "json" else next(shards[0].save(tmp_path / "other").glob("*.safetensors")).name
        (folder / f".{name}.{os.getpid()}.writing").symlink_to("/dev/full")
        with pytest.raises(
            CapacityError,
            match=rf"{name} cannot be written \(No space left on device\).*what was there before is whole",
        ):
            shards[0].save(folder)
        assert_same_sums(Measurement.load(folder), whole)
        assert not list(folder.glob(".*"))
        shards[0].save(folder)
        assert_same_sums(Measurement.load(folder), shards[0])
        assert len(list(folder.iterdir())) == 2

    def test_a_size_limit(self, whole: Measurement, shards: list[Measurement], folder: Path) -> None:
        resource = pytest.importorskip("resource")
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
            with pytest.raises(CapacityError, match="cannot be written"):
                shards[0].save(folder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert_same_sums(Measurement.load(folder), whole)
        assert len(list(folder.iterdir())) == 2

    def test_a_file_in_the_way(self, whole: Measurement, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("in the way")
        for target in (tmp_path / "file", tmp_path / "file" / "below"):
            with pytest.raises(CapacityError, match="cannot be created"):
                whole.save(target)
        assert (tmp_path / "file").read_text() == "in the way"


class TestResume:
    @pytest.fixture
    def attach(self, make_model: Callable[..., Any], make_sae: Callable[..., Any]) -> Callable[..., Any]:
        model = make_model("gpt_neox")

        def attach(seed: int = 0, hooks: tuple[str, ...] = (HOOK, EARLY)) -> Any:
            saes = [make_sae("topk", hook, seed=seed + i) for i, hook in enumerate(hooks)]
            return tlc.add_capacity_hooks(model, saes, fvu_every=2, importance=["second_moment", MeanActivation()])

        return attach

    @pytest.fixture
    def stream(self, tokenizer: Any, texts: list[str]) -> TokenStream:
        return TokenStream(texts, tokenizer, context=12, batch_rows=3)

    @staticmethod
    def checkpoint(handle: Any, stream: Any, folder: Path, batches: int) -> Path:
        """Run so many batches, and save a checkpoint as the command line does."""
        done = 0

        class StopError(Exception):
            pass

        def after(capacity: Any) -> None:
            nonlocal done
            done += 1
            if done == batches:
                measurement, extra = capacity.checkpoint()
                arrays = {
                    f"{i}/{name}": array
                    for i, h in enumerate(measurement.hooks)
                    for name, array in h.summary.arrays.items()
                }
                write_folder(folder, measurement.to_json(), arrays | extra)
                raise StopError

        with handle as capacity, pytest.raises(StopError):
            capacity.run(stream, after_batch=after)
        return folder

    @staticmethod
    def load(folder: Path) -> tuple[Measurement, dict[str, Any]]:
        return Measurement.load(folder), {
            name: array for name, array in read_folder(folder)[1].items() if name.startswith("resume/")
        }

    @pytest.mark.parametrize("batches", [1, *(pytest.param(batches, marks=pytest.mark.slow) for batches in (2, 5, 11))])
    def test_equals_the_uninterrupted_run(
        self, attach: Callable[..., Any], stream: TokenStream, tmp_path: Path, batches: int
    ) -> None:
        with attach() as capacity:
            whole = capacity.run(stream).measurement()
        folder = self.checkpoint(attach(), stream, tmp_path / "run", batches)
        earlier, extra = self.load(folder)
        assert not earlier.complete
        assert earlier.provenance.cursor == 3 * batches < whole.provenance.cursor
        with attach() as capacity:
            capacity.resume(earlier, extra)
            resumed = capacity.run(stream).measurement()
        assert_same_sums(whole, resumed)
        same_written(resumed, whole)
        assert resumed.complete

    @pytest.mark.parametrize("batches", [1, 5])
    def test_at_the_very_end_counts_no_more(
        self, attach: Callable[..., Any], stream: TokenStream, tmp_path: Path, batches: int
    ) -> None:
        """The checkpoint of the batch that brought the tokens asked for, from which no measurement was written."""
        earlier, extra = self.load(self.checkpoint(attach(), stream, tmp_path / "run", batches))
        counted = earlier.hooks[0].summary.n_tokens
        with attach() as capacity:
            whole = capacity.run(stream, counted).measurement()
        with attach() as capacity:
            capacity.resume(earlier, extra)
            resumed = capacity.run(stream, counted).measurement()
        assert_same_sums(whole, resumed)
        same_written(resumed, whole)
        assert whole.provenance.cursor == 3 * batches

    def test_twice(self, attach: Callable[..., Any], stream: TokenStream, tmp_path: Path) -> None:
        with attach() as capacity:
            whole = capacity.run(stream).measurement()
        folder = self.checkpoint(attach(), stream, tmp_path / "run", 3)
        again = attach()
        again.resume(*self.load(folder))
        self.checkpoint(again, stream, folder, 4)
        with attach() as capacity:
            capacity.resume(*self.load(folder))
            assert capacity.rows == 21
            assert_same_sums(whole, capacity.run(stream).measurement())

    def test_with_another_stream(
        self, attach: Callable[..., Any], stream: TokenStream, texts: list[str], tmp_path: Path
    ) -> None:
        folder = self.checkpoint(attach(), stream, tmp_path / "run", 3)
        for other in (
            replace(stream, source=texts[1:]),
            replace(stream, batch_rows=4),
            replace(stream, batch_rows=9),
            replace(stream, source=texts[:1]),
        ):
            with attach() as capacity:
                capacity.resume(*self.load(folder))
                counted = capacity.n_tokens
                with pytest.raises(CapacityError, match="the stream"):
                    capacity.run(other)
                assert capacity.n_tokens == counted

    def test_with_other_saes(self, attach: Callable[..., Any], stream: TokenStream, tmp_path: Path) -> None:
        earlier = self.load(self.checkpoint(attach(), stream, tmp_path / "run", 2))
        with (
            attach(seed=5) as capacity,
            pytest.raises(DictionaryError, match=f"the SAE at {HOOK} has other weights than the one measured before"),
        ):
            capacity.resume(*earlier)
        for hooks in ((HOOK,), (EARLY, HOOK), (HOOK, "blocks.2.hook_resid_pre")):
            with attach(hooks=hooks) as capacity, pytest.raises(CapacityError, match="resume with the same SAE"):
                capacity.resume(*earlier)

    def test_a_finished_run(self, attach: Callable[..., Any], stream: TokenStream) -> None:
        with attach() as capacity:
            whole = capacity.run(stream).measurement()
        with attach() as capacity, pytest.raises(CapacityError, match="cannot be resumed"):
            capacity.resume(whole, {})
