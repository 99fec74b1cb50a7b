"""What acts: the policy, its file, and what it exports."""
