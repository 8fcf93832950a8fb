"""Necks: a pyramid in, a pyramid out, between the backbone's own pyramid and the detector; chosen by name.

``MODEL.NECKS`` lists them in their order. A backbone does not know which necks follow.
"""

from dyhead.necks.dyhead import DyHeadOptions
from dyhead.necks.fpt import FPTOptions
from dyhead.necks.registry import NECKS, Necked, Registered, Stack, register_neck
from dyhead.necks.sepc import SEPCOptions

__all__ = ["NECKS", "DyHeadOptions", "FPTOptions", "Necked", "Registered", "SEPCOptions", "Stack", "register_neck"]
