"""What surrounds every command: its errors and exit status, and the warnings of libraries."""
