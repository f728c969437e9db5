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
#include "common.cuh"

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

#define CQ_HIDDEN (-1e30f) /* score of a key that a query does not see; finite, as differences must not be NaN */

struct cq_attention {
    const float *q;               /* [tokens][n_heads][CQ_HEAD_DIM] */
    const u16 *k_cache, *v_cache; /* F16 [n_kv_heads][n_ctx][CQ_HEAD_DIM] */
    float *out;                   /* as q */
    float *partial;               /* [splits][tokens][n_heads][CQ_HEAD_DIM + 2]: sums, then m and l; splits > 1 */
    const int *position;          /* of the first token */
    int n_tokens, n_heads, n_kv_heads, n_ctx, window; /* window 0: unlimited */
    float scale;
};

/* k or v [tokens][n_kv_heads][CQ_HEAD_DIM] to its place in the cache, as F16. Grid: (tokens, n_kv_heads). */
extern "C" __global__ void __launch_bounds__(CQ_THREADS)
    append(const float *from, u16 *cache, const int *position, int n_ctx) {
    from += ((long long)blockIdx.x * gridDim.y + blockIdx.y) * CQ_HEAD_DIM;
    cache += ((long long)blockIdx.y * n_ctx + *position + blockIdx.x) * CQ_HEAD_DIM;
    for (int i = threadIdx.x; i < CQ_HEAD_DIM; i += CQ_THREADS) cache[i] = to_half(from[i]);
}

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

CQ_DEVICE float lower(u32 pair) { return from_half((u16)pair); }
CQ_DEVICE float upper(u32 pair) { return from_half((u16)(pair >> 16)); }

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
    const long long rows = (long long)op.n_tokens * op.n_heads;
    float *to = op.out + row * CQ_HEAD_DIM, scale = 1.0f / state.sum;
    if (gridDim.z > 1) to = op.partial + (blockIdx.z * rows + row) * (CQ_HEAD_DIM + 2), scale = 1.0f;
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
    const int window = op.window > 0 ? op.window : 0x7fffffff, position = *op.position;
    const int mine = threadIdx.x / CQ_SHARING, row = min_int(first_row + mine, last_row);
    const int token = row / heads; /* rows past the end repeat the last one */
    const long long out_row = (long long)token * op.n_heads + blockIdx.y * heads + row % heads;
    for (int pair = threadIdx.x % CQ_SHARING; pair < CQ_PAIRS; pair += CQ_SHARING) {
        const float *from = op.q + out_row * CQ_HEAD_DIM + 2 * pair;
        queries[mine * CQ_PAIRS + pair] =
            make_float2(from[0] * op.scale, 2 * pair + 1 < CQ_HEAD_DIM ? from[1] * op.scale : 0.0f);
    }
    /* Keys that any row sees, in whole tiles from a multiple of CQ_KEYS on, dealt to the splits in equal parts. */
    const int begin = position + first_row / heads >= window ? position + first_row / heads - window + 1 : 0;
    const int end = position + last_row / heads + 1, first_tile = begin / CQ_KEYS;
    const int each = ceil_div(ceil_div(end, CQ_KEYS) - first_tile, gridDim.z);
    const int from = (first_tile + (int)blockIdx.z * each) * CQ_KEYS, to = min_int(end, from + each * CQ_KEYS);
    const u16 *k = op.k_cache + (long long)blockIdx.y * op.n_ctx * CQ_HEAD_DIM;
    const u16 *v = op.v_cache + (long long)blockIdx.y * op.n_ctx * CQ_HEAD_DIM;
    cq_row_state state = {CQ_HIDDEN, 0.0f, {}};
    for (int key = from; key < to; key += CQ_KEYS) {
        __syncthreads(); /* nobody reads the previous values any more */
        load_tile(k, key, to, tile);
        __syncthreads();
        softmax_tile(queries + mine * CQ_PAIRS, tile, position + token - key, window, p + mine * CQ_KEYS, state);
        __syncthreads();
        load_tile(v, key, to, tile);
        __syncthreads();
        add_values(p + mine * CQ_KEYS, tile, state);
    }
    if (first_row + mine <= last_row) store_row(op, state, out_row);
}

/* Joins the splits: with M the largest m, out = sum exp(m - M) sums / sum exp(m - M) l. Grid: (tokens * n_heads). */
extern "C" __global__ void __launch_bounds__(CQ_THREADS) attention_merge(const float *partial, float *out, int splits) {
    const float *row = partial + (long long)blockIdx.x * (CQ_HEAD_DIM + 2);
    const long long stride = (long long)gridDim.x * (CQ_HEAD_DIM + 2);
    float largest = CQ_HIDDEN, total = 0;
    for (int s = 0; s < splits; s++) largest = fmaxf(largest, row[s * stride + CQ_HEAD_DIM]);
    for (int s = 0; s < splits; s++)
        total += expf(row[s * stride + CQ_HEAD_DIM] - largest) * row[s * stride + CQ_HEAD_DIM + 1];
    for (int i = threadIdx.x; i < CQ_HEAD_DIM; i += CQ_THREADS) {
        float sum = 0;
        for (int s = 0; s < splits; s++) sum += expf(row[s * stride + CQ_HEAD_DIM] - largest) * row[s * stride + i];
        out[(long long)blockIdx.x * CQ_HEAD_DIM + i] = sum / total;
    }
}
