"""What training costs: formulas, a meter of energy, and the ledger of a step."""
