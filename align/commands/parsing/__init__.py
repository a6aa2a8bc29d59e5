"""Arguments of the command line. Nothing heavy is imported before a command is known."""
