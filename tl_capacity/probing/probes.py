"""Linear probes: how well a logistic regression tells a concept from a model's activations of unseen documents.

A control task (Hewitt & Liang 2019, arXiv:1909.03368) measures what the probe itself can learn by heart; intervals come
from a bootstrap over documents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray

from tl_capacity.errors import CapacityError
from tl_capacity.probing.activations import Activations
from tl_capacity.probing.concepts import LabelledTexts
from tl_capacity.probing.rows import ProbeNumbers
from tl_capacity.results.estimate import Estimate, cluster_bootstrap
from tl_capacity.runtime.checks import checked

PENALTIES = tuple(10.0**power for power in range(-4, 2))
"""Values of C, the inverse penalty of scikit-learn's logistic regression.

Of equally good ones, the strongest penalty is taken.
"""
FOLDS = 5
WIDEST_NEWTON = 1_024
"""Up to this many columns, Newton's method is faster than L-BFGS with the same coefficients: 2 to 4 times at 128."""


@dataclass(frozen=True)
class Probe:
    """A fitted probe, and its figures on unseen documents.

    Attributes:
        concept: its name.
        hook, width, pooling: of what it reads.
        c: C, chosen by cross-validation on the training split.
        n_train: rows that it was fitted on.
        accuracy, auroc: on the test split, with 95% intervals from a bootstrap over documents.
        control_accuracy: of the same kind of probe on the control task; None where none was asked for.
        selectivity: accuracy minus control accuracy.
        majority: accuracy of always saying the commoner class.
        weights: [width] of the standardised activations.
        scores: [row] log-odds of the first class on the test split.
        labels, documents: [row] whether a test row is of the first class, and the number of its document.
        control_correct: [row] whether the control probe is right; empty where there is none.
    """

    concept: str
    hook: str
    width: int
    pooling: str
    c: float
    n_train: int
    accuracy: Estimate
    auroc: Estimate
    majority: float
    weights: NDArray[np.float64]
    scores: NDArray[np.float64]
    labels: NDArray[np.bool_]
    documents: NDArray[np.int64]
    control_correct: NDArray[np.bool_]
    control_accuracy: float | None = None
    selectivity: Estimate | None = None

    @property
    def correct(self) -> NDArray[np.bool_]:
        """[row] whether the probe is right."""
        return np.asarray((self.scores > 0) == self.labels)

    def to_state(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """The probe as JSON and arrays, from which `of_state` makes it again."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        arrays = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
        return {
            name: asdict(value) if isinstance(value, Estimate) else value
            for name, value in values.items()
            if name not in arrays
        }, arrays

    @classmethod
    def of_state(cls, values: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> Probe:
        """The probe that `to_state` took apart."""
        state: dict[str, Any] = {
            name: Estimate(**value) if isinstance(value, dict) else value for name, value in values.items()
        } | dict(arrays)
        return cls(**state)

    @property
    def numbers(self) -> ProbeNumbers:
        """Everything but the arrays."""
        return ProbeNumbers(
            concept=self.concept,
            hook=self.hook,
            pooling=self.pooling,
            width=self.width,
            accuracy=self.accuracy,
            auroc=self.auroc,
            control=self.control_accuracy,
            selectivity=self.selectivity,
            majority=self.majority,
            c=self.c,
            n_train=self.n_train,
            n_test=len(self.labels),
            test_documents=len(np.unique(self.documents)),
        )

    def to_json(self) -> dict[str, Any]:
        """Everything but the arrays, as a flat JSON object."""
        return self.numbers.to_json()


@checked
def fit_probes(
    activations: Mapping[str, Activations],
    concepts: Sequence[LabelledTexts],
    *,
    split: str = "test",
    control: bool = True,
    seed: int = 0,
) -> list[Probe]:
    """A logistic regression for each concept, fitted on the training split and judged on another one.

    Args:
        activations: of each concept's texts, by the concept's name.
        concepts: the concepts.
        split: what to judge on; to choose a hook point or a pooling, use "validation" and leave the test split alone.
        control: also fit a probe for the control task.
        seed: of folds, control labels and resamples.

    Raises:
        CapacityError: where activations are missing, are not of the concept's texts, or are not finite, or where a
            split lacks a class.
    """
    if split not in ("validation", "test"):
        raise CapacityError(f"a probe is not judged on the {split!r} split: choose validation or test")
    return [_fit(_activations_of(activations, concept), concept, split, control, seed) for concept in concepts]


def probes_frame(probes: Sequence[Probe]) -> Any:
    """Probes as a pandas DataFrame, with one row for each and the columns of `Probe.to_json`."""
    import pandas

    return pandas.DataFrame([probe.to_json() for probe in probes])


def on_principal_components(activations: Activations, concept: LabelledTexts, width: int) -> Activations:
    """Activations projected on their first `width` principal components, fitted on the training split.

    No other `width` dimensions keep more of the variance.

    They are fewer where there are fewer training rows or dimensions.
    """
    from sklearn.decomposition import PCA

    train = concept.splits[activations.texts] == "train"
    components = PCA(min(width, activations.width, int(train.sum())), svd_solver="full").fit(activations.values[train])
    return replace(activations, values=components.transform(activations.values).astype(np.float32))


def difference(probe: Probe, other: Probe, seed: int = 0) -> Estimate:
    """Accuracy of one probe minus another's on the same test texts, which are resampled together.

    Raises:
        CapacityError: where they were tested on other rows.
    """
    if not (np.array_equal(probe.documents, other.documents) and np.array_equal(probe.labels, other.labels)):
        raise CapacityError(
            f"the probes of {probe.concept!r} and {other.concept!r} were tested on different rows: compare probes of"
            " one concept, split and pooling"
        )
    gained = probe.correct.astype(np.float64) - other.correct
    return cluster_bootstrap(lambda weights: _weighted_mean(gained, weights), probe.documents, seed)


def weighted_auroc(
    scores: Float[np.ndarray, " row"], labels: Bool[np.ndarray, " row"], weights: Float[np.ndarray, "replicate row"]
) -> Float[np.ndarray, " replicate"]:
    """Area under the ROC curve in each replicate.

    It is the weighted share of pairs of a positive and a negative row that are in order; ties count half.

    NaN where a replicate has no positive or no negative row.
    """
    order = np.argsort(scores, kind="stable")
    ordered, positive = scores[order], labels[order]
    ties = np.flatnonzero(np.concatenate([[True], np.diff(ordered) > 0]))
    positives = np.add.reduceat(weights[:, order] * positive, ties, axis=1)
    negatives = np.add.reduceat(weights[:, order] * ~positive, ties, axis=1)
    below = np.cumsum(negatives, axis=1) - negatives
    pairs = positives.sum(axis=1) * negatives.sum(axis=1)
    in_order = (positives * (below + negatives / 2)).sum(axis=1)
    return np.asarray(np.divide(in_order, pairs, out=np.full(len(pairs), np.nan), where=pairs > 0))


def control_labels(
    activations: Activations, train: Bool[np.ndarray, " row"], seed: int = 0
) -> Bool[np.ndarray, " row"]:
    """Labels of the control task of Hewitt & Liang 2019, which say nothing about the concept.

    Each token type gets a random number once. A row's label says whether the mean over its pooled tokens is above the
    median training row's. For rows of one token, this is their word-type task.

    They say nothing of the concept, and stay the same wherever a type occurs: a probe can get them right only by
    knowing the types.
    """
    value = np.random.default_rng(seed).standard_normal(1 + max(int(ids.max()) for ids in activations.tokens))
    votes = np.array([value[ids].mean() for ids in activations.tokens])
    return np.asarray(votes > np.median(votes[train]))


def logistic_regression(
    values: Float[np.ndarray, "row column"],
    labels: Bool[np.ndarray, " row"],
    documents: Int[np.ndarray, " row"],
    seed: int = 0,
) -> tuple[Any, float]:
    """The fitted probe, a scikit-learn pipeline, and its C.

    C has the highest mean log-likelihood over held-out folds. Each fold is standardised anew.

    What scikit-learn's `GridSearchCV` over the pipeline chooses, at half of its cost: a fold is standardised once for
    all C.

    Raises:
        CapacityError: where a class has a single document.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    solver = "newton-cholesky" if values.shape[1] <= WIDEST_NEWTON else "lbfgs"
    loss = np.zeros(len(PENALTIES))
    for train, held in folds_of(labels, documents, seed):
        scaler = StandardScaler().fit(values[train])
        inside, outside, sign = (
            scaler.transform(values[train]),
            scaler.transform(values[held]),
            np.where(labels[held], 1, -1),
        )
        for i, c in enumerate(PENALTIES):
            model = LogisticRegression(C=c, solver=solver, max_iter=5_000).fit(inside, labels[train])
            loss[i] += np.logaddexp(0, -sign * model.decision_function(outside)).mean()
    best = PENALTIES[int(loss.argmin())]
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=best, solver=solver, max_iter=5_000))
    return probe.fit(values, labels), best


def folds_of(
    labels: Bool[np.ndarray, " row"], documents: Int[np.ndarray, " row"], seed: int = 0
) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Up to five folds of whole documents, each with about the same share of both classes.

    Raises:
        CapacityError: where a class has a single document.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    n_folds = min(FOLDS, *(len(np.unique(documents[labels == label])) for label in (True, False)))
    if n_folds < 2:
        raise CapacityError(
            "a class has only one training document, so C cannot be cross-validated over documents: add documents, or"
            " leave documents unnamed"
        )
    folds = StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed).split(labels, labels, documents)
    return [
        (train, held) for train, held in folds if len(np.unique(labels[train])) == len(np.unique(labels[held])) == 2
    ]


def _fit(activations: Activations, concept: LabelledTexts, split: str, control: bool, seed: int) -> Probe:
    splits, documents = concept.splits[activations.texts], concept.documents[activations.texts]
    train, test = splits == "train", splits == split
    values = activations.values.astype(np.float64)  # in float32 the solvers stop short of the optimum
    labels = concept.labels[activations.texts]
    if len(np.unique(labels[test])) < 2:
        raise CapacityError(
            f"the {split} split of the concept {concept.name!r} does not hold texts of both classes: judge on another"
            " split"
        )
    fitted, c = logistic_regression(values[train], labels[train], documents[train], seed)
    scores = fitted.decision_function(values[test])
    correct = (scores > 0) == labels[test]
    commoner = bool(labels[train].mean() > 0.5)
    probe = Probe(
        concept=concept.name,
        hook=activations.hook,
        width=activations.width,
        pooling=activations.pooling,
        c=c,
        n_train=int(train.sum()),
        accuracy=cluster_bootstrap(lambda weights: _weighted_mean(correct, weights), documents[test], seed),
        auroc=cluster_bootstrap(lambda weights: weighted_auroc(scores, labels[test], weights), documents[test], seed),
        majority=float((labels[test] == commoner).mean()),
        weights=fitted[-1].coef_[0],
        scores=scores,
        labels=labels[test],
        documents=documents[test],
        control_correct=np.zeros(0, dtype=np.bool_),
    )
    if not control:
        return probe
    random_labels = control_labels(activations, train, seed)
    fitted, _ = logistic_regression(values[train], random_labels[train], documents[train], seed)
    right = np.asarray(fitted.predict(values[test]) == random_labels[test])
    gained = correct.astype(np.float64) - right
    return replace(
        probe,
        control_correct=right,
        control_accuracy=float(right.mean()),
        selectivity=cluster_bootstrap(lambda weights: _weighted_mean(gained, weights), documents[test], seed),
    )


def _activations_of(activations: Mapping[str, Activations], concept: LabelledTexts) -> Activations:
    collected = activations.get(concept.name)
    if collected is None:
        raise CapacityError(f"there are no activations of the concept {concept.name!r}: collect those of its texts")
    if len(np.unique(collected.texts)) != len(concept.texts):
        raise CapacityError(
            f"the activations of {concept.name!r} are of {len(np.unique(collected.texts)):,} texts, but it has"
            f" {len(concept.texts):,}: collect all of them"
        )
    if not np.isfinite(collected.values).all():
        raise CapacityError(
            f"the activations of {concept.name!r} at {collected.hook} hold NaN or infinite values: collect them again"
        )
    return collected


def _weighted_mean(values: NDArray[Any], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(weights @ values.astype(np.float64) / weights.sum(axis=1))
