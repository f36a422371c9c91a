"""Sources that are computed from the tables: terms of texts, quantities in texts, and columns."""
