"""A patch discriminator, its hinge loss and the adaptive weight of VQGAN (Esser et al. 2021, arXiv 2012.09841)."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from v2flow.errors import V2FlowError
from v2flow.ranks import world

_MOST_WEIGHT = 1e4
"""As in VQGAN: before the discriminator has an opinion its gradient is next to nothing."""


class PatchDiscriminator(nn.Sequential):
    """Pictures `[B, 3, H, W]` in [0, 1] to one verdict for each of their overlapping patches, `[B, 1, h, w]`.

    PatchGAN (Isola et al. 2017, section 3.2), with group norms, so that the verdict on a picture depends neither on the
    other pictures nor on the number of ranks.

    Args:
        width: channels of the first layer, a multiple of 8; they double with every layer up to eight times as many.
        depth: layers that halve the picture.
    """

    def __init__(self, width: int, depth: int) -> None:
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for layer in range(1, depth + 1):
            before, after = (width * 2 ** min(n, 3) for n in (layer - 1, layer))
            stride = 2 if layer < depth else 1
            layers += [nn.Conv2d(before, after, 4, stride, padding=1, bias=False),
                       nn.GroupNorm(8, after), nn.LeakyReLU(0.2)]  # fmt: skip
        layers.append(nn.Conv2d(width * 2 ** min(depth, 3), 1, 4, padding=1))
        super().__init__(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [0, 1] to a map of logits [B, 1, h, w]: above 0 it takes a patch for real."""
        # Its gradients are too small for half precision, and no scaler looks after them.
        with torch.autocast(images.device.type, enabled=False):
            return super().forward(images.float() * 2 - 1)


class Adversary:
    """A discriminator that trains itself beside the model.

    Lightning knows nothing of it: its steps are not counted in `global_step`, and no gradient clipping, schedule,
    average or DistributedDataParallel reaches it; so the model's own training stays automatic. All ranks start from the
    same weights and average their gradients, so they stay equal.

    Args:
        image_size: the side of the pictures.
        width, depth: of the discriminator.
        lr: learning rate of its AdamW, constant.
        seed: of its first weights.

    Raises:
        V2FlowError: pictures too small for `depth`.
    """

    def __init__(
        self, image_size: int, width: int, depth: int, lr: float, device: torch.device, seed: int
    ) -> None:
        if image_size < 3 * 2**depth:
            raise V2FlowError(
                f"option pixel_losses.discriminator_depth: {depth} halvings need pictures of at least "
                f"{3 * 2**depth} px, found {image_size} px; lower it"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.discriminator = PatchDiscriminator(width, depth).to(device)
        self.optimizer = torch.optim.AdamW(self.discriminator.parameters(), lr=lr, betas=(0.5, 0.9))

    def step(self, real: Tensor, fake: Tensor) -> Tensor:
        """One step of the discriminator on pictures `[B, 3, H, W]`; its hinge loss before it, 1 for one that is
        undecided. No rank makes a step whose loss or gradient is not finite on one of them: it would never recover."""
        self.discriminator.requires_grad_(True)
        verdicts = self.discriminator(real), self.discriminator(fake.detach())
        loss = (F.relu(1 - verdicts[0]).mean() + F.relu(1 + verdicts[1]).mean()) / 2
        self.optimizer.zero_grad()
        loss.backward()
        judged = [p.grad for p in self.discriminator.parameters() if p.grad is not None] + [
            loss.detach().clone()
        ]
        _average(judged)  # and so not finite on all ranks
        if nn.utils.get_total_norm(judged).isfinite():
            self.optimizer.step()
        return loss.detach()

    def loss(self, fake: Tensor) -> Tensor:
        """The model's side of the hinge loss, `-D(fake)`; its gradient goes to the pictures alone."""
        self.discriminator.requires_grad_(False)
        return -self.discriminator(fake).mean()

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values for a checkpoint."""
        return {
            "discriminator": self.discriminator.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.discriminator.load_state_dict(state["discriminator"])
        self.optimizer.load_state_dict(state["optimizer"])


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """The factor that gives both losses equal gradients at the model's last layer (VQGAN, equation 7); a scalar without
    gradient, the mean over the ranks."""
    norms = [
        torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm()
        for loss in (reconstruction, adversarial)
    ]
    weight = (norms[0] / (norms[1] + 1e-6)).clamp(0, _MOST_WEIGHT).detach()
    _average([weight])
    return weight


def _average(tensors: list[Tensor]) -> None:
    """Replace tensors by their means over the ranks."""
    ranks = world()[1]
    if ranks > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)
            tensor /= ranks
