/* F32, F16 and Q8_0 matrices (CQ_TYPE), as they lie in the file.
 *
 *     out[item][row] = sum over columns of W[row][column] * x[item][column]
 *
 * plain_gemv: a warp a row and item, lanes side by side in the row; Q8_0 eight lanes a block of 32, four weights each,
 * int32 within the four, float beyond. plain_gemm (F32 and F16; gemm.cu has Q8_0): float tiles of 64 rows by 64 items
 * in steps of 16 columns, 4 x 4 sums a thread. Sums of floats: the order differs from the CPU's, so results do in the
 * last places. */
#include "common.cuh"

enum {
    CQ_ELEMENT_BYTES = CQ_TYPE == CQ_F32 ? 4 : 2,
    CQ_GEMV_THREADS = 128,
    CQ_GEMM_THREADS = 256,
    CQ_TILE_ROWS = 64,
    CQ_STEP = 16,
    CQ_PITCH = 68, /* floats: multiples of 16 bytes, columns' starts in different banks */
};

CQ_DEVICE long long row_bytes(const cq_matrix &w) {
    if (CQ_TYPE == CQ_Q8_0) return (long long)w.n_cols / CQ_Q8_0_COLS * CQ_Q8_0_BYTES;
    return (long long)w.n_cols * CQ_ELEMENT_BYTES;
}

/* This lane's part of a row's dot product. */
#if CQ_TYPE == 8
CQ_DEVICE float dot_row(const cq_linear &op, const u8 *row, int in, int lane) {
    const int n_blocks = op.w.n_cols / CQ_Q8_0_COLS, quad = lane % 8;
    const i8 *q = op.q + (long long)in * op.w.n_cols + 4 * quad;
    const float *scales = op.scales + (long long)in * n_blocks;
    float sum = 0;
#pragma unroll 4
    for (int block = lane / 8; block < n_blocks; block += 4) {
        const u8 *bytes = row + (long long)block * CQ_Q8_0_BYTES;
        const u32 x = *(const u32 *)(q + block * CQ_Q8_0_COLS);
        sum +=
            (float)dot_signed(load_word(bytes + 2 + 4 * quad), x, 0) * (from_half(*(const u16 *)bytes) * scales[block]);
    }
    return sum;
}
#else
CQ_DEVICE float element(const u8 *row, int column) {
    return CQ_TYPE == CQ_F32 ? ((const float *)row)[column] : from_half(((const u16 *)row)[column]);
}

/* Eight elements from `column` on, a multiple of eight in rows that are multiples of eight: 16 bytes at once. */
CQ_DEVICE void eight_elements(const u8 *row, int column, float *out) {
    if constexpr (CQ_TYPE == CQ_F32) {
        const float4 low = *(const float4 *)(row + 4 * column), high = *(const float4 *)(row + 4 * column + 16);
        out[0] = low.x, out[1] = low.y, out[2] = low.z, out[3] = low.w;
        out[4] = high.x, out[5] = high.y, out[6] = high.z, out[7] = high.w;
    } else {
        const uint4 all = *(const uint4 *)(row + 2 * column);
        const u32 pairs[4] = {all.x, all.y, all.z, all.w};
        for (int i = 0; i < 8; i++) out[i] = from_half((u16)(pairs[i / 2] >> i % 2 * 16));
    }
}

CQ_DEVICE float dot_row(const cq_linear &op, const u8 *row, int in, int lane) {
    const float *x = op.x + (long long)in * op.w.n_cols;
    float sum = 0;
    if (op.w.n_cols % 8) {
#pragma unroll 8
        for (int i = lane; i < op.w.n_cols; i += 32) sum += element(row, i) * x[i];
        return sum;
    }
#pragma unroll 2
    for (int i = 8 * lane; i < op.w.n_cols; i += 256) {
        float w[8];
        eight_elements(row, i, w);
        const float4 low = *(const float4 *)(x + i), high = *(const float4 *)(x + i + 4);
        sum += w[0] * low.x + w[1] * low.y + w[2] * low.z + w[3] * low.w;
        sum += w[4] * high.x + w[5] * high.y + w[6] * high.z + w[7] * high.w;
    }
    return sum;
}
#endif

/* Grid: (n_rows / 4, items), 128 threads. */
extern "C" __global__ void __launch_bounds__(CQ_GEMV_THREADS) plain_gemv(const cq_linear op) {
    const int row = blockIdx.x * (CQ_GEMV_THREADS / 32) + threadIdx.x / 32, item = blockIdx.y, lane = threadIdx.x % 32;
    if (row >= op.w.n_rows) return; /* a whole warp */
    const int expert = matrix_of(op, item);
    if (expert < 0) return;
    const long long expert_row = (long long)expert * op.w.n_rows + row;
    const float sum = sum_lanes(dot_row(op, op.w.data + expert_row * row_bytes(op.w), input_row(op, item), lane), 32);
    if (lane == 0) store_output(op, sum, item, row);
}

#if CQ_TYPE != 8
/* to[column][i]: 16 columns of 64 rows; a thread takes four columns of one row. Past an end: zero. */
CQ_DEVICE void stage_weights(const u8 *row, int first, int n_cols, float *to) {
    const int i = threadIdx.x / 4;
#pragma unroll
    for (int j = threadIdx.x % 4; j < CQ_STEP; j += 4)
        to[j * CQ_PITCH + i] = row && first + j < n_cols ? element(row, first + j) : 0.0f;
}
CQ_DEVICE void stage_items(const float *row, int first, int n_cols, float *to) {
    const int i = threadIdx.x / 4;
#pragma unroll
    for (int j = threadIdx.x % 4; j < CQ_STEP; j += 4)
        to[j * CQ_PITCH + i] = row && first + j < n_cols ? row[first + j] : 0.0f;
}

/* Grid: (tiles, n_rows / 64), 256 threads. A thread sums rows 4 (thread % 16) .. + 3 and items 4 (thread / 16) .. + 3.
 */
extern "C" __global__ void __launch_bounds__(CQ_GEMM_THREADS, 2) plain_gemm(const cq_linear op) {
    CQ_SHARED(float, weights, CQ_STEP *CQ_PITCH);
    CQ_SHARED(float, items, CQ_STEP *CQ_PITCH);
    const cq_tile tile = tile_at(op, blockIdx.x);
    if (tile.expert < 0) return;
    const int row = blockIdx.y * CQ_TILE_ROWS + threadIdx.x / 4, item = tile.first + threadIdx.x / 4;
    const long long expert_row = (long long)tile.expert * op.w.n_rows + row;
    const u8 *w = row < op.w.n_rows ? op.w.data + expert_row * row_bytes(op.w) : nullptr;
    const float *x = nullptr;
    if (item < tile.last) x = op.x + (long long)input_row(op, output_row(op, tile, item)) * op.w.n_cols;
    const int row4 = threadIdx.x % 16 * 4, item4 = threadIdx.x / 16 * 4;
    float sums[4][4] = {};
    for (int first = 0; first < op.w.n_cols; first += CQ_STEP) {
        stage_weights(w, first, op.w.n_cols, weights);
        stage_items(x, first, op.w.n_cols, items);
        __syncthreads();
#pragma unroll
        for (int j = 0; j < CQ_STEP; j++)
#pragma unroll
            for (int i = 0; i < 16; i++)
                sums[i / 4][i % 4] += items[j * CQ_PITCH + item4 + i / 4] * weights[j * CQ_PITCH + row4 + i % 4];
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 16; i++) {
        const int to_row = blockIdx.y * CQ_TILE_ROWS + row4 + i % 4, from_item = tile.first + item4 + i / 4;
        if (to_row < op.w.n_rows && from_item < tile.last)
            store_output(op, sums[i / 4][i % 4], output_row(op, tile, from_item), to_row);
    }
}
#endif
