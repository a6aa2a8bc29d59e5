"""Sampling engines: a model in this process, or an OpenAI-compatible server."""
