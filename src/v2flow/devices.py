"""Where a model runs when nobody says where."""

import torch


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """`device`, or when left out cuda where there is one, else cpu."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
