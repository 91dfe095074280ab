"""Layout of a stage's output: the one place that knows the shapes (B, D, H, W), (B, H, W, D) and (B, N, D).

Letters: B images, D channels, H x W locations, N tokens, P prefix tokens (class, register and distillation tokens).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ImageSize = Sequence[int]  # height and width in pixels


class Layout:
    """How the feature map of a stage lies in the output of its module."""

    def tensor(self, output: Any) -> Tensor:
        """The feature map in the output of the module: the output itself, or an item of it."""
        return output

    def with_features(self, output: Any, tensor: Tensor) -> Any:
        """The output of the module with another feature map."""
        return tensor

    def to_nchw(self, tensor: Tensor, image_size: ImageSize | None = None) -> Tensor:
        """The feature map, or its gradient, as the stream reads it: (B, D, H, W)."""
        raise NotImplementedError

    def from_nchw(self, features: Tensor, prefix: Tensor) -> Tensor:
        """The other way: (B, D, H, W) in this layout, with the vectors (B, D) as prefix tokens where it has some."""
        raise NotImplementedError

    def one_location(self, vector: Tensor) -> Tensor:
        """(B, D) vectors as feature maps of one location.

        The vectors are the prefix tokens too: a head that reads the class token reads the vector there.
        """
        return self.from_nchw(vector[:, :, None, None], vector)


@dataclass(frozen=True)
class NCHW(Layout):
    """(B, D, H, W)."""

    def to_nchw(self, tensor: Tensor, image_size: ImageSize | None = None) -> Tensor:
        return tensor

    def from_nchw(self, features: Tensor, prefix: Tensor) -> Tensor:
        return features


@dataclass(frozen=True)
class NHWC(Layout):
    """(B, H, W, D), as swin's blocks have it."""

    def to_nchw(self, tensor: Tensor, image_size: ImageSize | None = None) -> Tensor:
        return tensor.permute(0, 3, 1, 2)

    def from_nchw(self, features: Tensor, prefix: Tensor) -> Tensor:
        return features.permute(0, 2, 3, 1)


@dataclass(frozen=True)
class Tokens(Layout):
    """(B, P + N, D): prefix tokens, then one token a location, row by row.

    Attributes:
        num_prefix: P. Prefix tokens are no locations.
        stride: Rows and columns of pixels per location.
        item: Index of the tokens where the module gives a tuple.
        windows: Rows and columns of the windows by which Hiera sorts its tokens, the innermost window first: it orders
            them by their place inside each window, and then by the place of the outermost window.
    """

    num_prefix: int
    stride: tuple[int, int]
    item: int | None = None
    windows: tuple[tuple[int, int], ...] = ()

    def tensor(self, output: Any) -> Tensor:
        return output if self.item is None else output[self.item]

    def with_features(self, output: Any, tensor: Tensor) -> Any:
        if self.item is None:
            return tensor
        return tuple(tensor if i == self.item else other for i, other in enumerate(output))

    def to_nchw(self, tensor: Tensor, image_size: ImageSize | None = None) -> Tensor:
        tokens = tensor[:, self.num_prefix :].transpose(1, 2)  # (B, D, N)
        if image_size is None:
            return tokens.unsqueeze(-1)
        height, width = self.grid(tokens.shape[2], image_size)
        if not self.windows:
            return tokens.unflatten(2, (height, width))
        rows, columns = (math.prod(sides) for sides in zip(*self.windows, strict=True))
        sides = (*(side for window in self.windows for side in window), height // rows, width // columns)
        tokens = tokens.unflatten(2, sides)
        outermost = tokens.ndim - 2  # rows of outermost windows; the columns are the last axis
        order = (0, 1, *range(outermost, 1, -2), *range(outermost + 1, 2, -2))
        return tokens.permute(order).reshape(*tokens.shape[:2], height, width)

    def from_nchw(self, features: Tensor, prefix: Tensor) -> Tensor:
        tokens = features.flatten(2).transpose(1, 2)
        return torch.cat([prefix.unsqueeze(1).expand(-1, self.num_prefix, -1), tokens], 1)

    def grid(self, count: int, image_size: ImageSize) -> tuple[int, int]:
        """Rows and columns of the locations of an image.

        Args:
            count: N, the tokens that are locations.
            image_size: Height and width of the network's input in pixels.

        Raises:
            ValueError: If the tokens are no grid of such an image.
        """
        up = [-(-size // stride) for size, stride in zip(image_size, self.stride, strict=True)]
        down = [size // stride for size, stride in zip(image_size, self.stride, strict=True)]
        # Networks with padding round up, the others leave out pixels that do not fill a patch.
        for height, width in (up, down):
            if height * width == count:
                return height, width
        raise ValueError(
            f'{count} patch tokens are no grid of an image of {image_size[0]} x {image_size[1]} pixels '
            f'with a stride of {self.stride[0]} x {self.stride[1]} pixels.'
        )


@dataclass(frozen=True)
class Stage:
    """A module of a network whose output holds a feature map.

    Attributes:
        name: Name of the module; `forward_features` where the pooled map is the output of no named module.
        dim: D.
        layout: How the feature map lies in the output.
    """

    name: str
    dim: int
    layout: Layout

    def tensor(self, output: Any) -> Tensor:
        """The feature map in the output of the module: the output itself, or an item of it."""
        return self.layout.tensor(output)

    def with_features(self, output: Any, tensor: Tensor) -> Any:
        """The output of the module with another feature map."""
        return self.layout.with_features(output, tensor)

    def to_nchw(self, tensor: Tensor, image_size: ImageSize | None = None) -> Tensor:
        """The feature map, or its gradient, as the stream reads it.

        Args:
            tensor: `tensor(output)`, or a tensor of its shape.
            image_size: Height and width of the network's input in pixels. The grid of patch tokens follows from it.

        Returns:
            (B, D, H, W) in image order, a view where the layout allows one. Patch tokens without an image size give
            (B, D, N, 1) in their own order: a sum over the locations does not depend on it.

        Raises:
            ValueError: If the tokens are no grid of such an image.
        """
        return self.layout.to_nchw(tensor, image_size)

    def one_location(self, vector: Tensor) -> Tensor:
        """(B, D) vectors as feature maps of one location, for the network's head."""
        return self.layout.one_location(vector)
