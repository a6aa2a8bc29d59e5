"""Processes of a launch: work split, heartbeat, signals, journal and progress."""
