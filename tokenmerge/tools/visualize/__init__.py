"""`tokenmerge visualize`: which patches became one token, as pictures, films and pages."""
