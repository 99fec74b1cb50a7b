"""Many runs: which they are, and how they get done on one machine or on a cluster."""
