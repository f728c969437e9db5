/* Grouped-query attention over the F16 cache, with an online softmax. CQ_HEAD_DIM: floats of a head.
 *
 *     out[t][h] = sum over visible keys j of softmax(scale * q[t][h] . k[j]) v[j]
 *
 * A block takes 32 rows (16 of wide heads): queries (token, head) whose heads share one key-value head, so that each
 * key is read once for a whole group. A single token has a kernel of its own, decode.cu. Keys come in tiles of 32 (8
 * for wider heads), converted from F16 when they are stored, where they fit; per row a running maximum m and sum l, and
 * when m grows what was summed so far shrinks by exp(m_old - m_new).
 *
 * Eight threads share a row, or two rows, for which they load keys and values once: of a tile each scores every eighth
 * key, then adds values to every eighth pair of columns.
 *
 * Grid: (rows / CQ_QUERY_ROWS, n_kv_heads, splits), 128 threads. Sums are float32. */
#include "attention.cuh"

enum {
    CQ_THREADS = 128,
    CQ_SHARING = 8,
    CQ_ROWS_EACH = CQ_HEAD_DIM > 256 ? 1 : 2, /* these sizes keep shared memory below 48 KB */
    CQ_KEYS = CQ_HEAD_DIM > 128 ? 8 : 32,
    CQ_BLOCK_ROWS = CQ_THREADS / CQ_SHARING,
    CQ_QUERY_ROWS = CQ_BLOCK_ROWS * CQ_ROWS_EACH,
    CQ_KEYS_EACH = CQ_KEYS / CQ_SHARING,
    CQ_PAIRS = (CQ_HEAD_DIM + 1) / 2,
    CQ_PITCH = CQ_PAIRS | 1,  /* of pairs; odd, so that keys and queries lie in different banks */
    CQ_P_PITCH = CQ_KEYS + 4, /* of probabilities, read four at once */
    CQ_PAIRS_EACH = (CQ_PAIRS + CQ_SHARING - 1) / CQ_SHARING,
};

/* Two columns of a key or value in shared memory. */
#if CQ_HEAD_DIM > 256
typedef u32 cq_pair;
CQ_DEVICE u32 pair_of(u32 f16s) { return f16s; }
CQ_DEVICE float2 floats_of(u32 pair) { return make_float2(lower(pair), upper(pair)); }
#else
typedef float2 cq_pair;
CQ_DEVICE float2 pair_of(u32 f16s) { return make_float2(lower(f16s), upper(f16s)); }
CQ_DEVICE float2 floats_of(const float2 &pair) { return pair; }
#endif

/* Keys or values first .. to tile [CQ_KEYS][CQ_PITCH] as pairs; zero past `end` and past an odd head. */
CQ_DEVICE void load_tile(const u16 *cache, int first, int end, cq_pair *tile) {
#pragma unroll 8
    for (int i = threadIdx.x; i < CQ_KEYS * CQ_PAIRS; i += CQ_THREADS) {
        const int key = i / CQ_PAIRS, pair = i % CQ_PAIRS;
        const u16 *from = cache + (long long)(first + key) * CQ_HEAD_DIM + 2 * pair;
        u32 both = 0;
        if (first + key < end) {
            if constexpr (CQ_HEAD_DIM % 2 == 0)
                both = *(const u32 *)from;
            else
                both = from[0] | (2 * pair + 1 < CQ_HEAD_DIM ? (u32)from[1] << 16 : 0);
        }
        tile[key * CQ_PITCH + pair] = pair_of(both);
    }
}

/* What a thread keeps of a row. */
struct cq_row_state {
    int position;
    float max, sum, out[2 * CQ_PAIRS_EACH];
};

/* scores[row][i] of this thread's keys share, share + 8, ..; queries: of its first row, the next one CQ_BLOCK_ROWS on.
 */
CQ_DEVICE void score_tile(const float2 *queries, const cq_pair *keys, float (*scores)[CQ_KEYS_EACH]) {
    const int share = threadIdx.x % CQ_SHARING;
#pragma unroll 4
    for (int pair = 0; pair < CQ_PAIRS; pair++) {
        float2 query[CQ_ROWS_EACH];
#pragma unroll
        for (int row = 0; row < CQ_ROWS_EACH; row++) query[row] = queries[row * CQ_BLOCK_ROWS * CQ_PITCH + pair];
#pragma unroll
        for (int i = 0; i < CQ_KEYS_EACH; i++) {
            const float2 key = floats_of(keys[(share + i * CQ_SHARING) * CQ_PITCH + pair]);
#pragma unroll
            for (int row = 0; row < CQ_ROWS_EACH; row++) scores[row][i] += query[row].x * key.x + query[row].y * key.y;
        }
    }
}

/* A row's scores to probabilities p [CQ_KEYS]; first: the tile's first key. A key is visible if its distance to the
 * query, from it back, is in [0, window). */
CQ_DEVICE void softmax_row(float *scores, int first, int window, float *p, cq_row_state &state) {
    const int share = threadIdx.x % CQ_SHARING;
    float largest = state.max, sum = 0;
#pragma unroll
    for (int i = 0; i < CQ_KEYS_EACH; i++) {
        const int from_key = state.position - first - (share + i * CQ_SHARING);
        if (from_key < 0 || from_key >= window) scores[i] = CQ_HIDDEN;
        largest = fmaxf(largest, scores[i]);
    }
    largest = max_lanes(largest, CQ_SHARING);
#pragma unroll
    for (int i = 0; i < CQ_KEYS_EACH; i++) {
        const float probability = scores[i] == CQ_HIDDEN ? 0.0f : expf(scores[i] - largest);
        p[share + i * CQ_SHARING] = probability;
        sum += probability;
    }
    const float shrink = expf(state.max - largest);
    state.sum = state.sum * shrink + sum_lanes(sum, CQ_SHARING);
    state.max = largest;
#pragma unroll
    for (int i = 0; i < 2 * CQ_PAIRS_EACH; i++) state.out[i] *= shrink;
}

/* p: of the thread's first row. */
CQ_DEVICE void add_values(const float *p, const cq_pair *values, cq_row_state *states) {
    const int share = threadIdx.x % CQ_SHARING;
    for (int first = 0; first < CQ_KEYS; first += 4) {
        float4 weights[CQ_ROWS_EACH];
#pragma unroll
        for (int row = 0; row < CQ_ROWS_EACH; row++)
            weights[row] = *(const float4 *)(p + row * CQ_BLOCK_ROWS * CQ_P_PITCH + first);
#pragma unroll
        for (int key = 0; key < 4; key++)
#pragma unroll
            for (int i = 0; i < CQ_PAIRS_EACH; i++) {
                const int pair = share + i * CQ_SHARING;
                if (pair >= CQ_PAIRS) continue;
                const float2 value = floats_of(values[(first + key) * CQ_PITCH + pair]);
#pragma unroll
                for (int row = 0; row < CQ_ROWS_EACH; row++) {
                    const float4 &w = weights[row];
                    const float weight = key == 0 ? w.x : key == 1 ? w.y : key == 2 ? w.z : w.w;
                    states[row].out[2 * i] += weight * value.x, states[row].out[2 * i + 1] += weight * value.y;
                }
            }
    }
}

CQ_DEVICE void store_row(const cq_attention &op, const cq_row_state &state, long long row) {
    float *to = result_row(op, row, CQ_HEAD_DIM);
    const float scale = gridDim.z > 1 ? 1.0f : 1.0f / state.sum;
    const int share = threadIdx.x % CQ_SHARING;
#pragma unroll
    for (int i = 0; i < 2 * CQ_PAIRS_EACH; i++) {
        const int column = 2 * (share + i / 2 * CQ_SHARING) + i % 2;
        if (column < CQ_HEAD_DIM) to[column] = state.out[i] * scale;
    }
    if (gridDim.z > 1 && share == 0) to[CQ_HEAD_DIM] = state.max, to[CQ_HEAD_DIM + 1] = state.sum;
}

extern "C" __global__ void __launch_bounds__(CQ_THREADS) attention(const cq_attention op) {
    CQ_SHARED(cq_pair, tile, CQ_KEYS * CQ_PITCH); /* keys, then values */
    CQ_SHARED(float2, queries, CQ_QUERY_ROWS * CQ_PITCH);
    CQ_SHARED(float, p, CQ_QUERY_ROWS *CQ_P_PITCH);
    /* Later rows see more keys: of every other key-value head they come first, so that processors have as much. */
    const int block = blockIdx.y % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
    const int heads = op.n_heads / op.n_kv_heads, first_row = block * CQ_QUERY_ROWS;
    const int last_row = min_int(first_row + CQ_QUERY_ROWS, op.n_tokens * heads) - 1;
    const int mine = threadIdx.x / CQ_SHARING, window = window_of(op);
    cq_row_state states[CQ_ROWS_EACH];
#pragma unroll
    for (int row = 0; row < CQ_ROWS_EACH; row++) {
        const int local = mine + row * CQ_BLOCK_ROWS, from = min_int(first_row + local, last_row);
        states[row] = {*op.position + from / heads, CQ_HIDDEN, 0.0f, {}}; /* rows past the end repeat the last one */
        for (int pair = threadIdx.x % CQ_SHARING; pair < CQ_PAIRS; pair += CQ_SHARING) {
            const float *q = op.q + query_row(op, from) * CQ_HEAD_DIM + 2 * pair;
            queries[local * CQ_PITCH + pair] =
                make_float2(q[0] * op.scale, 2 * pair + 1 < CQ_HEAD_DIM ? q[1] * op.scale : 0.0f);
        }
    }
    const cq_span span = span_of(op, first_row / heads, last_row / heads, CQ_KEYS);
    const u16 *k = op.k_cache + (long long)blockIdx.y * op.n_ctx * CQ_HEAD_DIM;
    const u16 *v = op.v_cache + (long long)blockIdx.y * op.n_ctx * CQ_HEAD_DIM;
    for (int key = span.from; key < span.to; key += CQ_KEYS) {
        float scores[CQ_ROWS_EACH][CQ_KEYS_EACH] = {};
        __syncthreads(); /* nobody reads the previous values any more */
        load_tile(k, key, span.to, tile);
        __syncthreads();
        score_tile(queries + mine * CQ_PITCH, tile, scores);
#pragma unroll
        for (int row = 0; row < CQ_ROWS_EACH; row++)
            softmax_row(scores[row], key, window, p + (mine + row * CQ_BLOCK_ROWS) * CQ_P_PITCH, states[row]);
        __syncthreads();
        load_tile(v, key, span.to, tile);
        __syncthreads();
        add_values(p + mine * CQ_P_PITCH, tile, states);
    }
#pragma unroll
    for (int row = 0; row < CQ_ROWS_EACH; row++) {
        const int at = first_row + mine + row * CQ_BLOCK_ROWS;
        if (at <= last_row) store_row(op, states[row], query_row(op, at));
    }
}
