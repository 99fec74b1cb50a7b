"""Episodes that somebody else has played: files of them, and how they are made."""
