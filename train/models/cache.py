"""Keys and values of the tokens a decoder has already read.

Shape suffixes: B sequences, L new tokens, S tokens so far, C capacity, K key/value heads, D features of a head.
"""

import torch
from torch import Tensor


class LayerCache:
    """One layer's keys and values.

    Args:
        cache: what it is part of.
    """

    def __init__(self, cache: "Cache"):
        self._cache = cache
        self._held: tuple[Tensor, Tensor] | None = None

    def extend(self, k_BLKD: Tensor, v_BLKD: Tensor) -> tuple[Tensor, Tensor]:
        """Add the new tokens' keys and values; k_BSKD and v_BSKD of all."""
        if self._held is None:
            batch, _, heads, features = k_BLKD.shape
            shape = (batch, self._cache.capacity, heads, features)
            self._held = (k_BLKD.new_empty(shape), v_BLKD.new_empty(shape))
        end = self._cache.length
        for held_BCKD, new_BLKD in zip(self._held, (k_BLKD, v_BLKD), strict=True):
            held_BCKD[:, end - new_BLKD.shape[1] : end] = new_BLKD
        return self._held[0][:, :end], self._held[1][:, :end]

    def keep(self, rows_B: Tensor) -> None:
        if self._held is not None:
            self._held = (self._held[0][rows_B], self._held[1][rows_B])


class Cache:
    """Room for every layer's keys and values, filled from the left. All sequences have the same number of columns:
    shorter prompts are padded on their left (document -1), which nothing attends to.

    Args:
        layers: of the decoder.
        batch: sequences.
        capacity: most tokens that will be held, padding included.
        device: where the keys and values are computed.
    """

    def __init__(self, layers: int, batch: int, capacity: int, device: torch.device):
        self.length = 0
        self.capacity = capacity
        self.layers = [LayerCache(self) for _ in range(layers)]
        self._documents_BC = torch.full((batch, capacity), -1, dtype=torch.int64, device=device)

    def see(self, documents_BL: Tensor) -> Tensor:
        """Make room for new tokens; documents_BS of all tokens including these. Called once per forward pass."""
        start, self.length = self.length, self.length + documents_BL.shape[1]
        self._documents_BC[:, start : self.length] = documents_BL
        return self._documents_BC[:, : self.length]

    def keep(self, rows_B: Tensor) -> None:
        """Go on with some of the sequences only.

        Args:
            rows_B: their numbers, int64.
        """
        self._documents_BC = self._documents_BC[rows_B]
        for layer in self.layers:
            layer.keep(rows_B)
