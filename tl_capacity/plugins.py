"""The plugin manager: finds plugins through the `tl_capacity` entry points, asks each once, and keeps what they
register by name.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

import pluggy

from tl_capacity import hookspecs
from tl_capacity.errors import PluginError
from tl_capacity.hookspecs import hookimpl
from tl_capacity.interfaces import (
    CapacityLaw,
    Concept,
    FloorPredictor,
    ImportanceEstimator,
    ModelFamily,
    NamedModel,
    Recipe,
    TokenSource,
)
from tl_capacity.interfaces.floors import problem_with
from tl_capacity.storage.digests import digest

FILE = "tl_capacity_plugin_"
"""Prefix of the module name of a plugin file, before the file's own name."""

Item = TypeVar("Item")
Estimator = TypeVar("Estimator", bound=ImportanceEstimator | type[ImportanceEstimator])


def says_default(item: object) -> bool:
    """Whether an object or its own class says that it is the default. Inheriting from a default does not count."""
    said = {**vars(type(item)), **getattr(item, "__dict__", {})}
    return bool(said.get("is_default", False))


@dataclass
class Registry(Generic[Item]):
    """The objects of one kind, in the order in which plugins registered them.

    Attributes:
        kind: what a sentence calls such an object.
        needs: attributes that each of them has.
        problem_with: says of an object what else is wrong with it, and what to do; None where nothing is.
    """

    kind: str
    items: dict[str, Item] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ("name",)
    problem_with: Callable[[object], str | None] = lambda item: None

    def lacking(self, item: object) -> str | None:
        """The first required attribute that an object lacks; None if it has all."""
        return next((need for need in self.needs if not getattr(item, need, "")), None)

    def add(self, item: Item, origin: str) -> None:
        if lacking := self.lacking(item):
            raise PluginError(
                f"plugin {origin!r} registers a {self.kind} without a {lacking}: give it a `{lacking}` attribute"
            )
        name = str(getattr(item, "name", ""))
        if isinstance(item, type):
            raise PluginError(
                f"plugin {origin!r} registers the class {item.__name__} itself: register an object of it,"
                f" {item.__name__}()"
            )
        if problem := self.problem_with(item):
            raise PluginError(f"plugin {origin!r} registers a {self.kind} {name!r} {problem}")
        if name in self.items:
            raise PluginError(
                f"plugins {self.origins[name]!r} and {origin!r} both register a {self.kind} named {name!r}: rename or"
                " uninstall one"
            )
        if says_default(item):
            for other in self.items.values():
                if says_default(other):
                    raise PluginError(
                        f"plugins {self.origins[str(getattr(other, 'name', ''))]!r} and {origin!r} both register a"
                        f" default {self.kind}: set `is_default = False` in one"
                    )
        self.items[name], self.origins[name] = item, origin

    @property
    def default(self) -> Item:
        """The default object: the one whose `is_default` is true.

        Raises:
            PluginError: where no plugin registered one.
        """
        for item in self.items.values():
            if says_default(item):
                return item
        raise PluginError(
            f"no {self.kind} is the default: name one of {', '.join(sorted(self.items)) or '(none)'}, or register one"
            " with `is_default = True`"
        )

    def named(self, name: str | None) -> Item:
        """The object of that name, or the default if no name is given.

        Raises:
            PluginError: where there is none.
        """
        return self.default if name is None else self[name]

    def __getitem__(self, name: str) -> Item:
        if name not in self.items:
            near = get_close_matches(name, self.items, n=1)
            hint = (
                f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(sorted(self.items)) or '(none)'}"
            )
            raise PluginError(f"there is no {self.kind} named {name!r}: {hint}")
        return self.items[name]

    def __contains__(self, name: object) -> bool:
        return name in self.items

    def __iter__(self) -> Iterator[Item]:
        return iter(self.items.values())


@dataclass(frozen=True)
class Plugins:
    """Everything that plugins contributed, and the plugins that failed."""

    importance_estimators: Registry[ImportanceEstimator] = field(
        default_factory=lambda: Registry("importance estimator", needs=("name", "unit"))
    )
    capacity_laws: Registry[CapacityLaw] = field(default_factory=lambda: Registry("capacity law"))
    floor_predictors: Registry[FloorPredictor] = field(
        default_factory=lambda: Registry("floor predictor", needs=("name", "unit"), problem_with=problem_with)
    )
    model_families: Registry[ModelFamily] = field(default_factory=lambda: Registry("model family"))
    models: Registry[NamedModel] = field(default_factory=lambda: Registry("model"))
    token_sources: Registry[TokenSource] = field(default_factory=lambda: Registry("token source"))
    concepts: Registry[Concept] = field(default_factory=lambda: Registry("concept"))
    recipes: Registry[Recipe] = field(default_factory=lambda: Registry("recipe"))
    failures: dict[str, str] = field(default_factory=dict)

    def family_of(self, model_type: str | None) -> ModelFamily | None:
        """The family that covers a `config.model_type`, if any plugin registered one."""
        return next((family for family in self.model_families if model_type in family.model_types), None)

    def registries(self) -> dict[str, Registry[Any]]:
        """Each registry, under the name that its hook has for it."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Registry)}


class PluginManager(pluggy.PluginManager):
    """pluggy's manager of this package's hooks. What it registers or unregisters shows in the next `plugins()`.

    Attributes:
        failures: why each plugin failed that could not be imported, by the plugin's name.
    """

    def __init__(self) -> None:
        super().__init__("tl_capacity")
        self.add_hookspecs(hookspecs)
        self.failures: dict[str, str] = {}

    def register(self, plugin: object, name: str | None = None) -> str:
        """Add a plugin (a module or an object with `@hookimpl` methods). Returns the plugin's name.

        Raises:
            PluginError: where it or another plugin of that name is registered already, or it implements a hook with
                other arguments than the hook's.
        """
        plugins.cache_clear()
        try:
            registered = super().register(plugin, name=name)
        except pluggy.PluginValidationError as problem:
            if self.is_registered(plugin):  # pluggy before 1.7 leaves it half registered
                super().unregister(plugin)
            raise PluginError(f"{' '.join(str(problem).split())}: a hook takes one argument, `register`") from problem
        except ValueError as problem:
            known = self.get_name(plugin)
            taken = (
                f"it is registered as {known!r} already" if known else f"{self.get_plugin(str(name))!r} has that name"
            )
            raise PluginError(
                f"the plugin {plugin!r} cannot be registered as {name!r}, because {taken}: choose another name, or"
                " unregister that first"
            ) from problem
        if registered is None:
            raise PluginError(f"a plugin named {name!r} is blocked: choose another name")
        return registered

    def unregister(self, plugin: object | None = None, name: str | None = None) -> Any:
        """Remove a plugin and return it. For a plugin that could not be imported, its failure is forgotten."""
        plugins.cache_clear()
        if name is not None and name in self.failures:
            return self.failures.pop(name)
        return super().unregister(plugin, name)

    def fail(self, name: str, problem: BaseException) -> None:
        """Record why a plugin could not be imported. Everything else works without it."""
        plugins.cache_clear()
        self.failures[name] = f"{type(problem).__name__}: {problem}"


@lru_cache(maxsize=1)
def plugin_manager() -> PluginManager:
    """The manager of this process, with every plugin named by an installed package's entry points.

    Raises:
        PluginError: where two packages have a plugin of one name.
    """
    manager = PluginManager()
    packages: dict[str, str] = {}
    for entry in sorted(
        entry_points(group="tl_capacity"), key=lambda e: (not e.value.startswith("tl_capacity."), e.name, _package(e))
    ):
        package = _package(entry)
        if entry.name in packages:
            raise PluginError(
                f"the packages {packages[entry.name]!r} and {package!r} both have a plugin named {entry.name!r}: rename"
                " or uninstall one"
            )
        packages[entry.name] = package
        try:
            manager.register(entry.load(), entry.name)
        except (Exception, SystemExit) as problem:  # somebody's plugin must not take the tool down
            manager.fail(entry.name, problem)
    return manager


@lru_cache(maxsize=1)
def plugins() -> Plugins:
    """What all plugins contributed. They are asked once, and again only after a plugin was registered or unregistered.

    Raises:
        PluginError: where two plugins register the same name, or one implements a hook that does not exist.
    """
    manager = plugin_manager()
    try:
        manager.check_pending()
    except pluggy.PluginValidationError as problem:
        near = get_close_matches(
            str(problem).split("'")[1] if "'" in str(problem) else "",
            [n for n in dir(hookspecs) if n.startswith("register_")],
            n=1,
        )
        hint = f"did you mean {near[0]}?" if near else "see `tl_capacity.hookspecs` for the hooks there are"
        raise PluginError(f"{str(problem).rstrip('.')}: {hint}") from problem
    contributed = Plugins(failures=dict(manager.failures))
    for name, registry in contributed.registries().items():
        # In the order of registration, but `tryfirst` and `trylast` are heeded: sources are asked in this order.
        for implementation in sorted(
            getattr(manager.hook, f"register_{name}").get_hookimpls(), key=lambda hook: hook.trylast - hook.tryfirst
        ):
            origin = implementation.plugin_name
            try:
                implementation.function(_adder(registry, origin))
            except PluginError:
                raise
            except (Exception, SystemExit) as problem:
                contributed.failures[origin] = f"{type(problem).__name__} in register_{name}: {problem}"
    return contributed


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist else entry.value


def _adder(registry: Registry[Any], origin: str) -> Callable[[Any], None]:
    return lambda item: registry.add(item, origin)


def register_plugin(plugin: object, name: str | None = None) -> str:
    """Add a plugin (a module or an object with `@hookimpl` methods) to this process. Returns the plugin's name.

    Raises:
        PluginError: where it or another plugin of that name is registered already, or it implements a hook with other
            arguments than the hook's.
    """
    return plugin_manager().register(plugin, name)


def unregister_plugin(name: str) -> None:
    """Remove a plugin."""
    plugin_manager().unregister(name=name)


def load_plugin_file(path: Path) -> str:
    """Import a Python file and register it as a plugin. If the file fails, `plugins().failures` records it, and
    everything else works.
    """
    if not path.is_file():
        raise PluginError(f"there is no plugin file {path}: pass the path of a Python file")
    name = FILE + path.stem
    if plugin_manager().is_registered(sys.modules.get(name)):
        name += f"_{digest(str(path.resolve()).encode())[:8]}"  # another file of that name, in another folder
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise PluginError(f"{path} is not a Python file: pass a file that ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as problem:
        del sys.modules[name]
        plugin_manager().fail(str(path), problem)
        return str(path)
    return register_plugin(module, name=str(path))


def plugin_file(origin: str, stem: str) -> ModuleType | None:
    """The module of a plugin that was loaded from a file of this name; None for any other plugin.

    Args:
        origin: the name of the plugin.
        stem: the file's name, without its folder and `.py`.
    """
    plugin = plugin_manager().get_plugin(origin)
    if not isinstance(plugin, ModuleType) or not plugin.__name__.startswith(FILE):
        return None
    return plugin if Path(str(plugin.__file__)).stem == stem else None


def register_importance_estimator(estimator: Estimator) -> Estimator:
    """Add one importance estimator from a notebook. Also a decorator of its class. Running the cell again replaces the
    earlier estimator of that name.

    Raises:
        PluginError: where another plugin has an estimator of that name; nothing is registered then.
    """
    instance: ImportanceEstimator = estimator() if isinstance(estimator, type) else estimator
    origin = f"notebook:{getattr(instance, 'name', type(instance).__name__)}"

    class AdHoc:
        @hookimpl
        def register_importance_estimators(self, register: Callable[[ImportanceEstimator], None]) -> None:
            register(instance)

    if plugin_manager().get_plugin(origin) is not None:
        unregister_plugin(origin)
    register_plugin(AdHoc(), name=origin)
    try:
        plugins()
    except PluginError:
        unregister_plugin(origin)  # otherwise nothing would work until the kernel is started again
        raise
    return estimator
