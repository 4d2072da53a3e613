"""Measurement: what was counted at every hook point, on what and how; save, load, merge."""
