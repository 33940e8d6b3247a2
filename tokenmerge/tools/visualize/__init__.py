"""`tokenmerge visualize`: show merged tokens as pictures, films and interactive pages."""
