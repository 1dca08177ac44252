"""The parts of a move between devices and dtypes."""
