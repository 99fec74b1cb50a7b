"""Analysis of recorded runs: learning curves, tables and figures of gradient conflicts."""
