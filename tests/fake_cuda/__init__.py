"""A CUDA runtime without a GPU, for tests of copies, streams and events (see README.md)."""
