"""Generated data: rows that a program creates and checks. They are the quickstart's data."""
