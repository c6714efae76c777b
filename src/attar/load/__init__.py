"""load: recipe → model, units, data in three splits."""
