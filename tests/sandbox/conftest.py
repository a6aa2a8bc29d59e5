import os
import socket

import pytest
from attacks import SECRET, descendants, gone, processes


@pytest.fixture
def host(tmp_path, monkeypatch):
    """Yield what attacks try to reach, and check afterwards that nothing of it has changed."""
    monkeypatch.setenv("API_KEY", SECRET)
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        places = {"file": str(secret), "outside": str(tmp_path / "created"), "here": os.getpid()}
        yield {**places, "port": server.getsockname()[1]}
        with pytest.raises(BlockingIOError):
            server.accept()
    assert secret.read_text() == SECRET
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]
    servers = {number for number, parent in processes() if parent == os.getpid()}
    assert gone({number for server in servers for number in descendants(server)})
