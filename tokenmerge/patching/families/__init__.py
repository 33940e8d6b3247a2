"""Family tables: one module of rows per library, imported when the first model of that library is patched."""
