"""Built-in recipes: experiments that `tl-capacity run NAME` runs. Listing them imports none of them."""

from __future__ import annotations

from collections.abc import Callable

from tl_capacity.hookspecs import hookimpl
from tl_capacity.interfaces import Recipe

RECIPES = (
    Recipe("demo", "The whole way in a minute, from counting features to a report", "tl_capacity.recipes.demo:main"),
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
        "What does it cost, in nats, to choose which features students keep?",
        "tl_capacity.recipes.placement:main",
    ),
    Recipe(
        "pythia-floor",
        "Measure, predict, distil and compare: are the predicted floors those observed?",
        "tl_capacity.recipes.pythia_floor:main",
    ),
    Recipe(
        "probe",
        "Which concepts do linear probes still tell from a model's and its students' activations?",
        "tl_capacity.recipes.probe:main",
    ),
    Recipe("recover", "Which features of the teacher did its students keep?", "tl_capacity.recipes.recover:main"),
    Recipe(
        "rivals",
        "What do floors say that know nothing of features, and what can no student beat?",
        "tl_capacity.recipes.rivals:main",
    ),
    Recipe(
        "splice",
        "What does the teacher lose, in nats, with only the features that a width may keep?",
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
