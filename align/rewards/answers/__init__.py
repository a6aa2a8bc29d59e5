"""Final answers of responses: extraction, and comparison with known ones."""
