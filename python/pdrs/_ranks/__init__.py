"""Tables that are spread over the ranks of a process group: who owns a name, and what the ranks send each other."""
