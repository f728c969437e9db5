/* What one instruction set provides to run a model: a table of kernels, cq_kernels. isa/list.h names the instruction
 * sets, each file of isa/ defines the tables of one or two, dispatch.c chooses. What clustering needs is a table of its
 * own (cluster_kernels.h). docs/adding-an-instruction-set.md says how to add one.
 *
 * The effective weight is an int8: W = centroid, or (centroid * group_scale + 64) >> 7 where the matrix has group
 * scales. With |W| <= 128 and |x| <= 127, a sum over n_cols <= CQ_MAX_COLS stays inside int32, also in the offset form
 * (W + 128) * x that unsigned-by-signed instructions need: 255 * 127 * 65536 < 2^31. */
#ifndef CQ_KERNELS_H
#define CQ_KERNELS_H
#include "../cuda/types.cuh"
#include "cq.h"
#include "isa/list.h"
#include <stddef.h>

#define CQ_INLINE static inline __attribute__((always_inline))

#define CQ_MAX_COLS 65536
#define CQ_BLOCK 64 /* weights per packed block: 8 * bits bytes */
#define CQ_MAX_HEAD_DIM 1024

#define CQ_MAX_CODEBOOK_ROWS 8 /* consecutive rows that share their codebooks */
#define CQ_MAX_CENTROIDS 32

/* Where a panel's products go: out[t][r] (+)= acc[t][r] * (row_scales[r] * token_scales[t]) for r < n_rows. */
typedef struct {
    float *const *out;
    const float *row_scales, *token_scales;
    int32_t n_rows, accumulate;
} cq_scaling;

/* Q8_0: a panel [n_blocks] of 32 columns each, and float scales [n_blocks][panel_rows]. */
typedef struct {
    const uint8_t *weights;
    const float *scales;
    int32_t n_blocks;
} cq_block_panel;

/* Tokens quantized per 32 columns: for each a pointer to its columns, and to its blocks' scales and sums. */
typedef struct {
    const int8_t *const *q;
    const float *const *scales;
    const int32_t *const *sums;
} cq_block_tokens;

typedef struct cq_kernels {
    int (*supported)(void); /* by the processor this runs on */

    /* ---- integers: exact, equal to the oracle in tests ---- */

    /* acc[n_rows]: rows row .. row + n_rows - 1 (counted over all experts) times x[n_cols]; x_sum = sum of x. */
    void (*gemv)(const cq_matrix *w, int64_t row, int32_t n_rows, const int8_t *x, int32_t x_sum, int32_t *acc);

    /* Decode n_rows <= panel_rows rows into a panel of cq_panel_bytes, in an order private to the file. */
    int32_t panel_rows, panel_head_bytes, panel_col_bytes;
    void (*decode_panel)(const cq_matrix *w, int64_t row, int32_t n_rows, uint8_t *panel);

    /* The same panel of int8 rows that are `stride` bytes apart, as zeros beyond n_rows; n_cols is a multiple of 32. */
    void (*pack_panel)(const int8_t *rows, int64_t stride, int32_t n_rows, int32_t n_cols, uint8_t *panel);

    /* acc[n_tokens][panel_rows], any n_tokens; n_cols a multiple of 16; x: a pointer per token, x_sum: a sum per token.
     */
    void (*gemm_panel)(const uint8_t *panel, int32_t n_cols, const int8_t *const *x, const int32_t *x_sum,
                       int32_t n_tokens, int32_t *acc);

    /* The same without a way through memory, acc being scratch as large; NULL: gemm_panel, then scale_acc. */
    void (*gemm_panel_scaled)(const uint8_t *panel, int32_t n_cols, const int8_t *const *x, const int32_t *x_sum,
                              int32_t n_tokens, int32_t *acc, const cq_scaling *to);

    /* dots[n_tokens][panel_rows], any n_tokens; NULL: gemm_panel of a block, then scale_acc, block after block. */
    void (*gemm_blocks)(const cq_block_panel *panel, const cq_block_tokens *tokens, int32_t n_tokens, float *dots);

    /* One row of Q8_0 blocks (F16 scale, 32 int8) times activations quantized per 32 columns. */
    float (*dot_q8_0)(const uint8_t *blocks, const int8_t *q, const float *scales, int32_t n_cols);

    /* Runs a fixed loop of int8 multiply-adds in registers; returns how many it made. */
    int64_t (*peak_macs)(int32_t iterations);

    /* ---- floats: isa/template/float_ops.h and attention.h, compiled for this instruction set ---- */
    void (*rms_norm)(const float *x, const float *weight, float *out, int32_t n, float eps);
    void (*quantize)(const float *x, int32_t n, int32_t bits, int32_t group, int8_t *q, float *scales, int32_t *sums);
    void (*swiglu)(const float *gate, const float *up, float *out, int32_t n);
    /* Rotates the pairs of x[n_rot] in place: (2i, 2i + 1) if interleaved, else (i, i + n_rot / 2); cos_sin as pairs.
     */
    void (*rope)(float *x, const float *cos_sin, int32_t n_rot, int32_t interleaved);
    void (*hadamard)(float *x, int32_t n, int32_t block);       /* in place, each block of columns */
    void (*axpy)(float a, const float *x, float *y, int32_t n); /* y += a x */
    void (*scale_acc)(const int32_t *acc, const float *row_scales, float token_scale, float *out, int32_t n,
                      int32_t accumulate);
    /* dot[n_tokens] of one F32 or F16 row with float activations */
    void (*dot_f32)(const float *w, const float *const *x, int32_t n_tokens, int32_t n_cols, float *dot);
    void (*dot_f16)(const uint16_t *w, const float *const *x, int32_t n_tokens, int32_t n_cols, float *dot);
    void (*f16_to_f32)(const uint16_t *x, float *out, int32_t n);
    void (*f32_to_f16)(const float *x, uint16_t *out, int32_t n);
    /* Attention of n_queries consecutive positions, the first at position `position`, of n_heads <= CQ_TILE_HEADS heads
     * from `head` on that share keys and values; q and out are those of the first head, strided. */
    void (*attention_heads)(const cq_attention *op, int32_t head, int32_t n_heads, int32_t position, int32_t n_queries,
                            const float *q, float *out, float *scratch);
    /* One token's queries q[n_heads][head_dim] of heads `head` .. that share keys and values, over keys first .. end
     * - 1. partials, `stride` floats per head: sum of 2^(score - m) * value [value_dim], the largest score m, sum of
     * 2^(score - m); scores are times log2 e. At most CQ_QUERY_TILE heads. */
    void (*attention_chunk)(const cq_attention *op, int32_t head, int32_t n_heads, int32_t first, int32_t end,
                            const float *q, float *partials, int64_t stride, float *scratch);
} cq_kernels;

#define CQ_DECLARE(symbol, name, clustering, compiled) extern const cq_kernels cq_kernels_##symbol;
CQ_INSTRUCTION_SETS(CQ_DECLARE)
#undef CQ_DECLARE

/* The table of the set in use; NULL if CQ_ISA in the environment names none. */
const cq_kernels *cq_kernels_current(void);

/* Of a type, from the table in types.cuh: bits per weight in the file and, lowest, whether it has a trellis; 0 for a
 * type that is not clustered. A constant where the type is one. */
CQ_INLINE int32_t cq_type_properties(int32_t type) {
    switch (type) {
#define CQ_CASE(name, id, bits, trellis)                                                                               \
    case name:                                                                                                         \
        return 2 * bits + trellis;
        CQ_CLUSTERED_TYPES(CQ_CASE)
#undef CQ_CASE
    default:
        return 0;
    }
}
#define CQ_ASSERT_SAME(name, id, bits, trellis) _Static_assert(name == id, "cq.h and types.cuh differ");
CQ_CLUSTERED_TYPES(CQ_ASSERT_SAME)
#undef CQ_ASSERT_SAME

CQ_INLINE int cq_is_clustered(int32_t type) { return cq_type_properties(type) != 0; }
CQ_INLINE int32_t cq_stored_bits(int32_t type) { return cq_type_properties(type) >> 1; }
CQ_INLINE int cq_has_trellis(int32_t type) { return cq_type_properties(type) & 1; }
/* Of the index into a codebook: one more with a trellis. */
CQ_INLINE int32_t cq_index_bits(int32_t type) { return cq_stored_bits(type) + cq_has_trellis(type); }

static inline int32_t cq_min(int32_t a, int32_t b) { return a < b ? a : b; }
static inline int32_t cq_ceil_div(int32_t a, int32_t b) { return (a + b - 1) / b; }
static inline int64_t cq_panel_bytes(const cq_kernels *kernels, int32_t n_cols) {
    return kernels->panel_head_bytes + (int64_t)kernels->panel_col_bytes * n_cols;
}
static inline int64_t cq_align64(int64_t bytes) { return (bytes + 63) & ~(int64_t)63; }

static inline int32_t cq_first_key(const cq_attention *op, int32_t position) {
    return op->window > 0 && position >= op->window ? position - op->window + 1 : 0;
}

/* Floats that attention needs for scratch. */
enum { CQ_QUERY_TILE = 32, CQ_KEY_TILE = 64, CQ_TILE_HEADS = 4 };
static inline int32_t cq_attention_tile_width(const cq_attention *op) {
    return op->head_dim > op->value_dim ? op->head_dim : op->value_dim;
}
static inline size_t cq_attention_scratch_floats(const cq_attention *op) {
    return 2 * (size_t)CQ_KEY_TILE * cq_attention_tile_width(op) + (size_t)CQ_QUERY_TILE * CQ_KEY_TILE +
           CQ_TILE_HEADS * (size_t)CQ_QUERY_TILE * (op->head_dim + 3);
}
#endif
