"""What developers run: checks on a GPU, under sanitizers, and against the original projects' numbers."""
