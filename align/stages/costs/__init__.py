"""What a step costs: estimates before it runs, and the measured cost for its ledger."""
