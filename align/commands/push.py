"""`align push`: upload a policy or reward model to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from align.models.hub import push_folder

MIB = 2**20


def push(folder: Path, repo: str, *, private: bool, dry_run: bool) -> None:
    """Upload the folder and print what was uploaded; with `dry_run` only print it."""
    pushed = push_folder(folder, repo, private=private, dry_run=dry_run)
    console = Console()
    table = Table(title=f"Files for {pushed.repo}", box=SIMPLE)
    table.add_column("file")
    table.add_column("MiB", justify="right")
    for name, size in pushed.files:
        table.add_row(name, f"{size / MIB:,.2f}")
    console.print(table)
    if pushed.skipped:
        console.print(f"Not uploaded: {', '.join(pushed.skipped)}", highlight=False, soft_wrap=True)
    for problem in pushed.problems:
        console.print(f"Model card: {problem}", highlight=False, soft_wrap=True)
    done = f"Uploaded to {pushed.url}" if pushed.url is not None else "Dry run: nothing was uploaded"
    console.print(f"{done} ({pushed.num_bytes / MIB:,.2f} MiB)", highlight=False, soft_wrap=True)
