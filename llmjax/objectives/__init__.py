"""Training objectives, one loss a file."""
