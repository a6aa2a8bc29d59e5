"""Untrusted code in isolated processes."""
