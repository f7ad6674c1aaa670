"""Payment: statements, channels, journal, stakes, audit."""
