"""Training: one step that is exact on any number of processes, and a loop that can be killed."""
