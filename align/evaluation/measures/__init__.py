"""What is measured of responses and decisions: loops and refusals, calibration, RewardBench."""
