"""What a run looks like afterwards: curves as PNG files and one self-contained page."""
