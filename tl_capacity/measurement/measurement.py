"""Measurement: what was measured, on what and how, one `HookMeasurement` for each SAE. On disk it is a JSON file and a
safetensors file named by its hash.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from tl_capacity.errors import CapacityError, MeasurementError
from tl_capacity.measurement.exports import page_writer
from tl_capacity.measurement.folder import JSON_NAME, read_folder, write_folder
from tl_capacity.measurement.provenance import Provenance, provenance_from_json, typed_field
from tl_capacity.results.columns import recorded
from tl_capacity.results.estimate import Estimate
from tl_capacity.results.hook import HookMeasurement
from tl_capacity.results.naming import hook_named, told_apart
from tl_capacity.results.summary import FeatureSummary
from tl_capacity.results.sums import check_sums, merge_sums
from tl_capacity.runtime.checks import checked
from tl_capacity.show.notebook import ShownInNotebooks

if TYPE_CHECKING:
    from tl_capacity.predict.budget import Budget
    from tl_capacity.predict.floors import FloorPrediction


@dataclass(frozen=True)
class Measurement(ShownInNotebooks):
    """What a run over text found at each tapped hook point. Immutable; `save` and `load` keep it,
    `merge` joins shards.
    """

    hooks: tuple[HookMeasurement, ...]
    provenance: Provenance = field(default_factory=Provenance)
    complete: bool = True

    def __repr__(self) -> str:
        tokens = self.hooks[0].summary.n_tokens if self.hooks else 0
        return (
            f"Measurement({self.provenance.model} at {', '.join(h.hook for h in self.hooks)}; {tokens:,} tokens of"
            f" {self.provenance.source})"
        )

    def __iter__(self) -> Iterator[HookMeasurement]:
        return iter(self.hooks)

    def __getitem__(self, hook: str) -> HookMeasurement:
        """The measurement at a hook point.

        Raises:
            CapacityError: where nothing was measured there, or several SAEs were: iterate to see each.
        """
        return hook_named(self.hooks, hook)

    @property
    def n_alive(self) -> dict[str, Estimate]:
        """F of each hook point, the number of alive features. Where several SAEs were measured, by the SAE's name."""
        name = told_apart(self.hooks)
        return {name(hook): hook.n_alive for hook in self.hooks}

    @property
    def d_star(self) -> dict[str, Estimate]:
        """d* of each hook point, in dimensions. Where several SAEs were measured, by the SAE's name."""
        name = told_apart(self.hooks)
        return {name(hook): hook.d_star for hook in self.hooks}

    @checked
    def budget(
        self,
        widths: Iterable[int] = (),
        importance: str | None = None,
        law: str | None = None,
        max_fvu: float | None = 1.0,
    ) -> Budget:
        """The per-layer table, with predicted floors for `widths`.

        Raises:
            CapacityError: where an SAE explains less than the mean does (FVU > `max_fvu`), so that its features are not
                the model's.
        """
        from tl_capacity.predict.budget import Budget

        return Budget.predict(self.hooks, tuple(widths), importance, law, max_fvu, self.warnings)

    @checked
    def floors(
        self,
        widths: Iterable[int],
        importance: str | None = None,
        law: str | None = None,
        max_fvu: float | None = 1.0,
    ) -> list[FloorPrediction]:
        """Predicted floors of every hook point and width; arguments as in `budget`."""
        return list(self.budget(widths, importance, law, max_fvu).floors)

    def to_frame(self) -> Any:
        """The per-layer table as a pandas DataFrame."""
        return self.budget(max_fvu=None).to_frame()

    def _repr_html_(self) -> str:
        return self.budget(max_fvu=None)._repr_html_()

    @checked
    def plot(
        self,
        widths: Sequence[int] = (),
        importance: str | None = None,
        law: str | None = None,
        hook: str | None = None,
    ) -> Any:
        """A plotly figure of the sorted importances, with the budget of each student width marked; see
        `measurement.figures.importance_figure`.
        """
        from tl_capacity.measurement.figures import importance_figure

        return importance_figure(self, widths, importance, law, hook)

    plot_importance = plot

    @checked
    def report(self, path: str | Path, widths: Sequence[int] = ()) -> Path:
        """Write one self-contained HTML page that shows the measurement, and return its path.

        Args:
            path: of the file.
            widths: student widths that the page predicts floors of; by default some between a sixteenth of the hook
                point's width and all of it.

        Raises:
            CapacityError: where the page cannot be written.
        """
        return page_writer()(self, Path(path), tuple(widths))

    @cached_property
    def warnings(self) -> list[str]:
        """What a reader must know before trusting the figures."""
        from tl_capacity.predict.caveats import measurement_warnings

        return measurement_warnings(self.hooks, self.complete)

    @checked
    def save(self, folder: str | Path) -> Path:
        """Write the measurement to `folder`. What was there stays whole if the process dies or the disk fills
        meanwhile.

        Raises:
            CapacityError: where the folder cannot be written.
        """
        return write_folder(Path(folder), self.to_json(), self.arrays())

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The sums of every hook point, under the names on disk: `place of the hook/name of the sum`."""
        return {f"{i}/{name}": array for i, h in enumerate(self.hooks) for name, array in h.summary.arrays.items()}

    def to_json(self) -> dict[str, Any]:
        """Everything except the arrays."""
        return {
            "complete": self.complete,
            "provenance": asdict(self.provenance),
            "hooks": [
                {
                    "hook": h.hook,
                    "sae": h.sae,
                    "sae_digest": h.sae_digest,
                    "architecture": h.architecture,
                    "width": h.width,
                    "alive_threshold": h.summary.alive_threshold,
                    "estimators": list(h.estimators),
                    "d_model": h.d_model,
                    "linear": h.linear,
                    "figures": recorded(h),
                    **({"notes": list(h.notes)} if h.notes else {}),
                    **({"neuronpedia_id": h.neuronpedia_id} if h.neuronpedia_id else {}),
                }
                for h in self.hooks
            ],
        }

    @classmethod
    @checked
    def load(cls, folder: str | Path) -> Measurement:
        """Read a measurement and check everything that it relies on.

        Raises:
            MeasurementError: where it is missing, truncated, altered, or of a newer schema.
        """
        return cls.read(Path(folder) / JSON_NAME)

    @classmethod
    def read(cls, path: Path) -> Measurement:
        """As `load`, from the measurement's JSON file."""
        content, arrays = read_folder(path.parent, path.name)
        try:
            hooks = []
            for i, saved in enumerate(content["hooks"]):
                sums = {key.removeprefix(f"{i}/"): value for key, value in arrays.items() if key.startswith(f"{i}/")}
                check_sums(sums, str(path.parent))
                hooks.append(
                    HookMeasurement(
                        **{
                            name: typed_field(saved, name, str)
                            for name in ("hook", "sae", "sae_digest", "architecture")
                        },
                        width=typed_field(saved, "width", int),
                        summary=FeatureSummary(sums, float(typed_field(saved, "alive_threshold", (int, float)))),
                        estimators=tuple(map(str, typed_field(saved, "estimators", list))),
                        d_model=typed_field({"d_model": None, **saved}, "d_model", (int, type(None))),
                        # Version 0.1 had none.
                        notes=tuple(map(str, typed_field({"notes": [], **saved}, "notes", list))),
                        linear=typed_field({"linear": None, **saved}, "linear", (bool, type(None))),
                        neuronpedia_id=typed_field(
                            {"neuronpedia_id": None, **saved}, "neuronpedia_id", (str, type(None))
                        ),
                    )
                )
            if not hooks or f"{len(hooks)}/counts" in arrays:
                raise IndexError(f"the list of hooks, of which it names {len(hooks)}")
            return cls(
                tuple(hooks), provenance_from_json(content["provenance"]), typed_field(content, "complete", bool)
            )
        except MeasurementError:
            raise
        except (CapacityError, KeyError, TypeError, AttributeError, IndexError, ValueError, OverflowError) as problem:
            raise MeasurementError(
                f"{path} lacks or garbles {problem}: the measurement was altered, so measure again"
            ) from problem

    @classmethod
    @checked
    def merge(cls, parts: Sequence[Measurement]) -> Measurement:
        """Join shards of one measurement. Counts are exact; moments are exact up to rounding.

        Raises:
            MeasurementError: where the shards measured other models, SAEs, sources or settings, or the same documents
                twice.
        """
        if not parts:
            raise MeasurementError("there is nothing to merge: pass at least one measurement")
        first, shards = parts[0], sorted(shard for p in parts for shard in p.provenance.shards)
        for part in parts[1:]:
            odd = first.provenance.difference(part.provenance, may_differ=("shards",))
            if odd is not None:
                raise MeasurementError(
                    f"the shards do not fit together: {odd.name} is {odd.mine!r} in one and {odd.theirs!r} in another;"
                    " merge shards of one measurement"
                )
            if _tapped(first) != _tapped(part):
                raise MeasurementError(
                    "the shards do not fit together: they have other hook points, SAE weights, estimators or"
                    " thresholds; merge shards of one measurement"
                )
        if len(set(shards)) < len(shards):
            twice = sorted({shard for shard in shards if shards.count(shard) > 1})
            raise MeasurementError(
                f"shard {', '.join(map(str, twice))} of {first.provenance.shard_count} is given twice: merge each shard"
                " once"
            )
        hooks = []
        for together in zip(*(p.hooks for p in parts), strict=True):
            arrays = dict(together[0].summary.arrays)
            for other in together[1:]:
                arrays = merge_sums(arrays, other.summary.arrays)
            linear = next((hook.linear for hook in together if hook.linear is not None), None)
            summary = replace(together[0].summary, arrays=arrays)
            hooks.append(replace(together[0], summary=summary, linear=linear))
        whole = len(shards) == first.provenance.shard_count
        joined = replace(
            first.provenance,
            shards=(0,) if whole else tuple(shards),
            shard_count=1 if whole else first.provenance.shard_count,
            cursor=sum(p.provenance.cursor for p in parts),
            tokens_digest="" if len(parts) > 1 else first.provenance.tokens_digest,
            seconds=sum(p.provenance.seconds for p in parts),
        )
        return cls(tuple(hooks), joined, all(p.complete for p in parts))


def _tapped(measurement: Measurement) -> list[tuple[Any, ...]]:
    return [(h.hook, h.sae_digest, h.estimators, h.summary.alive_threshold) for h in measurement.hooks]
