/* Operations on rows of floats: embedding, norm, activation quantizer, rope, SwiGLU, sums of experts, copies, also to
 * the KV cache, and joining attention's parts. */
#include "attention.cuh"

enum { CQ_ROW_THREADS = 256 };

/* max or sum over the block's 256 threads, for all of them; `partial` [8] is shared. */
CQ_DEVICE float block_max(float value, float *partial) {
    value = max_lanes(value, 32);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
    __syncthreads();
    return max_lanes(partial[threadIdx.x % 8], 8);
}
CQ_DEVICE float block_sum(float value, float *partial) {
    value = sum_lanes(value, 32);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
    __syncthreads();
    return sum_lanes(partial[threadIdx.x % 8], 8);
}

/* out[t][column] = table[tokens[t]][column]. Grid: tokens. */
extern "C" __global__ void __launch_bounds__(CQ_ROW_THREADS)
    embed(const cq_matrix table, const int *tokens, float *out) {
    const long long row = tokens[blockIdx.x];
    out += (long long)blockIdx.x * table.n_cols;
    for (int i = threadIdx.x; i < table.n_cols; i += CQ_ROW_THREADS) {
        const long long at = row * table.n_cols + i;
        if (table.type == CQ_F32) out[i] = ((const float *)table.data)[at];
        if (table.type == CQ_F16) out[i] = from_half(((const u16 *)table.data)[at]);
        if (table.type == CQ_Q8_0) {
            const u8 *block = table.data + at / CQ_Q8_0_COLS * CQ_Q8_0_BYTES;
            out[i] = from_half(*(const u16 *)block) * (float)(i8)block[2 + i % CQ_Q8_0_COLS];
        }
    }
}

/* out = x / sqrt(mean(x^2) + eps) * weight (+ bias), rows [n]; bias [n] or NULL. A thread sums n / 256 squares, then
 * the block in a tree. Grid: rows. */
extern "C" __global__ void __launch_bounds__(CQ_ROW_THREADS)
    rms_norm(const float *x, const float *weight, const float *bias, float *out, int n, float eps) {
    CQ_SHARED(float, partial, 8);
    x += (long long)blockIdx.x * n, out += (long long)blockIdx.x * n;
    float squares = 0;
    for (int i = threadIdx.x; i < n; i += CQ_ROW_THREADS) squares += x[i] * x[i];
    const float scale = 1.0f / sqrtf(block_sum(squares, partial) / (float)n + eps);
    for (int i = threadIdx.x; i < n; i += CQ_ROW_THREADS) {
        const float normed = x[i] * scale * weight[i];
        out[i] = bias ? normed + bias[i] : normed;
    }
}

/* As docs/format.md defines it: float32, ties to even; 0 * inf, where the scale is subnormal, counts as 0. */
CQ_DEVICE i8 quantize_value(float x, float inverse, float top) {
    const float v = rintf(x * inverse);
    return v == v ? (i8)fminf(fmaxf(v, -top), top) : 0;
}

/* q [rows][n] and scales [rows] of x [rows][n]; top: 127 or 7. A NaN makes the scale infinite and q zero, so that
 * what is computed from it is not finite. Grid: rows. */
extern "C" __global__ void __launch_bounds__(CQ_ROW_THREADS)
    quantize(const float *x, i8 *q, float *scales, int n, float top) {
    CQ_SHARED(float, partial, 8);
    x += (long long)blockIdx.x * n, q += (long long)blockIdx.x * n;
    float largest = 0;
    for (int i = threadIdx.x; i < n; i += CQ_ROW_THREADS) {
        const float magnitude = fabsf(x[i]); /* a NaN must win, and fmaxf would drop it: infinity stands in for it */
        largest = fmaxf(largest, magnitude == magnitude ? magnitude : __int_as_float(0x7f800000));
    }
    const float scale = block_max(largest, partial) / top, inverse = scale > 0 ? 1.0f / scale : 0.0f;
    for (int i = threadIdx.x; i < n; i += CQ_ROW_THREADS) q[i] = quantize_value(x[i], inverse, top);
    if (threadIdx.x == 0) scales[blockIdx.x] = scale;
}

/* The same per 32 columns, always 8 bits, for Q8_0: a warp a block. n_blocks: of all rows. Grid: n_blocks / 8. */
extern "C" __global__ void __launch_bounds__(CQ_ROW_THREADS)
    quantize_blocks(const float *x, i8 *q, float *scales, int n_blocks) {
    const long long block = (long long)blockIdx.x * 8 + threadIdx.x / 32, i = block * CQ_Q8_0_COLS + threadIdx.x % 32;
    if (block >= n_blocks) return; /* a whole warp */
    const float magnitude = fabsf(x[i]);
    const float largest = max_lanes(magnitude == magnitude ? magnitude : __int_as_float(0x7f800000), 32);
    const float scale = largest / 127.0f;
    q[i] = quantize_value(x[i], scale > 0 ? 1.0f / scale : 0.0f, 127.0f);
    if (threadIdx.x % 32 == 0) scales[block] = scale;
}

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

/* gate = silu(gate) * up, [rows][n], then each block of `hadamard` columns (a power of two, 0: none) times the
 * orthonormal Hadamard matrix in Sylvester's order, by the fast transform in place; a block's lines are in the
 * first-level cache. Grid: (n / (hadamard or 1024), rows). */
extern "C" __global__ void __launch_bounds__(CQ_ROW_THREADS) swiglu(float *gate, const float *up, int n, int hadamard) {
    const int width = hadamard ? hadamard : 1024, first = blockIdx.x * width, count = min_int(width, n - first);
    gate += (long long)blockIdx.y * n + first, up += (long long)blockIdx.y * n + first;
    for (int i = threadIdx.x; i < count; i += CQ_ROW_THREADS) gate[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
    if (!hadamard) return;
    for (int half = 1; half < hadamard; half *= 2) {
        __syncthreads();
        for (int i = threadIdx.x; i < hadamard / 2; i += CQ_ROW_THREADS) {
            float *a = gate + i / half * 2 * half + i % half, *b = a + half;
            const float sum = *a + *b, difference = *a - *b;
            *a = sum, *b = difference;
        }
    }
    __syncthreads();
    const float scale = 1.0f / sqrtf((float)hadamard);
    for (int i = threadIdx.x; i < hadamard; i += CQ_ROW_THREADS) gate[i] *= scale;
}

/* out[t] [n] += sum over rank of weights[t][rank] * y[slot] [n]. Grid: (n / 256, tokens). */
extern "C" __global__ void __launch_bounds__(CQ_ROW_THREADS)
    combine(const float *y, const float *weights, float *out, int n, int top_k) {
    const int i = blockIdx.x * CQ_ROW_THREADS + threadIdx.x;
    if (i >= n) return;
    float *to = out + (long long)blockIdx.y * n + i, sum = *to;
    for (int rank = 0; rank < top_k; rank++) {
        const long long slot = (long long)blockIdx.y * top_k + rank;
        sum += weights[slot] * y[slot * n + i];
    }
    *to = sum;
}

/* out[r] = x[first + r], rows [n]. Grid: (n / 256, rows). */
extern "C" __global__ void __launch_bounds__(CQ_ROW_THREADS) select_rows(const float *x, float *out, int n, int first) {
    const int i = blockIdx.x * CQ_ROW_THREADS + threadIdx.x;
    if (i < n) out[(long long)blockIdx.y * n + i] = x[(long long)(first + (int)blockIdx.y) * n + i];
}

/* out[r][0 .. n - 1] = x[r][0 .. n - 1], the rows being x_width and out_width floats apart. Rows may be parts of rows,
 * a few columns wide each, so threads count elements. Grid: n_elements / 256. */
extern "C" __global__ void __launch_bounds__(CQ_ROW_THREADS)
    copy_columns(const float *x, float *out, int x_width, int out_width, int n, int n_elements) {
    const int i = blockIdx.x * CQ_ROW_THREADS + threadIdx.x, row = i / n, column = i % n;
    if (i < n_elements) out[(long long)row * out_width + column] = x[(long long)row * x_width + column];
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
 * / sum exp(m - M) l. Grid: rows, tokens * n_heads. */
extern "C" __global__ void __launch_bounds__(CQ_ROW_THREADS)
    attention_merge(const float *partial, float *out, int splits, int dim) {
    const float *row = partial + (long long)blockIdx.x * (dim + 2);
    const long long stride = (long long)gridDim.x * (dim + 2);
    float largest = CQ_HIDDEN, total = 0;
    for (int s = 0; s < splits; s++) largest = fmaxf(largest, row[s * stride + dim]);
    for (int s = 0; s < splits; s++) total += expf(row[s * stride + dim] - largest) * row[s * stride + dim + 1];
    for (int i = threadIdx.x; i < dim; i += CQ_ROW_THREADS) {
        float sum = 0;
        for (int s = 0; s < splits; s++) sum += expf(row[s * stride + dim] - largest) * row[s * stride + i];
        out[(long long)blockIdx.x * dim + i] = sum / total;
    }
}
