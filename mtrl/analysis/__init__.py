"""Reading runs: curves, tables and pictures of conflicts."""
