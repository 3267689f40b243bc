"""One file a command; what is slow to import is imported when the command runs."""
