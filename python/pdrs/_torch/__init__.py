"""The ground floor: what every other part asks of torch and of Python."""
