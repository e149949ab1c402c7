"""The console: one page, one module; its template has the same name."""
