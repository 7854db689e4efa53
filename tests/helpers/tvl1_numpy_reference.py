"""A slow, readable NumPy version of OpenCV's CUDA TV-L1, step by step, as the oracle of `opencv-cuda` mode.

Written from opencv_contrib (modules/cudaoptflow/src/tvl1flow.cpp, modules/cudaoptflow/src/cuda/tvl1flow.cu,
modules/cudawarping/src/resize.cpp and cuda/resize.cu) and not from our fast code: one pair, one plane per
quantity, the published branches, no rescaled variables. Images are float32 in 0..255.
"""

import numpy as np

F = np.float32
EPSILON = np.finfo(np.float32).eps


def resized_shape(shape, scale):
    """cudawarping/src/resize.cpp, `resize`: dsize = saturate_cast<int>(side * fx), half to even."""
    return tuple(int(np.rint(side * scale)) for side in shape)


def resize_linear(image, shape, step):
    """cudawarping/src/cuda/resize.cu, `resize_linear`: src = dst * step, no half-pixel shift."""
    rows, cols = image.shape
    src_y = (np.arange(shape[0], dtype=F) * F(step[0]))[:, None]
    src_x = (np.arange(shape[1], dtype=F) * F(step[1]))[None, :]
    y1, x1 = np.floor(src_y).astype(int), np.floor(src_x).astype(int)
    y2, x2 = y1 + 1, x1 + 1
    y2_read, x2_read = np.minimum(y2, rows - 1), np.minimum(x2, cols - 1)
    out = image[y1, x1] * ((x2 - src_x) * (y2 - src_y)).astype(F)
    out = out + image[y1, x2_read] * ((src_x - x1) * (y2 - src_y)).astype(F)
    out = out + image[y2_read, x1] * ((x2 - src_x) * (src_y - y1)).astype(F)
    return out + image[y2_read, x2_read] * ((src_x - x1) * (src_y - y1)).astype(F)


def centered_gradient(image):
    """cudaoptflow/src/cuda/tvl1flow.cu, `centeredGradientKernel`."""
    rows, cols = image.shape
    x, y = np.arange(cols), np.arange(rows)
    dx = F(0.5) * (image[:, np.minimum(x + 1, cols - 1)] - image[:, np.maximum(x - 1, 0)])
    dy = F(0.5) * (image[np.minimum(y + 1, rows - 1)] - image[np.maximum(y - 1, 0)])
    return dx, dy


def bicubic_coeff(distance):
    """cudaoptflow/src/cuda/tvl1flow.cu, `bicubicCoeff`."""
    x = np.abs(distance).astype(F)
    inner = x * x * (F(1.5) * x - F(2.5)) + F(1)
    outer = x * (x * (F(-0.5) * x + F(2.5)) - F(4)) + F(2)
    return np.where(x <= 1, inner, np.where(x < 2, outer, F(0))).astype(F)


def warp_backward(first, second, dx, dy, u1, u2):
    """cudaoptflow/src/cuda/tvl1flow.cu, `warpBackwardKernel`; textures clamp. Up to 5 x 5 taps, as there."""
    rows, cols = first.shape
    wx = np.arange(cols, dtype=F)[None, :] + u1
    wy = np.arange(rows, dtype=F)[:, None] + u2
    xmin, ymin = np.ceil(wx - 2).astype(int), np.ceil(wy - 2).astype(int)
    sums = [np.zeros_like(first) for _ in range(3)]
    weights = np.zeros_like(first)
    for j in range(5):
        for i in range(5):
            cx, cy = xmin + i, ymin + j
            weight = bicubic_coeff(wx - cx) * bicubic_coeff(wy - cy)  # zero beyond floor(w + 2)
            at = np.clip(cy, 0, rows - 1), np.clip(cx, 0, cols - 1)
            for total, image in zip(sums, (second, dx, dy), strict=True):
                total += weight * image[at]
            weights += weight
    warped, warped_x, warped_y = (total * (F(1) / weights) for total in sums)
    grad = warped_x * warped_x + warped_y * warped_y
    rho = warped - warped_x * u1 - warped_y * u2 - first
    return warped_x, warped_y, grad, rho


def divergence(v1, v2):
    """cudaoptflow/src/cuda/tvl1flow.cu, `divergence`: backward differences, the value itself at the border."""
    out = v1 + v2
    out[:, 1:] -= v1[:, :-1]
    out[1:] -= v2[:-1]
    return out


def estimate_u(warped_x, warped_y, grad, rho_c, p, u1, u2, l_t, theta):
    """cudaoptflow/src/cuda/tvl1flow.cu, `estimateUKernel` (gamma = 0): the thresholding and the primal step."""
    rho = rho_c + (warped_x * u1 + warped_y * u2)
    below, above = rho < -l_t * grad, rho > l_t * grad
    ratio = np.where(grad > EPSILON, -rho / np.where(grad > EPSILON, grad, F(1)), F(0))
    factor = np.where(below, l_t, np.where(above, -l_t, ratio)).astype(F)
    new_u1 = u1 + factor * warped_x + theta * divergence(p[0], p[1])
    new_u2 = u2 + factor * warped_y + theta * divergence(p[2], p[3])
    return new_u1, new_u2, (u1 - new_u1) ** 2 + (u2 - new_u2) ** 2


def estimate_dual_variables(u1, u2, p, taut):
    """cudaoptflow/src/cuda/tvl1flow.cu, `estimateDualVariablesKernel`."""
    result = []
    for u, p_x, p_y in ((u1, p[0], p[1]), (u2, p[2], p[3])):
        u_x, u_y = np.zeros_like(u), np.zeros_like(u)
        u_x[:, :-1] = u[:, 1:] - u[:, :-1]
        u_y[:-1] = u[1:] - u[:-1]
        norm = F(1) + taut * np.hypot(u_x, u_y)
        result += [(p_x + taut * u_x) / norm, (p_y + taut * u_y) / norm]
    return result


def proc_one_scale(first, second, u1, u2, *, tau, lambda_, theta, warps, iterations, epsilon):
    """cudaoptflow/src/tvl1flow.cpp, `procOneScale`, with its rule of when the error is summed."""
    scaled_epsilon = epsilon * epsilon * first.size
    dx, dy = centered_gradient(second)
    p = [np.zeros_like(first) for _ in range(4)]
    l_t, taut = F(lambda_ * theta), F(tau / theta)
    used = []
    for _ in range(warps):
        data = warp_backward(first, second, dx, dy, u1, u2)
        error, previous, n = np.inf, 0.0, 0
        while error > scaled_epsilon and n < iterations:
            calculate = epsilon > 0 and n & 1 and previous < scaled_epsilon
            u1, u2, difference = estimate_u(*data, p, u1, u2, l_t, F(theta))
            if calculate:
                error = previous = float(difference.sum(dtype=np.float64))
            else:
                error, previous = np.inf, previous - scaled_epsilon
            p = estimate_dual_variables(u1, u2, p, taut)
            n += 1
        used.append(n)
    return u1, u2, used


def flow(first, second, *, scales, zoom, **rest):
    """cudaoptflow/src/tvl1flow.cpp, `calcImpl`: return the flow (2, H, W) and the iterations of each warp."""
    firsts, seconds = [first.astype(F)], [second.astype(F)]
    for _ in range(1, scales):
        shape = resized_shape(firsts[-1].shape, zoom)
        if min(shape) < 16:
            break
        step = (1 / zoom, 1 / zoom)
        firsts.append(resize_linear(firsts[-1], shape, step))
        seconds.append(resize_linear(seconds[-1], shape, step))
    u1, u2 = np.zeros_like(firsts[-1]), np.zeros_like(firsts[-1])
    used = []
    for scale in reversed(range(len(firsts))):
        u1, u2, count = proc_one_scale(firsts[scale], seconds[scale], u1, u2, **rest)
        used += count
        if scale:
            shape = firsts[scale - 1].shape
            step = tuple(small / large for small, large in zip(u1.shape, shape, strict=True))
            u1, u2 = (resize_linear(u, shape, step) * F(1 / zoom) for u in (u1, u2))
    return np.stack((u1, u2)), used
