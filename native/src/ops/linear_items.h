/* What the kinds of linear layers share: which rows an expert reads and writes, and the bytes of a weight row. */
#ifndef CQ_LINEAR_ITEMS_H
#define CQ_LINEAR_ITEMS_H
#include "ops/worker.h"

enum {
    CQ_TOKEN_TILE =
        48, /* tokens whose accumulators are kept before they are scaled: a multiple of every kernel's tile */
    CQ_GEMV_MAX_TOKENS = 4, /* up to here reading the weights once per token costs less than decoding a panel */
    CQ_MAX_PANEL_ROWS = 64,
    CQ_Q8_0_COLS = 32, /* columns of a Q8_0 block: an F16 scale and as many int8 */
    CQ_Q8_0_BYTES = 34,
};

/* The tokens that one expert (or the only matrix) multiplies: item i reads row input(i) and writes row output(i). */
typedef struct {
    const cq_linear *op;
    const int32_t *slots; /* NULL: item i is row first + i * step */
    int32_t n, first, step;
} cq_items;

static inline int32_t cq_output_row(const cq_items *it, int32_t i) {
    return it->slots ? it->slots[i] : it->first + i * it->step;
}

static inline int32_t cq_input_row(const cq_items *it, int32_t i) {
    const int32_t row = cq_output_row(it, i);
    return it->op->gather ? row / it->op->routing->top_k : row;
}

static inline float *cq_output(const cq_items *it, int32_t i, int32_t col) {
    return it->op->out + (int64_t)cq_output_row(it, i) * it->op->w->n_rows + col;
}

static inline void cq_add_bias(const cq_linear *op, int64_t row, int32_t n_rows, float *out) {
    if (!op->bias) return;
    for (int32_t r = 0; r < n_rows; r++) out[r] += op->bias[row + r];
}

static inline int64_t cq_row_bytes(const cq_matrix *w) {
    switch (w->type) {
    case CQ_F32:
        return (int64_t)w->n_cols * 4;
    case CQ_F16:
        return (int64_t)w->n_cols * 2;
    case CQ_Q8_0:
        return (int64_t)w->n_cols / CQ_Q8_0_COLS * CQ_Q8_0_BYTES;
    default:
        return (int64_t)w->n_cols / CQ_BLOCK * 8 * cq_stored_bits(w->type);
    }
}
#endif
