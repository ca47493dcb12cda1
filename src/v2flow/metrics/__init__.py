"""Metrics: reconstruction error, feature distances, codebook use, and the two rows that cost nothing.

One protocol holds for all of them: pictures are first rounded to 8 bits by :func:`to_uint8`, padding
(``valid`` False) is left out, sums are kept in fp64, and the state is reduced over the ranks of `torch.distributed` at
compute time.
"""

from v2flow.metrics.codebook import CodebookUsage, codebook_statistics
from v2flow.metrics.reconstruction import ReconstructionMetrics, psnr_per_image, to_uint8

__all__ = ["CodebookUsage", "ReconstructionMetrics", "codebook_statistics", "psnr_per_image", "to_uint8"]
