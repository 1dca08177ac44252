"""Named parameters by the million: ``torch.nn.ParameterDict`` on an ordered index in Rust."""

from importlib.metadata import version

from pdrs._core import IndexMap
from pdrs.parameter_dict import ParameterDict

__all__ = ["IndexMap", "ParameterDict"]
__version__ = version("pdrs")
