"""Networks: a trunk that the tasks share, and a head for each."""
