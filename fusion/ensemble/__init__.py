"""One price from several runs: of other variants, other inputs or other folds, mixed in log price."""
