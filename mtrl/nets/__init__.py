"""Networks: a trunk shared by all tasks, and a head per task."""
