"""One file per command; slow imports are inside the command's function."""
