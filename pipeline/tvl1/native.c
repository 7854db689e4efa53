/* TV-L1 optical flow of one pair of images on one core: the whole pyramid in one call.
 *
 * Same algorithm and symbols as mmkd.pipeline.tvl1.torch_path, which is the readable reference: see there and in
 * iterations.py for papers and sources. What differs is the order of the work, and rounding:
 *
 * - u and p of a row are updated one after the other, and up to `block` iterations follow each other down the
 *   image as a wavefront, iteration j at row y - j, so that a row is in the cache for all of them. Per pixel and
 *   iteration 11 planes are read and 6 written, 68 bytes; only every `block` iterations do they cross the
 *   second cache.
 * - multiplications and additions are fused, and one division serves both components of p.
 *
 * Bits: every operation is IEEE 754 in a written order (compile with -ffp-contract=off; sums of errors are 16
 * lanes of float per row, then doubles), so a pair's bits depend neither on the width of the vector registers
 * nor on `block`, nor on other pairs.
 *
 * What it gives up: one pair uses one core; callers run several pairs at once. C11 with the vector extension of
 * GCC and Clang; without fused multiply-add in hardware `tvl1_interface` says 0.
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define INTERFACE 1 /* raised with every change of what is exported; tvl1_native.py knows the same number */
#define LANES 16
#define PAD 4
#define MAX_BLOCK 32
#define SPAN 32 /* pixels; measured, see update_row */
#define SMALLEST_SQUARED_GRADIENT 1e-30f
#define EXPORT __attribute__((visibility("default")))
/* The next loop's iterations are independent: `restrict` is lost where a function is inlined. */
#if defined(__clang__)
#define INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define INDEPENDENT _Pragma("GCC ivdep")
#endif
#define INLINE static inline __attribute__((always_inline))
#if defined(CLONES) /* given on the command line: none, for the test of bits */
#elif defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__)
#define CLONES __attribute__((target_clones("avx512f", "fma", "default")))
#else
#define CLONES
#endif

typedef float v4 __attribute__((vector_size(16), aligned(4), may_alias));
typedef float v16 __attribute__((vector_size(64), aligned(4), may_alias));

typedef struct {
    double tau, lambda, theta, zoom, epsilon;
    const int32_t *heights, *widths; /* of each level, finest first */
    int32_t levels, warps, iterations, median, median_every, opencv, block;
} Options;

typedef struct {
    int height, width;
    ptrdiff_t pitch;   /* floats per row of all planes but u: the width, up to whole vectors */
    ptrdiff_t u_pitch; /* one vector more: right of the image u repeats, so differences there are zero */
    float *u[2];
    float *p[4]; /* x of u0, x of u1, y of u0, y of u1 */
    float *slope[2], *constant, *gradient[2];
    float *saved;  /* u and p before a block that may have to be undone */
    float *zeros;  /* p above the first row */
    float *error;  /* squared updates of a row */
    float *quads;  /* the second image, its x and y gradient and nothing, padded by PAD */
    float *rows;   /* scratch of the warp and the median */
    float tau, lambda;
} Level;

/* ---- memory ---- */

static size_t round_up(size_t n) { return (n + LANES - 1) / LANES * LANES; }

static float *take(float **next, size_t count)
{
    float *found = *next;
    *next += round_up(count) + LANES; /* not a power of two apart */
    return found;
}

/* Lays a level's planes out from `next`; returns the end. Called with next = NULL for the size alone. */
static float *lay_out(Level *level, int height, int width, float *next)
{
    level->height = height;
    level->width = width;
    level->pitch = (ptrdiff_t)round_up((size_t)width);
    level->u_pitch = level->pitch + LANES;
    size_t plane = (size_t)height * (size_t)level->pitch, u_plane = (size_t)height * (size_t)level->u_pitch;
    for (int i = 0; i < 2; i++) level->u[i] = take(&next, u_plane);
    for (int i = 0; i < 4; i++) level->p[i] = take(&next, plane + LANES) + LANES; /* p[-1] is read */
    for (int i = 0; i < 2; i++) level->slope[i] = take(&next, plane);
    level->constant = take(&next, plane);
    for (int i = 0; i < 2; i++) level->gradient[i] = take(&next, plane);
    level->saved = take(&next, 2 * u_plane + 4 * plane);
    level->zeros = take(&next, (size_t)level->pitch);
    level->error = take(&next, (size_t)level->pitch);
    level->quads = take(&next, 4 * (size_t)(height + 2 * PAD) * (size_t)(width + 2 * PAD));
    level->rows = take(&next, 16 * (size_t)level->u_pitch);
    return next;
}

/* ---- resizing, as resize_linear of steps.py ---- */

typedef struct {
    int first, second;
    float weight;
} Tap;

static Tap tap_of(int i, int source, double step, int half_pixel)
{
    float position = half_pixel ? (float)((i + 0.5) * step - 0.5) : (float)i * (float)step;
    float base = floorf(position);
    Tap tap = {0, 0, position - base};
    if (base < 0 || base >= (float)(source - 1)) tap.weight = 0;
    tap.first = base < 0 ? 0 : base > (float)(source - 1) ? source - 1 : (int)base;
    tap.second = tap.first + 1 < source ? tap.first + 1 : tap.first;
    return tap;
}

/* `across` has place for source_height x width floats; taps for the longer side of the result. */
CLONES static void resize(const float *source, int source_height, int source_width, float *restrict result,
                          int height, int width, double ratio, int half_pixel, float *restrict across,
                          Tap *restrict taps)
{
    if (source_width == width) {
        memcpy(across, source, sizeof(float) * (size_t)source_height * (size_t)width);
    } else {
        double step = ratio > 0 ? ratio : (double)source_width / width;
        for (int x = 0; x < width; x++) taps[x] = tap_of(x, source_width, step, half_pixel);
        for (int y = 0; y < source_height; y++) {
            const float *line = source + (ptrdiff_t)y * source_width;
            float *out = across + (ptrdiff_t)y * width;
            for (int x = 0; x < width; x++)
                out[x] = line[taps[x].first] * (1 - taps[x].weight) + line[taps[x].second] * taps[x].weight;
        }
    }
    double step = ratio > 0 ? ratio : (double)source_height / height;
    for (int y = 0; y < height; y++) {
        float *out = result + (ptrdiff_t)y * width;
        if (source_height == height) {
            memcpy(out, across + (ptrdiff_t)y * width, sizeof(float) * (size_t)width);
            continue;
        }
        Tap tap = tap_of(y, source_height, step, half_pixel);
        const float *low = across + (ptrdiff_t)tap.first * width, *high = across + (ptrdiff_t)tap.second * width;
        for (int x = 0; x < width; x++) out[x] = low[x] * (1 - tap.weight) + high[x] * tap.weight;
    }
}

/* ---- warp ---- */

/* Fills `quads` with the image and its centred gradient, borders repeated (clamped) or zero outside. */
CLONES static void make_quads(Level *level, const float *image, int clamped)
{
    int height = level->height, width = level->width, across = width + 2 * PAD;
    for (int row = 0; row < height + 2 * PAD; row++) {
        float *restrict out = level->quads + (ptrdiff_t)row * across * 4;
        int y = row - PAD;
        if (!clamped && (y < 0 || y >= height)) {
            memset(out, 0, sizeof(float) * 4 * (size_t)across);
            continue;
        }
        y = y < 0 ? 0 : y >= height ? height - 1 : y;
        const float *line = image + (ptrdiff_t)y * width;
        const float *above = y > 0 ? line - width : line, *below = y < height - 1 ? line + width : line;
        INDEPENDENT
        for (int x = 0; x < width; x++) {
            float *quad = out + 4 * (x + PAD);
            quad[0] = line[x];
            quad[1] = (line[x < width - 1 ? x + 1 : x] - line[x > 0 ? x - 1 : x]) * 0.5f;
            quad[2] = (below[x] - above[x]) * 0.5f;
            quad[3] = 0;
        }
        for (int i = 0; i < PAD; i++) {
            float *left = out + 4 * i, *right = out + 4 * (PAD + width + i);
            memcpy(left, out + 4 * PAD, sizeof(float) * 4);
            memcpy(right, out + 4 * (PAD + width - 1), sizeof(float) * 4);
            if (!clamped) {
                memset(left, 0, sizeof(float) * 4);
                memset(right, 0, sizeof(float) * 4);
            }
        }
    }
}

/* Weights of the taps at -1, 0, 1, 2; exactly 0, 1, 0, 0 at t = 0. */
INLINE void cubic_weights(float t, int clamped, float *before, float *here, float *after, float *beyond)
{
    if (clamped) { /* a = -0.5: bicubicCoeff of cudaoptflow/src/cuda/tvl1flow.cu, expanded in t */
        float squared = t * t, half_cubed = squared * t * 0.5f;
        *before = squared - half_cubed - 0.5f * t;
        *beyond = half_cubed - 0.5f * squared;
        *after = 0.5f * t + 2 * squared - 3 * half_cubed;
        *here = 1 - *before - *after - *beyond;
    } else { /* a = -0.75: interpolateCubic of imgproc */
        const float a = -0.75f;
        float near = t + 1, far = 1 - t;
        *before = ((a * near - 5 * a) * near + 8 * a) * near - 4 * a;
        *here = ((a + 2) * t - (a + 3)) * t * t + 1;
        *after = ((a + 2) * far - (a + 3)) * far * far + 1;
        *beyond = 1 - *before - *here - *after;
    }
}

/* Sets row y of the data term around the present u: see Iterations.linearise. */
INLINE void linearise_row(Level *level, const float *first, int y, float to_pixels, float theta, int clamped)
{
    int width = level->width, n = (int)level->pitch;
    int across = width + 2 * PAD;
    ptrdiff_t step = level->u_pitch, row = (ptrdiff_t)y * level->pitch;
    const float *u0 = level->u[0] + y * step, *u1 = level->u[1] + y * step;
    float *restrict wx = level->rows, *restrict wy = level->rows + 4 * step;
    float *restrict warped = level->rows + 8 * step;
    int32_t *restrict start = (int32_t *)(level->rows + 12 * step);
    float low = clamped ? -2 : -3, right = (float)(width + 1), bottom = (float)(level->height + 1);
    INDEPENDENT
    for (int x = 0; x < n; x++) {
        float px = (float)x + u0[x] * to_pixels, py = (float)y + u1[x] * to_pixels;
        px = px < low ? low : px;
        px = px > right ? right : px;
        py = py < low ? low : py;
        py = py > bottom ? bottom : py;
        float bx = floorf(px), by = floorf(py);
        cubic_weights(px - bx, clamped, wx + x, wx + step + x, wx + 2 * step + x, wx + 3 * step + x);
        cubic_weights(py - by, clamped, wy + x, wy + step + x, wy + 2 * step + x, wy + 3 * step + x);
        start[x] = 4 * (((int32_t)by + PAD - 1) * across + (int32_t)bx + PAD - 1);
    }
    INDEPENDENT
    for (int x = 0; x < width; x++) {
        const float *taps = level->quads + start[x];
        v16 sum = *(const v16 *)taps * wy[x];
        for (int i = 1; i < 4; i++) sum += *(const v16 *)(taps + (ptrdiff_t)i * 4 * across) * wy[x + i * step];
        float column[16];
        *(v16 *)column = sum;
        v4 all = *(v4 *)column * wx[x];
        for (int i = 1; i < 4; i++) all += *(v4 *)(column + 4 * i) * wx[x + i * step];
        *(v4 *)(warped + 4 * x) = all;
    }
    float *restrict slope0 = level->slope[0] + row, *restrict slope1 = level->slope[1] + row;
    float *restrict gradient0 = level->gradient[0] + row, *restrict gradient1 = level->gradient[1] + row;
    float *restrict constant = level->constant + row;
    const float *image = first + (ptrdiff_t)y * width;
    float inverse_tau = 1 / level->tau, inverse_theta = 1 / theta;
    INDEPENDENT
    for (int x = 0; x < width; x++) {
        float gx = warped[4 * x + 1], gy = warped[4 * x + 2];
        float residual = warped[4 * x] - image[x];
        residual = fmaf(-gx, u0[x] * to_pixels, residual);
        residual = fmaf(-gy, u1[x] * to_pixels, residual);
        float squared = fmaf(gx, gx, gy * gy);
        /* Where the gradient is 0 the update is gradient * anything = 0. */
        float inverse = -1 / (squared < SMALLEST_SQUARED_GRADIENT ? SMALLEST_SQUARED_GRADIENT : squared);
        constant[x] = residual * inverse * inverse_theta;
        inverse *= inverse_tau;
        slope0[x] = gx * inverse;
        slope1[x] = gy * inverse;
        gradient0[x] = gx;
        gradient1[x] = gy;
    }
}

CLONES static void linearise(Level *level, const float *first, float to_pixels, float theta, int clamped)
{
    if (clamped)
        for (int y = 0; y < level->height; y++) linearise_row(level, first, y, to_pixels, theta, 1);
    else
        for (int y = 0; y < level->height; y++) linearise_row(level, first, y, to_pixels, theta, 0);
}

/* ---- iterations ---- */

INLINE void update_u(const Level *level, int y, int from, int n, float *restrict squares)
{
    ptrdiff_t row = y * level->pitch;
    float *restrict u0 = level->u[0] + y * level->u_pitch, *restrict u1 = level->u[1] + y * level->u_pitch;
    const float *restrict slope0 = level->slope[0] + row, *restrict slope1 = level->slope[1] + row;
    const float *restrict gradient0 = level->gradient[0] + row, *restrict gradient1 = level->gradient[1] + row;
    const float *restrict constant = level->constant + row;
    const float *restrict x0 = level->p[0] + row, *restrict x1 = level->p[1] + row;
    const float *restrict y0 = level->p[2] + row, *restrict y1 = level->p[3] + row;
    const float *restrict above0 = y > 0 ? y0 - level->pitch : level->zeros;
    const float *restrict above1 = y > 0 ? y1 - level->pitch : level->zeros;
    float tau = level->tau, lambda = level->lambda;
    INDEPENDENT
    for (ptrdiff_t i = 0; i < n; i++) {
        ptrdiff_t x = from + i;
        float data = fmaf(slope1[x], u1[x], fmaf(slope0[x], u0[x], constant[x]));
        data = data < -lambda ? -lambda : data;
        data = data > lambda ? lambda : data;
        float update0 = fmaf(gradient0[x], data, (x0[x] - x0[x - 1]) + (y0[x] - above0[x]));
        float update1 = fmaf(gradient1[x], data, (x1[x] - x1[x - 1]) + (y1[x] - above1[x]));
        u0[x] = fmaf(tau, update0, u0[x]);
        u1[x] = fmaf(tau, update1, u1[x]);
        if (squares) squares[x] = fmaf(update0, update0, update1 * update1);
    }
}

INLINE void repeat_last_column(const Level *level, int y)
{
    for (int i = 0; i < 2; i++) {
        float *u = level->u[i] + y * level->u_pitch;
        for (ptrdiff_t x = level->width; x <= level->pitch; x++) u[x] = u[level->width - 1];
    }
}

INLINE double sum_squares(const Level *level)
{
    float *squares = level->error;
    for (ptrdiff_t x = level->width; x < level->pitch; x++) squares[x] = 0;
    v16 lanes = {0};
    for (ptrdiff_t x = 0; x < level->pitch; x += LANES) lanes += *(const v16 *)(squares + x);
    double sums[LANES];
    for (int i = 0; i < LANES; i++) sums[i] = (double)lanes[i];
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) sums[i] += sums[half + i];
    return sums[0];
}

INLINE void update_p(const Level *level, int y, int from, int n)
{
    ptrdiff_t row = y * level->pitch;
    const float *restrict u0 = level->u[0] + y * level->u_pitch, *restrict u1 = level->u[1] + y * level->u_pitch;
    ptrdiff_t down = y < level->height - 1 ? level->u_pitch : 0; /* no difference below the last row */
    float *restrict x0 = level->p[0] + row, *restrict x1 = level->p[1] + row;
    float *restrict y0 = level->p[2] + row, *restrict y1 = level->p[3] + row;
    INDEPENDENT
    for (ptrdiff_t i = 0; i < n; i++) {
        ptrdiff_t x = from + i;
        float across0 = u0[x + 1] - u0[x], down0 = u0[x + down] - u0[x];
        float across1 = u1[x + 1] - u1[x], down1 = u1[x + down] - u1[x];
        float norm0 = 1 + sqrtf(fmaf(across0, across0, down0 * down0));
        float norm1 = 1 + sqrtf(fmaf(across1, across1, down1 * down1));
        float inverse = 1 / (norm0 * norm1);
        float inverse0 = inverse * norm1, inverse1 = inverse * norm0;
        x0[x] = (x0[x] + across0) * inverse0;
        y0[x] = (y0[x] + down0) * inverse0;
        x1[x] = (x1[x] + across1) * inverse1;
        y1[x] = (y1[x] + down1) * inverse1;
    }
}

INLINE void copy_row(const Level *level, int y, int restore)
{
    size_t plane = (size_t)level->height * (size_t)level->pitch;
    size_t u_plane = (size_t)level->height * (size_t)level->u_pitch;
    float *saved = level->saved;
    for (int i = 0; i < 6; i++) {
        ptrdiff_t pitch = i < 2 ? level->u_pitch : level->pitch;
        float *here = (i < 2 ? level->u[i] : level->p[i - 2]) + y * pitch, *there = saved + y * pitch;
        memcpy(restore ? here : there, restore ? there : here, sizeof(float) * (size_t)pitch);
        saved += i < 2 ? u_plane : plane;
    }
}

/* Updates p of row y and then u for the next iteration, a span behind: roots and divisions of the one overlap
   with the arithmetic of the other, and what is stored has left the store buffer before it is read shifted. */
INLINE void update_row(const Level *level, int y, int with_p, int with_u, float *squares)
{
    int n = (int)level->pitch;
    for (int from = 0; from < n + SPAN; from += SPAN) {
        int here = n - from < SPAN ? n - from : SPAN, before = n - from < 0 ? n - from + SPAN : SPAN;
        if (with_p && from < n) update_p(level, y, from, here & -LANES);
        if (with_u && from > 0) update_u(level, y, from - SPAN, before & -LANES, squares);
    }
    if (with_u) repeat_last_column(level, y);
}

/* Runs `count` iterations as one wavefront; iteration j adds its squared updates to errors[j] if tested[j]. */
CLONES static void run_block(const Level *level, int count, const uint8_t *tested, double *errors, int save)
{
    int height = level->height;
    for (int j = 0; j < count; j++) errors[j] = 0;
    for (int step = 0; step < height + count; step++) {
        if (save && step < height) copy_row(level, step, 0);
        for (int j = 0; j <= count; j++) {
            int y = step - j; /* for p of iteration j - 1, which needs u of the row below, and u of iteration j */
            if (y < 0 || y >= height) continue;
            if (j == count) {
                update_row(level, y, 1, 0, NULL);
            } else if (tested[j]) {
                if (j == 0) update_row(level, y, 0, 1, level->error);
                else update_row(level, y, 1, 1, level->error);
                errors[j] += sum_squares(level);
            } else {
                if (j == 0) update_row(level, y, 0, 1, NULL);
                else update_row(level, y, 1, 1, NULL);
            }
        }
    }
}

/* ---- median, exchanges as in median.py ---- */

#define SWAP(a, b) { float low = a < b ? a : b, high = a < b ? b : a; a = low; b = high; }
#define X(i, j) SWAP(w[i], w[j])

INLINE void median_rows_3(float **lines, float *restrict out, int n)
{
    float *restrict a = lines[0], *restrict b = lines[1], *restrict c = lines[2];
    INDEPENDENT
    for (int x = 0; x < n + 2; x++) {
        SWAP(a[x], b[x]) SWAP(b[x], c[x]) SWAP(a[x], b[x])
    }
    INDEPENDENT
    for (int x = 0; x < n; x++) {
        float w[9];
        for (int i = 0; i < 3; i++) {
            w[i] = a[x + i];
            w[3 + i] = b[x + i];
            w[6 + i] = c[x + i];
        }
        X(0, 1) X(1, 2) X(3, 4) X(4, 5) X(3, 4) X(7, 8) X(6, 7) X(2, 4) X(2, 6) X(4, 6)
        out[x] = w[4];
    }
}

INLINE void median_rows_5(float **lines, float *restrict out, int n)
{
    float *restrict a = lines[0], *restrict b = lines[1], *restrict c = lines[2];
    float *restrict d = lines[3], *restrict e = lines[4];
    INDEPENDENT
    for (int x = 0; x < n + 4; x++) {
        float w[5] = {a[x], b[x], c[x], d[x], e[x]};
        X(0, 1) X(3, 4) X(2, 4) X(2, 3) X(1, 4) X(0, 3) X(0, 2) X(1, 3) X(1, 2)
        a[x] = w[0], b[x] = w[1], c[x] = w[2], d[x] = w[3], e[x] = w[4];
    }
    INDEPENDENT
    for (int x = 0; x < n; x++) {
        float w[25];
        for (int i = 0; i < 5; i++) {
            w[i] = a[x + i], w[5 + i] = b[x + i], w[10 + i] = c[x + i];
            w[15 + i] = d[x + i], w[20 + i] = e[x + i];
        }
        X(0, 1) X(3, 4) X(2, 4) X(2, 3) X(1, 4) X(0, 3) X(1, 3)
        X(5, 6) X(8, 9) X(7, 9) X(7, 8) X(6, 9) X(5, 8) X(6, 8) X(6, 7)
        X(10, 11) X(13, 14) X(12, 14) X(12, 13) X(11, 14) X(10, 13) X(10, 12) X(11, 13) X(11, 12)
        X(15, 16) X(18, 19) X(17, 18) X(16, 19) X(15, 18) X(15, 17) X(16, 18) X(16, 17)
        X(20, 21) X(23, 24) X(22, 24) X(22, 23) X(20, 23) X(20, 22) X(21, 22)
        X(3, 7) X(11, 15) X(4, 8) X(12, 16) X(20, 9) X(13, 17) X(7, 15) X(4, 12) X(8, 16) X(20, 13)
        X(8, 12) X(15, 8) X(13, 21) X(15, 4) X(8, 12) X(9, 13) X(4, 20) X(8, 9) X(12, 20) X(8, 12)
        out[x] = w[12];
    }
}

/* Copies row y of a plane, rows and columns beyond the border repeated; `reach` of them on each side. */
INLINE void bordered_row(const Level *level, const float *plane, int y, int reach, float *out)
{
    int width = level->width;
    y = y < 0 ? 0 : y >= level->height ? level->height - 1 : y;
    const float *line = plane + y * level->u_pitch;
    for (int i = 0; i < reach; i++) {
        out[i] = line[0];
        out[reach + width + i] = line[width - 1];
    }
    memcpy(out + reach, line, sizeof(float) * (size_t)width);
}

CLONES static void median_filter(const Level *level, int size)
{
    ptrdiff_t step = level->u_pitch;
    int reach = size / 2;
    /* The last `size` rows as they were; the first `size` rows of scratch, then as many that get sorted. */
    for (int plane = 0; plane < 2; plane++) {
        float *u = level->u[plane];
        for (int y = -reach; y < reach; y++)
            bordered_row(level, u, y, reach, level->rows + (y + reach) % size * step);
        for (int y = 0; y < level->height; y++) {
            bordered_row(level, u, y + reach, reach, level->rows + (y + 2 * reach) % size * step);
            float *lines[5];
            for (int i = 0; i < size; i++) {
                lines[i] = level->rows + (5 + i) * step;
                memcpy(lines[i], level->rows + (y + i) % size * step, sizeof(float) * (size_t)step);
            }
            float *out = u + y * step;
            if (size == 3) median_rows_3(lines, out, level->width);
            else median_rows_5(lines, out, level->width);
            out[level->width] = out[level->width - 1];
        }
    }
}

/* ---- warps, levels, pair ---- */

/* How many iterations to run before the next look at the errors, and which of them are tested. */
static int plan_cuda(const Options *options, int n, int limit, double threshold, double *previous, uint8_t *tested)
{
    for (int j = 0; j < limit; j++) {
        /* Odd iterations only, once for each threshold that the last sum held: procOneScale of cudaoptflow. */
        tested[j] = options->epsilon > 0 && (n + j) % 2 == 1 && *previous < threshold;
        if (tested[j]) return j + 1;
        *previous -= threshold;
    }
    return limit;
}

/* As many as the fall of the error lets expect before it meets the threshold, less some; at the start of a warp
   half as many as the warp before took. */
static int plan_opencv(const Options *options, int n, int limit, double threshold, const double *last, int before)
{
    if (options->epsilon == 0) return limit;
    double expected = before / 2;
    if (n >= 2) expected = last[1] < last[0] ? 0.75 * log(threshold / last[1]) / log(last[1] / last[0]) : 1;
    int count = expected < limit ? (int)expected : limit;
    return count < 1 ? 1 : count;
}

/* Iterates until convergence, or as often as allowed; `before` is how often the warp before did. */
static int iterate(Level *level, const Options *options, int before)
{
    double threshold = options->epsilon * options->epsilon * level->height * level->width;
    double scale = options->theta * options->theta, previous = 0, last[2] = {0, 0}, errors[MAX_BLOCK];
    uint8_t tested[MAX_BLOCK];
    int n = 0;
    while (n < options->iterations) {
        int limit = options->iterations - n;
        if (options->median > 1) {
            int left = options->median_every - n % options->median_every;
            if (left == options->median_every) median_filter(level, options->median);
            limit = limit < left ? limit : left;
        }
        limit = limit < options->block ? limit : options->block;
        int count, save = 0;
        if (options->opencv) {
            count = plan_opencv(options, n, limit, threshold, last, before);
            memset(tested, options->epsilon > 0, sizeof tested);
            save = count > 1 && options->epsilon > 0;
        } else {
            count = plan_cuda(options, n, limit, threshold, &previous, tested);
        }
        run_block(level, count, tested, errors, save);
        for (int j = 0; j < count; j++) {
            n++;
            if (!tested[j]) continue;
            last[0] = last[1];
            last[1] = previous = errors[j] * scale;
            if (previous > threshold) continue;
            if (j + 1 < count) { /* the block went too far: again, up to here */
                for (int y = 0; y < level->height; y++) copy_row(level, y, 1);
                run_block(level, j + 1, tested, errors, 0);
            }
            return n;
        }
    }
    return n;
}

static void run_level(Level *level, const Options *options, const float *first, const float *second,
                      float *flow, int32_t *counts)
{
    int height = level->height, width = level->width;
    ptrdiff_t step = level->u_pitch;
    float scale = (float)(options->tau / options->theta), to_pixels = (float)(options->theta / options->tau);
    level->tau = (float)options->tau;
    level->lambda = (float)options->lambda;
    for (int i = 0; i < 4; i++)
        memset(level->p[i] - LANES, 0, sizeof(float) * ((size_t)height * (size_t)level->pitch + LANES));
    size_t plane = (size_t)height * (size_t)level->pitch;
    for (int i = 0; i < 2; i++) {
        memset(level->slope[i], 0, sizeof(float) * plane); /* the columns right of the image stay 0 */
        memset(level->gradient[i], 0, sizeof(float) * plane);
        memset(level->u[i], 0, sizeof(float) * (size_t)height * (size_t)step);
        for (int y = 0; y < height; y++) {
            float *u = level->u[i] + y * step;
            const float *line = flow + ((ptrdiff_t)i * height + y) * width;
            for (int x = 0; x < width; x++) u[x] = line[x] * scale;
            u[width] = u[width - 1];
        }
    }
    memset(level->constant, 0, sizeof(float) * plane);
    memset(level->zeros, 0, sizeof(float) * (size_t)level->pitch);
    make_quads(level, second, !options->opencv);
    for (int warp = 0; warp < options->warps; warp++) {
        linearise(level, first, to_pixels, (float)options->theta, !options->opencv);
        counts[warp] = iterate(level, options, warp > 0 ? counts[warp - 1] : 0);
    }
    for (int i = 0; i < 2; i++)
        for (int y = 0; y < height; y++)
            for (int x = 0; x < width; x++)
                flow[((ptrdiff_t)i * height + y) * width + x] = level->u[i][y * step + x] * to_pixels;
}

/* The version of the interface, or 0 on a processor without fused multiply-add, where this must not be used. */
EXPORT int tvl1_interface(void)
{
#if defined(__x86_64__)
    return __builtin_cpu_supports("fma") ? INTERFACE : 0;
#elif defined(__FP_FAST_FMAF)
    return INTERFACE;
#else
    return 0;
#endif
}

static size_t pixels_of(const Options *options, int level)
{
    return (size_t)options->heights[level] * (size_t)options->widths[level];
}

/* Floats of one frame's pyramid: its levels one after the other, finest first. */
EXPORT size_t tvl1_pyramid_floats(const Options *options)
{
    size_t sum = 0;
    for (int i = 0; i < options->levels; i++) sum += pixels_of(options, i);
    return sum;
}

static float *lay_out_pair(Level *level, const Options *options, float *next, float **flows, float **across,
                           Tap **taps)
{
    int height = options->heights[0], width = options->widths[0], longer = height > width ? height : width;
    next = lay_out(level, height, width, next);
    for (int i = 0; i < 2; i++) flows[i] = take(&next, 2 * pixels_of(options, 0));
    *across = take(&next, pixels_of(options, 0));
    *taps = (Tap *)take(&next, (size_t)longer * sizeof(Tap) / sizeof(float));
    return next;
}

/* Floats of scratch that tvl1_pyramid and tvl1_pair need, aligned to 64 bytes. */
EXPORT size_t tvl1_workspace_floats(const Options *options)
{
    Level level;
    float *flows[2], *across;
    Tap *taps;
    return (size_t)(lay_out_pair(&level, options, (float *)64, flows, &across, &taps) - (float *)64);
}

/* Makes the pyramid of one image, bytes or floats, height x width without gaps. */
EXPORT void tvl1_pyramid(const Options *options, const void *image, int bytes, float *pyramid, float *workspace)
{
    Level level;
    float *flows[2], *across;
    Tap *taps;
    lay_out_pair(&level, options, workspace, flows, &across, &taps);
    size_t pixels = pixels_of(options, 0);
    if (bytes) {
        const uint8_t *values = image;
        for (size_t i = 0; i < pixels; i++) pyramid[i] = values[i];
    } else {
        memcpy(pyramid, image, sizeof(float) * pixels);
    }
    for (int i = 1; i < options->levels; i++) {
        float *finer = pyramid;
        pyramid += pixels_of(options, i - 1);
        resize(finer, options->heights[i - 1], options->widths[i - 1], pyramid, options->heights[i],
               options->widths[i], 1 / options->zoom, options->opencv, across, taps);
    }
}

/* Sets flow (2, height, width) in pixels from two pyramids, and the iterations of each warp, coarse to fine. */
EXPORT void tvl1_pair(const Options *options, const float *first, const float *second, float *flow,
                      int32_t *counts, float *workspace)
{
    Level level;
    float *flows[2], *across;
    Tap *taps;
    lay_out_pair(&level, options, workspace, flows, &across, &taps);
    size_t end = tvl1_pyramid_floats(options);
    int last = options->levels - 1;
    for (int i = last; i >= 0; i--) {
        int height = options->heights[i], width = options->widths[i];
        size_t pixels = pixels_of(options, i);
        float *present = i == 0 ? flow : flows[i % 2];
        end -= pixels;
        if (i == last) {
            memset(present, 0, sizeof(float) * 2 * pixels);
        } else {
            int coarse_height = options->heights[i + 1], coarse_width = options->widths[i + 1];
            float zoom = (float)(1 / options->zoom);
            for (int plane = 0; plane < 2; plane++) {
                const float *coarse = flows[(i + 1) % 2] + (size_t)plane * pixels_of(options, i + 1);
                float *fine = present + (size_t)plane * pixels;
                resize(coarse, coarse_height, coarse_width, fine, height, width, 0, options->opencv, across, taps);
                for (size_t j = 0; j < pixels; j++) fine[j] *= zoom;
            }
        }
        lay_out(&level, height, width, workspace);
        run_level(&level, options, first + end, second + end, present, counts + (last - i) * options->warps);
    }
}
