"""What the stages that sample, judge and evaluate share: journals, sampling, judging, rows of tasks."""
