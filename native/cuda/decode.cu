/* Grouped-query attention of one token over the F16 cache. CQ_HEAD_DIM: floats of a head; CQ_HEADS: a block's heads.
 *
 *     out[h] = sum over visible keys j of softmax(scale * q[h] . k[j]) v[j]
 *
 * Keys and values are read once, eight F16 values a load, and little is computed with them: what counts is how much is
 * on its way at once. So the keys are dealt to the splits in tiles of 32, and a tile's values are asked for together
 * with its keys. Four lanes share a key and multiply it with all heads of the block, which share its key-value head; a
 * warp makes the probabilities of every fourth head; then CQ_LANES threads have eight columns of the values each, and
 * every CQ_GROUPS-th key, whose sums are joined at the end. attention_merge joins the splits.
 *
 * Grid: (heads that share a key-value head / CQ_HEADS, n_kv_heads, splits), 128 threads. Sums are float32. */
#include "attention.cuh"

enum {
    CQ_THREADS = 128,
    CQ_KEYS = 32,
    CQ_SHARING = 4,                    /* lanes that share a key */
    CQ_EIGHTS = (CQ_HEAD_DIM + 7) / 8, /* loads of a key */
    CQ_WIDTH = 8 * CQ_EIGHTS,
    CQ_AHEAD = 4, /* loads of a thread at once, of keys and of values */
    CQ_LANES = CQ_EIGHTS <= 4 ? 4
    : CQ_EIGHTS <= 8          ? 8
    : CQ_EIGHTS <= 16         ? 16
    : CQ_EIGHTS <= 32         ? 32
    : CQ_EIGHTS <= 64         ? 64
                              : 128,
    CQ_GROUPS = CQ_THREADS / CQ_LANES,
    CQ_KEYS_EACH = CQ_KEYS / CQ_GROUPS,
    CQ_WARP_HEADS = (CQ_HEADS + 3) / 4,
    CQ_HEAD_PITCH = (CQ_HEADS + 3) / 4 * 4, /* of a key's probabilities, read four at once */
    CQ_QUERIES = CQ_HEADS * CQ_WIDTH,
    CQ_SUMS = CQ_THREADS * 8 * CQ_HEADS,
};

/* Columns 8 i .. 8 i + 7 of a key or value, zero past its end; of no key (NULL): zero. */
CQ_DEVICE uint4 load_eight(const u16 *row, int i) {
    if (!row || i >= CQ_EIGHTS) return make_uint4(0, 0, 0, 0);
    if constexpr (CQ_HEAD_DIM % 8 == 0) {
        return *(const uint4 *)(row + 8 * i);
    } else {
        u32 pairs[4] = {};
        for (int j = 0; j < 8 && 8 * i + j < CQ_HEAD_DIM; j++) pairs[j / 2] |= (u32)row[8 * i + j] << j % 2 * 16;
        return make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
}

CQ_DEVICE void to_floats(const uint4 &eight, float *out) {
    const u32 pairs[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
    for (int j = 0; j < 8; j++) out[j] = j % 2 ? upper(pairs[j / 2]) : lower(pairs[j / 2]);
}

CQ_DEVICE void load_values(const u16 *const v, int first, int end, int chunk, uint4 *values) {
    const int lane = threadIdx.x % CQ_LANES, group = threadIdx.x / CQ_LANES;
#pragma unroll
    for (int i = 0; i < CQ_AHEAD && i < CQ_KEYS_EACH; i++) {
        const int key = first + group + (chunk + i) * CQ_GROUPS;
        values[i] = load_eight(key < end ? v + (long long)key * CQ_HEAD_DIM : nullptr, lane);
    }
}

/* scores[h] += the products of this thread's loads of a key with the queries of head h; the tile's first values are on
 * their way meanwhile. */
CQ_DEVICE void multiply_key(const u16 *key, const float *queries, float *scores) {
    const int share = threadIdx.x % CQ_SHARING;
    for (int chunk = share; chunk < CQ_EIGHTS; chunk += CQ_AHEAD * CQ_SHARING) {
        uint4 eights[CQ_AHEAD];
#pragma unroll
        for (int i = 0; i < CQ_AHEAD; i++) eights[i] = load_eight(key, chunk + i * CQ_SHARING);
#pragma unroll
        for (int i = 0; i < CQ_AHEAD; i++) {
            const int eight = chunk + i * CQ_SHARING;
            float k[8];
            to_floats(eights[i], k);
            if (eight >= CQ_EIGHTS) break;
#pragma unroll
            for (int h = 0; h < CQ_HEADS; h++) {
                const float4 *q = (const float4 *)(queries + h * CQ_WIDTH + 8 * eight);
                const float4 low = q[0], high = q[1];
                scores[h] += k[0] * low.x + k[1] * low.y + k[2] * low.z + k[3] * low.w;
                scores[h] += k[4] * high.x + k[5] * high.y + k[6] * high.z + k[7] * high.w;
            }
        }
    }
}

/* The largest score and the sum of a warp's heads warp, warp + 4, .. */
struct cq_softmax {
    float max[CQ_WARP_HEADS], sum[CQ_WARP_HEADS];
};

/* scores [CQ_HEADS][CQ_KEYS] to probabilities p [CQ_KEYS][CQ_HEAD_PITCH], and by what earlier sums shrink. */
CQ_DEVICE void softmax_tile(const float *scores, cq_softmax &state, float *p, float *shrinks) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < CQ_WARP_HEADS; i++) {
        const int head = threadIdx.x / 32 + 4 * i;
        if (head >= CQ_HEADS) break; /* the whole warp */
        const float score = scores[head * CQ_KEYS + lane], largest = fmaxf(state.max[i], max_lanes(score, 32));
        const float probability = score == CQ_HIDDEN ? 0.0f : expf(score - largest);
        const float shrink = expf(state.max[i] - largest);
        state.sum[i] = state.sum[i] * shrink + sum_lanes(probability, 32);
        state.max[i] = largest;
        p[lane * CQ_HEAD_PITCH + head] = probability;
        if (lane == 0) shrinks[head] = shrink;
    }
}

CQ_DEVICE void add_values(const uint4 *values, const float *p, int chunk, float (*sums)[8]) {
#pragma unroll
    for (int i = 0; i < CQ_AHEAD && i < CQ_KEYS_EACH; i++) {
        const float *weights = p + (threadIdx.x / CQ_LANES + (chunk + i) * CQ_GROUPS) * CQ_HEAD_PITCH;
        float v[8];
        to_floats(values[i], v);
#pragma unroll
        for (int h = 0; h < CQ_HEADS; h++)
#pragma unroll
            for (int j = 0; j < 8; j++) sums[h][j] += weights[h] * v[j];
    }
}

/* Joins the groups' sums in shared memory and stores them; softmaxes: max and sum of every head. */
CQ_DEVICE void store_heads(const cq_attention &op, int first_head, int n_heads, const float (*sums)[8], float *shared,
                           const float2 *softmaxes) {
#pragma unroll
    for (int h = 0; h < CQ_HEADS; h++)
#pragma unroll
        for (int j = 0; j < 8; j += 4)
            *(float4 *)(shared + (h * CQ_THREADS + threadIdx.x) * 8 + j) =
                make_float4(sums[h][j], sums[h][j + 1], sums[h][j + 2], sums[h][j + 3]);
    __syncthreads();
    for (int i = threadIdx.x; i < n_heads * CQ_HEAD_DIM; i += CQ_THREADS) {
        const int head = i / CQ_HEAD_DIM, column = i % CQ_HEAD_DIM;
        float sum = 0;
        for (int group = 0; group < CQ_GROUPS; group++)
            sum += shared[(head * CQ_GROUPS + group) * CQ_LANES * 8 + column];
        float *to = result_row(op, query_row(op, first_head + head), CQ_HEAD_DIM);
        to[column] = gridDim.z > 1 ? sum : sum / softmaxes[head].y;
    }
}

CQ_DEVICE void store_softmax(const cq_attention &op, int head, float max, float sum) {
    if (gridDim.z == 1) return;
    float *to = result_row(op, query_row(op, head), CQ_HEAD_DIM);
    to[CQ_HEAD_DIM] = max, to[CQ_HEAD_DIM + 1] = sum;
}

extern "C" __global__ void __launch_bounds__(CQ_THREADS) attention_decode(const cq_attention op) {
    CQ_SHARED(float, shared, CQ_QUERIES > CQ_SUMS ? CQ_QUERIES : CQ_SUMS); /* queries, at last the groups' sums */
    CQ_SHARED(float, scores, CQ_HEADS *CQ_KEYS);
    CQ_SHARED(float, p, CQ_KEYS *CQ_HEAD_PITCH);
    CQ_SHARED(float, shrinks, CQ_HEADS);
    CQ_SHARED(float2, softmaxes, CQ_HEADS);
    const int first_head = blockIdx.x * CQ_HEADS, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int n_heads = min_int(CQ_HEADS, op.n_heads / op.n_kv_heads - first_head);
    const cq_span span = span_of(op, 0, 0, CQ_KEYS);
    if (span.from >= span.to) { /* attention_merge does not read such a split's sums */
        if ((int)threadIdx.x < n_heads) store_softmax(op, first_head + threadIdx.x, CQ_HIDDEN, 0.0f);
        return;
    }
    for (int i = threadIdx.x; i < CQ_QUERIES; i += CQ_THREADS) { /* heads past the end repeat the last one */
        const int head = min_int(i / CQ_WIDTH, n_heads - 1), column = i % CQ_WIDTH;
        const float *q = op.q + query_row(op, first_head + head) * CQ_HEAD_DIM;
        shared[i] = column < CQ_HEAD_DIM ? q[column] * op.scale : 0.0f;
    }
    const u16 *k = op.k_cache + (long long)blockIdx.y * op.n_ctx * CQ_HEAD_DIM;
    const u16 *v = op.v_cache + (long long)blockIdx.y * op.n_ctx * CQ_HEAD_DIM;
    const int position = *op.position, window = window_of(op);
    cq_softmax state;
#pragma unroll
    for (int i = 0; i < CQ_WARP_HEADS; i++) state.max[i] = CQ_HIDDEN, state.sum[i] = 0.0f;
    float sums[CQ_HEADS][8] = {};
    __syncthreads();
    for (int first = span.from; first < span.to; first += CQ_KEYS) {
        const int key = first + threadIdx.x / CQ_SHARING;
        uint4 values[CQ_AHEAD];
        float products[CQ_HEADS] = {};
        load_values(v, first, span.to, 0, values);
        multiply_key(key < span.to ? k + (long long)key * CQ_HEAD_DIM : nullptr, shared, products);
        const bool visible = key < span.to && position - key < window;
#pragma unroll
        for (int h = 0; h < CQ_HEADS; h++) {
            const float score = sum_lanes(products[h], CQ_SHARING);
            if ((int)threadIdx.x % CQ_SHARING == h % CQ_SHARING)
                scores[h * CQ_KEYS + threadIdx.x / CQ_SHARING] = visible ? score : CQ_HIDDEN;
        }
        __syncthreads();
        softmax_tile(scores, state, p, shrinks);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 8 * CQ_HEADS; i++) sums[i / 8][i % 8] *= shrinks[i / 8];
        for (int chunk = 0; chunk < CQ_KEYS_EACH; chunk += CQ_AHEAD) {
            if (chunk > 0) load_values(v, first, span.to, chunk, values);
            add_values(values, p, chunk, sums);
        }
    }
#pragma unroll
    for (int i = 0; i < CQ_WARP_HEADS; i++) {
        const int head = warp + 4 * i;
        if (lane || head >= n_heads) continue;
        softmaxes[head] = make_float2(state.max[i], state.sum[i]);
        store_softmax(op, first_head + head, state.max[i], state.sum[i]);
    }
    store_heads(op, first_head, n_heads, sums, shared, softmaxes);
}
