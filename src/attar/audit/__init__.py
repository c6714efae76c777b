"""audit: original, compressed, data → Verdict."""
