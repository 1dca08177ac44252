"""Where pickles of earlier versions look for the class of tables."""

from pdrs._stacked.tables import Table

__all__ = ["Table"]
