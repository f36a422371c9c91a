"""Ensembles: one price from several runs, which may differ in variant, inputs or fold, as a weighted mean of logs."""
