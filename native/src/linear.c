/* Linear layers: every matrix type, dense or routed to experts, for one token or many.
 *
 * The rows of a matrix are cut into units of panel_rows rows (several for narrow matrices, so that a unit reads at
 * least CQ_UNIT_BYTES); threads take units as they become free. Few tokens: GEMV straight from the packed indices.
 * More: the unit is decoded once to int8 and multiplied with all tokens. */
#include "worker.h"
#include <string.h>

enum {
    CQ_TOKEN_TILE =
        48, /* tokens whose accumulators are kept before they are scaled: a multiple of every kernel's tile */
    CQ_GEMV_MAX_TOKENS = 4, /* up to here reading the indices once per token costs less than decoding a panel */
    CQ_UNIT_BYTES = 16384,
    CQ_MAX_PANEL_ROWS = 64,
};

static int64_t row_bytes(const cq_matrix *w) {
    switch (w->type) {
    case CQ_F32:
        return (int64_t)w->n_cols * 4;
    case CQ_F16:
        return (int64_t)w->n_cols * 2;
    case CQ_Q8_0:
        return (int64_t)w->n_cols / 32 * 34;
    default:
        return (int64_t)w->n_cols / CQ_BLOCK * 8 * cq_stored_bits(w->type);
    }
}

int64_t cq_linear_scratch_bytes(const cq_kernels *kernels, const cq_matrix *w) {
    return cq_is_clustered(w->type) ? (int64_t)kernels->panel_rows * w->n_cols : 0;
}

/* The tokens that one expert (or the only matrix) multiplies: item i reads row input(i) and writes row output(i). */
typedef struct {
    const cq_linear *op;
    const int32_t *slots; /* NULL: items are rows */
    int32_t n;
} items;

static inline int32_t output_row(const items *it, int32_t i) { return it->slots ? it->slots[i] : i; }

static inline int32_t input_row(const items *it, int32_t i) {
    int32_t row = output_row(it, i);
    return it->op->gather ? row / it->op->routing->top_k : row;
}

static void add_bias(const cq_linear *op, int64_t row, int32_t n_rows, float *out) {
    if (!op->bias) return;
    for (int32_t r = 0; r < n_rows; r++) out[r] += op->bias[row + r];
}

static void clustered_gemv(const cq_worker *worker, const items *it, int64_t row, int32_t n_rows, int32_t out_col) {
    const cq_linear *op = it->op;
    const cq_matrix *w = op->w;
    int32_t acc[CQ_MAX_PANEL_ROWS];
    for (int32_t done = 0; done < n_rows; done += CQ_MAX_PANEL_ROWS) {
        int32_t n = n_rows - done < CQ_MAX_PANEL_ROWS ? n_rows - done : CQ_MAX_PANEL_ROWS;
        for (int32_t i = 0; i < it->n; i++) {
            int32_t in = input_row(it, i);
            float *out = op->out + (int64_t)output_row(it, i) * w->n_rows + out_col + done;
            worker->kernels->gemv(w, row + done, n, op->act->q + (int64_t)in * w->n_cols, op->act->sums[in], acc);
            worker->kernels->scale_acc(acc, w->scales + row + done, op->act->scales[in], out, n, op->accumulate);
            add_bias(op, row + done, n, out);
        }
    }
}

static void clustered_gemm(const cq_worker *worker, const items *it, int64_t row, int32_t n_rows, int32_t out_col) {
    const cq_linear *op = it->op;
    const cq_matrix *w = op->w;
    const cq_kernels *kernels = worker->kernels;
    int32_t acc[CQ_TOKEN_TILE * CQ_MAX_PANEL_ROWS] __attribute__((aligned(64)));
    const int8_t *x[CQ_TOKEN_TILE];
    int32_t sums[CQ_TOKEN_TILE];
    for (int32_t done = 0; done < n_rows; done += kernels->panel_rows) {
        int32_t n = n_rows - done < kernels->panel_rows ? n_rows - done : kernels->panel_rows;
        kernels->decode_panel(w, row + done, n, worker->scratch);
        for (int32_t first = 0; first < it->n; first += CQ_TOKEN_TILE) {
            int32_t n_tokens = it->n - first < CQ_TOKEN_TILE ? it->n - first : CQ_TOKEN_TILE;
            for (int32_t i = 0; i < n_tokens; i++) {
                int32_t in = input_row(it, first + i);
                x[i] = op->act->q + (int64_t)in * w->n_cols;
                sums[i] = op->act->sums[in];
            }
            kernels->gemm_panel(worker->scratch, w->n_cols, x, sums, n_tokens, acc);
            for (int32_t i = 0; i < n_tokens; i++) {
                float *out = op->out + (int64_t)output_row(it, first + i) * w->n_rows + out_col + done;
                kernels->scale_acc(acc + (int64_t)i * kernels->panel_rows, w->scales + row + done,
                                   op->act->scales[input_row(it, first + i)], out, n, op->accumulate);
                add_bias(op, row + done, n, out);
            }
        }
    }
}

/* F32, F16 and Q8_0: one weight row against all tokens while it is in the first-level cache. */
static void plain_rows(const cq_worker *worker, const items *it, int64_t row, int32_t n_rows, int32_t out_col) {
    const cq_linear *op = it->op;
    const cq_matrix *w = op->w;
    const float *x[CQ_TOKEN_TILE];
    float dot[CQ_TOKEN_TILE];
    for (int32_t first = 0; first < it->n; first += CQ_TOKEN_TILE) {
        int32_t n_tokens = it->n - first < CQ_TOKEN_TILE ? it->n - first : CQ_TOKEN_TILE;
        for (int32_t r = 0; r < n_rows; r++) {
            const uint8_t *data = w->data + (row + r) * row_bytes(w);
            for (int32_t i = 0; i < n_tokens; i++) {
                int64_t in = input_row(it, first + i);
                if (w->type == CQ_Q8_0)
                    dot[i] = worker->kernels->dot_q8_0(data, op->act->q + in * w->n_cols,
                                                       op->act->scales + in * (w->n_cols / 32), w->n_cols);
                else
                    x[i] = op->x + in * w->n_cols;
            }
            if (w->type == CQ_F16) worker->kernels->dot_f16((const uint16_t *)data, x, n_tokens, w->n_cols, dot);
            if (w->type == CQ_F32) worker->kernels->dot_f32((const float *)data, x, n_tokens, w->n_cols, dot);
            for (int32_t i = 0; i < n_tokens; i++) {
                float *out = op->out + (int64_t)output_row(it, first + i) * w->n_rows + out_col + r;
                float value = dot[i] + (op->bias ? op->bias[row + r] : 0.0f);
                *out = op->accumulate ? *out + value : value;
            }
        }
    }
}

void cq_run_linear(const cq_worker *worker, const cq_linear *op, int32_t n_rows) {
    const cq_matrix *w = op->w;
    int32_t panel = worker->kernels->panel_rows;
    int32_t panels_per_unit = (int32_t)(CQ_UNIT_BYTES / (row_bytes(w) * panel));
    int32_t unit_rows = panel * (panels_per_unit > 1 ? panels_per_unit : 1);
    int32_t units = cq_ceil_div(w->n_rows, unit_rows), first = 0, unit = cq_next_unit(worker);
    for (int32_t expert = 0; expert < w->n_experts; expert++) {
        items it = {op, NULL, n_rows};
        if (op->routing) {
            it.slots = op->routing->order + op->routing->offsets[expert];
            it.n = op->routing->offsets[expert + 1] - op->routing->offsets[expert];
        }
        if (it.n == 0) continue; /* no token chose this expert: it has no units */
        for (; unit < first + units; unit = cq_next_unit(worker)) {
            int32_t col = (unit - first) * unit_rows;
            int32_t n = w->n_rows - col < unit_rows ? w->n_rows - col : unit_rows;
            int64_t row = (int64_t)expert * w->n_rows + col;
            if (!cq_is_clustered(w->type))
                plain_rows(worker, &it, row, n, col);
            else if (it.n <= CQ_GEMV_MAX_TOKENS)
                clustered_gemv(worker, &it, row, n, col);
            else
                clustered_gemm(worker, &it, row, n, col);
        }
        first += units;
    }
}

void cq_dequantize_row(const cq_kernels *kernels, const cq_matrix *w, int64_t row, float *out) {
    const uint8_t *data = w->data + row * row_bytes(w);
    if (w->type == CQ_F32) memcpy(out, data, (size_t)w->n_cols * 4);
    if (w->type == CQ_F16) kernels->f16_to_f32((const uint16_t *)data, out, w->n_cols);
    if (w->type != CQ_Q8_0) return;
    for (int32_t block = 0; block < w->n_cols / 32; block++, data += 34) {
        uint16_t half;
        float scale;
        memcpy(&half, data, 2);
        kernels->f16_to_f32(&half, &scale, 1);
        for (int32_t j = 0; j < 32; j++) out[block * 32 + j] = scale * (float)(int8_t)data[2 + j];
    }
}
