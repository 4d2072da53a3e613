"""Versions of the libraries that a result depends on."""

from __future__ import annotations

import importlib.metadata
import sys

LIBRARIES = ("tl-capacity", "torch", "transformer-lens", "sae-lens", "transformers", "numpy")


def library_versions() -> dict[str, str]:
    """Versions of the installed libraries that a measurement depends on."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions | {"python": ".".join(map(str, sys.version_info[:3]))}
