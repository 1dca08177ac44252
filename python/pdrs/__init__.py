"""Named parameters by the million: ``torch.nn.ParameterDict`` on an ordered index in Rust."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

# First, and before torch: it refuses a subinterpreter, in which importing torch would never end.
from pdrs._core import IndexMap, group_tensors

# isort: split
from pdrs import optim
from pdrs._rows.gather import Lookup
from pdrs._rows.step_warnings import AbsentNamesWarning, UntrainedTableWarning
from pdrs._torch.errors import MissingEntryError
from pdrs.checkpoint import CheckpointError, load, open, save  # noqa: A004  # read as pdrs.open
from pdrs.parameter_dict import ParameterDict
from pdrs.stacked import StackedParameterDict
from pdrs.transfer import set_staging, to

__all__ = [
    "AbsentNamesWarning",
    "CheckpointError",
    "IndexMap",
    "Lookup",
    "MissingEntryError",
    "ParameterDict",
    "StackedParameterDict",
    "UntrainedTableWarning",
    "distributed",
    "load",
    "open",
    "optim",
    "save",
    "set_staging",
    "to",
]
if TYPE_CHECKING:
    from pdrs import distributed

__version__ = version("pdrs-torch")  # The distribution; pdrs on PyPI is another project.

# An ImportError now, and not in the middle of a move, where torch does not give its tensors as pdrs reads them.
group_tensors([])


def __getattr__(name: str) -> Any:
    if name == "distributed":  # at its first use: it imports much of torch that most programs do not need
        return import_module("pdrs.distributed")
    raise AttributeError(f"module 'pdrs' has no attribute {name!r}")
