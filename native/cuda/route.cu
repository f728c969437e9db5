/* Router: each token's experts, and the slots sorted by expert and dealt into tiles for the GEMM kernels. */
#include "common.cuh"

/* cq_scoring of cq.h; else softmax. */
enum { CQ_ROUTE_THREADS = 128, CQ_GROUP_THREADS = 256, CQ_SIGMOID = 1, CQ_SPARSEMIXER = 2 };

typedef unsigned long long u64;

/* Fields as in cq_route of cq.h. */
struct cq_route {
    const float *logits; /* [tokens][n_experts] */
    int *ids;            /* [tokens][top_k] */
    float *weights;      /* [tokens][top_k] */
    int n_tokens, n_experts, top_k, scoring, normalize, n_groups, top_groups;
    float scale, jitter;
};

/* The better of two candidates: larger logit, then lower index. An index of -1 is no candidate; NaN beats nothing. */
CQ_DEVICE bool better(float a, int a_index, float b, int b_index) {
    if (a_index < 0 || b_index < 0) return b_index < 0 && a_index >= 0;
    return a > b || (a_index < b_index && !(b > a));
}

CQ_DEVICE bool is_among(int expert, const int *ids, int n) {
    bool found = false;
    for (int i = 0; i < n; i++) found |= ids[i] == expert;
    return found;
}

/* A bit per group of consecutive experts: the top_groups whose best experts are best, ties to the lower index. At most
 * 64 groups: lane g has the best of groups g and g + 32, and counts those that are better. */
CQ_DEVICE u64 best_groups(const cq_route &op, const float *logits, int lane) {
    if (op.top_groups <= 0) return 1; /* one group */
    const int size = op.n_experts / op.n_groups;
    float best[2];
    int n_better[2] = {0, 0};
    for (int half = 0; half < 2; half++) {
        const int group = lane + 32 * half;
        best[half] = -3.4028235e38f;
        for (int i = 0; group < op.n_groups && i < size; i++) best[half] = fmaxf(best[half], logits[group * size + i]);
    }
    for (int other = 0; other < op.n_groups; other++) {
        const float value = __shfl_sync(~0u, other < 32 ? best[0] : best[1], other % 32);
        for (int half = 0; half < 2; half++)
            n_better[half] += value > best[half] || (value == best[half] && other < lane + 32 * half);
    }
    const u32 low = __ballot_sync(~0u, lane < op.n_groups && n_better[0] < op.top_groups);
    const u32 high = __ballot_sync(~0u, lane + 32 < op.n_groups && n_better[1] < op.top_groups);
    return (u64)high << 32 | low;
}

/* This lane's best expert that is of `groups` and not among ids[0 .. rank - 1], then the warp's. */
CQ_DEVICE int best_expert(const cq_route &op, const float *logits, u64 groups, const int *ids, int rank, int lane) {
    const int group_size = op.n_experts / (op.top_groups > 0 ? op.n_groups : 1);
    float best = 0;
    int index = -1;
    for (int e = lane; e < op.n_experts; e += 32)
        if ((groups >> (e / group_size) & 1) && !is_among(e, ids, rank) && better(logits[e], e, best, index))
            best = logits[e], index = e;
    for (int distance = 16; distance > 0; distance /= 2) {
        const float other = __shfl_xor_sync(~0u, best, distance);
        const int other_index = __shfl_xor_sync(~0u, index, distance);
        if (better(other, other_index, best, index)) best = other, index = other_index;
    }
    return index;
}

/* SparseMixer's weight (arXiv 2409.12136, at inference) of expert id, chosen after ids[0 .. rank - 1]. Up to the
 * comparison every step is a float operation of transformers' own, so that a logit at the threshold falls on the same
 * side: NVRTC divides exactly rounded, and there is no product and sum to contract. 0 / 0 is not beyond it. */
CQ_DEVICE float sparsemixer_weight(const cq_route &op, const float *logits, const int *ids, int rank, int id,
                                   int lane) {
    const float best = logits[id];
    float total = 0;
    for (int e = lane; e < op.n_experts; e += 32) {
        const float factor = fmaxf(fabsf(logits[e]), best), below = (best - logits[e]) / factor;
        if (!is_among(e, ids, rank) && !(below > 2.0f * op.jitter)) total += expf(logits[e] - best);
    }
    return 1.0f / sum_lanes(total, 32);
}

/* Per token the best top_k experts of the best groups, ties to the lower index, weighted by their scores: softmax over
 * all experts, sigmoids, or SparseMixer's. normalize: the weights divided by their sum; then times scale. A warp a
 * token. Grid: tokens / 4. */
extern "C" __global__ void __launch_bounds__(CQ_ROUTE_THREADS) route(const cq_route op) {
    const int token = blockIdx.x * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (token >= op.n_tokens) return; /* a whole warp */
    const float *logits = op.logits + (long long)token * op.n_experts;
    int *ids = op.ids + token * op.top_k;
    float *weights = op.weights + token * op.top_k, largest = -3.4028235e38f, total = 0, chosen = 0;
    const u64 groups = best_groups(op, logits, lane);
    for (int e = lane; e < op.n_experts; e += 32) largest = fmaxf(largest, logits[e]);
    largest = max_lanes(largest, 32);
    for (int e = lane; e < op.n_experts; e += 32) total += expf(logits[e] - largest);
    total = sum_lanes(total, 32);
    for (int rank = 0; rank < op.top_k; rank++) {
        const int id = best_expert(op, logits, groups, ids, rank, lane);
        float weight = expf(logits[id] - largest) / total;
        if (op.scoring == CQ_SIGMOID) weight = 1.0f / (1.0f + expf(-logits[id]));
        if (op.scoring == CQ_SPARSEMIXER) weight = sparsemixer_weight(op, logits, ids, rank, id, lane);
        chosen += weight;
        if (lane == 0) ids[rank] = id, weights[rank] = weight;
        __syncwarp(); /* the next round reads ids */
    }
    const bool divided = op.normalize && chosen > 0;
    for (int rank = lane; rank < op.top_k; rank += 32)
        weights[rank] = (divided ? weights[rank] / chosen : weights[rank]) * op.scale;
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
