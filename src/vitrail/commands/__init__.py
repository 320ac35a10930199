"""Commands of the command line that have a file of their own. Heavy imports are inside the functions."""
