"""The fine grid: its order, and the conditional mean that is corrected on it."""

import pytest
import torch
import torch.nn.functional as F

from v2flow.errors import V2FlowError
from v2flow.fine_grid import FineBlock, FineMean, from_fine, to_fine

GRID, PATCH, CHANNELS, WIDTH = (2, 3), 2, 8, 6
POSITIONS = GRID[0] * GRID[1]


def make_mean(randomised: bool = True) -> FineMean:
    torch.manual_seed(0)
    mean = FineMean(CHANNELS, WIDTH, GRID, PATCH, width=4, depth=2)
    if randomised:
        with torch.no_grad():
            for parameter in mean.parameters():
                parameter.normal_(std=0.3)
    return mean


def test_fine_positions_are_the_pixels_of_a_patch() -> None:
    """Channels of a position are c·p² values in the order of pixel_unshuffle: the fine grid is the picture."""
    picture = torch.arange(2 * 4 * 6).view(1, 2, 4, 6).float()
    latents = F.pixel_unshuffle(picture, 2).flatten(2).transpose(1, 2)
    assert latents.shape == (1, POSITIONS, CHANNELS)
    assert torch.equal(to_fine(latents, GRID, PATCH), picture)
    assert torch.equal(from_fine(picture, PATCH), latents)


def test_the_mean_starts_linear() -> None:
    mean, condition = make_mean(randomised=False), torch.randn(2, POSITIONS, WIDTH)
    assert torch.equal(mean(condition), mean.linear(condition))


def test_the_mean_of_a_patch_depends_on_its_neighbours_edge() -> None:
    mean, condition = make_mean(), torch.randn(1, POSITIONS, WIDTH, requires_grad=True)
    fine = to_fine(mean(condition), GRID, PATCH)
    # The pixel in the lower right corner of the first patch: what it takes from the patch beside it.
    fine[0, 0, 1, 1].backward()
    assert condition.grad is not None and condition.grad[0, 1].abs().sum() > 0
    assert all(p.grad is not None for p in mean.blocks.parameters())


def test_the_mean_is_one_picture_s_own() -> None:
    mean, condition = make_mean(), torch.randn(2, POSITIONS, WIDTH)
    other = condition.clone()
    other[1] += 1
    torch.testing.assert_close(mean(condition)[0], mean(other)[0])


def test_a_block_is_the_identity_at_first_and_its_control_acts() -> None:
    torch.manual_seed(0)
    block, x = FineBlock(4, control=3), torch.randn(1, 4, 5, 5)
    assert torch.equal(block(x, torch.ones(1, 1, 3)), x)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.3)
    assert not torch.allclose(block(x, torch.ones(1, 1, 3)), block(x, torch.zeros(1, 1, 3)))


def test_latents_that_are_no_patches_are_refused() -> None:
    with pytest.raises(V2FlowError, match="fine_patch.*the codec's 6 channels"):
        FineMean(6, WIDTH, GRID, PATCH, width=4, depth=1)
