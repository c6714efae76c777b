"""plan: candidates, budget → one candidate per unit."""
