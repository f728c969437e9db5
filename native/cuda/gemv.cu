/* LUT GEMV: one token (or a few slots of experts) times a clustered matrix.
 *
 *     out[item][row] = scales[row] * x_scale * sum over columns of W8[row][column] * q[item][column]
 *
 * `team` neighbouring threads share CQ_GEMV_ROWS rows, so sets of rows that share codebooks never straddle; each takes
 * every team-th half block of columns (codebook.cuh) of all of them. Its columns of q stay in registers, permuted to
 * the order in which a byte permute delivers weights. Per row: the codebook, scaled by the group's scale, as a table in
 * registers; four look-ups per byte permute (three permutes for 16 entries); dp4a. Memory is read once: 16 bytes per
 * thread where blocks allow it, all rows' indices ahead of their use. A trellis reads its set's last two rows again,
 * from the first-level cache.
 *
 * The sum uses offset weights u8 <= 255 and subtracts g * sum(q): |sum| <= 255 * 127 * 65536 < 2^31.
 *
 * Grid: (n_rows / (CQ_GEMV_ROWS * 128 / team), items, matrices), 128 threads. */
#include "codebook.cuh"

enum { CQ_GEMV_THREADS = 128, CQ_GEMV_ROWS = 8, CQ_GEMV_AHEAD = CQ_TYPE == CQ_CQ5 ? 4 : 8 };

/* q of one half block: words 2k and 2k + 1 belong to the two look-ups of index word k. Returns their sum. */
CQ_DEVICE int load_activations(const i8 *q, int half, u32 *x) {
    const uint4 low = *(const uint4 *)(q + 16 * half), high = *(const uint4 *)(q + 32 + 16 * half);
    const u32 lows[4] = {low.x, low.y, low.z, low.w}, highs[4] = {high.x, high.y, high.z, high.w};
    int sum = 0;
    for (int k = 0; k < 4; k++) {
        x[2 * k] = byte_permute(lows[k], highs[k], 0x5140);
        x[2 * k + 1] = byte_permute(lows[k], highs[k], 0x7362);
        sum = dot_unsigned(0x01010101u, lows[k], dot_unsigned(0x01010101u, highs[k], sum));
    }
    return sum;
}

CQ_DEVICE int dot_half(const u32 *table, const cq_half &own, const cq_half &above, const cq_half &above2, int half,
                       const u32 *x, int sum) {
    for (int k = 0; k < 4; k++) {
        u32 upper;
        const u32 index = index_word(own, above, above2, half, k, &upper);
        sum = dot_unsigned(look_up(table, index, upper), x[2 * k], sum);
        sum = dot_unsigned(look_up(table, index >> 16, upper >> 16), x[2 * k + 1], sum);
    }
    return sum;
}

/* Adds the products of one half block to sums[CQ_GEMV_ROWS]. Rows past the end repeat the last one. */
CQ_DEVICE void add_half(const cq_reader &r, int first_row, int block, int half, const i8 *q, int *sums) {
    cq_half rows[CQ_GEMV_AHEAD], above = {}, above2 = {};
    u32 x[8], codebook[CQ_TABLE], table[CQ_TABLE];
    const int x_sum = load_activations(q + block * CQ_BLOCK, half, x);
    const cq_columns columns = columns_of(r, block);
#pragma unroll
    for (int i = 0; i < CQ_GEMV_ROWS; i++) {
#pragma unroll
        for (int j = i; i % CQ_GEMV_AHEAD == 0 && j < i + CQ_GEMV_AHEAD; j++)
            rows[j - i] = load_half(block_at(r, min_int(first_row + j, r.n_rows - 1), block), half);
        const cq_half &own = rows[i % CQ_GEMV_AHEAD];
        const int row = min_int(first_row + i, r.n_rows - 1);
        if ((i & (r.codebook_rows - 1)) == 0) { /* a set begins */
            load_codebook(codebook_at(r, row, columns), codebook);
            if (CQ_TRELLIS) above = load_half(block_at(r, row_above(r, row, 1), block), half);
            if (CQ_TRELLIS) above2 = load_half(block_at(r, row_above(r, row, 2), block), half);
        }
        const u32 g = group_scale_at(r, row, columns);
        scale_codebook(codebook, g, table);
        sums[i] = dot_half(table, own, above, above2, half, x, sums[i]) - (int)g * x_sum;
        above2 = above, above = own;
    }
}

/* Of member i < CQ_GEMV_ROWS the sum of row i over the `team` threads that share rows: within warps, then over them.
 * All threads call it. */
CQ_DEVICE int sum_of_row(const int *sums, int team, int *shared) {
    const int member = threadIdx.x % min_int(team, 32), warp = threadIdx.x / 32;
    int mine = 0;
#pragma unroll
    for (int i = 0; i < CQ_GEMV_ROWS; i++) {
        const int sum = sum_lanes(sums[i], min_int(team, 32));
        mine = member == i ? sum : mine;
    }
    if (team <= 32) return mine;
    if (member < CQ_GEMV_ROWS) shared[warp * CQ_GEMV_ROWS + member] = mine;
    __syncthreads();
    const int first = warp / (team / 32) * (team / 32); /* warp of the group */
    mine = 0;
    for (int i = 0; i < team / 32; i++) mine += shared[(first + i) * CQ_GEMV_ROWS + member % CQ_GEMV_ROWS];
    return mine;
}

/* team: 8 to 128, so that member i of a team stores row i. Three blocks at once on a multiprocessor: 168 registers.
 */
extern "C" __global__ void __launch_bounds__(CQ_GEMV_THREADS, 3) gemv(const cq_linears ops, int team) {
    CQ_SHARED(int, shared, CQ_GEMV_THREADS / 32 * CQ_GEMV_ROWS);
    const cq_linear &op = ops.of[blockIdx.z];
    const int group = (blockIdx.x * CQ_GEMV_THREADS + threadIdx.x) / team, member = threadIdx.x % team;
    const int first_row = group * CQ_GEMV_ROWS, item = blockIdx.y, expert = matrix_of(op, item);
    if (expert < 0 || (int)blockIdx.x * CQ_GEMV_THREADS / team * CQ_GEMV_ROWS >= op.w.n_rows) return;
    const cq_reader r = reader_of(op.w, expert);
    const i8 *q = op.q + (long long)input_row(op, item) * op.w.n_cols;
    int sums[CQ_GEMV_ROWS] = {0};
    for (int half = member; half < op.w.n_cols / 32; half += team) add_half(r, first_row, half / 2, half % 2, q, sums);
    const int sum = sum_of_row(sums, team, shared), row = first_row + member;
    if (member >= CQ_GEMV_ROWS || row >= op.w.n_rows) return;
    /* The expert anew: kept in a register through the loop it makes CQ5 spill. */
    const int of = matrix_of(op, blockIdx.y);
    store_integer(op, sum, op.scales[input_row(op, blockIdx.y)], blockIdx.y, row, (long long)of * op.w.n_rows + row);
}
