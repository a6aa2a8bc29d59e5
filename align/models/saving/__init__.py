"""Saving of trained models: folders, checks before training, and the comparison with the trained model afterwards."""
