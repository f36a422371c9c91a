"""Sources that are computed from the tables: texts, quantities and columns."""
