"""Predicted floors, the budget of each layer, and what to know before trusting either."""
