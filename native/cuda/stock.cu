/* F32, F16 and Q8_0 matrices (CQ_TYPE), as they lie in the file.
 *
 *     out[item][row] = sum over columns of W[row][column] * x[item][column]
 *
 * stock_gemv: a warp a row and item, lanes side by side in the row; Q8_0 eight lanes a block of 32, four weights each,
 * int32 within the four, float beyond. stock_gemm (F32 and F16; gemm.cu has Q8_0): float tiles of 32 rows by 32 items,
 * as a router's few rows would fill few multiprocessors otherwise, in steps of 32 columns, 4 x 4 sums a thread. Sums of
 * floats: the order differs from the CPU's, so results do in the last places. */
#include "common.cuh"

enum {
    CQ_ELEMENT_BYTES = CQ_TYPE == CQ_F32 ? 4 : 2,
    CQ_GEMV_THREADS = 128,
    CQ_GEMM_THREADS = 256,
    CQ_TILE_ROWS = 32, /* and as many items */
    CQ_STEP = 32,
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
#pragma unroll 4
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
extern "C" __global__ void __launch_bounds__(CQ_GEMV_THREADS) stock_gemv(const cq_linear op) {
    const int row = blockIdx.x * (CQ_GEMV_THREADS / 32) + threadIdx.x / 32, item = blockIdx.y, lane = threadIdx.x % 32;
    if (row >= op.w.n_rows) return; /* a whole warp */
    const int expert = matrix_of(op, item);
    if (expert < 0) return;
    const long long expert_row = (long long)expert * op.w.n_rows + row;
    const float sum = sum_lanes(dot_row(op, op.w.data + expert_row * row_bytes(op.w), input_row(op, item), lane), 32);
    if (lane == 0) store_output(op, sum, item, row);
}

#if CQ_TYPE != 8
/* Four columns of a row, zero past its end or without one (NULL). */
CQ_DEVICE float4 four_weights(const u8 *row, int column, int n_cols) {
    if (!row || column >= n_cols) return make_float4(0, 0, 0, 0);
    if (n_cols % 4) {
        float four[4];
        for (int j = 0; j < 4; j++) four[j] = column + j < n_cols ? element(row, column + j) : 0.0f;
        return make_float4(four[0], four[1], four[2], four[3]);
    }
    if constexpr (CQ_TYPE == CQ_F32) return *(const float4 *)(row + 4 * column);
    const uint2 pairs = *(const uint2 *)(row + 2 * column);
    return make_float4(from_half((u16)pairs.x), from_half((u16)(pairs.x >> 16)), from_half((u16)pairs.y),
                       from_half((u16)(pairs.y >> 16)));
}
CQ_DEVICE float4 four_items(const float *row, int column, int n_cols) {
    if (!row || column >= n_cols) return make_float4(0, 0, 0, 0);
    if (n_cols % 4 == 0) return *(const float4 *)(row + column);
    float four[4];
    for (int j = 0; j < 4; j++) four[j] = column + j < n_cols ? row[column + j] : 0.0f;
    return make_float4(four[0], four[1], four[2], four[3]);
}

/* A step in shared memory is [column][i], 32 weight rows or items, so that a thread reads four i of a column at once.
 * Where i lies depends on the column: lanes that store eight times four columns of four rows reach 32 banks. */
CQ_DEVICE int place_in_step(int column, int i) { return column * CQ_TILE_ROWS + (i ^ 4 * (column / 4)); }

CQ_DEVICE void store_columns(float *step, int column, int i, const float4 &four) {
    step[place_in_step(column, i)] = four.x, step[place_in_step(column + 1, i)] = four.y;
    step[place_in_step(column + 2, i)] = four.z, step[place_in_step(column + 3, i)] = four.w;
}

/* sums[item][row] += the products of a quarter of a step's columns. */
CQ_DEVICE void multiply_columns(const float *weights, const float *items, int quarter, int row, int item,
                                float (*sums)[4]) {
#pragma unroll
    for (int j = 0; j < CQ_STEP / 4; j++) {
        const int column = quarter * (CQ_STEP / 4) + j;
        const float4 w = *(const float4 *)(weights + place_in_step(column, row));
        const float4 x = *(const float4 *)(items + place_in_step(column, item));
        const float ws[4] = {w.x, w.y, w.z, w.w}, xs[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (int i = 0; i < 16; i++) sums[i / 4][i % 4] += xs[i / 4] * ws[i % 4];
    }
}

/* Grid: (tiles, n_rows / 32, 2: halves of a tile), 256 threads. A quarter of the threads sums a quarter of each step's
 * columns: of rows 4 (thread % 8) .. + 3 and items 4 (thread / 8 % 8) .. + 3. While one step is multiplied, the next
 * one is on its way to registers, and then to the other half of shared memory. */
extern "C" __global__ void __launch_bounds__(CQ_GEMM_THREADS, 2) stock_gemm(const cq_linear op) {
    CQ_SHARED(float, shared,
              4 * CQ_STEP * CQ_TILE_ROWS); /* [2] weights and items of a step; at last the quarters' sums */
    const cq_tile tile = tile_at(op, blockIdx.x);
    const int first_item = tile.first + blockIdx.z * CQ_TILE_ROWS, first_row = blockIdx.y * CQ_TILE_ROWS;
    if (tile.expert < 0 || first_item >= tile.last) return;
    const int i = threadIdx.x / 8, column = threadIdx.x % 8 * 4, n_cols = op.w.n_cols;
    const long long expert_row = (long long)tile.expert * op.w.n_rows + first_row + i;
    const u8 *w = first_row + i < op.w.n_rows ? op.w.data + expert_row * row_bytes(op.w) : nullptr;
    const float *x = nullptr;
    if (first_item + i < tile.last)
        x = op.x + (long long)input_row(op, output_row(op, tile, first_item + i)) * op.w.n_cols;
    const int quarter = threadIdx.x / 64, row4 = threadIdx.x % 8 * 4, item4 = threadIdx.x / 8 % 8 * 4;
    float sums[4][4] = {};
    float4 next_w = four_weights(w, column, n_cols), next_x = four_items(x, column, n_cols);
    for (int first = 0, half = 0; first < n_cols; first += CQ_STEP, half ^= 1) {
        float *weights = shared + half * 2 * CQ_STEP * CQ_TILE_ROWS, *items = weights + CQ_STEP * CQ_TILE_ROWS;
        store_columns(weights, column, i, next_w), store_columns(items, column, i, next_x);
        next_w = four_weights(w, first + CQ_STEP + column, n_cols);
        next_x = four_items(x, first + CQ_STEP + column, n_cols);
        __syncthreads(); /* the step is there, and nobody reads the one before it any more */
        multiply_columns(weights, items, quarter, row4, item4, sums);
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < 4; j++)
        *(float4 *)(shared + ((quarter * CQ_TILE_ROWS) + item4 + j) * CQ_TILE_ROWS + row4) =
            make_float4(sums[j][0], sums[j][1], sums[j][2], sums[j][3]);
    __syncthreads();
    for (int at = threadIdx.x; at < CQ_TILE_ROWS * CQ_TILE_ROWS; at += CQ_GEMM_THREADS) {
        const int item = first_item + at / CQ_TILE_ROWS, row = first_row + at % CQ_TILE_ROWS;
        float sum = 0;
        for (int part = 0; part < 4; part++) sum += shared[part * CQ_TILE_ROWS * CQ_TILE_ROWS + at];
        if (row < op.w.n_rows && item < tile.last) store_output(op, sum, output_row(op, tile, item), row);
    }
}
#endif
