"""Predictions: the loss floors of student widths, the budget of each layer, and what to know before trusting either."""
