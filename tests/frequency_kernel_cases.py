"""The fused kernel of the band split in Triton's interpreter; `test_frequency_kernel.py` runs this file on its own.

The interpreter must be chosen before Triton is imported, and would slow down whatever else uses Triton.
"""

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 from the start", allow_module_level=True)

import interpreter  # noqa: F401
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from ffr import _frequency_kernel as kernel
from ffr import frequency, split_bands

TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 8e-2, torch.float16: 1e-2}  # of N(0, 1), P rounded as well
LAYOUTS = ("maps", "channels last", "tokens", "tokens behind a prefix", "every second row", "gaps")
REPEATED = {"": (), "channels": (1,), "space": (2, 3), "rows": (2,), "columns": (3,), "all": (1, 2, 3)}


def noise(seed, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def laid_out(x, layout):
    """The maps `x` in another layout."""
    tokens = x.flatten(2).transpose(1, 2)
    return {
        "maps": lambda: x,
        "channels last": lambda: x.contiguous(memory_format=torch.channels_last),
        "tokens": lambda: tokens.contiguous(),
        "tokens behind a prefix": lambda: torch.cat([tokens[:, :1], tokens], 1)[:, 1:],
        "every second row": lambda: x.repeat_interleave(2, 2)[:, :, ::2],
        "gaps": lambda: x.repeat_interleave(2, 3)[:, :, :, ::2],  # neither channels nor columns side by side
    }[layout]()


def split(x, mu, h, w):
    return kernel.split(x, *frequency._operands(x, mu, h, w), h, w)


def as_maps(x, h, w):
    return x if x.ndim == 4 else x.transpose(1, 2).unflatten(2, (h, w))


def exact(x, mu, h, w):
    """Low and high band of maps or tokens, as maps in float64."""
    x = as_maps(x, h, w).double()
    rows, columns = frequency._matrices(h, w, mu, torch.float64, x.device, True)
    low = rows @ x @ columns
    return low, x - low


@pytest.fixture
def fused(monkeypatch):
    """Everything that fits runs through the kernel, here on the CPU; counts the launches."""
    calls = []

    def choose(features, h, w):
        if not kernel.fits(features, h, w):
            return None
        calls.append((h, w))
        return kernel

    monkeypatch.setattr(frequency, "_fused", choose)
    return calls


@given(
    st.integers(0, 2**32 - 1),
    st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 35), st.integers(1, 35)),
    st.floats(0, 0.5),
    st.sampled_from(LAYOUTS),
    st.sampled_from(list(REPEATED)),
    st.sampled_from(list(TOLERANCE)),
)
@settings(max_examples=60)
def test_the_kernel_is_the_product(seed, shape, mu, layout, repeated, dtype):
    h, w = shape[2:]
    base = noise(seed, *(1 if axis in REPEATED[repeated] else size for axis, size in enumerate(shape)), dtype=dtype)
    base = base.expand(shape)
    x = laid_out(base, layout)
    low, high = split(x, mu, h, w)
    assert low.dtype == high.dtype == dtype
    assert low.shape == high.shape == x.shape
    for ours, wanted in zip((low, high), exact(x, mu, h, w), strict=True):
        assert_close(as_maps(ours, h, w).double(), wanted, rtol=0, atol=TOLERANCE[dtype])
    other = laid_out(noise(seed + 1, *shape, dtype=dtype), "maps" if x.ndim == 4 else "tokens")
    wanted = exact(x, mu, h, w)[0] + exact(other, mu, h, w)[1]
    joined = kernel.join(x, other, *frequency._operands(x, mu, h, w), h, w)
    assert_close(as_maps(joined, h, w).double(), wanted, rtol=0, atol=2 * TOLERANCE[dtype])


@pytest.mark.parametrize("grid", [(28, 28), (56, 40), (128, 9), (9, 128), (70, 65)])
@pytest.mark.parametrize("layout", ["maps", "tokens"])
def test_float32_keeps_its_error_on_tensor_cores_that_cut_numbers_to_eleven_bits(monkeypatch, grid, layout):
    multiply = InterpreterBuilder.create_dot
    factors = []

    def cut(self, a, b, *rest):
        a, b = (TensorHandle((x.data.view(np.uint32) & 0xFFFFE000).view(np.float32), x.dtype) for x in (a, b))
        factors.append(a)
        return multiply(self, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", cut)
    x = laid_out(noise(0, 2, 2, *grid), layout)
    for ours, wanted in zip(split(x, 0.4, *grid), exact(x, 0.4, *grid), strict=True):
        assert_close(as_maps(ours, *grid).double(), wanted, rtol=0, atol=3e-6)
    assert factors
    x = torch.full((1, 1, 8, 8), 1 + 8191 * 2**-23)  # what is cut off, not rounded, loses three units of this
    assert_close(split(x, 0.0, 8, 8)[0], x, rtol=0, atol=2**-23)


@pytest.mark.parametrize("size", [14, 28, 41])
def test_a_projection_is_two_matrices_of_eleven_bits_padded_with_zeros(size):
    parts = frequency._cached_operand(size, 5, torch.float32, torch.device("cpu"))
    assert not (parts.view(torch.int32) & 0x1FFF).any()
    wanted = frequency._cached_projection(size, 5, torch.float64, torch.device("cpu"))
    assert_close(parts.double().sum(0)[:size, :size], wanted, rtol=0, atol=2**-23)
    assert not parts[:, size:].any() and not parts[:, :, size:].any()


@pytest.mark.parametrize(("grid", "channels"), [((28, 28), 40), ((27, 41), 17), ((56, 56), 9), ((1, 64), 3)])
@pytest.mark.parametrize("layout", ["maps", "channels last", "tokens"])
def test_bands_and_gradient_by_the_kernel_are_those_of_the_products(fused, grid, channels, layout):
    x = laid_out(noise(0, 2, channels, *grid), layout).requires_grad_()
    settings = {"grid": grid} if x.ndim == 3 else {}
    low, high = split_bands(x, 0.4, **settings)
    wanted = frequency._as_graph(x, 0.4, *grid)
    assert_close(low, wanted.low, rtol=0, atol=4e-6)
    assert_close(high, wanted.high, rtol=0, atol=4e-6)
    weights = noise(1, *x.shape), noise(2, *x.shape)
    (ours,) = torch.autograd.grad((low, high), x, weights)
    (theirs,) = torch.autograd.grad(tuple(wanted), x, weights)
    assert_close(ours, theirs, rtol=0, atol=8e-6)
    assert len(fused) == 2


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("over", [(2, 3), 1, (1, 2, 3)])
@pytest.mark.parametrize("bands", [(1, 0), (0, 1), (1, 1)])
def test_gradients_that_are_repeated_in_memory_are_those_of_the_products(fused, layout, over, bands):
    def energy(split):
        low, high = (as_maps(band, 5, 7) for band in split(x))
        return bands[0] * low.sum(over).square().sum() + bands[1] * high.sum(over).square().sum()

    x = laid_out(noise(0, 2, 6, 5, 7), layout).requires_grad_()
    grid = {"grid": (5, 7)} if x.ndim == 3 else {}
    ours, theirs = (
        torch.autograd.grad(energy(split), x)[0]
        for split in (lambda x: split_bands(x, 0.3, **grid), lambda x: frequency._as_graph(x, 0.3, 5, 7))
    )
    assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    assert fused


def test_gradients_of_sums_second_derivatives_and_one_band_alone(fused):
    x = noise(0, 2, 3, 9, 7).requires_grad_()

    def loss(split):
        low, high = split(x)
        return low.sum() + (low**3).sum() + (low * high**2).sum()

    found = []
    for split in (lambda x: split_bands(x, 0.3), lambda x: frequency._as_graph(x, 0.3, 9, 7)):
        (first,) = torch.autograd.grad(loss(split), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        (alone,) = torch.autograd.grad(split(x)[1].square().sum(), x)
        found.append((first, second, alone))
    assert_close(*found, rtol=1e-4, atol=1e-4)
    assert len(fused) > 4


def test_the_transforms_of_torch_func_pass_through_the_kernel(fused):
    x, v = noise(0, 4, 2, 3, 5, 6), noise(1, 4, 2, 3, 5, 6)

    def energy(x):
        low, high = split_bands(x, 0.3)
        return low.square().sum() / 2 + high.sum()

    low, high = (band.reshape_as(x) for band in split_bands(x.flatten(0, 1), 0.3))
    bands = torch.func.vmap(lambda x: tuple(split_bands(x, 0.3)))(x)
    assert_close(bands, (low, high), rtol=0, atol=1e-6)
    gradient = low + frequency._as_graph(torch.ones_like(x[0]), 0.3, 5, 6).high
    assert_close(torch.func.vmap(torch.func.grad(energy))(x), gradient, rtol=0, atol=4e-6)
    assert_close(torch.func.jvp(energy, (x[0],), (v[0],))[1], (gradient[0] * v[0]).sum(), rtol=1e-5, atol=1e-5)
    assert fused


def test_a_compiler_and_an_export_see_products_alone(fused):
    x = noise(0, 2, 3, 5, 7)
    compiled = torch.compile(lambda x: split_bands(x, 0.3), fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), split_bands(x, 0.3), rtol=0, atol=4e-6)
    assert len(fused) == 1  # the eager call
    for strict in (False, True):
        graph = torch.export.export(frequency.FrequencyMask(0.3), (x,), strict=strict).graph
        assert not any("ffr" in str(node.target) for node in graph.nodes)


def test_a_trace_of_operators_holds_the_kernel_as_one_operator(fused):
    x = noise(0, 2, 3, 5, 7)
    graph = make_fx(lambda x: tuple(split_bands(x, 0.3)))(x)
    assert any("ffr.split_bands" in str(node.target) for node in graph.graph.nodes)
    assert_close(graph(x + 1), tuple(split_bands(x + 1, 0.3)), rtol=0, atol=0)


def test_the_operators_keep_the_rules_of_custom_operators():
    x = noise(0, 2, 3, 5, 7)
    operands = frequency._operands(x, 0.3, 5, 7)
    torch.library.opcheck(kernel.split, (x, *operands, 5, 7))
    torch.library.opcheck(kernel.join, (x, x + 1, *operands, 5, 7))


def test_what_does_not_fit_is_left_to_the_products():
    assert kernel.fits(torch.zeros(1, 8, 28, 28), 28, 28)
    assert kernel.fits(torch.zeros(1, 3136, 8), 56, 56)
    assert not kernel.fits(torch.zeros(1, 8, 28, 28, dtype=torch.float64), 28, 28)
    assert not kernel.fits(torch.zeros(0, 8, 28, 28), 28, 28)
    assert kernel.fits(torch.zeros(1, 8, 128, 128), 128, 128)
    assert not kernel.fits(torch.zeros(1, 8, 16, 129), 16, 129)  # too long a side
    assert not kernel.fits(torch.zeros(1, 8, 129, 16), 129, 16)
    assert not kernel.fits(torch.zeros(1, 1, 1, 1).expand(65_536, 1, 2, 2), 2, 2)  # images on the second launch axis
    assert not kernel.fits(torch.zeros(1, 128 * 128, 8), 128, 128)  # too few channels of a token at a time
    apart = torch.empty_strided((2, 8, 4, 4), (16, 2**28, 4, 1), device="meta")  # channels first, then images
    assert kernel.fits(apart, 4, 4)
    assert not kernel.fits(torch.empty_strided((2, 16, 4, 4), apart.stride(), device="meta"), 4, 4)
