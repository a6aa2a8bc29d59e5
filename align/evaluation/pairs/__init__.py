"""The table of judged pairs, its file forms, and the metrics that are functions of it."""
