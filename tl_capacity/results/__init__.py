"""What the sums of one hook point say: every figure with its interval."""
