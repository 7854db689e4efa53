// Runs the CUDA kernel that is included below on a CPU, one fiber per thread of a block, to test it without a GPU.
//
// Threads go on in turns until they wait for others, so barriers and shuffles that do not match hang and are found.
// Copies to shared memory happen at once or, with `late`, when they are waited for, whichever an error in the order
// of accesses would show. What it gives up: speed, and the approximate square root and reciprocal of a GPU.

#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __device__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct Index { unsigned x; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

static Index threadIdx, blockIdx, gridDim;
float4 shared[14000];

namespace emulation {
constexpr int MOST_THREADS = 1024, WARP = 32;
struct Thread {
    ucontext_t context;
    std::vector<char> stack;
    bool finished = false;
    int shuffles = 0, barriers = 0;
    std::vector<std::function<void()>> copies;
};
static std::vector<Thread> threads;
static ucontext_t scheduler;
static bool late_copies;
static long arrived_at_shuffle[MOST_THREADS / WARP];
static long arrived_at_barrier;
static unsigned values[MOST_THREADS / WARP][2][WARP];
static std::function<void()> kernel;

inline Thread& self() { return threads[threadIdx.x]; }
inline void yield() { swapcontext(&self().context, &scheduler); }

inline unsigned exchange(unsigned value, int source) {
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, turn = self().shuffles++;
    values[warp][turn % 2][lane] = value;
    arrived_at_shuffle[warp]++;
    while (arrived_at_shuffle[warp] < static_cast<long>(turn + 1) * WARP) yield();
    return values[warp][turn % 2][source];
}
inline void start() {
    kernel();
    self().finished = true;
    yield();
}
inline void run_block(int count) {
    threads = std::vector<Thread>(count);
    arrived_at_barrier = 0;
    std::memset(arrived_at_shuffle, 0, sizeof arrived_at_shuffle);
    std::memset(shared, 0xff, sizeof shared);  // NaN
    for (Thread& thread : threads) {
        thread.stack.resize(65536);
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.data();
        thread.context.uc_stack.ss_size = thread.stack.size();
        makecontext(&thread.context, start, 0);
    }
    for (int rounds = 0, finished = 0; finished < count; rounds++) {
        if (rounds > 10000000) std::fprintf(stderr, "the threads of a block wait for each other\n"), std::abort();
        finished = 0;
        for (int i = 0; i < count; i++) {
            if (!threads[i].finished) threadIdx.x = i, swapcontext(&scheduler, &threads[i].context);
            finished += threads[i].finished;
        }
    }
}
}  // namespace emulation

template <typename T>
T __shfl_sync(unsigned, T value, int source) {
    unsigned bits;
    std::memcpy(&bits, &value, 4);
    bits = emulation::exchange(bits, source);
    std::memcpy(&value, &bits, 4);
    return value;
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, int by) {
    int lane = threadIdx.x % 32;
    return __shfl_sync(mask, value, lane >= by ? lane - by : lane);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, int by) {
    int lane = threadIdx.x % 32;
    return __shfl_sync(mask, value, lane + by < 32 ? lane + by : lane);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
    return __shfl_sync(mask, value, (threadIdx.x % 32) ^ bits);
}
inline void __syncthreads() {
    long turn = ++emulation::self().barriers;
    emulation::arrived_at_barrier++;
    while (emulation::arrived_at_barrier < turn * static_cast<long>(emulation::threads.size())) emulation::yield();
}
inline float fast_sqrt(float x) { return std::sqrt(x); }
inline float fast_reciprocal(float x) { return 1.0f / x; }
inline float fast_inverse_sqrt(float x) { return 1.0f / std::sqrt(x); }
inline void copy_later(float* target, const float* source, bool inside) {
    auto copy = [=] {
        if (inside) std::memcpy(target, source, 16);
        else std::memset(target, 0, 16);
    };
    if (emulation::late_copies) emulation::self().copies.push_back(copy);
    else copy();
}
inline void wait_for_copies() {
    for (auto& copy : emulation::self().copies) copy();
    emulation::self().copies.clear();
}
using std::size_t;

#include KERNEL_FILE

extern "C" void emulate(const Work* work, int blocks, int late_copies) {
    emulation::late_copies = late_copies;
    gridDim.x = blocks;
    emulation::kernel = [=] { tvl1_blocked(*work); };
    for (int i = 0; i < blocks; i++) blockIdx.x = i, emulation::run_block(THREADS);
}
