// Runs the kernels of native/cuda on the CPU, from the same source: what NVRTC knows of CUDA, as C++.
//
// Included before a kernel's source (emulate.py). cp.async copies nothing before its wait.
#pragma once
#define CQ_PTX_CUH // the functions of native/cuda/ptx.cuh are below
#include "fibers.h"

struct uint2 {
    unsigned x, y;
};
struct float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace emulator {
// ---- shared memory, barriers, warps ----

template <class T> T *shared_array(const void *declaration, size_t count) {
    auto &memory = block.shared[declaration];
    if (!memory) {
        memory.reset(new char[count * sizeof(T)]);
        memset(memory.get(), (char)block.garbage, count * sizeof(T));
    }
    return (T *)memory.get();
}

inline void barrier() { leave(State::AT_BARRIER); }

// Every lane gives n <= 8 words; returns all lanes' words once all 32 are here.
inline const unsigned (*meet(const char *what, const void *words, int n))[8] {
    Warp &warp = block.warps[thread_number() / WARP];
    const int generation = warp.generation;
    if (warp.arrived && strcmp(warp.what, what))
        fail(std::string("lanes at different instructions: ") + warp.what + ", " + what);
    warp.what = what;
    memcpy(warp.words[generation % 2][lane()], words, n * 4);
    if (++warp.arrived == WARP) {
        warp.arrived = 0, warp.generation++;
        for (int i = 0; i < WARP; i++) {
            Thread &other = *block.threads[thread_number() / WARP * WARP + i];
            if (other.state == State::IN_WARP) other.state = State::READY;
        }
    } else {
        leave(State::IN_WARP);
    }
    return warp.words[generation % 2];
}

template <class T> T shuffle(T value, int from) {
    static_assert(sizeof(T) == 4, "words only");
    const unsigned (*all)[8] = meet("shfl", &value, 1);
    memcpy(&value, all[from], 4);
    return value;
}
template <class T> T shuffle_xor(T value, int distance) { return shuffle(value, lane() ^ distance); }

inline int byte_of(unsigned word, int i) { return word >> 8 * i & 255; }
inline int signed_byte_of(unsigned word, int i) { return (int8_t)byte_of(word, i); }
} // namespace emulator

// ---- the language ----

#define __global__
#define __device__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)
#define CQ_DEVICE static inline
#define CQ_SHARED(type, name, count)                                                                                   \
    static const char name##_declaration = 0;                                                                          \
    type *name = emulator::shared_array<type>(&name##_declaration, count)
#define CQ_DYNAMIC_SHARED(type, name) type *name = (type *)emulator::block.dynamic.data()
#define threadIdx (emulator::current->index)

static uint3 blockIdx, gridDim;

static inline void __syncthreads() { emulator::barrier(); }
static inline void __syncwarp() { emulator::meet("syncwarp", "", 0); }
template <class T> T __shfl_xor_sync(unsigned, T value, int distance) { return emulator::shuffle_xor(value, distance); }
template <class T> T __shfl_sync(unsigned, T value, int from) { return emulator::shuffle(value, from % 32); }
static inline unsigned __ballot_sync(unsigned, bool vote) {
    const unsigned word = vote;
    const unsigned (*all)[8] = emulator::meet("vote", &word, 1);
    unsigned votes = 0;
    for (int i = 0; i < emulator::WARP; i++) votes |= all[i][0] << i;
    return votes;
}
static inline int atomicAdd(int *address, int value) { // a thread runs until it waits: nothing comes between
    const int before = *address;
    *address += value;
    return before;
}
static inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
static inline float __int_as_float(int bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

// ---- the instructions of ptx.cuh ----

typedef unsigned int u32;
typedef unsigned short u16;

CQ_DEVICE u32 byte_permute(u32 a, u32 b, u32 selector) {
    u32 out = 0;
    for (int i = 0; i < 4; i++) {
        const u32 nibble = selector >> 4 * i & 15, byte = emulator::byte_of(nibble & 4 ? b : a, nibble & 3);
        out |= (nibble & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;
    }
    return out;
}
CQ_DEVICE int dot_unsigned(u32 a, u32 b, int sum) {
    u32 out = (u32)sum; // the instruction wraps around
    for (int i = 0; i < 4; i++) out += (u32)(emulator::byte_of(a, i) * emulator::signed_byte_of(b, i));
    return (int)out;
}
CQ_DEVICE int dot_signed(u32 a, u32 b, int sum) {
    u32 out = (u32)sum;
    for (int i = 0; i < 4; i++) out += (u32)(emulator::signed_byte_of(a, i) * emulator::signed_byte_of(b, i));
    return (int)out;
}

// a[row][k] is in lane 4 (row % 8) + k % 16 / 4, register row / 8 + 2 (k / 16), byte k % 4; b[k][column] in lane
// 4 column + k % 16 / 4, register k / 16.
CQ_DEVICE void matrix_multiply(int *d, const u32 *a, const u32 *b) {
    u32 own[6];
    memcpy(own, a, 16), memcpy(own + 4, b, 8);
    const u32(*all)[8] = emulator::meet("mma", own, 6);
    const int g = emulator::lane() / 4, t = emulator::lane() % 4;
    for (int e = 0; e < 4; e++) {
        const int row = g + e / 2 * 8, column = 2 * t + e % 2;
        u32 sum = (u32)d[e];
        for (int k = 0; k < 32; k++) {
            const u32 x = all[4 * (row % 8) + k % 16 / 4][row / 8 + 2 * (k / 16)];
            const u32 y = all[4 * column + k % 16 / 4][4 + k / 16];
            sum += (u32)(emulator::signed_byte_of(x, k % 4) * emulator::signed_byte_of(y, k % 4));
        }
        d[e] = (int)sum;
    }
}

CQ_DEVICE void load_matrices(u32 *out, const void *row) {
    if ((uintptr_t)row % 16) emulator::fail("ldmatrix: address not a multiple of 16");
    const u32(*all)[8] = emulator::meet("ldmatrix", &row, 2);
    for (int i = 0; i < 4; i++) {
        const char *from;
        memcpy(&from, all[8 * i + emulator::lane() / 4], 8);
        memcpy(out + i, from + 4 * (emulator::lane() % 4), 4);
    }
}

CQ_DEVICE void copy_async(void *shared, const void *global, bool valid) {
    if ((uintptr_t)shared % 16 || (uintptr_t)global % 16) emulator::fail("cp.async: address not a multiple of 16");
    emulator::current->copies.push_back({shared, global, valid});
}
CQ_DEVICE void copy_wait() {
    for (const emulator::Copy &copy : emulator::current->copies) {
        if (copy.valid) memcpy(copy.to, copy.from, 16);
        if (!copy.valid) memset(copy.to, 0, 16);
    }
    emulator::current->copies.clear();
}

CQ_DEVICE float from_half(u16 half) {
    _Float16 value;
    memcpy(&value, &half, 2);
    return (float)value;
}
CQ_DEVICE u16 to_half(float value) {
    const _Float16 rounded = (_Float16)value;
    u16 half;
    memcpy(&half, &rounded, 2);
    return half;
}

// ---- launching from Python: an array of pointers to the arguments, as the driver takes them ----

template <class... A, size_t... I>
const char *cq_launch(void (*kernel)(A...), void **arguments, const unsigned *grid, unsigned n_threads,
                      unsigned n_dynamic, unsigned seed, std::index_sequence<I...>) {
    return emulator::launch([=] { kernel(*(std::decay_t<A> *)arguments[I]...); }, grid, n_threads, n_dynamic, seed,
                            blockIdx, gridDim);
}
template <class... A>
const char *cq_launch(void (*kernel)(A...), void **arguments, const unsigned *grid, unsigned n_threads,
                      unsigned n_dynamic, unsigned seed) {
    return cq_launch(kernel, arguments, grid, n_threads, n_dynamic, seed, std::index_sequence_for<A...>());
}
#define CQ_EMULATE(name)                                                                                               \
    extern "C" const char *name##_launch(void **arguments, const unsigned *grid, unsigned n_threads,                   \
                                         unsigned n_dynamic, unsigned seed) {                                          \
        return cq_launch(name, arguments, grid, n_threads, n_dynamic, seed);                                           \
    }
