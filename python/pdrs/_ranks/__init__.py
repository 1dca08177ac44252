"""What the ranks of a process group do together."""
