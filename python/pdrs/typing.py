"""Types of arguments, for annotations in your own code.

Names
    Many names: a list, tuple, NumPy array, column of another library, or other iterable of ``str``.
Mask
    A bool for each entry: a tensor, an array, a column of another library, or a list.
Initialiser
    Gives new rows their values in place: ``init(rows)`` or ``init(rows, names)``.
Missing
    What becomes of names that are not there: ``"error"``, ``"skip"``, ``"zero"`` or ``"insert"``.
"""

from pdrs._rows.gather import Missing
from pdrs._rows.insert import Initialiser
from pdrs._torch.names import Mask, Names

__all__ = ["Initialiser", "Mask", "Missing", "Names"]
