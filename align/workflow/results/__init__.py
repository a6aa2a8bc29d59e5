"""Results of a run: tables, paired changes and model cards."""
