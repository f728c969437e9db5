/* Latent attention (arXiv 2405.04434) over the F16 cache: heads share one row a token, of CQ_HEAD_DIM columns, whose
 * first CQ_VALUE_DIM are the values.
 *
 *     out[t][h] = sum over visible keys j of softmax(scale * q[t][h] . k[j]) k[j][0 .. CQ_VALUE_DIM - 1]
 *
 * A block takes 16 rows (token, head), in decoding 16 heads of the token, and the cache is read once for all of them: a
 * tile of keys, copied as it lies in the cache while the one before is multiplied, gives scores and then values. What
 * limits the heads of a block are registers: a row's query and sums take 34 floats of every lane (of 576 and 512
 * columns), so a warp has two rows, and more warps would leave room for one block only. 128 heads make eight blocks
 * that walk the same keys at the same time: beyond the first they come from the second-level cache. In decoding the
 * keys are split among gridDim.z blocks, whose results attention_merge joins (heads.cu).
 *
 * A warp's lanes lie side by side in the columns, two each: lane l has pairs l, l + 32, ... of its rows' queries, of
 * every key and of the sums. The scores of a tile, as many sums over lanes, are exchanged so that lane l keeps the
 * l-th. Softmax with a running maximum m and sum l, as in attention.cu, where every lane knows those of its own score's
 * row.
 *
 * Grid: (rows / 16, n_kv_heads, splits), 256 threads. Sums are float32. */
#include "attention.cuh"

enum {
    CQ_THREADS = 256,
    CQ_WIDE = CQ_HEAD_DIM > 576, /* then one row a warp and half as many keys, for registers and shared memory */
    CQ_WARP_ROWS = CQ_WIDE ? 1 : 2,
    CQ_BLOCK_ROWS = CQ_WARP_ROWS * CQ_THREADS / 32,
    CQ_KEYS = CQ_WIDE ? 8 : 16,
    CQ_SCORES = CQ_WARP_ROWS * CQ_KEYS, /* of a warp and tile */
    CQ_PAIRS = (CQ_HEAD_DIM + 1) / 2,   /* of a key */
    CQ_VALUE_PAIRS = (CQ_VALUE_DIM + 1) / 2,
    CQ_PAIRS_EACH = (CQ_PAIRS + 31) / 32, /* of a lane */
    CQ_VALUE_PAIRS_EACH = (CQ_VALUE_PAIRS + 31) / 32,
    CQ_KEY_BYTES = 2 * CQ_HEAD_DIM,
};

/* A warp's rows; pairs of columns lane, lane + 32, .... max, sum: of the row whose scores this lane keeps. */
struct cq_rows {
    float2 query[CQ_WARP_ROWS][CQ_PAIRS_EACH], out[CQ_WARP_ROWS][CQ_VALUE_PAIRS_EACH];
    float max, sum;
};

/* Keys first .. to tile [CQ_KEYS][CQ_PAIRS]; zero past `end` and past an odd head. 16 bytes a thread where a key is a
 * multiple of them: keys are neighbours in the cache as in the tile. */
CQ_DEVICE void copy_tile(const u16 *cache, int first, int end, u32 *tile) {
    if constexpr (CQ_KEY_BYTES % 16 == 0) {
        const u8 *from = (const u8 *)(cache + (long long)first * CQ_HEAD_DIM);
        const int present = min_int(end - first, CQ_KEYS) * CQ_KEY_BYTES;
        for (int at = 16 * threadIdx.x; at < CQ_KEYS * CQ_KEY_BYTES; at += 16 * CQ_THREADS)
            copy_async((u8 *)tile + at, from + (at < present ? at : 0), at < present);
    } else {
        for (int i = threadIdx.x; i < CQ_KEYS * 2 * CQ_PAIRS; i += CQ_THREADS) {
            const int key = i / (2 * CQ_PAIRS), column = i % (2 * CQ_PAIRS);
            const bool present = first + key < end && column < CQ_HEAD_DIM;
            ((u16 *)tile)[i] = present ? cache[(long long)(first + key) * CQ_HEAD_DIM + column] : 0;
        }
    }
}

CQ_DEVICE u32 pair_at(const u32 *tile, int key, int pair, int n_pairs) {
    return pair < n_pairs ? tile[key * CQ_PAIRS + pair] : 0;
}

/* Sums over the warp's lanes of values[n], n a power of two up to 32: lane l gets that of values[l % n]. Every exchange
 * halves what is left to sum, so 32 sums take 31 shuffles instead of 160. */
template <int n> CQ_DEVICE float sum_each(const float (&values)[n], int lane) {
    float half[n / 2];
#pragma unroll
    for (int i = 0; i < n / 2; i++) {
        const bool upper_half = lane & n / 2;
        const float kept = upper_half ? values[i + n / 2] : values[i];
        half[i] = kept + __shfl_xor_sync(~0u, upper_half ? values[i] : values[i + n / 2], n / 2);
    }
    if constexpr (n > 2)
        return sum_each<n / 2>(half, lane);
    else
        return half[0];
}

/* This lane's score: of row lane / CQ_KEYS and key lane % CQ_KEYS of the tile. */
CQ_DEVICE float score_tile(const u32 *tile, const cq_rows &rows, int lane) {
    float scores[CQ_SCORES] = {};
#pragma unroll
    for (int i = 0; i < CQ_PAIRS_EACH; i++)
#pragma unroll
        for (int key = 0; key < CQ_KEYS; key++) {
            const u32 pair = pair_at(tile, key, lane + 32 * i, CQ_PAIRS);
            const float x = lower(pair), y = upper(pair);
#pragma unroll
            for (int row = 0; row < CQ_WARP_ROWS; row++)
                scores[row * CQ_KEYS + key] += rows.query[row][i].x * x + rows.query[row][i].y * y;
        }
    float sum = sum_each<CQ_SCORES>(scores, lane);
    for (int distance = CQ_SCORES; distance < 32; distance *= 2) sum += __shfl_xor_sync(~0u, sum, distance);
    return sum;
}

/* Adds a tile's values, once what was summed so far has shrunk. p: this lane's probability. */
CQ_DEVICE void add_values(const u32 *tile, float p, float shrink, cq_rows &rows, int lane) {
#pragma unroll
    for (int row = 0; row < CQ_WARP_ROWS; row++) {
        const float factor = __shfl_sync(~0u, shrink, row * CQ_KEYS);
#pragma unroll
        for (int i = 0; i < CQ_VALUE_PAIRS_EACH; i++) rows.out[row][i].x *= factor, rows.out[row][i].y *= factor;
    }
#pragma unroll 4
    for (int key = 0; key < CQ_KEYS; key++) {
        float weights[CQ_WARP_ROWS];
#pragma unroll
        for (int row = 0; row < CQ_WARP_ROWS; row++) weights[row] = __shfl_sync(~0u, p, row * CQ_KEYS + key);
#pragma unroll
        for (int i = 0; i < CQ_VALUE_PAIRS_EACH; i++) {
            const u32 pair = pair_at(tile, key, lane + 32 * i, CQ_VALUE_PAIRS);
            const float x = lower(pair), y = upper(pair);
#pragma unroll
            for (int row = 0; row < CQ_WARP_ROWS; row++)
                rows.out[row][i].x += weights[row] * x, rows.out[row][i].y += weights[row] * y;
        }
    }
}

/* distance: from the tile's first key to the query of this lane's score; a key is visible if it is in [0, window) from
 * the key itself. */
CQ_DEVICE void attend_tile(const u32 *tile, int distance, int window, cq_rows &rows, int lane) {
    const float score = score_tile(tile, rows, lane);
    const int from_key = distance - lane % CQ_KEYS;
    const bool visible = from_key >= 0 && from_key < window;
    const float largest = fmaxf(rows.max, max_lanes(visible ? score : CQ_HIDDEN, CQ_KEYS));
    const float p = visible ? expf(score - largest) : 0.0f, shrink = expf(rows.max - largest);
    rows.sum = rows.sum * shrink + sum_lanes(p, CQ_KEYS);
    rows.max = largest;
    add_values(tile, p, shrink, rows, lane);
}

CQ_DEVICE void load_query(const float *from, float scale, int lane, float2 *query) {
#pragma unroll
    for (int i = 0; i < CQ_PAIRS_EACH; i++) {
        const int column = 2 * (lane + 32 * i);
        query[i] = make_float2(column < CQ_HEAD_DIM ? from[column] * scale : 0.0f,
                               column + 1 < CQ_HEAD_DIM ? from[column + 1] * scale : 0.0f);
    }
}

CQ_DEVICE void store_row(float *to, const float2 *out, float max, float sum, int lane) {
    const float scale = gridDim.z > 1 ? 1.0f : 1.0f / sum;
#pragma unroll
    for (int i = 0; i < CQ_VALUE_PAIRS_EACH; i++) {
        const int column = 2 * (lane + 32 * i);
        if (column < CQ_VALUE_DIM) to[column] = out[i].x * scale;
        if (column + 1 < CQ_VALUE_DIM) to[column + 1] = out[i].y * scale;
    }
    if (gridDim.z > 1 && lane == 0) to[CQ_VALUE_DIM] = max, to[CQ_VALUE_DIM + 1] = sum;
}

extern "C" __global__ void __launch_bounds__(CQ_THREADS, 2) latent_attention(const cq_attention op) {
    CQ_SHARED(u32, tiles, 2 * CQ_KEYS * CQ_PAIRS); /* one to multiply, one that arrives */
    const int heads = op.n_heads / op.n_kv_heads, first_row = blockIdx.x * CQ_BLOCK_ROWS, lane = threadIdx.x % 32;
    const int last_row = min_int(first_row + CQ_BLOCK_ROWS, op.n_tokens * heads) - 1;
    const int mine = first_row + threadIdx.x / 32 * CQ_WARP_ROWS; /* rows past the end repeat the last one */
    const int token = min_int(mine + lane / CQ_KEYS % CQ_WARP_ROWS, last_row) / heads;
    const int position = *op.position + token, window = window_of(op);
    const cq_span span = span_of(op, first_row / heads, last_row / heads, CQ_KEYS);
    const u16 *cache = op.k_cache + (long long)blockIdx.y * op.n_ctx * CQ_HEAD_DIM;
    cq_rows rows = {{}, {}, CQ_HIDDEN, 0.0f};
#pragma unroll
    for (int row = 0; row < CQ_WARP_ROWS; row++)
        load_query(op.q + query_row(op, min_int(mine + row, last_row)) * CQ_HEAD_DIM, op.scale, lane, rows.query[row]);
    if (span.from < span.to) copy_tile(cache, span.from, span.to, tiles);
    int buffer = 0;
    for (int key = span.from; key < span.to; key += CQ_KEYS, buffer ^= 1) {
        copy_wait();
        __syncthreads(); /* this tile is there, and no thread reads the other one any more */
        const u32 *tile = tiles + buffer * CQ_KEYS * CQ_PAIRS;
        if (key + CQ_KEYS < span.to)
            copy_tile(cache, key + CQ_KEYS, span.to, tiles + (buffer ^ 1) * CQ_KEYS * CQ_PAIRS);
        if (mine <= last_row) attend_tile(tile, position - key, window, rows, lane);
    }
#pragma unroll
    for (int row = 0; row < CQ_WARP_ROWS; row++) {
        const float max = __shfl_sync(~0u, rows.max, row * CQ_KEYS), sum = __shfl_sync(~0u, rows.sum, row * CQ_KEYS);
        if (mine + row > last_row) continue;
        store_row(result_row(op, query_row(op, mine + row), CQ_VALUE_DIM), rows.out[row], max, sum, lane);
    }
}
