"""What this process has paid for the tokens of servers: policies, judges and teachers together. Imports no torch."""

from __future__ import annotations

from threading import Lock


class ServerCosts:
    """A sum of prices in `accounting.currency`, to which several threads may add."""

    def __init__(self) -> None:
        self.total = 0.0
        self._lock = Lock()

    def add(self, price: float) -> None:
        """Add the price of an answer."""
        with self._lock:
            self.total += price


SERVER_COSTS = ServerCosts()  # of this process
