"""Requests to servers: bounded in time and size, retried, with a concurrency that adapts to the server."""
