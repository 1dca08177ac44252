"""Types of arguments and results, for annotations in your own code.

Names
    Many names: a list, tuple, NumPy array, column of another library, or other iterable of ``str``.
Mask
    A bool for each entry: a tensor, an array, a column of another library, or a list.
Initialiser
    Gives new rows their values in place: ``init(rows)`` or ``init(rows, names)``.
Missing
    What becomes of names that are not there: ``"error"``, ``"skip"``, ``"zero"`` or ``"insert"``.
IncompatibleKeys
    The result of :func:`pdrs.load`: lists of ``missing_keys`` and ``unexpected_keys``.
"""

from pdrs._files.load_module import IncompatibleKeys
from pdrs._rows.gather import Missing
from pdrs._rows.insert import Initialiser
from pdrs._torch.names import Mask, Names

__all__ = ["IncompatibleKeys", "Initialiser", "Mask", "Missing", "Names"]
