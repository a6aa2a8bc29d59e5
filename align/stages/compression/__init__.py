"""Stages that make smaller or merged copies of trained models."""
