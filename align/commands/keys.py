"""`align keys` and `align schema`: the key reference and the JSON Schema of a recipe."""

from __future__ import annotations

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from align.errors import InputError
from align.registry import suggest
from align.workflow.reference import SECTIONS, Key, keys, schema_text


def show_keys(name: str | None) -> None:
    """Print the keys of a section, or those of all sections whose name contains `name`, or all."""
    console = Console()
    for section, rows in _found(name).items():
        table = Table(title=SECTIONS[section][0], box=SIMPLE, title_justify="left")
        for column in ("key", "type", "default", "meaning"):
            table.add_column(column, overflow="fold", ratio=2 if column == "meaning" else None)
        for row in rows:
            meaning = row.meaning if row.section is None else f"{row.meaning} See: align keys {row.section}"
            table.add_row(row.key, row.type.replace("\\|", "|"), row.default, meaning)
        console.print(table, markup=False)


def _found(name: str | None) -> dict[str, list[Key]]:
    """Return the keys to print, by section."""
    if name in SECTIONS:
        return {name: keys(name)}
    found = {section: [key for key in keys(section) if (name or "") in key.key] for section in SECTIONS}
    if not any(found.values()):
        raise InputError(f"no section and no key is called {name!r}; {suggest(str(name), SECTIONS)}")
    return {section: rows for section, rows in found.items() if rows}


def show_schema(*, as_json: bool) -> None:
    """Print the JSON Schema of a recipe; without `as_json`, how an editor uses it."""
    if as_json:
        print(schema_text(), end="")
        return
    print(
        "align schema --json > recipe.schema.json writes the JSON Schema of a recipe. Editors with the YAML language\n"
        "server complete and check a recipe whose first line is\n\n"
        "  # yaml-language-server: $schema=recipe.schema.json\n\n"
        "The keys are listed by: align keys, align keys sft, align keys learning_rate"
    )
