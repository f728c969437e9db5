/* Router: each token's experts, and the slots sorted by expert and dealt into tiles for the GEMM kernels. */
#include "common.cuh"

enum { CQ_ROUTE_THREADS = 128, CQ_GROUP_THREADS = 256, CQ_SIGMOID = 1 /* cq_scoring of cq.h; else softmax */ };

/* The better of two candidates: larger logit, then lower index. An index of -1 is no candidate; NaN beats nothing. */
CQ_DEVICE bool better(float a, int a_index, float b, int b_index) {
    if (a_index < 0 || b_index < 0) return b_index < 0 && a_index >= 0;
    return a > b || (a_index < b_index && !(b > a));
}

/* This lane's best expert that ids[0 .. rank - 1] do not hold, then the warp's. */
CQ_DEVICE int best_expert(const float *logits, int n_experts, const int *ids, int rank, int lane) {
    float best = 0;
    int index = -1;
    for (int e = lane; e < n_experts; e += 32) {
        bool taken = false;
        for (int i = 0; i < rank; i++) taken |= ids[i] == e;
        if (!taken && better(logits[e], e, best, index)) best = logits[e], index = e;
    }
    for (int distance = 16; distance > 0; distance /= 2) {
        const float other = __shfl_xor_sync(~0u, best, distance);
        const int other_index = __shfl_xor_sync(~0u, index, distance);
        if (better(other, other_index, best, index)) best = other, index = other_index;
    }
    return index;
}

/* ids, weights [tokens][top_k]: of logits [tokens][n_experts] the best top_k, ties to the lower index, and their
 * softmax over all experts or their sigmoids; normalize: their weights divided by their sum. A warp a token. Grid:
 * tokens / 4. */
extern "C" __global__ void __launch_bounds__(CQ_ROUTE_THREADS)
    route(const float *logits, int *ids, float *weights, int n_tokens, int n_experts, int top_k, int scoring,
          int normalize) {
    const int token = blockIdx.x * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (token >= n_tokens) return; /* a whole warp */
    logits += (long long)token * n_experts, ids += token * top_k, weights += token * top_k;
    float largest = -3.4028235e38f, total = 0, chosen = 0;
    for (int e = lane; e < n_experts; e += 32) largest = fmaxf(largest, logits[e]);
    largest = max_lanes(largest, 32);
    for (int e = lane; e < n_experts; e += 32) total += expf(logits[e] - largest);
    total = sum_lanes(total, 32);
    for (int rank = 0; rank < top_k; rank++) {
        const int id = best_expert(logits, n_experts, ids, rank, lane);
        const bool sigmoid = scoring == CQ_SIGMOID;
        const float weight = sigmoid ? 1.0f / (1.0f + expf(-logits[id])) : expf(logits[id] - largest) / total;
        chosen += weight;
        if (lane == 0) ids[rank] = id, weights[rank] = weight;
        __syncwarp(); /* the next round reads ids */
    }
    if (normalize && chosen > 0)
        for (int rank = lane; rank < top_k; rank += 32) weights[rank] /= chosen;
}

/* offsets [n_experts + 1] and order [n_slots]: the slots sorted by expert, then by slot; tiles [n_tiles][2]: expert and
 * first place in order of every tile of 64 slots of one expert, -1 for the tiles that are left. A warp takes every
 * eighth expert and finds its slots 32 at a time by a vote. Shared memory: 2 * (n_experts + 1) ints. Grid: 1. */
extern "C" __global__ void __launch_bounds__(CQ_GROUP_THREADS)
    group(const int *ids, int *order, int *offsets, int *tiles, int n_slots, int n_experts, int n_tiles) {
    CQ_DYNAMIC_SHARED(int, starts);
    int *tile_starts = starts + n_experts + 1;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int e = warp; e < n_experts; e += 8) {
        int count = 0;
        for (int first = 0; first < n_slots; first += 32)
            count += __popc(__ballot_sync(~0u, first + lane < n_slots && ids[first + lane] == e));
        if (lane == 0) starts[e + 1] = count;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        starts[0] = tile_starts[0] = 0;
        for (int e = 0; e < n_experts; e++) {
            tile_starts[e + 1] = tile_starts[e] + ceil_div(starts[e + 1], CQ_TILE_TOKENS);
            starts[e + 1] += starts[e];
        }
    }
    __syncthreads();
    for (int e = threadIdx.x; e <= n_experts; e += CQ_GROUP_THREADS) offsets[e] = starts[e];
    for (int e = warp; e < n_experts; e += 8) {
        int place = starts[e];
        for (int first = 0; first < n_slots; first += 32) {
            const bool mine = first + lane < n_slots && ids[first + lane] == e;
            const u32 votes = __ballot_sync(~0u, mine);
            if (mine) order[place + __popc(votes & ((1u << lane) - 1))] = first + lane;
            place += __popc(votes);
        }
        for (int i = tile_starts[e] + lane; i < tile_starts[e + 1]; i += 32)
            tiles[2 * i] = e, tiles[2 * i + 1] = starts[e] + (i - tile_starts[e]) * CQ_TILE_TOKENS;
    }
    for (int i = tile_starts[n_experts] + threadIdx.x; i < n_tiles; i += CQ_GROUP_THREADS) tiles[2 * i] = -1;
}
