"""What a person reads at the end: one JSON, the same facts in the terminal and on a page."""
