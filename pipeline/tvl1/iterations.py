"""The iterations of TV-L1: two updates per iteration over strips of rows that stay in the cache.

Symbols are those of Zach, Pock, Bischof (2007) and Sánchez, Meinhardt-Llopis, Facciolo (IPOL 2013): u the
flow, p the dual variable, rho the linearised residual, τ, λ, θ step, attachment and tightness. The state
holds U = (τ/θ)·u rather than u, which removes two multiplications per pixel: p ← (p + ∇U)/(1 + |∇U|).

Layout: each plane is the pairs' rows one after the other, (B·H, W), seen flat. Forward differences in the
last column and row are zero, so p is zero there, so a backward difference that reads over the edge of a row
or a pair reads a zero, as it should: a strip is one flat operation, for any number of pairs.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST_SQUARED_GRADIENT = 1e-30


@dataclass(frozen=True)
class PrimalViews:
    """Views of some rows, n pixels, for the update of u; the first axis of two is the flow component."""

    u: Tensor
    """(2, n), updated."""
    u_parts: tuple[Tensor, ...]
    """Both components of `u`."""
    slope_parts: tuple[Tensor, ...]
    """Both components of the slope, see `Iterations.linearise`."""
    constant: Tensor
    """(n,), see `Iterations.linearise`."""
    gradient: Tensor
    """(2, n), the warped ∇I₁."""
    p_x: Tensor
    """(2, n), the dual variable, horizontal."""
    p_left: Tensor
    """(2, n), the same one pixel to the left."""
    p_y: Tensor
    """(2, n), the dual variable, vertical."""
    p_above: Tensor
    """(2, n), the same one row up."""
    data: Tensor
    """(n,), scratch."""
    update: Tensor
    """(2, n), scratch for the update of U divided by τ."""
    update_parts: tuple[Tensor, ...]
    """Both components of the scratch."""
    row_errors: Tensor
    """(rows,), place for the sum of squares of each row."""


@dataclass(frozen=True)
class DualViews:
    """Views of some rows, n pixels, for the update of p; the first axis of three is the direction."""

    u: Tensor
    """(2, n)."""
    u_right: Tensor
    """(2, n), one pixel to the right."""
    u_below: Tensor
    """(2, n), one row down."""
    p: Tensor
    """(2, 2, n), updated."""
    forward: Tensor
    """(2, 2, n), scratch for the forward differences."""
    forward_parts: tuple[Tensor, ...]
    """Both directions of `forward`."""
    last_column: Tensor
    """(2, rows), the horizontal differences that are zero."""
    last_row: Tensor
    """(2, pairs, W), the vertical differences that are zero."""
    norm: Tensor
    """(2, n), scratch."""


class Iterations:
    """State and scratch of the iterations of B pairs of one size; the first `active` pairs take part."""

    def __init__(self, flow: Tensor, *, tau: float, lambda_: float, theta: float, strip_pixels: int) -> None:
        """Start from the flow (2, B, H, W) in pixels, with p = 0, as `procOneScale` does at each scale."""
        _, self.pairs, self.height, self.width = flow.shape
        self.tau, self.lambda_, self.theta = tau, lambda_, theta
        self.active = self.pairs
        # order[place] is the pair that lies there: pairs that stop are moved behind the active ones.
        self.order = list(range(self.pairs))
        pixels, line = flow[0].numel(), self.width
        new = flow.new_zeros
        # A line more after U and before p: the neighbours of the last and first row, read but never used.
        self._u_padded = new(2, pixels + line)
        self._u = self._u_padded[:, :pixels]
        self._p_padded = new(2, 2, pixels + line)
        self._p = self._p_padded[:, :, line:]
        self._slope, self._gradient = new(2, pixels), new(2, pixels)
        self._constant = new(pixels)
        self._row_errors = new(pixels // line)
        # Whole rows, so that a strip is one flat operation.
        self._strip = max(1, min(pixels // line, strip_pixels // line)) * line
        self._scratch = new(8, self._strip + line)
        self._one = flow.new_ones(())
        self._strips: list[tuple[PrimalViews, DualViews]] = []
        self.u.copy_(flow).mul_(tau / theta)
        self._plan()

    @property
    def u(self) -> Tensor:
        """U = (τ/θ)·u, (2, B, H, W), writable."""
        return self._u.view(2, self.pairs, self.height, self.width)

    def flow(self) -> Tensor:
        """Return u (2, B, H, W) in pixels, the pairs in the order in which they came."""
        places = torch.tensor(self.order, device=self._u.device).argsort()
        return self.u.index_select(1, places).mul_(self.theta / self.tau)

    def linearise(self, warped: list[Tensor], first: Tensor, flow: Tensor) -> None:
        """Set the data term around `flow` from the warped I₁, ∂x I₁, ∂y I₁ and I₀, each (B, H, W).

        Follows the end of `warpBackwardKernel` (cudaoptflow/src/cuda/tvl1flow.cu) and `calcGradRho`
        (optflow/src/tvl1flow.cpp): g = |∇I₁|², rho_c = I₁w - Iₓu₁ - I_yu₂ - I₀. Stored so that
        -rho/(θg) = slope·U + constant.
        """
        pairs = torch.tensor(self.order, device=first.device)
        image, image_x, image_y, first = (stack.index_select(0, pairs) for stack in (*warped, first))
        gradient, slope = self._gradient.view_as(flow), self._slope.view_as(flow)
        torch.stack((image_x, image_y), out=gradient)
        flow = flow.index_select(1, pairs)
        residual = image.sub_(image_x * flow[0]).sub_(image_y * flow[1]).sub_(first)
        # Where g = 0 the update is gradient * anything = 0: a finite stand-in replaces the branch for it.
        squared = image_x.square_().addcmul_(image_y, image_y).clamp_(min=SMALLEST_SQUARED_GRADIENT)
        inverse = squared.reciprocal_().neg_()
        torch.mul(residual, inverse, out=self._constant.view_as(first)).div_(self.theta)
        torch.mul(gradient, inverse.div_(self.tau), out=slope)
        # A new warp begins: pairs that had converged within the last one iterate again.
        if self.active != self.pairs:
            self.active = self.pairs
            self._plan()

    def retire(self, position: int) -> int:
        """Stop the pair at `position`: swap it with the last active one and return where that was."""
        last = self.active - 1
        self.order[position], self.order[last] = self.order[last], self.order[position]
        size = self.height * self.width
        # Active pairs stay next to each other, so that strips need not skip any.
        if position != last:
            one, two = (slice(i * size, (i + 1) * size) for i in (position, last))
            for state in (self._u, self._p, self._slope, self._gradient, self._constant):
                kept = state[..., one].clone()
                state[..., one] = state[..., two]
                state[..., two] = kept
        self.active = last
        self._plan()
        return last

    def _plan(self) -> None:
        stop, line = self.active * self.height * self.width, self.width
        self._strips = []
        for start in range(0, stop, self._strip):
            end = min(start + self._strip, stop)
            # p of a row needs U of the row below, and U of that row needs the old p: p is one row behind.
            dual = self._dual_views(max(0, start - line), end if end == stop else end - line)
            self._strips.append((self._primal_views(start, end), dual))

    def _primal_views(self, start: int, stop: int) -> PrimalViews:
        line, count = self.width, stop - start
        return PrimalViews(
            u=self._u[:, start:stop],
            u_parts=self._u[:, start:stop].unbind(),
            slope_parts=self._slope[:, start:stop].unbind(),
            constant=self._constant[start:stop],
            gradient=self._gradient[:, start:stop],
            p_x=self._p[0, :, start:stop],
            p_left=self._p_padded[0, :, line + start - 1 : line + stop - 1],
            p_y=self._p[1, :, start:stop],
            p_above=self._p_padded[1, :, start:stop],
            data=self._scratch[0, :count],
            update=self._scratch[1:3, :count],
            update_parts=self._scratch[1:3, :count].unbind(),
            row_errors=self._row_errors[start // line : stop // line],
        )

    def _dual_views(self, start: int, stop: int) -> DualViews:
        line, count = self.width, stop - start
        forward = self._scratch[:4, :count].view(2, 2, count)
        rows = forward.view(2, 2, -1, line)
        skipped = -(start // line + 1) % self.height  # rows before the first that ends a pair
        return DualViews(
            u=self._u[:, start:stop],
            u_right=self._u_padded[:, start + 1 : stop + 1],
            u_below=self._u_padded[:, start + line : stop + line],
            p=self._p[:, :, start:stop],
            forward=forward,
            forward_parts=forward.unbind(),
            last_column=rows[0, :, :, -1],
            last_row=rows[1, :, skipped :: self.height],
            norm=self._scratch[4:6, :count],
        )

    def step(self, *, with_error: bool) -> list[float]:
        """Run one iteration; return the sum of squared updates (px²) of each active pair if asked for.

        u follows `estimateUKernel`, p `estimateDualVariablesKernel` of cudaoptflow/src/cuda/tvl1flow.cu, and
        `estimateV`, `estimateU`, `estimateDualVariables` of optflow/src/tvl1flow.cpp: Sánchez et al. 2013,
        equations (9) to (11) and algorithm 1.
        """
        for primal, dual in self._strips:
            self._update_u(primal)
            if with_error:
                _row_errors(primal)
            self._update_p(dual)
        if not with_error:
            return []
        rows, height = self._row_errors[: self.active * self.height].tolist(), self.height
        # fsum rounds the exact sum once, so that no order is left.
        return [self.theta**2 * math.fsum(rows[start : start + height]) for start in range(0, len(rows), height)]

    def _update_u(self, view: PrimalViews) -> None:
        torch.addcmul(view.constant, view.slope_parts[0], view.u_parts[0], out=view.data)
        view.data.addcmul_(view.slope_parts[1], view.u_parts[1]).clamp_(-self.lambda_, self.lambda_)
        torch.sub(view.p_x, view.p_left, out=view.update)
        view.update.add_(view.p_y).sub_(view.p_above).addcmul_(view.gradient, view.data)
        view.u.add_(view.update, alpha=self.tau)

    def _update_p(self, view: DualViews) -> None:
        across, down = view.forward_parts
        torch.sub(view.u_right, view.u, out=across)
        torch.sub(view.u_below, view.u, out=down)
        view.last_column.zero_()
        view.last_row.zero_()
        torch.mul(across, across, out=view.norm).addcmul_(down, down).sqrt_().add_(self._one)
        # τ is in U already (see the module), so none stands here.
        view.p.add_(view.forward).div_(view.norm)


def _row_errors(view: PrimalViews) -> None:
    """Set each row's sum of squared updates, in an order that depends on the width of the row alone."""
    one, two = view.update_parts
    torch.mul(one, one, out=view.data).addcmul_(two, two)
    values = view.data.view(len(view.row_errors), -1)
    if values.device.type == "cpu":
        # torch sums contiguous rows one by one and shares only whole rows among threads.
        torch.sum(values, 1, out=view.row_errors)
        return
    # On a GPU the shape of torch's sum depends on the number of rows, so it is written out: halving.
    width = values.shape[1]
    while width > 1:
        half = width // 2
        values[:, :half].add_(values[:, width - half : width])
        width -= half
    view.row_errors.copy_(values[:, 0])
