"""The section on made data: what a step's `measures.json` holds, as a table, charts and examples."""
