"""The parts of a StackedParameterDict."""
