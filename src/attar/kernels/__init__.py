"""One file per operation: the reference first, the fast version below it."""
