/* Attention of a tile of queries, included by float_ops.h.
 *
 * Keys are walked in tiles of CQ_KEY_TILE, converted from F16 once per tile, with an online softmax: running maximum m
 * and sum l per query; when m grows, what was summed so far shrinks by exp(m_old - m_new).
 *
 * A batch is consecutive queries of one head, in the vector lanes: scores are [key][CQ_QUERY_TILE], so that maximum,
 * exponential and sum need no operation across lanes. One token (decoding) would leave those lanes empty: its queries
 * are those of a group of heads with the same keys and values, which are read and converted once for all of them; the
 * head dimension is in the lanes and scores are [query][CQ_KEY_TILE]. */
#ifndef CQ_ATTENTION_H
#define CQ_ATTENTION_H

#define CQ_HIDDEN (-1e30f) /* score of a key that a query does not see; finite, as their difference must not be NaN */

typedef struct {
    const cq_attention *op;
    int32_t position, n_queries;
    float *tile;               /* [CQ_KEY_TILE][head_dim]: keys; then values, [CQ_KEY_TILE][value_dim] or their first
                                * columns */
    float *queries;            /* [head_dim][CQ_QUERY_TILE], times score_scale */
    float *scores;             /* [CQ_KEY_TILE][CQ_QUERY_TILE], or [query][CQ_KEY_TILE]; then probabilities */
    float *max, *sum, *shrink; /* [CQ_QUERY_TILE] */
} attention_tile;

/* Scores are in base 2, where an exponential has fewer steps. */
static float score_scale(const cq_attention *op) { return op->scale * 1.44269504f; }

/* Of n_keys, those that any of the queries up to `last` sees; `ahead`: how many the first one sees. The others are in
 * the future of all of them. */
CQ_INLINE int32_t seen_keys(int32_t n_keys, int32_t ahead, int32_t last) {
    const int32_t seen = ahead + last;
    return seen < 0 ? 0 : cq_min(n_keys, seen);
}

static void transpose_queries(const attention_tile *a, const float *q) {
    const int32_t dim = a->op->head_dim;
    const int64_t stride = (int64_t)a->op->n_heads * dim;
    const float scale = score_scale(a->op);
    for (int32_t i = 0; i < a->n_queries; i += CQ_LANES) {
        const int32_t n = cq_min(a->n_queries - i, CQ_LANES);
        int32_t d = 0;
        for (; d + CQ_LANES <= dim; d += CQ_LANES) {
            vec rows[CQ_LANES] = {0};
            for (int32_t k = 0; k < n; k++) rows[k] = load_vec(q + (i + k) * stride + d) * scale;
            transpose_groups(rows, CQ_LANES);
            for (int32_t k = 0; k < CQ_LANES; k++) store_vec(a->queries + (d + k) * CQ_QUERY_TILE + i, rows[k]);
        }
        for (; d < dim; d++)
            for (int32_t k = 0; k < CQ_LANES; k++)
                a->queries[d * CQ_QUERY_TILE + i + k] = k < n ? q[(i + k) * stride + d] * scale : 0.0f;
    }
}

static int32_t value_stride(const cq_attention *op) { return op->v_cache ? op->value_dim : op->head_dim; }

/* Calls function(dim, ...), for the usual sizes with a constant: addresses then need no registers of their own. */
#define CQ_WITH_HEAD_DIM(dim, function, ...)                                                                           \
    switch (dim) {                                                                                                     \
    case 64:                                                                                                           \
        function(64, __VA_ARGS__);                                                                                     \
        break;                                                                                                         \
    case 128:                                                                                                          \
        function(128, __VA_ARGS__);                                                                                    \
        break;                                                                                                         \
    default:                                                                                                           \
        function(dim, __VA_ARGS__);                                                                                    \
    }

/* scores[key][query] = key . query for CQ_SCORE_KEYS keys and CQ_SCORE_VECS vectors of queries. */
CQ_INLINE void score_tile(const int32_t dim, const float *keys, const float *queries, float *scores) {
    vec acc[CQ_SCORE_KEYS][CQ_SCORE_VECS] = {0};
    for (int32_t d = 0; d < dim; d++)
#pragma GCC unroll 16
        for (int32_t v = 0; v < CQ_SCORE_VECS; v++) {
            const vec query = load_vec(queries + d * CQ_QUERY_TILE + v * CQ_LANES);
#pragma GCC unroll 16
            for (int32_t k = 0; k < CQ_SCORE_KEYS; k++) acc[k][v] += keys[k * dim + d] * query;
        }
#pragma GCC unroll 16
    for (int32_t k = 0; k < CQ_SCORE_KEYS; k++)
#pragma GCC unroll 16
        for (int32_t v = 0; v < CQ_SCORE_VECS; v++) store_vec(scores + k * CQ_QUERY_TILE + v * CQ_LANES, acc[k][v]);
}

/* Rows past n_keys, up to a multiple of CQ_SCORE_KEYS, come out of stale floats and are never read; so do lanes past
 * n_queries, and scores of keys that no query of a tile sees. */
CQ_INLINE void score_tiles(const int32_t dim, const attention_tile *a, int32_t first_key, int32_t n_keys) {
    for (int32_t lane = 0; lane < a->n_queries; lane += CQ_SCORE_VECS * CQ_LANES) {
        const int32_t seen = seen_keys(n_keys, a->position - first_key + 1, lane + CQ_SCORE_VECS * CQ_LANES - 1);
        for (int32_t key = 0; key < seen; key += CQ_SCORE_KEYS)
            score_tile(dim, a->tile + key * dim, a->queries + lane, a->scores + key * CQ_QUERY_TILE + lane);
    }
}

static void batch_scores(const attention_tile *a, int32_t first_key,
                         int32_t n_keys){CQ_WITH_HEAD_DIM(a -> op->head_dim, score_tiles, a, first_key, n_keys)}

/* -1 in the lanes whose query sees the key: it is not in the query's future, nor before its window. */
CQ_INLINE int_vec visible(const attention_tile *a, int32_t key, int32_t first_lane) {
    int_vec distance; /* from the key to the query */
    for (int32_t i = 0; i < CQ_LANES; i++) distance[i] = i;
    distance += a->position + first_lane - key;
    return (distance >= 0) & (distance < (a->op->window > 0 ? a->op->window : INT32_MAX));
}

/* Scores -> 2^(score - max), or zero where the key is not visible; for the queries in lanes first .. masked 0: all
 * keys are visible to all queries. */
CQ_INLINE void softmax_lanes(const int32_t masked, const attention_tile *a, int32_t first_key, int32_t n_keys,
                             int32_t first) {
    const int_vec hidden = (int_vec)all_lanes(CQ_HIDDEN);
    const vec previous = load_vec(a->max + first);
    float *scores = a->scores + first;
    vec max = previous;
    for (int32_t k = 0; k < n_keys; k++) {
        vec score = load_vec(scores + k * CQ_QUERY_TILE);
        if (masked) {
            const int_vec mask = visible(a, first_key + k, first);
            score = (vec)(((int_vec)score & mask) | (hidden & ~mask));
        }
        max = max_vec(max, score);
    }
    const vec shrink = exp2_vec(previous - max);
    vec sum = load_vec(a->sum + first) * shrink;
    for (int32_t k = 0; k < n_keys; k++) {
        vec p = exp2_vec(load_vec(scores + k * CQ_QUERY_TILE) - max);
        if (masked) p = (vec)((int_vec)p & visible(a, first_key + k, first));
        store_vec(scores + k * CQ_QUERY_TILE, p);
        sum += p;
    }
    store_vec(a->max + first, max), store_vec(a->sum + first, sum), store_vec(a->shrink + first, shrink);
}

static void batch_softmax(const attention_tile *a, int32_t first_key, int32_t n_keys) {
    const int32_t window = a->op->window > 0 ? a->op->window : INT32_MAX;
    const int32_t all_visible =
        first_key + n_keys - 1 <= a->position && a->position + a->n_queries - 1 - first_key < window;
    for (int32_t first = 0; first < a->n_queries; first += CQ_LANES)
        if (all_visible)
            softmax_lanes(0, a, first_key, n_keys, first);
        else
            softmax_lanes(1, a, first_key, seen_keys(n_keys, a->position - first_key + 1, first + CQ_LANES - 1), first);
}

static void group_scores(const attention_tile *a, const float *q, int32_t n_keys) {
    const int32_t dim = a->op->head_dim;
    const float *keys[CQ_KEY_TILE];
    for (int32_t k = 0; k < n_keys; k++) keys[k] = a->tile + k * dim;
    for (int32_t i = 0; i < a->n_queries; i++) dot_f32(q + i * dim, keys, n_keys, dim, a->scores + i * CQ_KEY_TILE);
}

static void group_softmax(const attention_tile *a, int32_t n_keys) {
    const float scale = score_scale(a->op);
    for (int32_t i = 0; i < a->n_queries; i++) {
        float *scores = a->scores + i * CQ_KEY_TILE, largest = a->max[i];
#pragma omp simd reduction(max : largest)
        for (int32_t k = 0; k < n_keys; k++) {
            scores[k] *= scale;
            largest = scores[k] > largest ? scores[k] : largest;
        }
        for (int32_t k = n_keys; k % CQ_LANES; k++) scores[k] = CQ_HIDDEN; /* adds 2^-125 to a sum of at least one */
        vec sum = {0};
        for (int32_t k = 0; k < n_keys; k += CQ_LANES) {
            const vec p = exp2_vec(load_vec(scores + k) - largest);
            store_vec(scores + k, p);
            sum += p;
        }
        a->shrink[i] = exp2_vec(all_lanes(a->max[i] - largest))[0];
        a->sum[i] = a->sum[i] * a->shrink[i] + sum_lanes(sum);
        a->max[i] = largest;
    }
}

/* Where the probability of a key and a query lies in scores, and a query's output in out. */
typedef struct {
    int32_t key, query;
    int64_t out;
} attention_strides;

/* out[i][d ..] = out * shrink[i] + sum over keys of p[key][i] * value[key][d ..], N queries times V vectors. Values are
 * row floats apart. */
CQ_INLINE void value_tile(const int32_t row, const attention_strides at, const int32_t N, const int32_t V,
                          const attention_tile *a, int32_t n_keys, int32_t i, int32_t d, float *out) {
    vec acc[4][CQ_TILE_VECS];
#pragma GCC unroll 16
    for (int32_t n = 0; n < N; n++)
#pragma GCC unroll 16
        for (int32_t v = 0; v < V; v++)
            acc[n][v] = load_vec(out + (i + n) * at.out + d + v * CQ_LANES) * a->shrink[i + n];
    for (int32_t k = 0; k < n_keys; k++)
#pragma GCC unroll 16
        for (int32_t v = 0; v < V; v++) {
            const vec value = load_vec(a->tile + k * row + d + v * CQ_LANES);
#pragma GCC unroll 16
            for (int32_t n = 0; n < N; n++) acc[n][v] += a->scores[k * at.key + (i + n) * at.query] * value;
        }
#pragma GCC unroll 16
    for (int32_t n = 0; n < N; n++)
#pragma GCC unroll 16
        for (int32_t v = 0; v < V; v++) store_vec(out + (i + n) * at.out + d + v * CQ_LANES, acc[n][v]);
}

CQ_INLINE void value_rows(const int32_t dim, const int32_t row, const attention_strides at, const int32_t N,
                          const attention_tile *a, int32_t n_keys, int32_t i, float *out) {
    int32_t d = 0;
    for (; d + CQ_TILE_VECS * CQ_LANES <= dim; d += CQ_TILE_VECS * CQ_LANES)
        value_tile(row, at, N, CQ_TILE_VECS, a, n_keys, i, d, out);
    for (; d + CQ_LANES <= dim; d += CQ_LANES) value_tile(row, at, N, 1, a, n_keys, i, d, out);
    for (; d < dim; d++)
        for (int32_t n = i; n < i + N; n++) {
            float sum = out[n * at.out + d] * a->shrink[n];
            for (int32_t k = 0; k < n_keys; k++) sum += a->scores[k * at.key + n * at.query] * a->tile[k * row + d];
            out[n * at.out + d] = sum;
        }
}

/* `ahead` as in seen_keys. */
CQ_INLINE void value_tiles(const int32_t dim, const int32_t row, const attention_strides at, const attention_tile *a,
                           int32_t ahead, int32_t n_keys, float *out) {
    int32_t i = 0;
    for (; i + 4 <= a->n_queries; i += 4) value_rows(dim, row, at, 4, a, seen_keys(n_keys, ahead, i + 3), i, out);
    for (; i < a->n_queries; i++) value_rows(dim, row, at, 1, a, seen_keys(n_keys, ahead, i), i, out);
}

CQ_INLINE void packed_values(const int32_t dim, const attention_strides at, const attention_tile *a, int32_t ahead,
                             int32_t n_keys, float *out) {
    value_tiles(dim, dim, at, a, ahead, n_keys, out);
}

CQ_INLINE void add_values(const attention_tile *a, const attention_strides at, int32_t ahead, int32_t n_keys,
                          float *out) {
    const int32_t dim = a->op->value_dim, row = value_stride(a->op);
    if (row != dim) {
        value_tiles(dim, row, at, a, ahead, n_keys, out);
        return;
    }
    CQ_WITH_HEAD_DIM(dim, packed_values, at, a, ahead, n_keys, out)
}

static void add_batch_values(const attention_tile *a, int32_t first_key, int32_t n_keys, float *out) {
    const attention_strides at = {CQ_QUERY_TILE, 1, (int64_t)a->op->n_heads * a->op->value_dim};
    add_values(a, at, a->position - first_key + 1, n_keys, out);
}

static void add_group_values(const attention_tile *a, int32_t n_keys, float *out, int64_t stride) {
    const attention_strides at = {1, CQ_KEY_TILE, stride};
    add_values(a, at, n_keys, n_keys, out);
}

static void load_keys(const attention_tile *a, int64_t kv_head, int32_t first, int32_t n_keys) {
    const int32_t dim = a->op->head_dim;
    f16_to_f32(a->op->k_cache + (kv_head * a->op->n_ctx + first) * dim, a->tile, n_keys * dim);
}

/* Nothing to do where they are columns of the keys. */
static void load_values(const attention_tile *a, int64_t kv_head, int32_t first, int32_t n_keys) {
    const int32_t dim = a->op->value_dim;
    if (a->op->v_cache) f16_to_f32(a->op->v_cache + (kv_head * a->op->n_ctx + first) * dim, a->tile, n_keys * dim);
}

/* Of the number-th head of those that go together; two tiles, of keys and values, and scores are common to all. */
static attention_tile carve_scratch(const cq_attention *op, int32_t number, int32_t position, int32_t n_queries,
                                    float *scratch) {
    attention_tile a = {.op = op, .position = position, .n_queries = n_queries, .tile = scratch};
    a.scores = scratch + 2 * CQ_KEY_TILE * cq_attention_tile_width(op);
    a.max = a.scores + CQ_KEY_TILE * CQ_QUERY_TILE + (int64_t)number * CQ_QUERY_TILE * (op->head_dim + 3);
    a.sum = a.max + CQ_QUERY_TILE;
    a.shrink = a.sum + CQ_QUERY_TILE;
    a.queries = a.shrink + CQ_QUERY_TILE;
    for (int32_t i = 0; i < CQ_QUERY_TILE; i++) a.max[i] = CQ_HIDDEN, a.sum[i] = 0;
    return a;
}

static attention_tile begin_head(const cq_attention *op, int32_t number, int32_t position, int32_t n_queries,
                                 const float *q, float *out, float *scratch) {
    const int64_t stride = (int64_t)op->n_heads * op->value_dim;
    for (int32_t i = 0; i < n_queries; i++) /* outputs of a head are far apart */
        for (int32_t d = 0; d < op->value_dim; d += 16) __builtin_prefetch(out + i * stride + d, 1);
    const attention_tile a = carve_scratch(op, number, position, n_queries, scratch);
    transpose_queries(&a, q);
    for (int32_t i = 0; i < n_queries; i++) memset(out + i * stride, 0, sizeof(float) * (size_t)op->value_dim);
    return a;
}

static void attention_heads(const cq_attention *op, int32_t head, int32_t n_heads, int32_t position, int32_t n_queries,
                            const float *q, float *out, float *scratch) {
    const int32_t dim = op->value_dim, end = position + n_queries;
    const int64_t stride = (int64_t)op->n_heads * dim, kv_head = head / (op->n_heads / op->n_kv_heads);
    attention_tile heads[CQ_TILE_HEADS], values;
    for (int32_t h = 0; h < n_heads; h++)
        heads[h] = begin_head(op, h, position, n_queries, q + h * op->head_dim, out + h * dim, scratch);
    for (int32_t first = cq_first_key(op, position); first < end; first += CQ_KEY_TILE) {
        const int32_t n_keys = cq_min(end - first, CQ_KEY_TILE);
        load_keys(heads, kv_head, first, n_keys);
        for (int32_t h = 0; h < n_heads; h++) {
            batch_scores(&heads[h], first, n_keys);
            batch_softmax(&heads[h], first, n_keys);
            values = heads[h];
            if (op->v_cache) values.tile += CQ_KEY_TILE * cq_attention_tile_width(op);
            if (h == 0) load_values(&values, kv_head, first, n_keys);
            add_batch_values(&values, first, n_keys, out + h * dim);
        }
    }
    for (int32_t h = 0; h < n_heads; h++)
        for (int32_t i = 0; i < n_queries; i++) {
            const float share = 1.0f / heads[h].sum[i];
            for (int32_t d = 0; d < dim; d++) out[i * stride + h * dim + d] *= share;
        }
}

static void attention_chunk(const cq_attention *op, int32_t head, int32_t n_heads, int32_t first, int32_t end,
                            const float *q, float *parts, int64_t stride, float *scratch) {
    const int32_t dim = op->value_dim;
    const int64_t kv_head = head / (op->n_heads / op->n_kv_heads);
    const attention_tile a = carve_scratch(op, 0, 0, n_heads, scratch);
    for (int32_t i = 0; i < n_heads; i++) memset(parts + i * stride, 0, sizeof(float) * (size_t)dim);
    for (; first < end; first += CQ_KEY_TILE) {
        const int32_t n_keys = cq_min(end - first, CQ_KEY_TILE);
        load_keys(&a, kv_head, first, n_keys);
        group_scores(&a, q, n_keys);
        group_softmax(&a, n_keys);
        load_values(&a, kv_head, first, n_keys);
        add_group_values(&a, n_keys, parts, stride);
    }
    for (int32_t i = 0; i < n_heads; i++) {
        parts[i * stride + dim] = a.max[i];
        parts[i * stride + dim + 1] = a.sum[i];
    }
}
#endif
