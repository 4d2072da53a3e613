"""Which features go first: the data that the page's script needs for its lists, with every number as text."""

from __future__ import annotations

from base64 import b64encode
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tl_capacity.report.edges import ShownFeature, shown_features
from tl_capacity.report.parts import percent
from tl_capacity.report.snippets import Snippet
from tl_capacity.report.story import Story, latents_around
from tl_capacity.results.estimate import significant


def features(story: Story) -> dict[str, Any]:
    """For each hook point, the features on both sides of each width's budget, and what is known about them."""
    hooks = []
    for place, around in story.edges.items():
        hook = story.measurement.hooks[place]
        known = shown_features(hook, latents_around(around), story.importance.name)
        hooks.append(
            {
                "name": story.name(hook),
                "main": hook is story.main,
                "edges": [
                    {
                        "width": e.width,
                        "n_kept": f"{e.n_kept:,}",
                        "n_lost": f"{e.n_lost:,}",
                        "kept": list(e.kept),
                        "lost": list(e.lost),
                    }
                    for e in around
                ],
                "pages": hook.feature_pages,
                "order": _packed(hook.ranked(story.importance.name)),
                "features": {str(latent): _shown_feature(story, place, feature) for latent, feature in known.items()},
            }
        )
    return {"unit": story.unit, "hooks": hooks, "snippets": bool(story.snippets)}


def _shown_feature(story: Story, place: int, feature: ShownFeature) -> dict[str, Any]:
    return {
        "rank": feature.rank.brief(",.0f"),
        "importance": feature.importance.brief(significant(feature.importance.value, 3)),
        "rate": percent(feature.rate),
        "snippets": [
            {
                "strength": f"{snippet.strength:.3g}",
                "document": snippet.document,
                "pieces": _joined(snippet),
            }
            for snippet in story.snippets.get((place, feature.latent), ())
        ],
    }


def _packed(latents: NDArray[np.int64]) -> str:
    """Numbers of latents as base64 of little-endian 32-bit integers. The script reads ranks from them."""
    return b64encode(latents.astype("<u4").tobytes()).decode()


def _joined(snippet: Snippet) -> list[tuple[str, float]]:
    """The pieces, with neighbours of equal share joined.

    Most of the text is not active, so the page gets smaller.
    """
    rounded = [(text, round(share, 2)) for text, share in snippet.pieces]
    return [
        ("".join(text for text, _ in run).replace("\n", "⏎"), share)
        for share, run in groupby(rounded, key=lambda piece: piece[1])
    ]


def features_missing(story: Story) -> str:
    """Why there are no lists of features; empty if there are some."""
    return "" if story.edges else "No hook point has enough alive features to rank: count more tokens."
