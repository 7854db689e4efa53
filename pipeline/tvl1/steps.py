"""The image steps of TV-L1 outside the iterations: pyramid, gradient, warp.

Everything is a fixed sequence of elementwise operations and gathers, so the bits of one pair do not depend
on which other pairs share its batch. What that gives up is speed on strongly reduced work such as sums,
which nothing here needs. Source of each step: opencv_contrib, file and function named in each docstring.
"""

import math

import torch
import torch.nn.functional as functional
from torch import Tensor

SMALLEST_SIDE_PIXELS = 16
# A bicubic tap reaches 1 pixel left and 2 right of the base pixel, which is itself clamped to -2 .. size + 1.
PAD_BEFORE = 3
PAD_AFTER = 4


def pyramid_sizes(height: int, width: int, *, scales: int, zoom: float) -> list[tuple[int, int]]:
    """Return the (height, width) of each scale, finest first; a scale with a side below 16 is not used.

    Follows the loop "create the scales" of `calc` in optflow/src/tvl1flow.cpp (and `calcImpl` of
    cudaoptflow): each size is rounded half to even from the one before it.
    """
    sizes = [(height, width)]
    while len(sizes) < scales:
        height, width = round(height * zoom), round(width * zoom)
        if min(height, width) < SMALLEST_SIDE_PIXELS:
            break
        sizes.append((height, width))
    return sizes


def resize_linear(images: Tensor, size: tuple[int, int], *, ratio: float | None, half_pixel: bool) -> Tensor:
    """Resize (..., H, W) bilinearly; `ratio` is source pixels per result pixel, None for the sizes' ratio.

    `half_pixel=True` follows `cv::resize` (imgproc/src/resize.cpp, INTER_LINEAR on float, horizontally then
    vertically); False follows `resize_linear` in cudawarping/src/cuda/resize.cu, where pixel (0, 0) of both
    images coincide. The latter sums four products; the order differs here, which is worth rounding alone.
    """
    for dim in (-1, -2):
        source, result = images.shape[dim], size[dim]
        if source == result:  # both sources copy; at equal sizes the positions are whole numbers anyway
            continue
        step = source / result if ratio is None else ratio
        first, second, weight = linear_taps(source, result, step=step, half_pixel=half_pixel)
        first, second = first.to(images.device), second.to(images.device)
        weight = weight.to(images.device).view(-1, *([1] * (-1 - dim)))
        low, high = images.index_select(dim, first), images.index_select(dim, second)
        images = low.mul_(1 - weight).add_(high.mul_(weight))
    return images


def linear_taps(source: int, result: int, *, step: float, half_pixel: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return of each of `result` positions the two pixels it lies between, and the weight of the second."""
    positions = torch.arange(result, dtype=torch.float64)
    if half_pixel:
        positions = ((positions + 0.5) * step - 0.5).float()
    else:  # the kernel works in float: dst_x * fx
        positions = positions.float() * torch.tensor(step, dtype=torch.float32)
    first = positions.floor()
    weight = (positions - first).masked_fill((first < 0) | (first >= source - 1), 0)
    first = first.clamp(0, source - 1).long()
    return first, (first + 1).clamp(max=source - 1), weight


def centred_gradient(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return ∂x and ∂y of (..., H, W), half the difference of both neighbours, borders repeated.

    Follows `centeredGradientKernel` in cudaoptflow/src/cuda/tvl1flow.cu and `centeredGradient` in
    optflow/src/tvl1flow.cpp, which agree; Sánchez et al. 2013, section 3.
    """
    horizontal, vertical = torch.empty_like(images), torch.empty_like(images)
    for dim, out in ((-1, horizontal), (-2, vertical)):
        last = images.shape[dim] - 1
        out.narrow(dim, 0, last).copy_(images.narrow(dim, 1, last))
        out.narrow(dim, last, 1).copy_(images.narrow(dim, last, 1))
        out.narrow(dim, 1, last).sub_(images.narrow(dim, 0, last))
        out.narrow(dim, 0, 1).sub_(images.narrow(dim, 0, 1))
        out.mul_(0.5)
    return horizontal, vertical


class ClampedWarp:
    """Bicubic warp, a = -0.5, of several image stacks (B, H, W) by one flow; outside, the border repeats.

    Follows `warpBackwardKernel` and `bicubicCoeff` in cudaoptflow/src/cuda/tvl1flow.cu. The kernel divides by
    the sum of the 16 weights; that sum is one up to rounding, so the division is left out.
    """

    def __init__(self, stacks: tuple[Tensor, Tensor, Tensor], *, chunk_pixels: int) -> None:
        """Pad the three stacks once; `chunk_pixels` at a time are warped, so that temporaries stay cached."""
        batch, self.height, self.width = stacks[0].shape
        image, device = stacks[0], stacks[0].device
        self.chunk_pixels = min(chunk_pixels, image.numel())
        pads = (PAD_BEFORE, PAD_AFTER, PAD_BEFORE, PAD_AFTER)
        padded = functional.pad(torch.stack(stacks, 1), pads, mode="replicate")
        rows, self.stride = padded.shape[2:]
        # Two floats travel as one double: a gather costs by the element, not by the byte.
        flats = [torch.stack((padded[:, 0], padded[:, i]), -1).view(torch.float64).view(-1) for i in (1, 2)]
        reach = len(flats[0]) - 3 * self.stride - 3
        offsets = [row * self.stride + column for row in range(4) for column in range(4)]
        self.sources = [[flat.narrow(0, offset, reach) for offset in offsets] for flat in flats]
        # Indices are those of the first of 4 x 4 taps, one pixel up and left of the base pixel.
        kind = torch.int32 if len(flats[0]) < 2**31 else torch.int64
        first = torch.arange(batch, device=device) * (rows * self.stride) + (PAD_BEFORE - 1) * (self.stride + 1)
        self.origin = first.to(kind).view(-1, 1, 1).expand_as(image).reshape(-1)
        x = torch.arange(self.width, device=device, dtype=torch.float32)
        y = torch.arange(self.height, device=device, dtype=torch.float32)[:, None]
        self.x, self.y = x.expand_as(image).reshape(-1), y.expand_as(image).reshape(-1)
        # Scratch is kept: on Linux fresh memory costs more in page faults than the arithmetic on it.
        self.index = torch.empty(2, self.chunk_pixels, dtype=kind, device=device)
        self.gathered = torch.empty(self.chunk_pixels, dtype=torch.float64, device=device)
        self.positions = image.new_empty(2, 2, self.chunk_pixels)
        self.scratch = image.new_empty(13, self.chunk_pixels, 2)

    def __call__(self, flow: Tensor) -> list[Tensor]:
        """Return each stack at x + flow(x), flow (2, B, H, W) in pixels."""
        u, v = flow.reshape(2, -1)
        result = u.new_empty(3, len(u))
        for start in range(0, len(u), self.chunk_pixels):
            stop = min(start + self.chunk_pixels, len(u))
            self._chunk(slice(start, stop), u[start:stop], v[start:stop], result[:, start:stop])
        return list(result.view(3, *flow.shape[1:]))

    def _chunk(self, place: slice, u: Tensor, v: Tensor, out: Tensor) -> None:
        count = len(u)
        index, base_index = self.index[:, :count]
        gathered, scratch = self.gathered[:count], self.scratch[:, :count]
        position, base = self.positions[..., :count]
        torch.add(self.x[place], u, out=position[0]).clamp_(-2, self.width + 1)
        torch.add(self.y[place], v, out=position[1]).clamp_(-2, self.height + 1)
        torch.floor(position, out=base)
        index.copy_(base[1]).mul_(self.stride).add_(base_index.copy_(base[0])).add_(self.origin[place])
        position.sub_(base)
        fraction, weights = scratch[8:10], scratch[:8].view(2, 4, -1)
        for axis in range(2):
            fraction[axis, :, 0] = position[axis]  # once for each of the two floats
            fraction[axis, :, 1] = position[axis]
            _cubic_weights(fraction[axis].view(-1), out=weights[axis], scratch=scratch[10].view(-1))
        for i, sources in enumerate(self.sources):
            line, result = scratch[11].view(-1), scratch[12].view(-1)
            self._taps(sources, index, *weights, gathered=gathered, line=line, result=result)
            if i == 0:
                out[0] = scratch[12, :, 0]
            out[i + 1] = scratch[12, :, 1]

    @staticmethod
    def _taps(
        sources: list[Tensor],
        index: Tensor,
        weights_x: Tensor,
        weights_y: Tensor,
        *,
        gathered: Tensor,
        line: Tensor,
        result: Tensor,
    ) -> None:
        """Sum the 4 x 4 taps of two images into `result` (2n,)."""
        tap, across, down = gathered.view(torch.float32), weights_x.unbind(), weights_y.unbind()
        for row in range(4):
            for column in range(4):
                torch.index_select(sources[4 * row + column], 0, index, out=gathered)
                if column == 0:
                    torch.mul(tap, across[0], out=line)
                else:
                    line.addcmul_(tap, across[column])
            if row == 0:
                torch.mul(line, down[0], out=result)
            else:
                result.addcmul_(line, down[row])


def _cubic_weights(t: Tensor, *, out: Tensor, scratch: Tensor) -> None:
    """Set `out` (4, n) to Keys' weights, a = -0.5, of the taps at -1, 0, 1, 2 for the fraction t in [0, 1).

    `bicubicCoeff` expanded in t: exactly 0, 1, 0, 0 at t = 0, so that an image warped by nothing is itself.
    """
    before, here, after, beyond = out
    torch.mul(t, t, out=here)
    cubed = torch.mul(here, t, out=scratch).mul_(0.5)  # t³/2
    torch.sub(here, cubed, out=before).sub_(t, alpha=0.5)  # t² - t³/2 - t/2
    torch.sub(cubed, here, alpha=0.5, out=beyond)  # t³/2 - t²/2
    torch.mul(t, 0.5, out=after).add_(here, alpha=2).sub_(cubed, alpha=3)  # t/2 + 2t² - 3t³/2
    torch.sub(1, before, out=here).sub_(after).sub_(beyond)


class ZeroWarp:
    """Bicubic warp, a = -0.75, of several image stacks (B, H, W) by one flow; zero outside.

    Follows `remap(..., INTER_CUBIC)` as `procOneScale` of optflow/src/tvl1flow.cpp calls it (OpenCV 5;
    OpenCV 4 rounds positions to 1/32 pixel). `grid_sample` takes positions as fractions of the image; the
    stacks are padded with zeros to powers of two, so that whole-numbered positions survive the conversion
    exactly and identical frames give exactly zero flow.
    """

    def __init__(self, stacks: tuple[Tensor, Tensor, Tensor]) -> None:
        """Pad the stacks once; they are warped many times."""
        _, height, width = stacks[0].shape
        self.size = tuple(2 ** math.ceil(math.log2(side)) for side in (width, height))
        pads = (0, self.size[0] - width, 0, self.size[1] - height)
        self.image = functional.pad(torch.stack(stacks, 1), pads)
        device = stacks[0].device
        self.x = torch.arange(width, device=device, dtype=torch.float32)
        self.y = torch.arange(height, device=device, dtype=torch.float32)[:, None]

    def __call__(self, flow: Tensor) -> list[Tensor]:
        """Return each stack at x + flow(x), flow (2, B, H, W) in pixels."""
        grid = torch.stack((self.x + flow[0], self.y + flow[1]), -1)
        grid.add_(0.5).mul_(torch.tensor([2.0 / side for side in self.size], device=grid.device)).sub_(1)
        warped = functional.grid_sample(self.image, grid, mode="bicubic", align_corners=False)
        return [stack.contiguous() for stack in warped.unbind(1)]
