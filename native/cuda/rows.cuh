/* What kernels of rows share: a block's sums, and rows in steps of four floats. */
#ifndef CQ_ROWS_CUH
#define CQ_ROWS_CUH
#include "common.cuh"

enum {
    CQ_ROW_THREADS = 256,
    CQ_PART = 4 * CQ_ROW_THREADS, /* columns of a row that a block takes at once, four a thread */
    CQ_KEPT = 4,                  /* parts of a row that stay in registers from one pass to the next */
};

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

/* Columns i .. i + 3 of a row [n] at a multiple of 4 floats if n is one; zero past the end. */
CQ_DEVICE void load_four(const float *row, int i, int n, float *four) {
    if (n % 4 == 0) {
        const float4 all = *(const float4 *)(row + i);
        four[0] = all.x, four[1] = all.y, four[2] = all.z, four[3] = all.w;
    } else {
        for (int j = 0; j < 4; j++) four[j] = i + j < n ? row[i + j] : 0.0f;
    }
}
CQ_DEVICE void store_four(float *row, int i, int n, const float *four) {
    if (n % 4 == 0) {
        *(float4 *)(row + i) = make_float4(four[0], four[1], four[2], four[3]);
    } else {
        for (int j = 0; j < 4 && i + j < n; j++) row[i + j] = four[j];
    }
}
#endif
