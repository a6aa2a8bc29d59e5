"""A headless Chromium for tests of pages."""

import shutil
import subprocess

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
FLAGS = (
    "--headless",
    "--no-sandbox",  # root may not have one
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    "--disable-sync",
    "--hide-scrollbars",
    "--no-first-run",
)

needs_browser = pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(BROWSERS)} is installed")


def dumped(page, tmp_path, flags=()):
    """Return the DOM of a page after its scripts have run."""
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    call = [BROWSER, *FLAGS, *flags, profile, "--window-size=1400,900", "--dump-dom", page.as_uri()]
    return subprocess.run(call, capture_output=True, text=True, timeout=600, check=True).stdout
