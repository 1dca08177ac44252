"""Named parameters by the million: ``torch.nn.ParameterDict`` on an ordered index in Rust."""

from importlib.metadata import version

from pdrs import optim
from pdrs._core import IndexMap, group_tensors
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
    "load",
    "open",
    "optim",
    "save",
    "set_staging",
    "to",
]
__version__ = version("pdrs-torch")  # The distribution; pdrs on PyPI is another project.

# An ImportError now, and not in the middle of a move, where torch does not give its tensors as pdrs reads them.
group_tensors([])
