"""Tasks whose verdicts are a judge's."""
