# Triton reads annotations of a kernel as its own types, ships no type information and has no unpacking of tuples;
# upper case marks constants of a compiled kernel, as in all Triton code.
# ruff: noqa: ANN001, ANN201, N803, RUF005
# mypy: disable-error-code="import-untyped, misc, no-untyped-def, no-untyped-call, untyped-decorator, assignment"
"""The Triton kernels of TV-L1: resize, gradient, warp, one fused iteration, stopping rule, median.

A group holds up to MOST_PAIRS pairs of one size. Planes have `pitch` columns, of which `width` are in use:
`state` (2, B, 6, H, pitch) holds U = (τ/θ)·u and p twice, `side[b]` says which of both is the present one, and each
iteration writes the other; `data` (B, 3, H, pitch) holds the warped ∂x I₁, ∂y I₁ and rho_c = I₁w - Iₓu₁ - I_yu₂ -
I₀.
What a pair's bits are depends on nothing but its size: sums run over tiles of the image in a fixed order, without
atomics. A pair with `steps[b]` = 0 has stopped, and its programs end at once.
"""

import triton
import triton.language as tl

MOST_PAIRS = tl.constexpr(64)
TILES_AT_ONCE = tl.constexpr(32)
SMALLEST_SQUARED_GRADIENT = tl.constexpr(1e-30)


@triton.jit
def _bilinear(image, x, y, pitch, x_first, x_second, x_weight, y_first, y_second, y_weight, inside):
    """Return the value at result pixel (x, y): across, then down, from the taps of tvl1_steps.linear_taps."""
    left, right = tl.load(x_first + x, mask=inside, other=0), tl.load(x_second + x, mask=inside, other=0)
    upper = tl.load(y_first + y, mask=inside, other=0) * pitch
    lower = tl.load(y_second + y, mask=inside, other=0) * pitch
    across, down = tl.load(x_weight + x, mask=inside, other=0.0), tl.load(y_weight + y, mask=inside, other=0.0)
    first = tl.load(image + upper + left, mask=inside) * (1 - across)
    first += tl.load(image + upper + right, mask=inside) * across
    second = tl.load(image + lower + left, mask=inside) * (1 - across)
    second += tl.load(image + lower + right, mask=inside) * across
    return first * (1 - down) + second * down


@triton.jit
def resize_kernel(
    source, result, x_first, x_second, x_weight, y_first, y_second, y_weight,
    source_height, source_width, height, width, BLOCK: tl.constexpr,
):  # fmt: skip
    """Set `result` (B, H, W) from `source` (B, source_H, source_W), as tvl1_steps.resize_linear does."""
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < height * width
    pair = tl.program_id(1).to(tl.int64)
    image = source + pair * source_height * source_width
    x, y = pixel % width, pixel // width
    value = _bilinear(image, x, y, source_width, x_first, x_second, x_weight, y_first, y_second, y_weight, inside)
    tl.store(result + pair * height * width + pixel, value, mask=inside)


@triton.jit
def upsample_kernel(
    source, source_side, state, x_first, x_second, x_weight, y_first, y_second, y_weight,
    source_pairs, source_height, source_pitch, height, width, pitch, enlargement, BLOCK: tl.constexpr,
):  # fmt: skip
    """Set U on side 0 of `state` from the present U of a coarser level, as tvl1_steps.resize_linear does."""
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < height * width
    pair, component = tl.program_id(1).to(tl.int64), tl.program_id(2)
    plane = height.to(tl.int64) * pitch
    source_plane = source_height.to(tl.int64) * source_pitch
    present = tl.load(source_side + pair).to(tl.int64)
    image = source + ((present * source_pairs + pair) * 6 + component) * source_plane
    x, y = pixel % width, pixel // width
    value = _bilinear(image, x, y, source_pitch, x_first, x_second, x_weight, y_first, y_second, y_weight, inside)
    tl.store(state + (pair * 6 + component) * plane + y * pitch + x, value * enlargement, mask=inside)


@triton.jit
def gradient_kernel(image, across, down, height, width, BLOCK: tl.constexpr):
    """Set ∂x, ∂y of (B, H, W), borders repeated: `centeredGradientKernel` of cudaoptflow/src/cuda/tvl1flow.cu."""
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < height * width
    x, y = pixel % width, pixel // width
    start = tl.program_id(1).to(tl.int64) * height * width
    right = tl.load(image + start + y * width + tl.minimum(x + 1, width - 1), mask=inside)
    left = tl.load(image + start + y * width + tl.maximum(x - 1, 0), mask=inside)
    below = tl.load(image + start + tl.minimum(y + 1, height - 1) * width + x, mask=inside)
    above = tl.load(image + start + tl.maximum(y - 1, 0) * width + x, mask=inside)
    tl.store(across + start + pixel, 0.5 * (right - left), mask=inside)
    tl.store(down + start + pixel, 0.5 * (below - above), mask=inside)


@triton.jit
def _cubic_weight(tap: tl.constexpr, t, KEYS: tl.constexpr):
    """Return the bicubic weight of the tap at tap - 1 for the fraction t: exactly 0, 1, 0, 0 at t = 0.

    KEYS: a = -0.5, `bicubicCoeff` of cudaoptflow/src/cuda/tvl1flow.cu, expanded in t. Else a = -0.75,
    INTER_CUBIC of `cv::remap`.
    """
    if KEYS:
        if tap == 0:
            return t * (t * (1 - 0.5 * t) - 0.5)
        if tap == 1:
            return t * t * (1.5 * t - 2.5) + 1
        if tap == 2:
            return t * (t * (2 - 1.5 * t) + 0.5)
        return t * t * (0.5 * t - 0.5)
    if tap == 0:
        return t * (t * (1.5 - 0.75 * t) - 0.75)
    if tap == 1:
        return t * t * (1.25 * t - 2.25) + 1
    if tap == 2:
        return t * (t * (1.5 - 1.25 * t) + 0.75)
    return t * t * (0.75 * t - 0.75)


@triton.jit
def linearise_kernel(
    state, side, first, second, across, down, data, pairs, height, width, pitch, pixels_per_u,
    CLAMPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Warp I₁ and its gradient (B, H, W) by the present flow and set `data` around it.

    CLAMPED: `warpBackwardKernel` of cudaoptflow/src/cuda/tvl1flow.cu (a = -0.5, borders repeated; its division by
    the sum of the weights, one up to rounding, is left out). Else `remap` and `calcGradRho` of
    optflow/src/tvl1flow.cpp (a = -0.75, zero outside).
    """
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < height * width
    x, y = pixel % width, pixel // width
    pair = tl.program_id(1).to(tl.int64)
    present = tl.load(side + pair).to(tl.int64)
    plane = height.to(tl.int64) * pitch
    at = y * pitch + x
    flow = state + (present * pairs + pair) * 6 * plane + at
    u = tl.load(flow, mask=inside, other=0.0) * pixels_per_u
    v = tl.load(flow + plane, mask=inside, other=0.0) * pixels_per_u
    start = pair * height * width
    # Beyond these all taps are the border, or zero; and whole numbers beyond 2**31 have no index.
    source_x = tl.minimum(tl.maximum(x + u, -3.0), width + 2.0)
    source_y = tl.minimum(tl.maximum(y + v, -3.0), height + 2.0)
    base_x, base_y = tl.floor(source_x), tl.floor(source_y)
    part_x, part_y = source_x - base_x, source_y - base_y
    base_x, base_y = base_x.to(tl.int32), base_y.to(tl.int32)
    warped = tl.zeros([BLOCK], tl.float32)
    warped_x = tl.zeros([BLOCK], tl.float32)
    warped_y = tl.zeros([BLOCK], tl.float32)
    for row in tl.static_range(4):
        tap_y = base_y + (row - 1)
        weight_y = _cubic_weight(row, part_y, CLAMPED)
        line_y = tl.minimum(tl.maximum(tap_y, 0), height - 1)
        if not CLAMPED:
            weight_y = tl.where(tap_y == line_y, weight_y, 0.0)
        for column in tl.static_range(4):
            tap_x = base_x + (column - 1)
            weight = _cubic_weight(column, part_x, CLAMPED) * weight_y
            place_x = tl.minimum(tl.maximum(tap_x, 0), width - 1)
            if not CLAMPED:
                weight = tl.where(tap_x == place_x, weight, 0.0)
            tap = start + line_y * width + place_x
            warped += weight * tl.load(second + tap, mask=inside, other=0.0)
            warped_x += weight * tl.load(across + tap, mask=inside, other=0.0)
            warped_y += weight * tl.load(down + tap, mask=inside, other=0.0)
    constant = warped - warped_x * u - warped_y * v - tl.load(first + start + pixel, mask=inside, other=0.0)
    target = data + pair * 3 * plane + at
    tl.store(target, warped_x, mask=inside)
    tl.store(target + plane, warped_y, mask=inside)
    tl.store(target + 2 * plane, constant, mask=inside)


@triton.jit
def _primal(flow, data, at, plane, inside, p11, p12, p21, p22, left_1, left_2, above_1, above_2, tau, scale, limit):
    """Return the new U and the old one at `at`: U + clamp(s - d·U, ±l)·d + τ·div p.

    With d the direction of ∇I₁ and m its length, s = -(τ/θ)·rho_c/m and l = τλm, this is the thresholding of
    `estimateUKernel` without a division by m², which may be zero.
    """
    u1 = tl.load(flow + at, mask=inside, other=0.0)
    u2 = tl.load(flow + plane + at, mask=inside, other=0.0)
    d1 = tl.load(data + at, mask=inside, other=0.0)
    d2 = tl.load(data + plane + at, mask=inside, other=0.0)
    s = tl.load(data + 2 * plane + at, mask=inside, other=0.0)
    squared = d1 * d1 + d2 * d2
    inverse = tl.where(squared > SMALLEST_SQUARED_GRADIENT, tl.rsqrt(squared), 0.0)
    bound = limit * squared * inverse
    d1, d2 = d1 * inverse, d2 * inverse
    step = tl.minimum(tl.maximum(-scale * s * inverse - d1 * u1 - d2 * u2, -bound), bound)
    new_1 = u1 + step * d1 + tau * ((p11 - left_1) + (p12 - above_1))
    new_2 = u2 + step * d2 + tau * ((p21 - left_2) + (p22 - above_2))
    return new_1, new_2, u1, u2


@triton.jit
def iterate_kernel(
    state, data, partials, side, steps, pairs, height, width, pitch, tau, scale, limit,
    WITH_ERROR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Run one iteration of the pairs that go on, a tile per program; sum its squared update, `partials` (B, tiles).

    `estimateUKernel` and `estimateDualVariablesKernel` of cudaoptflow/src/cuda/tvl1flow.cu in one: U is computed
    again at the right and lower neighbour, so that one launch reads U, p and the data and writes U and p.
    """
    pair = tl.program_id(1).to(tl.int64)
    if tl.load(steps + pair) > 0:
        tiles_across = tl.cdiv(width, COLUMNS)
        y = (tl.program_id(0) // tiles_across) * ROWS + tl.arange(0, ROWS)[:, None]
        x = (tl.program_id(0) % tiles_across) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        plane = height.to(tl.int64) * pitch
        present = tl.load(side + pair).to(tl.int64)
        flow = state + (present * pairs + pair) * 6 * plane
        constants = data + pair * 3 * plane
        p11, p12, p21, p22 = flow + 2 * plane, flow + 3 * plane, flow + 4 * plane, flow + 5 * plane
        at = y * pitch + x
        inside = (y < height) & (x < width)
        has_left, has_above = inside & (x > 0), inside & (y > 0)
        has_right, has_below = inside & (x < width - 1), inside & (y < height - 1)

        a11, a12 = tl.load(p11 + at, mask=inside, other=0.0), tl.load(p12 + at, mask=inside, other=0.0)
        a21, a22 = tl.load(p21 + at, mask=inside, other=0.0), tl.load(p22 + at, mask=inside, other=0.0)
        left_1 = tl.load(p11 + at - 1, mask=has_left, other=0.0)
        left_2 = tl.load(p21 + at - 1, mask=has_left, other=0.0)
        above_1 = tl.load(p12 + at - pitch, mask=has_above, other=0.0)
        above_2 = tl.load(p22 + at - pitch, mask=has_above, other=0.0)
        u1, u2, old_1, old_2 = _primal(
            flow, constants, at, plane, inside, a11, a12, a21, a22,
            left_1, left_2, above_1, above_2, tau, scale, limit,
        )  # fmt: skip

        r11 = tl.load(p11 + at + 1, mask=has_right, other=0.0)
        r12 = tl.load(p12 + at + 1, mask=has_right, other=0.0)
        r21 = tl.load(p21 + at + 1, mask=has_right, other=0.0)
        r22 = tl.load(p22 + at + 1, mask=has_right, other=0.0)
        above_1 = tl.load(p12 + at + 1 - pitch, mask=has_right & has_above, other=0.0)
        above_2 = tl.load(p22 + at + 1 - pitch, mask=has_right & has_above, other=0.0)
        right_1, right_2, _, _ = _primal(
            flow, constants, at + 1, plane, has_right, r11, r12, r21, r22,
            a11, a21, above_1, above_2, tau, scale, limit,
        )  # fmt: skip

        lower = at + pitch
        b11, b12 = tl.load(p11 + lower, mask=has_below, other=0.0), tl.load(p12 + lower, mask=has_below, other=0.0)
        b21, b22 = tl.load(p21 + lower, mask=has_below, other=0.0), tl.load(p22 + lower, mask=has_below, other=0.0)
        left_1 = tl.load(p11 + lower - 1, mask=has_below & has_left, other=0.0)
        left_2 = tl.load(p21 + lower - 1, mask=has_below & has_left, other=0.0)
        below_1, below_2, _, _ = _primal(
            flow, constants, lower, plane, has_below, b11, b12, b21, b22,
            left_1, left_2, a12, a22, tau, scale, limit,
        )  # fmt: skip

        across_1, across_2 = tl.where(has_right, right_1 - u1, 0.0), tl.where(has_right, right_2 - u2, 0.0)
        down_1, down_2 = tl.where(has_below, below_1 - u1, 0.0), tl.where(has_below, below_2 - u2, 0.0)
        inverse_1 = 1.0 / (1.0 + tl.sqrt(across_1 * across_1 + down_1 * down_1))
        inverse_2 = 1.0 / (1.0 + tl.sqrt(across_2 * across_2 + down_2 * down_2))
        target = state + ((1 - present) * pairs + pair) * 6 * plane + at
        tl.store(target, u1, mask=inside)
        tl.store(target + plane, u2, mask=inside)
        tl.store(target + 2 * plane, (a11 + across_1) * inverse_1, mask=inside)
        tl.store(target + 3 * plane, (a12 + down_1) * inverse_1, mask=inside)
        tl.store(target + 4 * plane, (a21 + across_2) * inverse_2, mask=inside)
        tl.store(target + 5 * plane, (a22 + down_2) * inverse_2, mask=inside)
        if WITH_ERROR:
            change_1, change_2 = u1 - old_1, u2 - old_2
            squares = tl.where(inside, change_1 * change_1 + change_2 * change_2, 0.0)
            error = tl.sum(tl.sum(squares, axis=1), axis=0)
            tl.store(partials + pair * tl.num_programs(0) + tl.program_id(0), error)


@triton.jit
def begin_kernel(done, steps, final, previous, listed, count, first_steps, pairs):
    """Start a warp: the first `pairs` pairs go on, none has iterated. One program."""
    pair = tl.arange(0, MOST_PAIRS)
    active = pair < pairs
    tl.store(done + pair, 0)
    tl.store(final + pair, 0)
    tl.store(previous + pair, tl.zeros([MOST_PAIRS], tl.float64))
    tl.store(steps + pair, tl.where(active, first_steps, 0))
    tl.store(listed + pair, pair)
    tl.store(count, pairs)


@triton.jit
def decide_kernel(
    partials, limits, done, steps, final, previous, side, listed, count, tiles, iterations, period,
    EVERY: tl.constexpr, SLOTS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Say after a launch of `steps[b]` iterations which pairs go on, and how far. One program.

    Follows `procOneScale` of both tvl1flow.cpp. EVERY = 1, the CPU class: each iteration tests the mean squared
    update. EVERY = 2, the CUDA class: odd iterations only, and for each threshold that the last sum held not in one
    of the next. EVERY = 0: none. The rule is a function of the sums alone, so it can be followed after the fact: a
    pair that should have stopped within a launch runs it again from the state before it, as far as it should have
    gone (`final`). `limits` holds the threshold and what a sum is multiplied by, in float64 as in OpenCV. A launch
    ends at multiples of `period` iterations at the latest. The tiles of an image fill CHUNKS times TILES_AT_ONCE.
    """
    pair = tl.arange(0, MOST_PAIRS)
    so_far, ran = tl.load(done + pair), tl.load(steps + pair)
    again = tl.load(final + pair) > 0
    tested = (ran > 0) & (again == 0)
    stop_after = tl.zeros([MOST_PAIRS], tl.int32)
    if EVERY > 0:
        threshold, factor = tl.load(limits), tl.load(limits + 1)
        last = tl.load(previous + pair)
        for slot in tl.static_range(SLOTS):
            live = tested & (slot < ran) & (stop_after == 0)
            n = so_far + slot
            due = live & ((n + 1) % EVERY == 0)
            if EVERY == 2:
                due = due & (last < threshold)
            error = tl.zeros([MOST_PAIRS], tl.float64)
            for chunk in range(CHUNKS):
                tile = chunk * TILES_AT_ONCE + tl.arange(0, TILES_AT_ONCE)
                here = partials + (pair[:, None] * SLOTS + slot) * tiles + tile[None, :]
                values = tl.load(here, mask=due[:, None] & (tile < tiles)[None, :], other=0.0)
                error += tl.sum(values.to(tl.float64), axis=1)
            error *= factor
            stop_after = tl.where(due & (error <= threshold), slot + 1, stop_after)
            last = tl.where(due, error, tl.where(live, last - threshold, last))
        tl.store(previous + pair, last)
    repeat = (stop_after > 0) & (stop_after < ran)
    advanced = (ran > 0) & (repeat == 0)
    so_far += tl.where(advanced, ran, 0)
    goes_on = advanced & (again == 0) & (stop_after == 0) & (so_far < iterations)
    full = tl.minimum(tl.minimum(SLOTS, period - so_far % period), iterations - so_far)
    following = tl.where(repeat, stop_after, tl.where(goes_on, full, 0))
    present = tl.load(side + pair)
    tl.store(side + pair, tl.where(advanced, 1 - present, present))
    tl.store(done + pair, so_far)
    tl.store(final + pair, repeat.to(tl.int32))
    tl.store(steps + pair, following)
    active = (following > 0).to(tl.int32)
    tl.store(listed + tl.cumsum(active, axis=0) - 1, pair, mask=active > 0)
    tl.store(count, tl.sum(active, axis=0))


@triton.jit
def _replaced(values, place: tl.constexpr, value):
    return values[:place] + (value,) + values[place + 1 :]


@triton.jit
def _exchanged(values, low: tl.constexpr, high: tl.constexpr):
    one, two = values[low], values[high]
    return _replaced(_replaced(values, low, tl.minimum(one, two)), high, tl.maximum(one, two))


@triton.jit
def median_kernel(
    state, filtered, side, steps, final, pairs, height, width, pitch,
    SIZE: tl.constexpr, NETWORK: tl.constexpr, EXCHANGES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Set `filtered` (B, 2, H, pitch) to the median of U, borders repeated, for the pairs that go on.

    NETWORK exchanges places 2i and 2i + 1 of the window until its middle is the median. A pair that repeats
    iterations has been filtered before them.
    """
    pair = tl.program_id(1).to(tl.int64)
    if (tl.load(steps + pair) > 0) & (tl.load(final + pair) == 0):
        pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = pixel < height * width
        x, y = pixel % width, pixel // width
        plane = height.to(tl.int64) * pitch
        present = tl.load(side + pair).to(tl.int64)
        component = tl.program_id(2)
        source = state + ((present * pairs + pair) * 6 + component) * plane
        values = ()
        for place in tl.static_range(SIZE * SIZE):
            row = tl.minimum(tl.maximum(y + (place // SIZE - SIZE // 2), 0), height - 1)
            column = tl.minimum(tl.maximum(x + (place % SIZE - SIZE // 2), 0), width - 1)
            values = values + (tl.load(source + row * pitch + column, mask=inside, other=0.0),)
        for i in tl.static_range(EXCHANGES):
            values = _exchanged(values, NETWORK[2 * i], NETWORK[2 * i + 1])
        tl.store(filtered + (pair * 2 + component) * plane + y * pitch + x, values[SIZE * SIZE // 2], mask=inside)


@triton.jit
def replace_kernel(state, filtered, side, steps, final, pairs, height, pitch, BLOCK: tl.constexpr):
    """Copy the filtered U back, for the pairs that `median_kernel` filtered."""
    pair = tl.program_id(1).to(tl.int64)
    if (tl.load(steps + pair) > 0) & (tl.load(final + pair) == 0):
        plane = height.to(tl.int64) * pitch
        cell = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        present = tl.load(side + pair).to(tl.int64)
        target = state + (present * pairs + pair) * 6 * plane + cell
        values = tl.load(filtered + pair * 2 * plane + cell, mask=cell < 2 * plane)
        tl.store(target, values, mask=cell < 2 * plane)
