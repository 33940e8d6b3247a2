"""The rows: one module per library, imported when the first model of that library is patched."""
