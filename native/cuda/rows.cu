/* Operations on rows of floats: embedding, norm, activation quantizer, SwiGLU, sums of experts, copies. */
#include "rows.cuh"

/* A row [n] that the block goes through several times. A thread has columns 4 t .. 4 t + 3 of every part; those of the
 * first parts are in `kept`, the others are read from memory each time. */
struct cq_row {
    const float *x;
    int n;
    float kept[CQ_KEPT][4];
};

CQ_DEVICE cq_row load_row(const float *x, int n) {
    cq_row row = {x, n, {}};
#pragma unroll
    for (int part = 0; part < CQ_KEPT; part++) {
        const int i = part * CQ_PART + 4 * threadIdx.x;
        if (i < n) load_four(x, i, n, row.kept[part]);
    }
    return row;
}

/* use(four, others, i) for this thread's columns i .. i + 3 of two rows. What it changes in `four` must go to row.x as
 * well. */
template <class Use> CQ_DEVICE void each_four(cq_row &row, const cq_row &other, Use use) {
#pragma unroll
    for (int part = 0; part < CQ_KEPT; part++) {
        const int i = part * CQ_PART + 4 * threadIdx.x;
        if (i < row.n) use(row.kept[part], other.kept[part], i);
    }
    for (int i = CQ_KEPT * CQ_PART + 4 * threadIdx.x; i < row.n; i += CQ_PART) {
        float four[4], others[4];
        load_four(row.x, i, row.n, four), load_four(other.x, i, row.n, others);
        use(four, others, i);
    }
}

/* The same with one row. */
template <class Use> CQ_DEVICE void each_four(cq_row &row, Use use) {
    each_four(row, row, [&](float *four, const float *, int i) { use(four, i); });
}

/* The largest of four magnitudes. A NaN must win, and fmaxf would drop it: infinity stands in for it. */
CQ_DEVICE float magnitude_of(const float *four) {
    float largest = 0;
    for (int j = 0; j < 4; j++)
        largest = fmaxf(largest, four[j] == four[j] ? fabsf(four[j]) : __int_as_float(0x7f800000));
    return largest;
}

/* As docs/format.md defines it: float32, ties to even; 0 * inf, where the scale is subnormal, counts as 0. */
CQ_DEVICE i8 quantize_value(float x, float inverse, float top) {
    const float v = rintf(x * inverse);
    return v == v ? (i8)fminf(fmaxf(v, -top), top) : 0;
}

/* q [n] and the scale of a row; largest: of this thread's columns. n is a multiple of 4. */
CQ_DEVICE void quantize_row(cq_row &row, float largest, i8 *q, float *scale_out, float top, float *partial) {
    const float scale = block_max(largest, partial) / top, inverse = scale > 0 ? 1.0f / scale : 0.0f;
    each_four(row, [&](const float *four, int i) {
        u32 bytes = 0;
        for (int j = 0; j < 4; j++) bytes |= (u32)(u8)quantize_value(four[j], inverse, top) << 8 * j;
        *(u32 *)(q + i) = bytes;
    });
    if (threadIdx.x == 0) *scale_out = scale;
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

/* What `rms_norm` writes, arrays of rows [n]: out = x / sqrt(mean(x^2) + eps) * weight (+ bias), bias [n] or NULL; q
 * not NULL: then also out quantized, as `quantize` does it. */
struct cq_norm {
    const float *weight, *bias;
    float *out;
    i8 *q;
    float *scales;
    int n;
    float eps, top;
};

/* The norm of row `number`. A thread sums n / 256 squares, then the block in a tree. partial: [16]. */
CQ_DEVICE void norm_row(cq_row &row, const cq_norm &op, long long number, float *partial) {
    const cq_row weight = load_row(op.weight, op.n); /* on its way while squares are summed */
    const float *bias = op.bias;
    const int n = op.n; /* copies: captured by reference, `op` itself would go to local memory */
    float *out = op.out + number * n, squares = 0, largest = 0;
    each_four(row, [&](const float *four, int) {
        for (int j = 0; j < 4; j++) squares += four[j] * four[j];
    });
    const float scale = 1.0f / sqrtf(block_sum(squares, partial) / (float)n + op.eps);
    each_four(row, weight, [&](float *four, const float *weights, int i) {
        float biases[4];
        if (bias) load_four(bias, i, n, biases);
        for (int j = 0; j < 4; j++) {
            const float normed = four[j] * scale * weights[j];
            four[j] = bias ? normed + biases[j] : normed;
        }
        store_four(out, i, n, four);
        largest = fmaxf(largest, magnitude_of(four));
    });
    if (!op.q) return;
    row.x = out;
    quantize_row(row, largest, op.q + number * n, op.scales + number, op.top, partial + 8);
}

/* Grid: rows. */
extern "C" __global__ void __launch_bounds__(CQ_ROW_THREADS) rms_norm(const float *x, const cq_norm op) {
    CQ_SHARED(float, partial, 16);
    cq_row row = load_row(x + (long long)blockIdx.x * op.n, op.n);
    norm_row(row, op, blockIdx.x, partial);
}

/* x[t] += sum over rank of weights[t][rank] * y[slot], as `combine`; then x's norm. Grid: tokens. */
extern "C" __global__ void __launch_bounds__(CQ_ROW_THREADS)
    combine_norm(const float *y, const float *weights, float *x, int top_k, const cq_norm op) {
    CQ_SHARED(float, partial, 16);
    const int n = op.n;
    x += (long long)blockIdx.x * n, y += (long long)blockIdx.x * top_k * n, weights += blockIdx.x * top_k;
    cq_row row = load_row(x, n);
    each_four(row, [&](float *four, int i) {
#pragma unroll 4
        for (int rank = 0; rank < top_k; rank++) {
            float part[4];
            load_four(y + (long long)rank * n, i, n, part);
            for (int j = 0; j < 4; j++) four[j] += weights[rank] * part[j];
        }
        store_four(x, i, n, four);
    });
    norm_row(row, op, blockIdx.x, partial);
}

/* q [rows][n] and scales [rows] of x [rows][n]; top: 127 or 7. A NaN makes the scale infinite and q zero, so that
 * what is computed from it is not finite. n is a multiple of 4. Grid: rows. */
extern "C" __global__ void __launch_bounds__(CQ_ROW_THREADS)
    quantize(const float *x, i8 *q, float *scales, int n, float top) {
    CQ_SHARED(float, partial, 8);
    cq_row row = load_row(x + (long long)blockIdx.x * n, n);
    float largest = 0;
    each_four(row, [&](const float *four, int) { largest = fmaxf(largest, magnitude_of(four)); });
    quantize_row(row, largest, q + (long long)blockIdx.x * n, scales + blockIdx.x, top, partial);
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

/* The fast Hadamard transform, unscaled, of every `size` columns (a power of two up to 1024) of a part: in a thread's
 * registers, between lanes, then through `shared` [CQ_PART]. Of two columns `half` apart the first becomes their sum,
 * the second their difference, from the nearest pairs on. All threads call it. */
CQ_DEVICE void transform_part(float *four, int size, float *shared) {
    for (int half = 1; half < 4 && half < size; half *= 2)
        for (int i = 0; i < 2; i++) {
            float *a = four + (half == 1 ? 2 * i : i), *b = a + half;
            const float sum = *a + *b, difference = *a - *b;
            *a = sum, *b = difference;
        }
    for (int half = 4; half < size; half *= 2) {
        const bool is_second = 4 * threadIdx.x & half;
        float other[4];
        if (half < 128) {
            for (int j = 0; j < 4; j++) other[j] = __shfl_xor_sync(~0u, four[j], half / 4);
        } else {
            __syncthreads(); /* nobody reads the previous values any more */
            store_four(shared, 4 * threadIdx.x, CQ_PART, four);
            __syncthreads();
            load_four(shared, 4 * threadIdx.x ^ half, CQ_PART, other);
        }
        for (int j = 0; j < 4; j++) four[j] = is_second ? other[j] - four[j] : four[j] + other[j];
    }
}

/* silu(gate) * up of this thread's columns i .. i + 3 of rows [n], zero past the end; then the Hadamard transform. */
CQ_DEVICE void gated_part(const float *gate, const float *up, int i, int n, int hadamard, float *shared, float *four) {
    float ups[4] = {};
    for (int j = 0; j < 4; j++) four[j] = 0;
    if (i < n) load_four(gate, i, n, four), load_four(up, i, n, ups);
    for (int j = 0; j < 4; j++) four[j] = four[j] / (1.0f + expf(-four[j])) * ups[j];
    if (!hadamard) return;
    transform_part(four, min_int(hadamard, CQ_PART), shared);
    const float scale = 1.0f / sqrtf((float)hadamard);
    for (int j = 0; j < 4 && hadamard <= CQ_PART; j++) four[j] *= scale;
}

/* gate = silu(gate) * up, [rows][n], then each block of `hadamard` columns (a power of two, 0: none) times the
 * orthonormal Hadamard matrix in Sylvester's order, by the fast transform; where blocks are wider than a part its last
 * steps are in memory. Grid: (n / max(1024, hadamard), rows). */
extern "C" __global__ void __launch_bounds__(CQ_ROW_THREADS) swiglu(float *gate, const float *up, int n, int hadamard) {
    CQ_SHARED(float, shared, CQ_PART);
    const int width = hadamard > CQ_PART ? hadamard : CQ_PART, first = blockIdx.x * width;
    gate += (long long)blockIdx.y * n, up += (long long)blockIdx.y * n;
    for (int part = first; part < first + width; part += CQ_PART) {
        const int i = part + 4 * threadIdx.x;
        float four[4];
        gated_part(gate, up, i, n, hadamard, shared, four);
        if (i < n) store_four(gate, i, n, four);
    }
    if (hadamard <= CQ_PART) return;
    for (int half = CQ_PART; half < hadamard; half *= 2) {
        const float scale = 2 * half == hadamard ? 1.0f / sqrtf((float)hadamard) : 1.0f;
        __syncthreads();
        for (int i = threadIdx.x; i < hadamard / 2; i += CQ_ROW_THREADS) {
            float *a = gate + first + i / half * 2 * half + i % half, *b = a + half;
            const float sum = *a + *b, difference = *a - *b;
            *a = sum * scale, *b = difference * scale;
        }
    }
}

/* The same for rows of up to 4096 columns, a multiple of 4, and blocks of up to 1024; then quantized as by `quantize`.
 * Grid: rows. */
extern "C" __global__ void __launch_bounds__(CQ_ROW_THREADS)
    swiglu_quantize(float *gate, const float *up, i8 *q, float *scales, int n, int hadamard, float top) {
    CQ_SHARED(float, shared, CQ_PART);
    CQ_SHARED(float, partial, 8);
    gate += (long long)blockIdx.x * n, up += (long long)blockIdx.x * n;
    cq_row row = {gate, n, {}};
    float largest = 0;
#pragma unroll
    for (int part = 0; part < CQ_KEPT; part++) {
        const int i = part * CQ_PART + 4 * threadIdx.x;
        if (part * CQ_PART >= n) break; /* the whole block */
        gated_part(gate, up, i, n, hadamard, shared, row.kept[part]);
        if (i < n) store_four(gate, i, n, row.kept[part]);
        largest = fmaxf(largest, magnitude_of(row.kept[part]));
    }
    quantize_row(row, largest, q + (long long)blockIdx.x * n, scales + blockIdx.x, top, partial);
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
