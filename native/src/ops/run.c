/* The program executor: one team of threads walks the operations, with a barrier before those that ask for one. What is
 * a single row, as between two linear layers where one token is decoded, the last thread to arrive there computes. */
#include "ops/attention.h"
#include "ops/linear.h"
#include <float.h>
#include <math.h>
#include <string.h>

static void run_embed(const cq_worker *worker, const cq_embed *op) {
    cq_range range = cq_share(worker, worker->step->n_tokens);
    for (int32_t t = range.begin; t < range.end; t++)
        cq_dequantize_row(worker->kernels, op->table, worker->step->tokens[t],
                          op->out + (int64_t)t * op->table->n_cols);
}

static void run_rms_norm(const cq_worker *worker, const cq_rms_norm *op, int32_t n_rows) {
    cq_range range = cq_share(worker, n_rows);
    for (int64_t t = range.begin; t < range.end; t++) {
        worker->kernels->rms_norm(op->x + t * op->n, op->weight, op->out + t * op->n, op->n, op->eps);
        if (op->bias) worker->kernels->axpy(1.0f, op->bias, op->out + t * op->n, op->n);
    }
}

static void run_quantize(const cq_worker *worker, const cq_quantize *op, int32_t n_rows) {
    cq_range range = cq_share(worker, n_rows);
    int32_t n_scales = op->out->group ? op->n / op->out->group : 1;
    for (int64_t t = range.begin; t < range.end; t++)
        worker->kernels->quantize(op->x + t * op->n, op->n, op->out->bits, op->out->group, op->out->q + t * op->n,
                                  op->out->scales + t * n_scales, op->out->sums + t * n_scales);
}

static void run_rope(const cq_worker *worker, const cq_rope *op, int32_t n_rows) {
    cq_range range = cq_share(worker, n_rows);
    for (int64_t t = range.begin; t < range.end; t++)
        for (int64_t h = 0; h < op->n_heads; h++)
            worker->kernels->rope(op->x + (t * op->n_heads + h) * op->head_dim,
                                  op->cos_sin + (worker->step->position + t) * op->n_rot, op->n_rot, op->interleaved);
}

static void run_swiglu(const cq_worker *worker, const cq_swiglu *op, int32_t n_rows) {
    cq_range range = cq_share(worker, n_rows);
    for (int64_t t = range.begin; t < range.end; t++) {
        worker->kernels->swiglu(op->gate + t * op->n, op->up + t * op->n, op->out + t * op->n, op->n);
        if (op->hadamard) worker->kernels->hadamard(op->out + t * op->n, op->n, op->hadamard);
    }
}

static int is_among(int32_t expert, const int32_t *ids, int32_t n) {
    int found = 0;
    for (int32_t i = 0; i < n; i++) found |= ids[i] == expert;
    return found;
}

/* SparseMixer's weight (arXiv 2409.12136, at inference) of the rank-th choice. Every step is a float operation of
 * transformers' own, so that a logit at the threshold falls on the same side; 0 / 0 is not beyond it. */
static float sparsemixer_weight(const cq_route *op, const float *logits, const int32_t *ids, int32_t rank) {
    const float best = logits[ids[rank]];
    float total = 0.0f;
    for (int32_t e = 0; e < op->routing->n_experts; e++) {
        const float factor = fmaxf(fabsf(logits[e]), best), below = (best - logits[e]) / factor;
        if (!is_among(e, ids, rank) && !(below > 2.0f * op->jitter)) total += expf(logits[e] - best);
    }
    return 1.0f / total;
}

/* A bit per group of experts: those with the best experts, ties to the lower index. */
static uint64_t best_groups(const cq_route *op, const float *logits) {
    if (op->top_groups <= 0) return 1; /* one group */
    const int32_t size = op->routing->n_experts / op->n_groups;
    float best[64];
    for (int32_t g = 0; g < op->n_groups; g++) {
        best[g] = -FLT_MAX;
        for (int32_t e = g * size; e < (g + 1) * size; e++) best[g] = fmaxf(best[g], logits[e]);
    }
    uint64_t chosen = 0;
    for (int32_t g = 0; g < op->n_groups; g++) {
        int32_t better = 0;
        for (int32_t other = 0; other < op->n_groups; other++)
            better += best[other] > best[g] || (best[other] == best[g] && other < g);
        chosen |= (uint64_t)(better < op->top_groups) << g;
    }
    return chosen;
}

/* The top_k best experts of the best groups, ties to the lower index, weighted by their scores. */
static void route_token(const cq_route *op, const float *logits, int32_t *ids, float *weights) {
    const int32_t n_experts = op->routing->n_experts, top_k = op->routing->top_k;
    const int32_t group_size = n_experts / (op->top_groups > 0 ? op->n_groups : 1);
    const uint64_t groups = best_groups(op, logits);
    float max = -FLT_MAX, total = 0.0f, chosen = 0.0f;
    for (int32_t e = 0; e < n_experts; e++) max = fmaxf(max, logits[e]);
    for (int32_t e = 0; e < n_experts; e++) total += expf(logits[e] - max);
    for (int32_t rank = 0; rank < top_k; rank++) {
        int32_t best = -1;
        for (int32_t e = 0; e < n_experts; e++)
            if ((groups >> (e / group_size) & 1) && !is_among(e, ids, rank) && (best < 0 || logits[e] > logits[best]))
                best = e;
        ids[rank] = best;
        weights[rank] = op->scoring == CQ_SPARSEMIXER ? sparsemixer_weight(op, logits, ids, rank)
                        : op->scoring == CQ_SIGMOID   ? 1.0f / (1.0f + expf(-logits[best]))
                                                      : expf(logits[best] - max) / total;
        chosen += weights[rank];
    }
    if (op->normalize && chosen > 0.0f)
        for (int32_t rank = 0; rank < top_k; rank++) weights[rank] /= chosen;
    if (op->scale != 0.0f)
        for (int32_t rank = 0; rank < top_k; rank++) weights[rank] *= op->scale;
}

/* Counting sort of the slots by expert; within an expert they stay in token order. */
static void group_by_expert(const cq_routing *routing, int32_t n_slots) {
    int32_t *offsets = routing->offsets;
    memset(offsets, 0, sizeof(int32_t) * (size_t)(routing->n_experts + 1));
    for (int32_t slot = 0; slot < n_slots; slot++) offsets[routing->ids[slot] + 1]++;
    for (int32_t e = 0; e < routing->n_experts; e++) offsets[e + 1] += offsets[e];
    for (int32_t slot = 0; slot < n_slots; slot++) routing->order[offsets[routing->ids[slot]]++] = slot;
    for (int32_t e = routing->n_experts; e > 0; e--) offsets[e] = offsets[e - 1];
    offsets[0] = 0;
}

static void run_route(const cq_worker *worker, const cq_route *op, int32_t n_rows) {
    const cq_routing *routing = op->routing;
    cq_range range = cq_share(worker, n_rows);
    for (int64_t t = range.begin; t < range.end; t++)
        route_token(op, op->logits + t * routing->n_experts, routing->ids + t * routing->top_k,
                    routing->weights + t * routing->top_k);
    cq_wait_for_all(worker);
    if (worker->thread == 0) group_by_expert(routing, n_rows * routing->top_k);
}

static void run_combine(const cq_worker *worker, const cq_combine *op, int32_t n_rows) {
    cq_range range = cq_share(worker, n_rows);
    int32_t top_k = op->routing->top_k;
    for (int64_t t = range.begin; t < range.end; t++)
        for (int64_t slot = t * top_k; slot < (t + 1) * top_k; slot++)
            worker->kernels->axpy(op->routing->weights[slot], op->y + slot * op->n, op->out + t * op->n, op->n);
}

static void run_select_outputs(const cq_worker *worker, const cq_select_outputs *op) {
    const cq_step *step = worker->step;
    cq_range range = cq_share(worker, step->n_outputs);
    const float *x = op->x + (int64_t)(step->n_tokens - step->n_outputs) * op->n;
    for (int64_t t = range.begin; t < range.end; t++)
        memcpy(op->out + t * op->n, x + t * op->n, sizeof(float) * (size_t)op->n);
}

static void run_copy(const cq_worker *worker, const cq_copy *op, int32_t n_rows) {
    cq_range range = cq_share(worker, n_rows);
    for (int64_t r = range.begin; r < range.end; r++)
        memcpy(op->out + r * op->out_width, op->x + r * op->x_width, sizeof(float) * (size_t)op->n);
}

static void run_op(const cq_worker *worker, const cq_op *op) {
    int32_t n_rows = cq_row_count(op, worker->step);
    switch (op->code) {
    case CQ_OP_EMBED:
        run_embed(worker, &op->u.embed);
        break;
    case CQ_OP_RMS_NORM:
        run_rms_norm(worker, &op->u.rms_norm, n_rows);
        break;
    case CQ_OP_QUANTIZE:
        run_quantize(worker, &op->u.quantize, n_rows);
        break;
    case CQ_OP_LINEAR:
        cq_run_linear(worker, &op->u.linear, n_rows);
        break;
    case CQ_OP_ROPE:
        run_rope(worker, &op->u.rope, n_rows);
        break;
    case CQ_OP_ATTENTION:
        cq_run_attention(worker, &op->u.attention);
        break;
    case CQ_OP_SWIGLU:
        run_swiglu(worker, &op->u.swiglu, n_rows);
        break;
    case CQ_OP_ROUTE:
        run_route(worker, &op->u.route, n_rows);
        break;
    case CQ_OP_COMBINE:
        run_combine(worker, &op->u.combine, n_rows);
        break;
    case CQ_OP_SELECT_OUTPUTS:
        run_select_outputs(worker, &op->u.select_outputs);
        break;
    case CQ_OP_COPY:
        run_copy(worker, &op->u.copy, n_rows);
        break;
    }
}

/* The end of the operations from `begin` on that have one row, which threads cannot share out. */
static int32_t end_of_single_rows(const cq_op *ops, int32_t n_ops, int32_t begin, const cq_step *step) {
    int32_t end = begin;
    while (end < n_ops && ops[end].code != CQ_OP_LINEAR && ops[end].code != CQ_OP_ATTENTION &&
           cq_row_count(ops + end, step) == 1)
        end++;
    return end;
}

static void run_alone(const cq_worker *worker, const cq_op *ops, int32_t n_ops) {
    cq_barrier own = {0, 0};
    cq_worker alone = *worker;
    alone.thread = 0;
    alone.n_threads = 1;
    alone.barrier = &own;
    for (int32_t i = 0; i < n_ops; i++) run_op(&alone, ops + i);
}

static void run_all(cq_worker *worker, const cq_op *ops, int32_t n_ops, int32_t *counters) {
    for (int32_t i = 0; i < n_ops; i++) {
        const int32_t end = ops[i].waits ? end_of_single_rows(ops, n_ops, i, worker->step) : i;
        if (end > i) {
            if (cq_barrier_arrive(worker->barrier, worker->n_threads)) {
                run_alone(worker, ops + i, end - i);
                cq_barrier_open(worker->barrier);
            }
            i = end;
            if (i == n_ops) return;
        } else if (ops[i].waits)
            cq_wait_for_all(worker);
        worker->counter = counters + i;
        run_op(worker, ops + i);
    }
}

static int64_t thread_scratch_bytes(const cq_op *ops, int32_t n_ops) {
    int64_t most = 0;
    for (int32_t i = 0; i < n_ops; i++) {
        int64_t need = 0;
        if (ops[i].code == CQ_OP_LINEAR) need = cq_linear_scratch_bytes(cq_kernels_current(), ops[i].u.linear.w);
        if (ops[i].code == CQ_OP_ATTENTION)
            need = (int64_t)(sizeof(float) * cq_attention_scratch_floats(&ops[i].u.attention));
        if (need > most) most = need;
    }
    return cq_align64(most);
}

/* What the team shares: the barrier and a work counter per operation, zero at the start; then attention's partial
 * results. */
static int64_t counted_bytes(int32_t n_ops) {
    return (int64_t)sizeof(cq_barrier) + cq_align64((int64_t)sizeof(int32_t) * n_ops);
}

static int64_t shared_scratch_bytes(const cq_op *ops, int32_t n_ops) {
    int64_t most = 0;
    for (int32_t i = 0; i < n_ops; i++)
        if (ops[i].code == CQ_OP_ATTENTION && cq_attention_partial_bytes(&ops[i].u.attention) > most)
            most = cq_attention_partial_bytes(&ops[i].u.attention);
    return counted_bytes(n_ops) + cq_align64(most);
}

int64_t cq_scratch_bytes(const cq_op *ops, int32_t n_ops, int32_t n_threads) {
    return shared_scratch_bytes(ops, n_ops) + n_threads * thread_scratch_bytes(ops, n_ops);
}

int cq_run(const cq_op *ops, int32_t n_ops, const cq_step *step) {
    if (n_ops < 1 || step->n_tokens < 1 || step->n_outputs > step->n_tokens || step->n_threads < 1 ||
        step->position < 0)
        return CQ_ERR_ARGUMENT;
    for (int32_t i = 0; i < n_ops; i++)
        if (ops[i].code < 0 || ops[i].code >= CQ_OP_COUNT) return CQ_ERR_ARGUMENT;
    int32_t *counters = (int32_t *)(step->scratch + sizeof(cq_barrier));
    const int64_t shared = shared_scratch_bytes(ops, n_ops), own = thread_scratch_bytes(ops, n_ops);
    memset(step->scratch, 0, (size_t)counted_bytes(n_ops));
#pragma omp parallel num_threads(step->n_threads)
    {
        cq_worker worker = {.kernels = cq_kernels_current(), .step = step, .barrier = (cq_barrier *)step->scratch};
        worker.thread = omp_get_thread_num();
        worker.n_threads = omp_get_num_threads();
        worker.partials = (float *)(step->scratch + counted_bytes(n_ops));
        worker.scratch = step->scratch + shared + worker.thread * own;
        run_all(&worker, ops, n_ops, counters);
    }
    return CQ_OK;
}
