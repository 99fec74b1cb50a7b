"""A method for what no method's choice of weights should hide."""

import torch

from mtrl.surgery import GramianSurgery


class Fixed(GramianSurgery):
    """Weights that tell the tasks apart: k / 4 for the k-th."""

    def weights(self, gramian, generator):
        found = torch.arange(1, 1 + gramian.shape[-1], dtype=gramian.dtype)
        return (found / 4).expand(gramian.shape[:2])
