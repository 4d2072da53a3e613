"""Counting: the model reads text, its hook points are tapped, and sums are kept."""
