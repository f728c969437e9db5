/* Attention of one head against a double reference. */
#include "check.h"

static float from_f16(uint16_t f16) {
    float value;
    cq_kernels_portable.f16_to_f32(&f16, &value, 1);
    return value;
}

/* One query at `position`: want[value_dim], and the bound of the error.
 *
 * A score is a float dot product of head_dim terms, so it is off by at most ds = (head_dim + 4) 2^-24 sum |q k| scale
 * (2^-24 times the largest such sum over the keys). The exponential adds 4 units and the subtraction of the maximum one
 * of |score|. A relative error d of every probability moves the result by at most 2 d max |v|; summing n keys, n units
 * of it. */
static double reference(const cq_attention *op, int32_t kv_head, int32_t position, const float *q, double *want) {
    const int32_t dim = op->head_dim, value_dim = op->value_dim;
    const uint16_t *values = op->v_cache ? op->v_cache : op->k_cache;
    const int32_t value_stride = op->v_cache ? value_dim : dim;
    const int32_t first = op->window > 0 && position >= op->window ? position - op->window + 1 : 0;
    double *scores = malloc(sizeof(double) * (size_t)(position + 1)), largest = -INFINITY, total = 0;
    double most = 0, max_value = 0;
    for (int32_t k = first; k <= position; k++) {
        const uint16_t *key = op->k_cache + ((int64_t)kv_head * op->n_ctx + k) * dim;
        double magnitude = scores[k] = 0;
        for (int32_t d = 0; d < dim; d++) {
            const double product = (double)q[d] * from_f16(key[d]) * op->scale;
            scores[k] += product, magnitude += fabs(product);
        }
        most = fmax(most, magnitude), largest = fmax(largest, scores[k]);
    }
    for (int32_t d = 0; d < value_dim; d++) want[d] = 0;
    for (int32_t k = first; k <= position; k++) {
        const double p = exp(scores[k] - largest);
        total += p;
        for (int32_t d = 0; d < value_dim; d++) {
            const double value = from_f16(values[((int64_t)kv_head * op->n_ctx + k) * value_stride + d]);
            want[d] += p * value, max_value = fmax(max_value, fabs(value));
        }
    }
    for (int32_t d = 0; d < value_dim; d++) want[d] /= total;
    free(scores);
    const double relative = ((dim + 4) * most + 2 * most + 4 + 2 * (position + 1 - first)) * 0x1p-24;
    return 2 * relative * max_value + 1e-30;
}

/* The last position alone: the heads that share keys and values at once, in two chunks joined here. */
static void check_chunks(const cq_attention *op, int32_t position, const float *q, float *scratch) {
    const int32_t dim = op->value_dim, stride = 2 * (dim + 2), group = op->n_heads / op->n_kv_heads;
    const int32_t first = cq_first_key(op, position), middle = first + (position + 1 - first) / 3;
    guarded memory = guarded_new(sizeof(float) * (size_t)(group * stride));
    float *partials = memory.data;
    double *want = malloc(sizeof(double) * (size_t)dim);
    for (int32_t head = 0; head < op->n_heads; head += group) {
        const float *queries = q + head * op->head_dim;
        for (int32_t i = 0; i < group * stride; i++) partials[i] = NAN;
        const cq_kernels *kernels = cq_kernels_current();
        kernels->attention_chunk(op, head, group, first, middle, queries, partials, stride, scratch);
        kernels->attention_chunk(op, head, group, middle, position + 1, queries, partials + dim + 2, stride, scratch);
        for (int32_t i = 0; i < group; i++) {
            const double bound = reference(op, head / group, position, queries + i * op->head_dim, want);
            const float *a = partials + i * stride, *b = a + dim + 2;
            const double largest = fmax(a[dim], b[dim]), wa = exp2(a[dim] - largest), wb = exp2(b[dim] - largest);
            for (int32_t d = 0; d < dim; d++) {
                const double got = (wa * a[d] + wb * b[d]) / (wa * a[dim + 1] + wb * b[dim + 1]);
                CHECK(fabs(got - want[d]) <= bound, "chunks dim %d position %d window %d: %g, want %g, bound %g", dim,
                      position, op->window, got, want[d], bound);
            }
        }
    }
    free(want);
    guarded_free(memory);
}

static void fill_f16(uint16_t *out, size_t n, float magnitude) {
    for (size_t i = 0; i < n; i++) {
        const float value = magnitude * random_float();
        cq_kernels_portable.f32_to_f16(&value, out + i, 1);
    }
}

/* views: the values are the first value_dim columns of the keys. */
static void check_widths(int32_t dim, int32_t value_dim, int views, int32_t position, int32_t n_queries, int32_t window,
                         float sharpness) {
    const int32_t n_heads = 4, n_kv_heads = 2, n_ctx = position + n_queries;
    const size_t keys = (size_t)n_kv_heads * n_ctx * dim, values = (size_t)n_kv_heads * n_ctx * value_dim;
    guarded mk = guarded_new(keys * 2), mv = guarded_new(values * 2);
    guarded mq = guarded_new(sizeof(float) * (size_t)n_queries * n_heads * dim),
            mo = guarded_new(sizeof(float) * (size_t)n_queries * n_heads * value_dim);
    float *q = mq.data, *out = mo.data;
    fill_f16(mk.data, keys, sharpness), fill_f16(mv.data, values, 1);
    for (int32_t i = 0; i < n_queries * n_heads * dim; i++) q[i] = random_float();
    for (int32_t i = 0; i < n_queries * n_heads * value_dim; i++) out[i] = NAN;
    cq_attention op = {.k_cache = mk.data, .v_cache = views ? NULL : mv.data, .n_heads = n_heads};
    op.n_kv_heads = n_kv_heads, op.head_dim = dim, op.value_dim = value_dim;
    op.n_ctx = n_ctx, op.window = window, op.scale = 1 / sqrtf((float)dim);
    const size_t scratch_bytes = sizeof(float) * cq_attention_scratch_floats(&op);
    guarded scratch = guarded_new(scratch_bytes);
    double *want = malloc(sizeof(double) * (size_t)value_dim);
    const int32_t together = 1 + n_queries % 2; /* heads, of the two that share keys */
    for (int32_t head = 0; head < n_heads; head += together) {
        memset(scratch.data, 0xff, scratch_bytes); /* NaN: nothing stale may count */
        cq_kernels_current()->attention_heads(&op, head, together, position, n_queries, q + head * dim,
                                              out + head * value_dim, scratch.data);
    }
    for (int32_t head = 0; head < n_heads; head++)
        for (int32_t i = 0; i < n_queries; i++) {
            const double bound = reference(&op, head / 2, position + i, q + (i * n_heads + head) * dim, want);
            for (int32_t d = 0; d < value_dim; d++) {
                const float got = out[(i * n_heads + head) * value_dim + d];
                CHECK(fabs(got - want[d]) <= bound,
                      "attention dim %d position %d + %d of %d window %d: %g, want %g, bound %g", dim, position, i,
                      n_queries, window, got, want[d], bound);
            }
        }
    free(want);
    memset(scratch.data, 0xff, scratch_bytes);
    check_chunks(&op, position + n_queries - 1, q + (n_queries - 1) * n_heads * dim, scratch.data);
    guarded_free(mk), guarded_free(mv), guarded_free(mq), guarded_free(mo), guarded_free(scratch);
}

static void check_attention(int32_t dim, int32_t position, int32_t n_queries, int32_t window, float sharpness) {
    check_widths(dim, dim, 0, position, n_queries, window, sharpness);
}

void test_attention(void) {
    static const int32_t dims[] = {4, 20, 64, 80, 128, 192}, positions[] = {0, 1, 63, 64, 65, 200};
    for (int32_t d = 0; d < 6; d++)
        for (int32_t p = 0; p < 6; p++)
            for (int32_t n = 1; n <= CQ_QUERY_TILE; n += n < 5 ? 1 : 11)
                check_attention(dims[d], positions[p], n, (d + p + n) % 3 ? 0 : 7 + 60 * (p % 2),
                                1 + 20.0f * (float)(d % 2));
    check_attention(CQ_MAX_HEAD_DIM, 30, CQ_QUERY_TILE, 0, 1);
    check_attention(64, 3000, 1, 0, 8);
    check_attention(64, 3000, CQ_QUERY_TILE, 100, 8);
    /* a compressed cache: values are columns of the keys; and values narrower or wider than keys */
    static const int32_t widths[][2] = {{24, 16}, {68, 64}, {81, 47}, {576, 512}, {192, 128}, {64, 64}};
    for (int32_t w = 0; w < 6; w++)
        for (int32_t p = 0; p < 6; p++) {
            check_widths(widths[w][0], widths[w][1], 1, positions[p], 1 + 7 * p % CQ_QUERY_TILE, 0, 4);
            check_widths(widths[w][p % 2], widths[w][1 - p % 2], 0, positions[p], 1 + 5 * p % CQ_QUERY_TILE, 0, 4);
        }
}
