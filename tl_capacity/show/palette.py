"""Colours of figures by Okabe and Ito (https://jfly.uni-koeln.de/color/). Readers with any colour vision can tell them
apart.

Figures are read without colours as well, so each series of one also has its own dash or symbol.
"""

from __future__ import annotations

BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
"""The colours, in the order in which series take them."""
