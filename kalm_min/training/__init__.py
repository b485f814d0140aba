"""Training: a step that is exact on any number of processes, in a loop that may be killed."""
