"""Requests to servers: bounded in time and size, retried, and no more at a time than a server has room for."""
