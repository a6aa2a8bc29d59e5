"""The section on which policies are worth their cost: costs with all dependencies, fronts, charts and tables."""
