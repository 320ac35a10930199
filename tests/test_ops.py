"""The plain functions that `vit.py` and `variants/` share."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from vitrail.ops import RESAMPLINGS, attend, sampling_matrix

sides = st.integers(2, 40)  # with antialiasing PyTorch ignores the rows where images are one pixel wide


@pytest.mark.parametrize("resampling", [*RESAMPLINGS, "offset"])
@given(old=st.tuples(sides, sides), new=st.tuples(sides, sides), seed=st.integers(0, 99))
def test_two_products_interpolate_as_pytorch_does(
    resampling: str, old: tuple[int, int], new: tuple[int, int], seed: int
) -> None:
    image = torch.randn(1, 2, *old, generator=torch.Generator().manual_seed(seed))
    if resampling == "offset":
        scale = ((new[0] + 0.1) / old[0], (new[1] + 0.1) / old[1])
        expected = F.interpolate(image, scale_factor=scale, mode="bicubic")
    else:
        mode, corners, antialias = RESAMPLINGS[resampling]
        expected = F.interpolate(image, size=new, mode=mode, align_corners=corners, antialias=antialias)
    down, right = (sampling_matrix(a, b, resampling) for a, b in zip(old, new, strict=True))
    torch.testing.assert_close(down @ image @ right.T, expected, atol=1e-4, rtol=1e-4)


def test_bf16_training_weighs_keys_as_fused_attention_does() -> None:
    """Explicit products, which are faster for few tokens on a CPU: with a weight per key, and its gradient."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 5, 8, generator=generator).bfloat16().requires_grad_() for _ in range(3))
    weights = torch.tensor([[1.0, 3.0, 1.0, 2.0, 1.0]]).expand(2, -1).log()[:, None, None].bfloat16()
    with torch.no_grad():
        expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=weights.float())
    found = attend(q, k, v, weights)
    torch.testing.assert_close(found.float(), expected, atol=0.03, rtol=0.03)
    assert not torch.allclose(attend(q, k, v).float(), expected, atol=0.03, rtol=0.03)
    found.sum().backward()
    assert q.grad is not None and q.grad.isfinite().all() and q.grad.any()
