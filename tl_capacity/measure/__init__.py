"""Counting: hook points are tapped while the model reads text, and sums are kept."""
