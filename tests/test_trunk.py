"""The transformer: positions, attention, modulation and blocks against formulas written out."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch import Tensor

from conftest import randomised
from onefold.networks.trunk import (
    Attention,
    Block,
    Modulation,
    SwiGLU,
    Trunk,
    fourier_features,
    hidden_width,
    rotary_table,
    rotate,
)


def test_shapes_are_checked_in_tests():
    with pytest.raises(TypeCheckError):
        rotate(torch.randn(2, 3, 4), rotary_table(2, 2, 4))
    with pytest.raises(TypeCheckError):
        rotate(torch.randn(1, 2, 5, 4), rotary_table(2, 2, 4))  # 5 tokens, 4 positions
    with pytest.raises(TypeCheckError):
        Modulation(8)(torch.zeros(2, 8, dtype=torch.int64))


# --- rotary positions ---


def logits(rows: int, columns: int, head: int, seed: int) -> Tensor:
    """q·k for one query and one key put at every pair of positions, (N, N)."""
    q, k = torch.randn(2, head, generator=torch.Generator().manual_seed(seed))
    table = rotary_table(rows, columns, head)
    q, k = (rotate(v.expand(1, 1, rows * columns, head), table)[0, 0] for v in (q, k))
    return q @ k.T


@settings(max_examples=20)
@given(st.integers(1, 4), st.integers(1, 4), st.sampled_from([4, 8, 32]), st.integers(0, 99))
def test_attention_sees_relative_positions_only(rows: int, columns: int, head: int, seed: int):
    seen: dict[tuple[int, int], float] = {}
    for i, row in enumerate(logits(rows, columns, head, seed)):
        for j, logit in enumerate(row.tolist()):
            offset = i // columns - j // columns, i % columns - j % columns
            assert logit == pytest.approx(seen.setdefault(offset, logit), abs=1e-4)


def test_attention_tells_every_offset_from_every_other():
    offsets = logits(4, 4, 16, 0)[5]  # token (1, 1) against all
    assert torch.pdist(offsets[:, None]).min() > 1e-3


@settings(max_examples=20)
@given(st.integers(0, 99))
def test_rotation_keeps_norms_and_the_first_token(seed: int):
    x = torch.randn(2, 3, 12, 8, generator=torch.Generator().manual_seed(seed))
    turned = rotate(x, rotary_table(3, 4, 8))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[:, :, 0], x[:, :, 0])
    assert not torch.allclose(turned[:, :, 1:], x[:, :, 1:], atol=1e-3)


def test_angles_by_hand():
    """Pair i of the first half turns with the row, of the second with the column, at 1 … 1/100 radians a token."""
    cos, sin = rotary_table(2, 3, 8)
    row, column = 1, 2
    angles = torch.tensor([row * 1.0, row * 0.01, column * 1.0, column * 0.01])
    torch.testing.assert_close(cos[row * 3 + column], angles.cos())
    torch.testing.assert_close(sin[row * 3 + column], angles.sin())
    x = torch.zeros(1, 1, 6, 8)
    x[..., 2] = 1  # the first number of the pair (2, 6)
    turned = rotate(x, rotary_table(2, 3, 8))[0, 0, 5]
    torch.testing.assert_close(turned[[2, 6]], torch.tensor([math.cos(2), math.sin(2)]))


# --- layers against their formulas ---


def rms(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def test_attention_is_the_formula():
    width, heads, table = 24, 3, rotary_table(2, 3, 8)
    layer, h = randomised(Attention(width, heads)), torch.randn(2, 6, width)
    q, k, v = (h @ w.T for w in layer.project_in.weight.chunk(3))
    outs = []
    for head in range(heads):
        part = slice(8 * head, 8 * head + 8)
        a = rotate((layer.norm_q.weight * rms(q[..., part])).unsqueeze(1), table)[:, 0]
        b = rotate((layer.norm_k.weight * rms(k[..., part])).unsqueeze(1), table)[:, 0]
        outs.append((a @ b.mT / math.sqrt(8)).softmax(-1) @ v[..., part])
    expected = torch.cat(outs, -1) @ layer.project_out.weight.T
    torch.testing.assert_close(layer(h, table), expected, atol=1e-5, rtol=1e-5)


def test_swiglu_is_the_formula():
    layer, h = randomised(SwiGLU(16)), torch.randn(2, 5, 16)
    gate, value = layer.project_in.weight.chunk(2)
    expected = (F.silu(h @ gate.T) * (h @ value.T)) @ layer.project_out.weight.T
    torch.testing.assert_close(layer(h), expected)


def test_block_is_the_formula():
    table = rotary_table(2, 2, 8)
    block, h, modulation = randomised(Block(16, 2)), torch.randn(3, 4, 16), torch.randn(3, 6, 16)
    b1, s1, g1, b2, s2, g2 = (modulation + block.offset).unsqueeze(2).unbind(1)
    expected = h + (1 + g1) * block.attention((1 + s1) * rms(h) + b1, table)
    expected = expected + (1 + g2) * block.swiglu((1 + s2) * rms(expected) + b2)
    torch.testing.assert_close(block(h, modulation, table), expected, atol=1e-5, rtol=1e-5)
    one_for_all = block(h, modulation[:1], table)
    torch.testing.assert_close(one_for_all, block(h, modulation[:1].expand(3, -1, -1), table))


def test_modulation_is_the_formula_and_starts_at_zero():
    condition = torch.randn(3, 8)
    assert (Modulation(8)(condition) == 0).all()
    layer = randomised(Modulation(8))
    expected = layer.out(F.silu(layer.hidden(F.silu(condition)))).view(3, 6, 8)
    torch.testing.assert_close(layer(condition), expected)


def test_untrained_trunk_is_the_identity_before_its_norm():
    trunk, h = Trunk(16, 3, 2, 2, 3), torch.randn(2, 6, 16)
    states = trunk.hidden(h, torch.randn(2, 6, 16))
    assert len(states) == 3
    assert all(torch.equal(state, h) for state in states)
    torch.testing.assert_close(trunk(h, torch.zeros(1, 6, 16)), rms(h))


def test_hidden_states_lead_to_the_output():
    trunk, h, modulation = randomised(Trunk(16, 3, 2, 2, 3)), torch.randn(2, 6, 16), torch.randn(2, 6, 16)
    states = trunk.hidden(h, modulation)
    torch.testing.assert_close(trunk.norm(states[-1]), trunk(h, modulation))
    assert not torch.allclose(states[0], states[1], atol=1e-3)


def test_every_token_reaches_every_token():
    trunk = randomised(Trunk(16, 1, 2, 2, 3))
    h = torch.randn(1, 6, 16, requires_grad=True)
    for token in range(6):
        (gradient,) = torch.autograd.grad(trunk(h, torch.zeros(1, 6, 16))[0, token].sum(), h)
        assert (gradient[0].abs().amax(-1) > 1e-6).all()


# --- widths and time features ---


@given(st.integers(1, 4096))
def test_hidden_width_is_near_eight_thirds(width: int):
    hidden = hidden_width(width)
    assert hidden % 128 == 0
    assert hidden == 128 or abs(hidden - 8 * width / 3) <= 64


def test_hidden_widths_of_the_recipes():
    assert [hidden_width(width) for width in (8, 128, 512, 768, 1024)] == [128, 384, 1408, 2048, 2688]


def test_time_features_by_hand():
    t = torch.tensor([0.0, 0.3, 1.0])
    features = fourier_features(t, 64)
    frequencies = torch.tensor([0.5 * 1000 ** (k / 31) for k in range(32)], dtype=torch.float64)
    angles = math.pi * t.double()[:, None] * frequencies
    torch.testing.assert_close(features.double(), torch.cat([angles.cos(), angles.sin()], 1), atol=1e-3, rtol=0)
