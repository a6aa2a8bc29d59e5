"""Checksums of files, and errors of the disk in one line."""
