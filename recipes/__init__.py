"""Built-in recipes: experiments that `tl-capacity run NAME` runs. Listing them imports none of them."""

from __future__ import annotations

from collections.abc import Callable

from tl_capacity.hookspecs import hookimpl
from tl_capacity.interfaces import Recipe

RECIPES = (
    Recipe("demo", "Go the whole way in a minute, from counting features to a report", "tl_capacity.recipes.demo:main"),
    Recipe("distill", "Distil a teacher into students of several widths at once", "tl_capacity.recipes.distill:main"),
    Recipe(
        "check-importance",
        "Compare importances in nats with the KL of exact ablations",
        "tl_capacity.recipes.check_importance:main",
    ),
    Recipe(
        "embedded-concepts",
        "Rebuild the embedded concepts from redistributable sources",
        "tl_capacity.recipes.embedded_concepts:main",
    ),
    Recipe(
        "embedded-teacher",
        "Rebuild the embedded teacher, its SAEs and its texts from public-domain sources",
        "tl_capacity.recipes.embedded_teacher:main",
    ),
    Recipe(
        "placement",
        "Train students to keep chosen features, and say what that costs in nats",
        "tl_capacity.recipes.placement:main",
    ),
    Recipe(
        "pythia-floor",
        "Run the paper's experiment: measure, predict, distil, and compare the floors",
        "tl_capacity.recipes.pythia_floor:main",
    ),
    Recipe(
        "probe",
        "Say which concepts linear probes still tell from a model's and its students' activations",
        "tl_capacity.recipes.probe:main",
    ),
    Recipe("recover", "Count which of the teacher's features its students kept", "tl_capacity.recipes.recover:main"),
    Recipe(
        "rivals",
        "Compute floors without any features, and a bound that no student can beat",
        "tl_capacity.recipes.rivals:main",
    ),
    Recipe(
        "splice",
        "Say what the teacher loses, in nats, with only the features that a width may keep",
        "tl_capacity.recipes.splice:main",
    ),
    Recipe(
        "toy-sweep",
        "Train toy models of superposition in one batch and judge every predictor of their floors",
        "tl_capacity.recipes.toy_sweep:main",
    ),
    Recipe(
        "train-sae", "Train a sparse autoencoder at one hook point with SAELens", "tl_capacity.recipes.train_sae:main"
    ),
)


@hookimpl
def register_recipes(register: Callable[[Recipe], None]) -> None:
    for recipe in RECIPES:
        register(recipe)
