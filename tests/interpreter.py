"""Triton's interpreter, which runs its kernels where there is no GPU, with four faults mended."""

import functools
import importlib.util
import os

import torch


@functools.cache
def use_interpreter() -> None:
    """Let Triton's kernels run in the interpreter; before the first of them is imported.

    Four faults of the interpreter of Triton 3.6, which no device has, are mended. It makes an int
    of an array of one entry for `range`, which numpy 2.4 refuses. It multiplies the bits of
    bfloat16 as if they were integers, truncates to bfloat16, and rounds an fma's product.
    """
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated
    if importlib.util.find_spec("triton") is not None:
        _mend()


def _mend() -> None:
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    patch, dot = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_dot

    def patch_and_mend(tensor: type, scope: object) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def widened(handle: object) -> object:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    convert = interpreter._convert_float

    def nearest(data: np.ndarray, source: tl.dtype, target: tl.dtype, mode: object) -> object:
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, mode)
        rounded = torch.from_numpy(np.ascontiguousarray(data)).to(torch.bfloat16)
        return rounded.view(torch.int16).numpy().view(np.uint16)

    def fma(self: object, x: object, y: object, z: object) -> object:
        exact = x.data.astype(np.float64) * y.data + z.data
        return interpreter.TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    interpreter._convert_float = nearest
    interpreter.InterpreterBuilder.create_fma = fma
    interpreter._patch_lang_tensor = patch_and_mend
    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *rest: dot(
        self, widened(a), widened(b), *rest
    )
