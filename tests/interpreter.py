"""Triton's interpreter: before Triton 3.8 NumPy 2.5 ended no loop for it, of whose end it makes an array of one."""

from triton.runtime import interpreter

_patch = interpreter._patch_lang_tensor


def _patched(tensor, *scope):
    _patch(tensor, *scope)
    tensor.__index__ = lambda self: int(self.handle.data.item())


interpreter._patch_lang_tensor = _patched
