"""The decoder's operations against PyTorch's own or the formulas written out, values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter

from cm3leon.models import kernels
from cm3leon.models.kernels import (
    add_linear_weight_gradient,
    apply_rotary_emb,
    attention,
    linear,
    linear_input_gradient,
    pack_weight,
    packed_linear,
    relu,
)


def with_gradients(function, *inputs):
    """The function's value and the gradients of its inputs, of a weighted sum of it."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    y = function(*leaves)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y.dtype)
    return y, *torch.autograd.grad((y * weights).sum(), leaves)


def equal(found, expected, **tolerance):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.float(), b.float(), **tolerance)


def test_pairs_are_turned_by_their_angles():
    angles = torch.randn(2, 7, 1, 4)
    cos_sin = torch.stack([angles.cos(), angles.sin()], -1)

    def written_out(x):
        a, b = x[..., 0::2], x[..., 1::2]
        turned = torch.empty_like(x)
        turned[..., 0::2], turned[..., 1::2] = a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()
        return turned

    x = torch.randn(2, 7, 3, 8)
    equal(with_gradients(lambda x: apply_rotary_emb(x, cos_sin), x), with_gradients(written_out, x), rtol=1e-5, atol=1e-6)
    compiled = torch.compile(apply_rotary_emb, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, cos_sin), apply_rotary_emb(x, cos_sin), rtol=1e-5, atol=1e-6)


def test_relu_overwrites_its_input():
    x = torch.randn(50, 8)
    equal(with_gradients(lambda x: relu(x * 2), x), with_gradients(lambda x: F.relu(x * 2), x))
    relu(x)
    assert x.min() == 0


PACKED = torch.tensor([0, 9, 10, 33, 40], dtype=torch.int32)


def reference(q, k, v, cu_seqlens):
    """PyTorch's attention, of packed samples under a mask of all tokens by all tokens."""
    number = torch.bucketize(torch.arange(q.shape[2]), torch.tensor([0]) if cu_seqlens is None else cu_seqlens, right=True)
    mask = (number[:, None] == number).tril()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.4)


@pytest.mark.parametrize("cu_seqlens", [None, PACKED], ids=["rows", "packed"])
def test_attention_in_bfloat16_is_near_that_in_float32(cu_seqlens):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2 if cu_seqlens is None else 1, 3, 40, 16) for _ in range(3))
    expected = with_gradients(lambda q, k, v: reference(q, k, v, cu_seqlens), q, k, v)
    for inputs in ([q, k, v.bfloat16()], [x.bfloat16() for x in (q, k, v)]):
        found = with_gradients(lambda q, k, v: attention(q, k, v, 0.4, cu_seqlens, 23), *inputs)
        assert [x.dtype for x in found] == [torch.bfloat16, *[x.dtype for x in inputs]]
        for a, b in zip(found, expected, strict=True):
            assert (a.float() - b).norm() < 0.01 * b.norm()
    equal(with_gradients(lambda q, k, v: attention(q, k, v, 0.4, cu_seqlens, 23), q, k, v), expected, rtol=1e-4, atol=1e-5)


def test_large_scores_are_told_apart_in_bfloat16():
    """Scores 20 and 20.02, which bfloat16 cannot tell apart: as are their weights."""
    q = torch.tensor([[1.0, 1.0]]).expand(1, 1, 2, 2).contiguous()
    k = torch.tensor([[20.0, 0.0], [20.0, 0.02]]).view(1, 1, 2, 2)
    v = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).view(1, 1, 2, 2)
    found = attention(q, k, v.bfloat16(), 1.0)[0, 0, 1]
    torch.testing.assert_close(found.float(), attention(q, k, v, 1.0)[0, 0, 1], rtol=0, atol=2**-9)
    assert found[0] > found[1]


@pytest.mark.parametrize("cu_seqlens", [None, PACKED], ids=["rows", "packed"])
def test_attention_in_bfloat16_sees_nothing_that_is_hidden(cu_seqlens):
    """What a token does not see has no part in it to the bit, and gets no gradient from it."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 3, 40, 16).bfloat16() for _ in range(3))
    before = attention(q, k, v, 0.4, cu_seqlens, 23)
    later = v.clone().requires_grad_()
    with torch.no_grad():
        later[:, :, 30:] += 5
    after = attention(q, k, later, 0.4, cu_seqlens, 23)
    assert torch.equal(before[:, :, :30], after[:, :, :30])
    after[:, :, :30].float().sum().backward()
    assert not later.grad[:, :, 30:].any()
    if cu_seqlens is not None:
        other_samples = torch.cat([v[:, :, :33] * 2, v[:, :, 33:]], 2)
        assert torch.equal(attention(q, k, other_samples, 0.4, cu_seqlens, 23)[:, :, 33:], before[:, :, 33:])


@pytest.fixture(params=[False, True], ids=["mkl", "onednn"])
def slow_mkl(request, monkeypatch):
    """Whether MKL is slow on this processor: both forms of products, on any processor with oneDNN."""
    if request.param and not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr(kernels, "prefers_onednn", lambda: request.param)
    return request.param


@pytest.mark.parametrize("shape", [(2, 144, 24), (288, 24), (1, 256, 24), (260, 24), (3, 24)], ids=str)
def test_linear_layers_are_pytorch_s_in_either_form(slow_mkl, shape):
    torch.manual_seed(0)
    x, weight = torch.randn(shape), torch.randn(40, 24)
    found, expected = with_gradients(linear, x, weight), with_gradients(F.linear, x, weight)
    assert all(one.is_contiguous() for one in found)
    equal(found, expected, rtol=1e-5, atol=1e-4)
    gradient, x = torch.randn(*shape[:-1], 40).flatten(0, -2), x.flatten(0, -2)
    total = torch.ones(40, 24)
    add_linear_weight_gradient(total, gradient, x)
    equal([linear_input_gradient(gradient, weight), total], [gradient @ weight, 1 + gradient.T @ x], rtol=1e-5, atol=1e-4)


def test_rows_are_convolved_where_prefers_onednn_in_float32_alone(slow_mkl):
    def convolutions(rows, dtype=torch.float32):
        with torch.profiler.profile() as profile, torch.autocast("cpu", enabled=dtype != torch.float32):
            linear(torch.randn(rows, 24), torch.randn(40, 24))
        return sum(event.count for event in profile.key_averages() if event.key == "aten::conv2d")

    assert convolutions(288) == slow_mkl
    assert not convolutions(288, torch.bfloat16) and not convolutions(296) and not convolutions(192)


def test_a_weight_of_many_elements_has_its_gradient_from_few_rows(slow_mkl, monkeypatch):
    monkeypatch.setattr(kernels, "WIDE_WEIGHT", 40 * 24)
    for rows in (256, 512):
        gradient, x, total = torch.randn(rows, 40), torch.randn(rows, 24), torch.zeros(40, 24)
        with torch.profiler.profile() as profile:
            add_linear_weight_gradient(total, gradient, x)
        assert any(event.key == "aten::convolution_backward" for event in profile.key_averages()) == (slow_mkl and rows == 512)
        torch.testing.assert_close(total, gradient.T @ x, rtol=1e-5, atol=1e-4)


def test_compilers_are_asked_nothing_about_the_number_of_rows(slow_mkl):
    """Lengths above and below the threshold, multiples of 16 and not, are one graph after the first."""
    counted = []
    for function in (linear, F.linear):
        torch._dynamo.reset()
        counter = CompileCounter()
        compiled = torch.compile(function, backend=counter)
        for rows in (265, 272, 288, 289, 218, 336):
            compiled(torch.randn(1, rows, 24), torch.randn(40, 24))
        counted.append(counter.frame_count)
    torch._dynamo.reset()
    assert counted[0] == counted[1]


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")
@pytest.mark.parametrize("rows", [0, 1, 3, 32, 33, 49, 255, 256, 257, 513])
def test_packed_weights_give_the_same_for_any_rows(rows):
    torch.manual_seed(0)
    weight = torch.randn(40, 24)
    packed = pack_weight(weight)
    for x in (torch.randn(rows, 24), torch.randn(rows, 2, 24), torch.randn(2, rows, 24).transpose(0, 1)):
        torch.testing.assert_close(packed_linear(x, packed), F.linear(x, weight), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")
def test_packed_weights_meet_few_numbers_of_rows():
    """For each of which oneDNN keeps a kernel."""
    met = set()
    with torch.profiler.profile(record_shapes=True) as profile:
        for rows in range(1, 600, 7):
            packed_linear(torch.randn(rows, 24), pack_weight(torch.randn(40, 24)))
    for event in profile.key_averages(group_by_input_shape=True):
        if event.key == "mkldnn::_linear_pointwise":
            met.add(event.input_shapes[0][0])
    assert max(met) == kernels.MAX_PACKED_ROWS and len(met) <= kernels.EXACT_PACKED_ROWS + kernels.MAX_PACKED_ROWS // 16
