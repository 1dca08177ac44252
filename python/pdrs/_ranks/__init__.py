"""What the ranks of a process group do together: tables that they share, and replicas that stay the same."""
