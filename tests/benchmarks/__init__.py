"""Measurements that are run by hand; their figures stand in the README, and no test asserts a time."""
