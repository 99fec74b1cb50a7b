"""Commands, one file each; imports are light until the arguments are parsed."""
