/* Grouped-query attention over the F16 cache, with an online softmax. CQ_HEAD_DIM: floats of a head.
 *
 *     out[t][h] = sum over visible keys j of softmax(scale * q[t][h] . k[j]) v[j]
 *
 * A block takes 16 rows: queries (token, head) whose heads share one key-value head, so that each key is read once for
 * a whole group. In decoding the rows are the heads of the group; the keys are then split among gridDim.z blocks, whose
 * results attention_merge joins. Keys come in tiles of 32 (8 for wide heads), converted from F16; per row a running
 * maximum m and sum l, and when m grows what was summed so far shrinks by exp(m_old - m_new).
 *
 * Eight threads share a row: of a tile each scores every eighth key, then adds values to every eighth pair of columns.
 *
 * Grid: (rows / 16, n_kv_heads, splits), 128 threads. Sums are float32. */
#include "attention.cuh"

enum {
    CQ_THREADS = 128,
    CQ_QUERY_ROWS = 16,
    CQ_SHARING = 8,
    CQ_KEYS = CQ_HEAD_DIM > 256 ? 8 : 32, /* shared memory stays below 48 KB */
    CQ_KEYS_EACH = CQ_KEYS / CQ_SHARING,
    CQ_PAIRS = (CQ_HEAD_DIM + 1) / 2,
    CQ_PITCH = CQ_PAIRS | 1, /* of pairs; odd, so that keys lie in different banks */
    CQ_PAIRS_EACH = (CQ_PAIRS + CQ_SHARING - 1) / CQ_SHARING,
};

/* Keys or values first .. to tile [CQ_KEYS][CQ_PITCH] as pairs; zero past `end` and past an odd head. */
CQ_DEVICE void load_tile(const u16 *cache, int first, int end, u32 *tile) {
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
        tile[key * CQ_PITCH + pair] = both;
    }
}

/* What a thread keeps of its row. */
struct cq_row_state {
    float max, sum, out[2 * CQ_PAIRS_EACH];
};

/* scores[]: of this thread's keys part, part + 8, ...; then the probabilities go to p [CQ_QUERY_ROWS][CQ_KEYS]. A key
 * is visible if its distance to the query, from it back, is in [0, window). */
CQ_DEVICE void softmax_tile(const float2 *query, const u32 *keys, int distance, int window, float *p,
                            cq_row_state &state) {
    const int part = threadIdx.x % CQ_SHARING;
    float scores[CQ_KEYS_EACH] = {}, largest = state.max;
    for (int pair = 0; pair < CQ_PAIRS; pair++)
#pragma unroll
        for (int i = 0; i < CQ_KEYS_EACH; i++) {
            const u32 key = keys[(part + i * CQ_SHARING) * CQ_PITCH + pair];
            scores[i] += query[pair].x * lower(key) + query[pair].y * upper(key);
        }
#pragma unroll
    for (int i = 0; i < CQ_KEYS_EACH; i++) {
        const int from_key = distance - (part + i * CQ_SHARING);
        if (from_key < 0 || from_key >= window) scores[i] = CQ_HIDDEN;
        largest = fmaxf(largest, scores[i]);
    }
    largest = max_lanes(largest, CQ_SHARING);
    float sum = 0;
#pragma unroll
    for (int i = 0; i < CQ_KEYS_EACH; i++) {
        const float probability = scores[i] == CQ_HIDDEN ? 0.0f : expf(scores[i] - largest);
        p[part + i * CQ_SHARING] = probability;
        sum += probability;
    }
    const float shrink = expf(state.max - largest);
    state.sum = state.sum * shrink + sum_lanes(sum, CQ_SHARING);
    state.max = largest;
#pragma unroll
    for (int i = 0; i < 2 * CQ_PAIRS_EACH; i++) state.out[i] *= shrink;
}

CQ_DEVICE void add_values(const float *p, const u32 *values, cq_row_state &state) {
    const int part = threadIdx.x % CQ_SHARING;
    for (int key = 0; key < CQ_KEYS; key++)
#pragma unroll
        for (int i = 0; i < CQ_PAIRS_EACH; i++) {
            const int pair = part + i * CQ_SHARING;
            const u32 value = pair < CQ_PAIRS ? values[key * CQ_PITCH + pair] : 0;
            state.out[2 * i] += p[key] * lower(value), state.out[2 * i + 1] += p[key] * upper(value);
        }
}

CQ_DEVICE void store_row(const cq_attention &op, const cq_row_state &state, long long row) {
    float *to = result_row(op, row, CQ_HEAD_DIM);
    const float scale = gridDim.z > 1 ? 1.0f : 1.0f / state.sum;
    const int part = threadIdx.x % CQ_SHARING;
#pragma unroll
    for (int i = 0; i < 2 * CQ_PAIRS_EACH; i++) {
        const int column = 2 * (part + i / 2 * CQ_SHARING) + i % 2;
        if (column < CQ_HEAD_DIM) to[column] = state.out[i] * scale;
    }
    if (gridDim.z > 1 && part == 0) to[CQ_HEAD_DIM] = state.max, to[CQ_HEAD_DIM + 1] = state.sum;
}

extern "C" __global__ void __launch_bounds__(CQ_THREADS) attention(const cq_attention op) {
    CQ_SHARED(u32, tile, CQ_KEYS * CQ_PITCH); /* keys, then values */
    CQ_SHARED(float2, queries, CQ_QUERY_ROWS * CQ_PAIRS);
    CQ_SHARED(float, p, CQ_QUERY_ROWS *CQ_KEYS);
    const int heads = op.n_heads / op.n_kv_heads, first_row = blockIdx.x * CQ_QUERY_ROWS;
    const int last_row = min_int(first_row + CQ_QUERY_ROWS, op.n_tokens * heads) - 1;
    const int mine = threadIdx.x / CQ_SHARING, row = min_int(first_row + mine, last_row);
    const int position = *op.position + row / heads; /* rows past the end repeat the last one */
    const int window = window_of(op);
    const long long out_row = query_row(op, row);
    for (int pair = threadIdx.x % CQ_SHARING; pair < CQ_PAIRS; pair += CQ_SHARING) {
        const float *from = op.q + out_row * CQ_HEAD_DIM + 2 * pair;
        queries[mine * CQ_PAIRS + pair] =
            make_float2(from[0] * op.scale, 2 * pair + 1 < CQ_HEAD_DIM ? from[1] * op.scale : 0.0f);
    }
    const cq_span span = span_of(op, first_row / heads, last_row / heads, CQ_KEYS);
    const u16 *k = op.k_cache + (long long)blockIdx.y * op.n_ctx * CQ_HEAD_DIM;
    const u16 *v = op.v_cache + (long long)blockIdx.y * op.n_ctx * CQ_HEAD_DIM;
    cq_row_state state = {CQ_HIDDEN, 0.0f, {}};
    for (int key = span.from; key < span.to; key += CQ_KEYS) {
        __syncthreads(); /* nobody reads the previous values any more */
        load_tile(k, key, span.to, tile);
        __syncthreads();
        softmax_tile(queries + mine * CQ_PAIRS, tile, position - key, window, p + mine * CQ_KEYS, state);
        __syncthreads();
        load_tile(v, key, span.to, tile);
        __syncthreads();
        add_values(p + mine * CQ_KEYS, tile, state);
    }
    if (first_row + mine <= last_row) store_row(op, state, out_row);
}
