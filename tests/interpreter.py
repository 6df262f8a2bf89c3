"""Importing this lets Triton's interpreter before 3.8 run loops under NumPy 2.5, for which an array of one is no int.

It can go when 3.8 is the oldest Triton that is tested.
"""

from triton.runtime import interpreter

_patch = interpreter._patch_lang_tensor


def _patched(tensor, *scope):
    _patch(tensor, *scope)
    tensor.__index__ = lambda self: int(self.handle.data.item())


interpreter._patch_lang_tensor = _patched
