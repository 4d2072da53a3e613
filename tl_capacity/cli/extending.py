"""Commands for what plugins add: `plugins` lists it, and `run` runs a recipe."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from tl_capacity.cli.shared import AsJson
from tl_capacity.runtime.logs import bar_allowed
from tl_capacity.runtime.progress import peak_memory
from tl_capacity.show.tables import table
from tl_capacity.show.terminal import console, print_json, print_text


def plugins(as_json: AsJson = False) -> None:
    """List what plugins contribute and where it comes from."""
    from tl_capacity.plugins import plugins as find

    registered = find()
    objects = [
        {
            "kind": registry.kind,
            "name": name,
            "from": registry.origins[name],
            "summary": str(getattr(item, "summary", "")),
            **({"caveat": str(item.caveat)} if getattr(item, "caveat", "") else {}),
            **_claims(item),
        }
        for registry in registered.registries().values()
        for name, item in registry.items.items()
    ]
    if as_json:
        print_json({"plugins": objects, "failures": registered.failures})
        return
    rows = [
        [
            each["kind"],
            each["name"],
            each["from"],
            "; ".join(filter(None, [each["summary"], each.get("caveat"), _in_words(each)])),
        ]
        for each in objects
    ]
    console().print(table("Plugins", ["kind", "name", "from", "what it is"], rows, right=False))
    for origin, problem in registered.failures.items():
        print_text(f"failed: {origin}: {problem}", style="red")


def _claims(item: Any) -> dict[str, Any]:
    """What a floor predictor says of itself; empty for anything else."""
    from tl_capacity.interfaces import FloorPredictor

    if not isinstance(item, FloorPredictor):
        return {}
    return {name: getattr(item, name) for name in ("unit", "constants", "needs_model", "knows_features", "is_bound")}


def _in_words(claims: dict[str, Any]) -> str:
    """The same in words."""
    if "constants" not in claims:
        return ""
    fitted = "nothing is fitted" if not claims["constants"] else f"constants fitted: {claims['constants']}"
    said = [f"unit: {claims['unit']}", fitted]
    said += ["needs the model"] * claims["needs_model"] + ["knows no features"] * (not claims["knows_features"])
    return ", ".join(said + ["a lower bound"] * claims["is_bound"])


def run(
    name: Annotated[str | None, typer.Argument(help="Name of the recipe.")] = None,
    options: Annotated[list[str] | None, typer.Argument(help="Options of the recipe.")] = None,
) -> None:
    """Run a recipe, or list all recipes.

    Without NAME, the recipes are listed. `tl-capacity run NAME --help` shows a recipe's options.
    """
    from tl_capacity import recipe
    from tl_capacity.plugins import plugins as find

    recipes = find().recipes
    if name is None or name in ("--help", "-h"):
        rows = [[r.name, recipes.origins[r.name], r.summary] for r in recipes]
        console().print(table("Recipes", ["name", "from", "what it does"], rows, right=False))
        return
    recipe.run(recipe.load(recipes[name]), options or [], f"tl-capacity run {name}")
    from tl_capacity.runtime.processes import is_first

    if bar_allowed() and is_first():
        typer.echo(f"peak memory {peak_memory() / 1e9:.2f} GB", err=True)
