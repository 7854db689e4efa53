// Up to `halo` iterations of TV-L1 on tiles that stay in registers, for blocked.py, which names the symbols.
//
// A warp holds ROWS rows of 64 pixels, a lane two neighbouring columns of them; WARPS warps above each other make
// a tile. Neighbours to the left and right are in the lane or one shuffle away, those above and below in the lane
// or, at the edge of a warp, in shared memory. Cells nearer than n pixels to an edge of the tile are wrong after
// n iterations, unless that edge lies outside of the image: tiles overlap, and each stores what it owns.
// Every block works through tiles; while it iterates on one, the copy engine brings the next to shared memory.
//
// What a pixel's bits are does not depend on the tile, on the iterations per launch or on whether the error is
// summed: compile with -fmad=false, each fused multiplication is written out.

#ifdef __CUDACC__
__device__ __forceinline__ float fast_sqrt(float x) {
    float y;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float fast_reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float fast_inverse_sqrt(float x) {
    float y;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// Four floats, zeros where `inside` is false; there after wait_for_copies, for the thread that asked for them.
__device__ __forceinline__ void copy_later(float* shared, const float* global, bool inside) {
    unsigned target = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    int bytes = inside ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(global), "r"(bytes) : "memory");
}
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
#endif  // else the emulation of tests/cuda_emulation.h

constexpr int LANES = 32;
constexpr int THREADS = WARPS * LANES;
constexpr int TILE_WIDTH = 2 * LANES;
constexpr int TILE_HEIGHT = WARPS * ROWS;
constexpr int TILE_CELLS = TILE_WIDTH * TILE_HEIGHT;
constexpr int STATE_PLANES = 6;
constexpr int PLANES = 9;
constexpr int QUADS = TILE_WIDTH / 4;
constexpr unsigned ALL = 0xffffffffu;
constexpr unsigned ALL_ROWS = (1u << ROWS) - 1;
constexpr float SMALLEST_SQUARED_GRADIENT = 1e-30f;

// The fields are documented in blocked.py, whose structure mirrors this one.
struct Work {
    float* state;
    const float* data;
    float* partials;
    const int* count;
    const int* list;
    const int* steps;
    const int* done;
    const int* side;
    int pairs, height, width, pitch;
    int tiles_x, tiles_y, step_x, step_y, halo;
    int error_every;
    float tau, scale, limit;
};

// One tile of one pair; x, y is its upper left cell, [own_x, own_x_stop) x [own_y, own_y_stop) what it stores.
struct Place {
    int pair, tile, x, y, own_x, own_x_stop, own_y, own_y_stop, side, steps, done;
};

// Tells the compiler that all lanes hold the same value, without which it guards each shuffle.
__device__ __forceinline__ int uniform(int value) { return __shfl_sync(ALL, value, 0); }

// The cells of one lane. sqrt(g) is the length of the gradient, d its direction.
struct Cells {
    float u1[ROWS][2], u2[ROWS][2];                                    // (tau/theta) u
    float p11[ROWS][2], p12[ROWS][2], p21[ROWS][2], p22[ROWS][2];      // p12 belongs to u1, downwards
    float d1[ROWS][2], d2[ROWS][2], s[ROWS][2], limit[ROWS][2];        // the data term, see derive
};

// What is true of a lane's rows and columns, packed to spare registers: a bit per row or column from these on.
enum MaskBit { ROW_HAS_BELOW = 0, ROW_OWNED = 8, COLUMN_HAS_RIGHT = 16, COLUMN_OWNED = 18, HAS_ABOVE = 20 };
__device__ __forceinline__ bool has(unsigned masks, int bit) { return masks >> bit & 1; }

__device__ __forceinline__ Place locate(const Work& work, int item) {
    int tiles = work.tiles_x * work.tiles_y;
    Place place;
    place.pair = work.list[item / tiles];
    place.tile = item % tiles;
    int column = place.tile % work.tiles_x, row = place.tile / work.tiles_x;
    place.x = column * work.step_x;
    place.y = row * work.step_y;
    place.own_x = column == 0 ? 0 : place.x + work.halo;
    place.own_y = row == 0 ? 0 : place.y + work.halo;
    place.own_x_stop = column == work.tiles_x - 1 ? work.width : place.x + work.step_x + work.halo;
    place.own_y_stop = row == work.tiles_y - 1 ? work.height : place.y + work.step_y + work.halo;
    place.side = work.side[place.pair];
    place.steps = work.steps[place.pair];
    place.done = work.done[place.pair];
    return place;
}

__device__ __forceinline__ float* state_planes(const Work& work, int side, int pair) {
    size_t plane = static_cast<size_t>(work.height) * work.pitch;
    return work.state + (static_cast<size_t>(side) * work.pairs + pair) * STATE_PLANES * plane;
}

// Four columns at a time; the pitch is a multiple of four, and beyond the width lie zeros.
__device__ __forceinline__ void fetch(const Work& work, const Place& place, float* stage) {
    size_t plane = static_cast<size_t>(work.height) * work.pitch;
    const float* state = state_planes(work, place.side, place.pair);
    const float* data = work.data + static_cast<size_t>(place.pair) * (PLANES - STATE_PLANES) * plane;
    int quad = threadIdx.x % QUADS;
    int x = place.x + 4 * quad;
#pragma unroll
    for (int row = 0; row < TILE_HEIGHT; row += THREADS / QUADS) {
        int tile_row = row + static_cast<int>(threadIdx.x / QUADS);
        int y = place.y + tile_row;
        bool inside = x < work.pitch && y < work.height;
        size_t offset = inside ? static_cast<size_t>(y) * work.pitch + x : 0;
        float* target = stage + tile_row * TILE_WIDTH + 4 * quad;
#pragma unroll
        for (int i = 0; i < PLANES; i++) {
            const float* source = i < STATE_PLANES ? state + i * plane : data + (i - STATE_PLANES) * plane;
            copy_later(target + i * TILE_CELLS, source + offset, inside);
        }
    }
}

// -rho/(theta g) (I_x, I_y) limited to lambda |grad I|, times tau: clamp(s - d U, -limit, limit) d.
__device__ __forceinline__ void derive(Cells& c, int r, int k, float i_x, float i_y, float rho, const Work& work) {
    float g = fmaf(i_x, i_x, i_y * i_y);
    float inverse = g > SMALLEST_SQUARED_GRADIENT ? fast_inverse_sqrt(g) : 0.0f;
    c.d1[r][k] = i_x * inverse;
    c.d2[r][k] = i_y * inverse;
    c.s[r][k] = -work.scale * rho * inverse;
    c.limit[r][k] = work.limit * g * inverse;
}

__device__ __forceinline__ void load(Cells& c, const float* stage, const Work& work) {
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        int row = ROWS * static_cast<int>(threadIdx.x / LANES) + r;
        const float* cell = stage + row * TILE_WIDTH + 2 * (threadIdx.x % LANES);
        auto plane = [&](int i) { return *reinterpret_cast<const float2*>(cell + i * TILE_CELLS); };
        auto put = [&](float (&to)[2], float2 pair) { to[0] = pair.x, to[1] = pair.y; };
        put(c.u1[r], plane(0)), put(c.u2[r], plane(1));
        put(c.p11[r], plane(2)), put(c.p12[r], plane(3)), put(c.p21[r], plane(4)), put(c.p22[r], plane(5));
        float2 i_x = plane(6), i_y = plane(7), rho = plane(8);
        derive(c, r, 0, i_x.x, i_y.x, rho.x, work);
        derive(c, r, 1, i_x.y, i_y.y, rho.y, work);
    }
}

__device__ __forceinline__ unsigned masks(const Work& work, const Place& place) {
    int x = place.x + 2 * static_cast<int>(threadIdx.x % LANES);
    int y = place.y + ROWS * static_cast<int>(threadIdx.x / LANES);
    unsigned m = (y > 0) << HAS_ABOVE;
#pragma unroll
    for (int k = 0; k < 2; k++) {
        m |= (x + k < work.width - 1) << (COLUMN_HAS_RIGHT + k);
        m |= (x + k >= place.own_x && x + k < place.own_x_stop) << (COLUMN_OWNED + k);
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        m |= (y + r < work.height - 1) << (ROW_HAS_BELOW + r);
        m |= (y + r >= place.own_y && y + r < place.own_y_stop) << (ROW_OWNED + r);
    }
    return m;
}

// U += clamp(s - d U) d + tau div p, in place; returns the square of the change of both components.
__device__ __forceinline__ float update_u(Cells& c, int r, int k, float left_1, float left_2, float above_1,
                                          float above_2, float tau) {
    float u1 = c.u1[r][k], u2 = c.u2[r][k], d1 = c.d1[r][k], d2 = c.d2[r][k], limit = c.limit[r][k];
    float t = fminf(fmaxf(fmaf(-d2, u2, fmaf(-d1, u1, c.s[r][k])), -limit), limit);
    float div_1 = (c.p11[r][k] - left_1) + (c.p12[r][k] - above_1);
    float div_2 = (c.p21[r][k] - left_2) + (c.p22[r][k] - above_2);
    float new_1 = fmaf(tau, div_1, fmaf(t, d1, u1)), new_2 = fmaf(tau, div_2, fmaf(t, d2, u2));
    c.u1[r][k] = new_1;
    c.u2[r][k] = new_2;
    float change_1 = new_1 - u1, change_2 = new_2 - u2;
    return fmaf(change_1, change_1, change_2 * change_2);
}

// p <- (p + grad U) / (1 + |grad U|) for one component.
__device__ __forceinline__ void update_p(float& p_x, float& p_y, float across, float down) {
    float inverse = fast_reciprocal(1.0f + fast_sqrt(fmaf(across, across, down * down)));
    p_x = (p_x + across) * inverse;
    p_y = (p_y + down) * inverse;
}

// One iteration. Returns the lane's sum of squared changes over its owned cells, if WITH_ERROR. The image may end
// within the columns of this warp only if BORDER_X, within its rows only if BORDER_Y.
template <bool BORDER_X, bool BORDER_Y, bool WITH_ERROR>
__device__ __forceinline__ float iterate(Cells& c, unsigned m, float tau, float4* u_edges, float4* p_edges) {
    int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    float error[2] = {0.0f, 0.0f};
    float4 above = p_edges[(warp > 0 ? warp - 1 : 0) * LANES + lane];
    if (BORDER_Y && !has(m, HAS_ABOVE)) above = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        float left_1 = __shfl_up_sync(ALL, c.p11[r][1], 1), left_2 = __shfl_up_sync(ALL, c.p21[r][1], 1);
        if (BORDER_X && lane == 0) left_1 = left_2 = 0.0f;
#pragma unroll
        for (int k = 0; k < 2; k++) {
            float above_1 = r > 0 ? c.p12[r > 0 ? r - 1 : 0][k] : (k ? above.y : above.x);
            float above_2 = r > 0 ? c.p22[r > 0 ? r - 1 : 0][k] : (k ? above.w : above.z);
            float change = update_u(c, r, k, k ? c.p11[r][0] : left_1, k ? c.p21[r][0] : left_2, above_1, above_2, tau);
            if (WITH_ERROR && has(m, ROW_OWNED + r)) error[k] += change;
        }
        if (r == 0) u_edges[warp * LANES + lane] = make_float4(c.u1[0][0], c.u1[0][1], c.u2[0][0], c.u2[0][1]);
    }
    __syncthreads();
    float4 below = u_edges[(warp < WARPS - 1 ? warp + 1 : warp) * LANES + lane];
#pragma unroll
    for (int r = ROWS - 1; r >= 0; r--) {
        float right_1 = __shfl_down_sync(ALL, c.u1[r][0], 1), right_2 = __shfl_down_sync(ALL, c.u2[r][0], 1);
#pragma unroll
        for (int k = 0; k < 2; k++) {
            bool last = r == ROWS - 1;
            float across_1 = (k ? right_1 : c.u1[r][1]) - c.u1[r][k];
            float across_2 = (k ? right_2 : c.u2[r][1]) - c.u2[r][k];
            float down_1 = (last ? (k ? below.y : below.x) : c.u1[last ? r : r + 1][k]) - c.u1[r][k];
            float down_2 = (last ? (k ? below.w : below.z) : c.u2[last ? r : r + 1][k]) - c.u2[r][k];
            if (BORDER_X) {
                across_1 = has(m, COLUMN_HAS_RIGHT + k) ? across_1 : 0.0f;
                across_2 = has(m, COLUMN_HAS_RIGHT + k) ? across_2 : 0.0f;
            }
            if (BORDER_Y) {
                down_1 = has(m, ROW_HAS_BELOW + r) ? down_1 : 0.0f;
                down_2 = has(m, ROW_HAS_BELOW + r) ? down_2 : 0.0f;
            }
            update_p(c.p11[r][k], c.p12[r][k], across_1, down_1);
            update_p(c.p21[r][k], c.p22[r][k], across_2, down_2);
        }
        if (r == ROWS - 1)
            p_edges[warp * LANES + lane] = make_float4(c.p12[r][0], c.p12[r][1], c.p22[r][0], c.p22[r][1]);
    }
    __syncthreads();
    return (has(m, COLUMN_OWNED) ? error[0] : 0.0f) + (has(m, COLUMN_OWNED + 1) ? error[1] : 0.0f);
}

template <bool BORDER_X, bool BORDER_Y>
__device__ __forceinline__ void iterations(Cells& c, unsigned m, const Work& work, const Place& place,
                                           float4* u_edges, float4* p_edges, float* warp_errors) {
    int steps = uniform(place.steps), done = uniform(place.done);
    for (int j = 0; j < steps; j++) {
        bool with_error = work.error_every > 0 && (done + j + 1) % work.error_every == 0;
        if (!with_error) {
            iterate<BORDER_X, BORDER_Y, false>(c, m, work.tau, u_edges, p_edges);
            continue;
        }
        float error = iterate<BORDER_X, BORDER_Y, true>(c, m, work.tau, u_edges, p_edges);
        for (int distance = LANES / 2; distance > 0; distance /= 2) error += __shfl_xor_sync(ALL, error, distance);
        if (threadIdx.x % LANES == 0) warp_errors[j * WARPS + threadIdx.x / LANES] = error;
    }
}

__device__ __forceinline__ void store(const Cells& c, const Work& work, const Place& place) {
    size_t plane = static_cast<size_t>(work.height) * work.pitch;
    float* state = state_planes(work, 1 - place.side, place.pair);
    int x = place.x + 2 * static_cast<int>(threadIdx.x % LANES);
    int first_row = place.y + ROWS * static_cast<int>(threadIdx.x / LANES);
    if (x < place.own_x || x >= place.own_x_stop) return;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        int y = first_row + r;
        if (y < place.own_y || y >= place.own_y_stop) continue;
        // Both columns of the lane: own_x is even, and the one beyond an odd width lies in the pitch and is zero.
        float* cell = state + static_cast<size_t>(y) * work.pitch + x;
        auto put = [&](int i, const float (&from)[2]) {
            *reinterpret_cast<float2*>(cell + i * plane) = make_float2(from[0], from[1]);
        };
        put(0, c.u1[r]), put(1, c.u2[r]);
        put(2, c.p11[r]), put(3, c.p12[r]), put(4, c.p21[r]), put(5, c.p22[r]);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) tvl1_blocked(const Work work) {
    extern __shared__ float4 shared[];
    float4* u_edges = shared;
    float4* p_edges = u_edges + THREADS;
    float* stage = reinterpret_cast<float*>(p_edges + THREADS);
    float* warp_errors = stage + PLANES * TILE_CELLS;
    Place* places = reinterpret_cast<Place*>(warp_errors + MOST_HALO * WARPS);

    int tiles = work.tiles_x * work.tiles_y;
    int total = *work.count * tiles;
    int item = blockIdx.x;
    if (item >= total) return;
    if (threadIdx.x == 0) places[0] = locate(work, item);
    __syncthreads();
    fetch(work, places[0], stage);
    for (int turn = 0; item < total; turn ^= 1) {
        const Place& place = places[turn];
        item += gridDim.x;
        wait_for_copies();
        __syncthreads();
        // Not before: until here other threads may still read the place of the tile before.
        if (threadIdx.x == 0 && item < total) places[turn ^ 1] = locate(work, item);
        Cells c;
        load(c, stage, work);
        p_edges[threadIdx.x] = make_float4(c.p12[ROWS - 1][0], c.p12[ROWS - 1][1], c.p22[ROWS - 1][0], c.p22[ROWS - 1][1]);
        __syncthreads();
        if (item < total) fetch(work, places[turn ^ 1], stage);
        unsigned m = masks(work, place);
        bool border_x = uniform(place.x == 0 || place.x + TILE_WIDTH >= work.width);
        bool border_y = uniform(!has(m, HAS_ABOVE) || (m >> ROW_HAS_BELOW & ALL_ROWS) != ALL_ROWS);
        // Warps of one block may take different ones: each has the same barriers.
        if (border_x && border_y) iterations<true, true>(c, m, work, place, u_edges, p_edges, warp_errors);
        else if (border_x) iterations<true, false>(c, m, work, place, u_edges, p_edges, warp_errors);
        else if (border_y) iterations<false, true>(c, m, work, place, u_edges, p_edges, warp_errors);
        else iterations<false, false>(c, m, work, place, u_edges, p_edges, warp_errors);
        store(c, work, place);
        __syncthreads();
        if (static_cast<int>(threadIdx.x) < place.steps) {
            float sum = 0.0f;
            for (int warp = 0; warp < WARPS; warp++) sum += warp_errors[threadIdx.x * WARPS + warp];
            work.partials[(static_cast<size_t>(place.pair) * work.halo + threadIdx.x) * tiles + place.tile] = sum;
        }
    }
}
