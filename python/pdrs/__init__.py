"""Named parameters by the million: ``torch.nn.ParameterDict`` on an ordered index in Rust."""

from importlib.metadata import version

from pdrs._core import IndexMap
from pdrs.parameter_dict import ParameterDict
from pdrs.stacked import StackedParameterDict
from pdrs.transfer import set_staging, to

__all__ = ["IndexMap", "ParameterDict", "StackedParameterDict", "set_staging", "to"]
__version__ = version("pdrs")
