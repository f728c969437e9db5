/* Router: each token's experts, and the slots sorted by expert and dealt into tiles for the GEMM kernels. */
#include "common.cuh"

/* cq_scoring of cq.h; else softmax. */
enum { CQ_ROUTE_THREADS = 128, CQ_GROUP_THREADS = 256, CQ_SIGMOID = 1, CQ_SPARSEMIXER = 2, CQ_KEPT = 4 };

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

/* A lane's experts lane, lane + 32, ..: their logits, of the first four in registers, and a bit for each that is
 * chosen already. At most 64 x 32 experts. */
struct cq_candidates {
    const float *logits;
    int n_experts, lane;
    float kept[CQ_KEPT];
    u64 chosen;
};

CQ_DEVICE cq_candidates load_candidates(const float *logits, int n_experts, int lane) {
    cq_candidates c = {logits, n_experts, lane, {}, 0};
#pragma unroll
    for (int i = 0; i < CQ_KEPT; i++)
        if (lane + 32 * i < n_experts) c.kept[i] = logits[lane + 32 * i];
    return c;
}

/* use(logit, expert, whether it is chosen) for each of the lane's experts. */
template <class Use> CQ_DEVICE void each_candidate(const cq_candidates &c, Use use) {
#pragma unroll
    for (int i = 0; i < CQ_KEPT; i++)
        if (c.lane + 32 * i < c.n_experts) use(c.kept[i], c.lane + 32 * i, (c.chosen >> i & 1) != 0);
    for (int i = CQ_KEPT; c.lane + 32 * i < c.n_experts; i++)
        use(c.logits[c.lane + 32 * i], c.lane + 32 * i, (c.chosen >> i & 1) != 0);
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

/* An expert and its logit; -1: none. */
struct cq_best {
    int expert;
    float logit;
};

/* This lane's best expert that is of `groups` and not chosen, then the warp's. */
CQ_DEVICE cq_best best_expert(const cq_route &op, const cq_candidates &candidates, u64 groups) {
    const int group_size = op.n_experts / (op.top_groups > 0 ? op.n_groups : 1);
    int expert = -1;
    float best = 0;
    each_candidate(candidates, [&](float logit, int e, bool chosen) {
        const bool allowed = op.top_groups <= 0 || (groups >> (e / group_size) & 1);
        if (allowed && !chosen && better(logit, e, best, expert)) best = logit, expert = e;
    });
    for (int distance = 16; distance > 0; distance /= 2) {
        const float other = __shfl_xor_sync(~0u, best, distance);
        const int other_expert = __shfl_xor_sync(~0u, expert, distance);
        if (better(other, other_expert, best, expert)) best = other, expert = other_expert;
    }
    return {expert, best};
}

/* SparseMixer's weight (arXiv 2409.12136, at inference) of the expert with logit `best`, of those not chosen. Up to the
 * comparison every step is a float operation of transformers' own, so that a logit at the threshold falls on the same
 * side: NVRTC divides exactly rounded, and there is no product and sum to contract. 0 / 0 is not beyond it. */
CQ_DEVICE float sparsemixer_weight(const cq_route &op, const cq_candidates &candidates, float best) {
    float total = 0;
    each_candidate(candidates, [&](float logit, int, bool chosen) {
        const float factor = fmaxf(fabsf(logit), best), below = (best - logit) / factor;
        if (!chosen && !(below > 2.0f * op.jitter)) total += expf(logit - best);
    });
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
    float *weights = op.weights + token * op.top_k, largest = -3.4028235e38f, total = 0, sum = 0, mine = 0;
    const u64 groups = best_groups(op, logits, lane);
    cq_candidates candidates = load_candidates(logits, op.n_experts, lane);
    each_candidate(candidates, [&](float logit, int, bool) { largest = fmaxf(largest, logit); });
    largest = max_lanes(largest, 32);
    each_candidate(candidates, [&](float logit, int, bool) { total += expf(logit - largest); });
    total = sum_lanes(total, 32);
    for (int rank = 0; rank < op.top_k; rank++) {
        const cq_best best = best_expert(op, candidates, groups);
        float weight = expf(best.logit - largest) / total;
        if (op.scoring == CQ_SIGMOID) weight = 1.0f / (1.0f + expf(-best.logit));
        if (op.scoring == CQ_SPARSEMIXER) weight = sparsemixer_weight(op, candidates, best.logit);
        sum += weight;
        if (best.expert % 32 == lane) candidates.chosen |= 1ull << best.expert / 32;
        if (rank % 32 == lane) {
            ids[rank] = best.expert, weights[rank] = weight;
            if (rank < 32) mine = weight;
        }
    }
    const bool divided = op.normalize && sum > 0;
    for (int rank = lane; rank < op.top_k; rank += 32) { /* those that this lane stored */
        const float weight = rank < 32 ? mine : weights[rank];
        weights[rank] = (divided ? weight / sum : weight) * op.scale;
    }
}

/* Sum over the block's 256 threads, for all of them; `partial` [8] is shared. */
CQ_DEVICE int block_sum(int value, int *partial) {
    value = sum_lanes(value, 32);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
    __syncthreads();
    return sum_lanes(partial[threadIdx.x % 8], 8);
}

/* offsets [n_experts + 1] and order [n_slots]: the slots sorted by expert, then by slot; tiles [n_tiles][2]: expert and
 * first place in order of every tile of 64 slots of one expert, -1 for the tiles that are left. A block an expert: it
 * counts the slots of all, sums those of the experts before it, and writes its own slots and tiles. A warp takes an
 * eighth of the slots, in their order, and counts its expert's by votes. Shared memory: n_experts ints. Grid:
 * n_experts.
 */
extern "C" __global__ void __launch_bounds__(CQ_GROUP_THREADS)
    group(const int *ids, int *order, int *offsets, int *tiles, int n_slots, int n_experts, int n_tiles) {
    CQ_DYNAMIC_SHARED(int, counts);
    CQ_SHARED(int, partial, 4 * 8);
    const int expert = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int each = ceil_div(ceil_div(n_slots, 32), 8) * 32, begin = warp * each, end = min_int(n_slots, begin + each);
    for (int e = threadIdx.x; e < n_experts; e += CQ_GROUP_THREADS) counts[e] = 0;
    __syncthreads();
    int in_warp = 0;
#pragma unroll 4
    for (int first = begin; first < end; first += 32) {
        const int id = first + lane < end ? ids[first + lane] : -1;
        if (id >= 0) atomicAdd(counts + id, 1);
        in_warp += __popc(__ballot_sync(~0u, id == expert));
    }
    __syncthreads();
    int before = 0, tiles_before = 0, all_tiles = 0;
    for (int e = threadIdx.x; e < n_experts; e += CQ_GROUP_THREADS) {
        const int n = ceil_div(counts[e], CQ_TILE_TOKENS);
        all_tiles += n;
        if (e < expert) before += counts[e], tiles_before += n;
    }
    before = block_sum(before, partial);
    tiles_before = block_sum(tiles_before, partial + 8), all_tiles = block_sum(all_tiles, partial + 16);
    if (lane == 0) partial[24 + warp] = in_warp;
    __syncthreads();
    int place = before;
    for (int w = 0; w < warp; w++) place += partial[24 + w];
#pragma unroll 4
    for (int first = begin; first < end; first += 32) {
        const bool mine = first + lane < end && ids[first + lane] == expert;
        const u32 votes = __ballot_sync(~0u, mine);
        if (mine) order[place + __popc(votes & ((1u << lane) - 1))] = first + lane;
        place += __popc(votes);
    }
    for (int i = threadIdx.x; i < ceil_div(counts[expert], CQ_TILE_TOKENS); i += CQ_GROUP_THREADS)
        tiles[2 * (tiles_before + i)] = expert, tiles[2 * (tiles_before + i) + 1] = before + i * CQ_TILE_TOKENS;
    for (int i = all_tiles + expert * CQ_GROUP_THREADS + threadIdx.x; i < n_tiles; i += n_experts * CQ_GROUP_THREADS)
        tiles[2 * i] = -1;
    if (threadIdx.x == 0) offsets[expert] = before;
    if (threadIdx.x == 0 && expert == n_experts - 1) offsets[n_experts] = n_slots;
}
