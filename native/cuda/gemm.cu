/* LUT GEMM: tiles of 128 weight rows by 64 tokens or slots, in steps of 64 columns.
 *
 *     out[item][row] = scales[row] * x_scale * sum over columns of W8[row][column] * q[item][column]
 *
 * Each step decodes 128 x 64 weights to int8 in shared memory, two threads a row (codebook.cuh), beside 64 x 64
 * activations, and multiplies them on the integer tensor cores; CQ_DP4A: with dp4a, for chips without. Both arrays are
 * double: while one step is multiplied, the next one's activations are copied (cp.async) and its indices are on
 * their way to registers. Rows of shared memory are 80 bytes apart, so that eight rows' 16-byte pieces lie in different
 * banks. Eight warps multiply 32 x 32 each.
 *
 * One launch serves all experts of a layer: block (x, y) takes tile x of the items (common.cuh) and rows 128 y ..
 *
 * CQ types: int32 over the whole row, |sum| <= 128 * 127 * 65536 < 2^31. Q8_0: int32 over 32 columns, one tensor core
 * instruction deep, then float: sum += acc * (weight scale * activation scale).
 *
 * Grid: (tiles, n_rows / 128, matrices), 256 threads. */
#if CQ_TYPE == 8
#include "common.cuh"
#else
#include "codebook.cuh"
#endif

enum {
    CQ_IS_Q8_0 = CQ_TYPE == CQ_Q8_0,
    CQ_THREADS = 256,
    CQ_TILE_ROWS = 128,
    CQ_STEP = 64,
    CQ_PITCH = 80,
    CQ_WARP_ROWS = 32,
    CQ_WARP_TOKENS = 32,
    CQ_ROW_TILES = 2,
    CQ_TOKEN_TILES = 4, /* of 16 x 8, in a warp's tile */
};

/* One step in shared memory. */
struct cq_stage {
    i8 *weights;                         /* [CQ_TILE_ROWS][CQ_PITCH] */
    i8 *tokens;                          /* [CQ_TILE_TOKENS][CQ_PITCH] */
    float *weight_scales, *token_scales; /* Q8_0: [CQ_TILE_ROWS][2], [CQ_TILE_TOKENS][2] */
};

/* The stage of a step, of the two that lie one after the other. */
CQ_DEVICE cq_stage stage_of(const cq_stage &first, int step) {
    const int i = step % 2;
    return {first.weights + i * CQ_TILE_ROWS * CQ_PITCH, first.tokens + i * CQ_TILE_TOKENS * CQ_PITCH,
            first.weight_scales + i * 2 * CQ_TILE_ROWS, first.token_scales + i * 2 * CQ_TILE_TOKENS};
}

/* What a thread of a warp sums: element e of tiles m, n is d[e] of matrix_multiply. */
#if CQ_TYPE == 8
typedef float cq_sum;
#else
typedef int cq_sum;
#endif
struct cq_sums {
    cq_sum of[CQ_ROW_TILES][CQ_TOKEN_TILES][4];
};

/* ---- half a row of a step: loaded to registers, later stored to shared memory ---- */

#if CQ_TYPE == 8
struct cq_fetched {
    u32 words[8];
    float scale;
};
struct cq_source {
    const u8 *row;
    int half, n_blocks;
};

CQ_DEVICE cq_source source_of(const cq_matrix &w, int expert, int row, int half) {
    const int n_blocks = w.n_cols / CQ_Q8_0_COLS;
    return {w.data + ((long long)expert * w.n_rows + row) * n_blocks * CQ_Q8_0_BYTES, half, n_blocks};
}

/* Half a step is one block of Q8_0; a row may end after the first half. */
CQ_DEVICE cq_fetched fetch_weights(const cq_source &s, int step) {
    cq_fetched f = {};
    const int block = 2 * step + s.half;
    if (block >= s.n_blocks) return f;
    const u8 *bytes = s.row + (long long)block * CQ_Q8_0_BYTES;
    f.scale = from_half(*(const u16 *)bytes);
#pragma unroll
    for (int i = 0; i < 8; i++) f.words[i] = load_word(bytes + 2 + 4 * i);
    return f;
}

CQ_DEVICE void store_weights(const cq_source &s, const cq_fetched &f, int row, const cq_stage &stage) {
    uint4 *to = (uint4 *)(stage.weights + row * CQ_PITCH + 32 * s.half);
    to[0] = make_uint4(f.words[0], f.words[1], f.words[2], f.words[3]);
    to[1] = make_uint4(f.words[4], f.words[5], f.words[6], f.words[7]);
    stage.weight_scales[2 * row + s.half] = f.scale;
}
#else
struct cq_fetched {
    cq_half own, above, above2;
    u32 codebook[CQ_TABLE], group_scale;
};
struct cq_source {
    cq_reader r;
    int half, row, row_1, row_2; /* and the rows above */
};

CQ_DEVICE cq_source source_of(const cq_matrix &w, int expert, int row, int half) {
    cq_source s = {reader_of(w, expert), half, row, row, row};
    if (CQ_TRELLIS) s.row_1 = row_above(s.r, row, 1), s.row_2 = row_above(s.r, row, 2);
    return s;
}

CQ_DEVICE cq_fetched fetch_weights(const cq_source &s, int step) {
    cq_fetched f;
    f.own = f.above = f.above2 = load_half(block_at(s.r, s.row, step), s.half);
    if (CQ_TRELLIS) f.above = load_half(block_at(s.r, s.row_1, step), s.half);
    if (CQ_TRELLIS) f.above2 = load_half(block_at(s.r, s.row_2, step), s.half);
    const cq_columns columns = columns_of(s.r, step);
    load_codebook(codebook_at(s.r, s.row, columns), f.codebook);
    f.group_scale = group_scale_at(s.r, s.row, columns);
    return f;
}

/* The look-ups of an index word interleave columns j .. and j + 32 ..; two more permutes part them. */
CQ_DEVICE void store_weights(const cq_source &s, const cq_fetched &f, int row, const cq_stage &stage) {
    u32 table[CQ_TABLE], low[4], high[4];
    scale_codebook(f.codebook, f.group_scale, table);
    table_to_signed(table, f.group_scale);
#pragma unroll
    for (int k = 0; k < 4; k++) {
        u32 upper;
        const u32 index = index_word(f.own, f.above, f.above2, s.half, k, &upper);
        const u32 first = look_up(table, index, upper), second = look_up(table, index >> 16, upper >> 16);
        low[k] = byte_permute(first, second, 0x6420), high[k] = byte_permute(first, second, 0x7531);
    }
    uint4 *to = (uint4 *)(stage.weights + row * CQ_PITCH + 16 * s.half);
    to[0] = make_uint4(low[0], low[1], low[2], low[3]);
    to[2] = make_uint4(high[0], high[1], high[2], high[3]);
}
#endif

/* ---- activations ---- */

/* A thread copies one 16-byte piece of one token; tokens past the tile's end and columns past the row's are zero. */
CQ_DEVICE void copy_tokens(const cq_linear &op, int in, int step, const cq_stage &stage) {
    const int token = threadIdx.x / 4, column = step * CQ_STEP + threadIdx.x % 4 * 16;
    const bool valid = in >= 0 && column < op.w.n_cols;
    copy_async(stage.tokens + token * CQ_PITCH + threadIdx.x % 4 * 16,
               valid ? op.q + (long long)in * op.w.n_cols + column : op.q, valid);
    if (CQ_IS_Q8_0 && threadIdx.x % 4 < 2) {
        const int block = 2 * step + threadIdx.x % 4, n_blocks = op.w.n_cols / CQ_Q8_0_COLS;
        const bool inside = in >= 0 && block < n_blocks;
        stage.token_scales[2 * token + threadIdx.x % 4] = inside ? op.scales[(long long)in * n_blocks + block] : 0.0f;
    }
}

/* ---- the multiplication of one step ---- */

/* acc of 32 columns from column k on: 32 rows from `row` on times 32 tokens from `token` on. */
CQ_DEVICE void multiply(const cq_stage &stage, int row, int token, int k, int (*acc)[CQ_TOKEN_TILES][4]) {
    const int lane = threadIdx.x % 32;
#ifdef CQ_DP4A
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int word = 0; word < 8; word++) {
        u32 w[4], x[2 * CQ_TOKEN_TILES];
#pragma unroll
        for (int i = 0; i < 4; i++) w[i] = *(const u32 *)(stage.weights + (row + 8 * i + g) * CQ_PITCH + k + 4 * word);
#pragma unroll
        for (int i = 0; i < 2 * CQ_TOKEN_TILES; i++)
            x[i] = *(const u32 *)(stage.tokens + (token + i / 2 * 8 + 2 * t + i % 2) * CQ_PITCH + k + 4 * word);
#pragma unroll
        for (int i = 0; i < 16 * CQ_ROW_TILES; i++) {
            const int m = i / 16, n = i / 4 % 4, e = i % 4;
            acc[m][n][e] = dot_signed(w[2 * m + e / 2], x[2 * n + e % 2], acc[m][n][e]);
        }
    }
#else
    u32 a[CQ_ROW_TILES][4], b[CQ_TOKEN_TILES / 2][4];
#pragma unroll
    for (int m = 0; m < CQ_ROW_TILES; m++) /* rows 0-7 and 8-15, then the same 16 bytes on */
        load_matrices(a[m], stage.weights + (row + 16 * m + lane % 16) * CQ_PITCH + k + lane / 16 * 16);
#pragma unroll
    for (int n = 0; n < CQ_TOKEN_TILES / 2; n++) /* both halves of tokens 0-7, then of 8-15 */
        load_matrices(b[n],
                      stage.tokens + (token + 16 * n + lane / 16 * 8 + lane % 8) * CQ_PITCH + k + lane / 8 % 2 * 16);
#pragma unroll
    for (int m = 0; m < CQ_ROW_TILES; m++)
#pragma unroll
        for (int n = 0; n < CQ_TOKEN_TILES; n++) matrix_multiply(acc[m][n], a[m], b[n / 2] + n % 2 * 2);
#endif
}

/* Row and token, in the warp's tile, of element e of tiles m, n. */
CQ_DEVICE int row_of(int m, int e) { return 16 * m + threadIdx.x % 32 / 4 + e / 2 * 8; }
CQ_DEVICE int token_of(int n, int e) { return 8 * n + threadIdx.x % 4 * 2 + e % 2; }

CQ_DEVICE void multiply_step(const cq_stage &stage, int row, int token, cq_sums &sums) {
#if CQ_TYPE == 8
#pragma unroll
    for (int block = 0; block < 2; block++) {
        int acc[CQ_ROW_TILES][CQ_TOKEN_TILES][4] = {};
        multiply(stage, row, token, block * CQ_Q8_0_COLS, acc);
#pragma unroll
        for (int i = 0; i < 16 * CQ_ROW_TILES; i++) {
            const int m = i / 16, n = i / 4 % 4, e = i % 4;
            const float scale = stage.weight_scales[2 * (row + row_of(m, e)) + block] *
                                stage.token_scales[2 * (token + token_of(n, e)) + block];
            sums.of[m][n][e] += (float)acc[m][n][e] * scale;
        }
    }
#else
    multiply(stage, row, token, 0, sums.of);
    multiply(stage, row, token, 32, sums.of);
#endif
}

CQ_DEVICE void store_tile(const cq_linear &op, const cq_tile &tile, int first_row, int first_token,
                          const cq_sums &sums) {
#pragma unroll
    for (int i = 0; i < 2 * CQ_TOKEN_TILES; i++) {
        const int n = i / 2, item = tile.first + first_token + token_of(n, i % 2);
        if (item >= tile.last) continue;
        const int to = output_row(op, tile, item);
        const float token_scale = CQ_IS_Q8_0 ? 1.0f : op.scales[input_row(op, to)];
#pragma unroll
        for (int j = 0; j < 2 * CQ_ROW_TILES; j++) {
            const int m = j / 2, e = j % 2 * 2 + i % 2, row = first_row + row_of(m, e);
            if (row >= op.w.n_rows) continue;
            if constexpr (CQ_IS_Q8_0)
                store_output(op, sums.of[m][n][e], to, row);
            else
                store_integer(op, sums.of[m][n][e], token_scale, to, row, (long long)tile.expert * op.w.n_rows + row);
        }
    }
}

extern "C" __global__ void __launch_bounds__(CQ_THREADS) gemm(const cq_linears ops) {
    const cq_linear &op = ops.of[blockIdx.z];
    CQ_SHARED(i8, weights, 2 * CQ_TILE_ROWS * CQ_PITCH);
    CQ_SHARED(i8, tokens, 2 * CQ_TILE_TOKENS * CQ_PITCH);
    CQ_SHARED(float, weight_scales, CQ_IS_Q8_0 ? 4 * CQ_TILE_ROWS : 1);
    CQ_SHARED(float, token_scales, CQ_IS_Q8_0 ? 4 * CQ_TILE_TOKENS : 1);
    const cq_tile tile = tile_at(op, blockIdx.x);
    if (tile.expert < 0 || (int)blockIdx.y * CQ_TILE_ROWS >= op.w.n_rows) return;
    const cq_stage first = {weights, tokens, weight_scales, token_scales};
    const int weight_row = threadIdx.x / 2, item = tile.first + threadIdx.x / 4,
              n_steps = ceil_div(op.w.n_cols, CQ_STEP);
    const int in = item < tile.last ? input_row(op, output_row(op, tile, item)) : -1;
    const int row =
        min_int(blockIdx.y * CQ_TILE_ROWS + weight_row, op.w.n_rows - 1); /* past the end: decoded in vain */
    const cq_source source = source_of(op.w, tile.expert, row, threadIdx.x % 2);
    const int warp = threadIdx.x / 32, warp_row = warp % 4 * CQ_WARP_ROWS, warp_token = warp / 4 * CQ_WARP_TOKENS;
    const bool idle = tile.first + warp_token >= tile.last;
    cq_sums sums = {};
    copy_tokens(op, in, 0, first);
    store_weights(source, fetch_weights(source, 0), weight_row, first);
    for (int step = 0; step < n_steps; step++) {
        const cq_stage now = stage_of(first, step), next = stage_of(first, step + 1);
        const bool more = step + 1 < n_steps;
        cq_fetched fetched;
        copy_wait();
        __syncthreads(); /* this step is complete, and no thread reads the previous one any more */
        if (more) copy_tokens(op, in, step + 1, next);
        if (more) fetched = fetch_weights(source, step + 1);
        if (!idle) multiply_step(now, warp_row, warp_token, sums);
        if (more) store_weights(source, fetched, weight_row, next);
    }
    /* The tile anew: kept in registers through the loop it makes Q8_0 spill. */
    store_tile(op, tile_at(op, blockIdx.x), blockIdx.y * CQ_TILE_ROWS + warp_row, warp_token, sums);
}
