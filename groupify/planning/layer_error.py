"""How well one conv can be replaced, from the second moments of its inputs alone.

A dense conv is a linear map, ``y = W u + b`` of an unfolded input patch u, so ``Cov(u)`` tells all that least
squares needs, for every number of groups and every order of the channels: ``Cov(y, u) = W Cov(u)``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from groupify.graph.permute import row_channels
from groupify.stats.moments import Ridge, principal_maps
from groupify.structures import SiteRecipe

_RIDGE = 0.01


@dataclass(frozen=True)
class LayerError:
    """What the best replacement of a conv is off by.

    Attributes:
        covariance: of the error over the outputs, ``Cov(y − ŷ)``, shape (O, O).
        relative: its variance ÷ the variance of the output, mean over the outputs.
    """

    covariance: Tensor
    relative: float

    def weighted(self, importance: Tensor) -> float:
        """Return ``tr(F Cov(y − ŷ))`` for an importance F, shape (O, O)."""
        return max(0.0, float((importance * self.covariance).sum()))


class LayerMoments:
    """The dense map of one conv and the covariance of what it reads, in float64.

    Args:
        weight: shape (O, I, taps).
        covariance: of the input patches, shape (I·taps, I·taps).
    """

    def __init__(self, weight: Tensor, covariance: Tensor) -> None:
        self._size = weight.shape
        self._weight = weight.double().flatten(1)
        self._covariance = covariance.double()
        self._cross = self._weight @ self._covariance  # Cov(y, u)
        self._outputs = self._cross @ self._weight.T  # Cov(y)

    def error(
        self, site: SiteRecipe, input_order: Tensor | None = None, output_order: Tensor | None = None
    ) -> LayerError:
        """Return the error of the best replacement by least squares.

        Args:
            site: structure and shuffle; one conv, or grouped and pointwise.
            input_order, output_order: channels of the dense model at each place of the grouped one,
                shapes (I,) and (O,); as they are if None.
        """
        outputs, inputs, taps = self._size
        columns = torch.arange(inputs) if input_order is None else input_order
        parts = (columns.unsqueeze(1) * taps + torch.arange(taps)).reshape(site.groups, -1)
        covariances = torch.stack([self._covariance[part[:, None], part] for part in parts])  # (G, D, D)
        if site.structure.is_one_conv:
            rows = torch.arange(outputs) if output_order is None else output_order
            rows = rows[row_channels(outputs, site.groups, site.shuffle)].reshape(site.groups, -1)
            cross = torch.stack(
                [self._cross[out[:, None], part] for out, part in zip(rows, parts, strict=True)]
            )
            maps = Ridge(covariances, _RIDGE).solve(cross)
            own, with_outputs = self._of_features(maps, parts)
            places = torch.argsort(rows.reshape(-1))  # of each output among the features
            return self._remaining(own[places[:, None], places], with_outputs[:, places])
        share = torch.stack([self._weight[:, part] for part in parts])  # (G, O, D)
        maps = principal_maps(share, covariances, (site.structure.expand or outputs) // site.groups)
        own, with_outputs = self._of_features(maps, parts)
        pointwise = Ridge(own.clone().unsqueeze(0), _RIDGE).solve(with_outputs.unsqueeze(0))[0]
        return self._remaining(pointwise @ own @ pointwise.T, with_outputs @ pointwise.T)

    def _of_features(self, maps: Tensor, parts: Tensor) -> tuple[Tensor, Tensor]:
        """``Cov(f)`` and ``Cov(y, f)`` of the features f that map (G, R, D) takes from each group."""
        read = torch.cat([kernel @ self._covariance[part] for kernel, part in zip(maps, parts, strict=True)])
        own = torch.cat([read[:, part] @ kernel.T for kernel, part in zip(maps, parts, strict=True)], dim=1)
        return own, self._weight @ read.T

    def _remaining(self, predicted: Tensor, shared: Tensor) -> LayerError:
        """The error from ``Cov(ŷ)`` and ``Cov(y, ŷ)``."""
        covariance = self._outputs - shared - shared.T + predicted
        variance = self._outputs.diagonal().clamp(min=1e-12)
        return LayerError(covariance, float((covariance.diagonal().clamp(min=0) / variance).mean()))
