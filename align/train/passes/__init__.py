"""Forward passes over micro-batches: batches, statistics, evaluation and the routing of experts."""
