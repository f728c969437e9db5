/* Around attention: norms and rope of heads, new rows of the KV cache, and joining attention's parts. */
#include "attention.cuh"
#include "rows.cuh"

/* x [tokens][n_heads][head_dim] in place; cos_sin [n_ctx][n_rot / 2][2]. Pairs (2i, 2i + 1) if interleaved, else (i, i
 * + n_rot / 2). position: of the first token, in memory so that a captured graph can be replayed. Grid: tokens. */
extern "C" __global__ void __launch_bounds__(CQ_ROW_THREADS)
    rope(float *x, const float *cos_sin, const int *position, int n_heads, int head_dim, int n_rot, int interleaved) {
    const int half = n_rot / 2;
    x += (long long)blockIdx.x * n_heads * head_dim;
    cos_sin += (long long)(*position + (int)blockIdx.x) * n_rot;
    for (int i = threadIdx.x; i < n_heads * half; i += CQ_ROW_THREADS) {
        const int pair = i % half;
        float *a = x + i / half * head_dim + (interleaved ? 2 * pair : pair), *b = a + (interleaved ? 1 : half);
        const float c = cos_sin[2 * pair], s = cos_sin[2 * pair + 1], rotated = *a * c - *b * s;
        *b = *b * c + *a * s;
        *a = rotated;
    }
}

/* 1 / sqrt(mean(x^2) + eps) of a row [n], by a warp, in the order of `rms_norm` up to 128 columns. */
CQ_DEVICE float norm_scale(const float *x, int n, float eps) {
    float squares = 0;
    for (int i = 4 * (threadIdx.x % 32); i < n; i += 128) {
        float four[4];
        load_four(x, i, n, four);
        for (int j = 0; j < 4; j++) squares += four[j] * four[j];
    }
    return 1.0f / sqrtf(sum_lanes(squares, 32) / (float)n + eps);
}

/* Norm and rope (as `rope`) of queries, to q_out, which may be q, and of keys, to the cache; values to the cache. A
 * warp a head. Grid: (tokens, (n_heads + 2 n_kv_heads) / 8). */
extern "C" __global__ void __launch_bounds__(CQ_ROW_THREADS) prepare_heads(const cq_heads op) {
    const int lane = threadIdx.x % 32, head = blockIdx.y * 8 + threadIdx.x / 32, n = op.head_dim, half = op.n_rot / 2;
    const int key = head - op.n_heads, value = key - op.n_kv_heads, kv_head = value < 0 ? key : value;
    if (value >= op.n_kv_heads) return; /* a whole warp */
    const long long token = blockIdx.x, position = *op.position + token;
    const long long of_kv = (token * op.n_kv_heads + kv_head) * n,
                    cached = (kv_head * (long long)op.n_ctx + position) * n;
    if (value >= 0) {
        for (int i = lane; i < n; i += 32) op.v_cache[cached + i] = to_half(op.v[of_kv + i]);
        return;
    }
    const long long of_q = (token * op.n_heads + head) * n;
    const float *x = key < 0 ? op.q + of_q : op.k + of_kv, *weight = key < 0 ? op.q_weight : op.k_weight;
    const float scale = weight ? norm_scale(x, n, key < 0 ? op.q_eps : op.k_eps) : 1.0f;
    const float *cos_sin = op.cos_sin + position * op.n_rot;
    float *query = key < 0 ? op.q_out + of_q : nullptr;
    u16 *to_cache = op.k_cache + cached;
    const auto normed = [=](int i) { return weight ? x[i] * scale * weight[i] : x[i]; };
    const auto store = [=](int i, float result) {
        if (query)
            query[i] = result;
        else
            to_cache[i] = to_half(result);
    };
    for (int pair = lane; pair < half; pair += 32) {
        const int first = op.interleaved ? 2 * pair : pair, second = first + (op.interleaved ? 1 : half);
        const float c = cos_sin[2 * pair], s = cos_sin[2 * pair + 1], a = normed(first), b = normed(second);
        store(first, a * c - b * s);
        store(second, b * c + a * s);
    }
    for (int i = op.n_rot + lane; i < n; i += 32) store(i, normed(i));
}

/* Keys or values [tokens][n_kv_heads][dim] to their places in the cache [n_kv_heads][n_ctx][dim], as F16. Grid:
 * (tokens, n_kv_heads). */
extern "C" __global__ void __launch_bounds__(CQ_ROW_THREADS)
    append(const float *from, u16 *cache, const int *position, int n_ctx, int dim) {
    from += ((long long)blockIdx.x * gridDim.y + blockIdx.y) * dim;
    cache += ((long long)blockIdx.y * n_ctx + *position + blockIdx.x) * dim;
    for (int i = threadIdx.x; i < dim; i += CQ_ROW_THREADS) cache[i] = to_half(from[i]);
}

/* Joins the splits of partial [splits][rows][dim + 2] (attention.cuh): with M the largest m, out = sum exp(m - M) sums
 * / sum exp(m - M) l. Splits without keys (l is 0) are the last ones; their sums are not read. Where rows are narrow,
 * 256 / dim threads share a column. Shared memory: 4 * splits bytes. Grid: rows, tokens * n_heads. */
extern "C" __global__ void __launch_bounds__(CQ_ROW_THREADS)
    attention_merge(const float *partial, float *out, int splits, int dim) {
    CQ_DYNAMIC_SHARED(float, weights);
    CQ_SHARED(float, sums, CQ_ROW_THREADS);
    CQ_SHARED(float, of_warps, 3 * 8);
    const float *row = partial + (long long)blockIdx.x * (dim + 2);
    const long long stride = (long long)gridDim.x * (dim + 2);
    float largest = CQ_HIDDEN, total = 0, used = 0;
    for (int s = threadIdx.x; s < splits; s += CQ_ROW_THREADS) {
        largest = fmaxf(largest, row[s * stride + dim]);
        if (row[s * stride + dim + 1] != 0) used = (float)(s + 1);
    }
    largest = block_max(largest, of_warps);
    for (int s = threadIdx.x; s < splits; s += CQ_ROW_THREADS) {
        weights[s] = expf(row[s * stride + dim] - largest);
        total += weights[s] * row[s * stride + dim + 1];
    }
    const int n = (int)block_max(used, of_warps + 8);
    total = block_sum(total, of_warps + 16); /* and all weights are there */
    const int parts = 2 * dim <= CQ_ROW_THREADS ? CQ_ROW_THREADS / dim : 1, part = parts > 1 ? threadIdx.x / dim : 0;
    for (int i = parts > 1 ? threadIdx.x % dim : threadIdx.x; i < dim; i += CQ_ROW_THREADS) {
        float sum = 0;
#pragma unroll 8
        for (int s = part; s < n; s += parts) sum += weights[s] * row[s * stride + i];
        if (parts > 1) sums[threadIdx.x] = sum;
        if (parts == 1) out[(long long)blockIdx.x * dim + i] = sum / total;
    }
    if (parts == 1) return; /* the whole block */
    __syncthreads();
    if ((int)threadIdx.x >= dim) return;
    float sum = 0;
    for (int i = 0; i < parts; i++) sum += sums[i * dim + threadIdx.x];
    out[(long long)blockIdx.x * dim + threadIdx.x] = sum / total;
}
