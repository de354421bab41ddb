"""The jobs behind the command line, and what they show."""
