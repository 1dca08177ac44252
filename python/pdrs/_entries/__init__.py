"""The parts of a ParameterDict."""
