/* GEMV, panel GEMM and Q8_0 against a reference that packs the bytes itself, in guarded memory. */
#include "check.h"

enum content { RANDOM, LARGEST, SMALLEST, N_CONTENTS };

typedef struct {
    cq_matrix w;
    int8_t *weights; /* [n_rows][n_cols]: what the packed bytes mean */
    guarded data, centroids, group_scales;
} sample;

static void put_bit(uint8_t *plane, int32_t i, int32_t bit) { plane[i / 8] |= (uint8_t)((bit & 1) << (i % 8)); }

/* stored: of a type with T the free bit u above the bits of the index that it stores itself. */
static void put_index(uint8_t *block, int32_t type, int32_t i, int32_t stored) {
    const int32_t k = cq_stored_bits(type);
    if (k >= 4)
        block[i % 32] |= (uint8_t)((stored & 15) << (i < 32 ? 0 : 4));
    else
        block[i % 16] |= (uint8_t)((stored & 3) << (i / 16 * 2));
    if (k == 3) put_bit(block + 16, i, stored >> 2);
    if (k == 5) put_bit(block + 32, i, stored >> 4);
}

/* The index that the stored bits of a row and of those above it mean, all rows of a set at one column. */
static int32_t index_of(int32_t type, const uint8_t *stored, int32_t n, int32_t r) {
    const int32_t k = cq_stored_bits(type), own = stored[r], above = stored[(r + n - 1) % n],
                  above2 = stored[(r + 2 * n - 2) % n];
    if (!cq_has_trellis(type)) return own;
    const int32_t u = own >> (k - 1), u1 = above >> (k - 1), u2 = above2 >> (k - 1);
    return (own & ((1 << (k - 1)) - 1)) | (u ^ u2) << (k - 1) | u1 << k;
}

/* Two experts of half the rows each where their number is even. */
static sample sample_new(int32_t type, int32_t n_rows, int32_t n_cols, int32_t codebook_cols, int32_t scale_cols,
                         enum content content) {
    const int32_t bits = cq_stored_bits(type), k = 1 << cq_index_bits(type);
    const int32_t n_books = cq_ceil_div(n_cols, codebook_cols), book_rows = 1 << random_between(0, 3);
    const int32_t n_experts = n_rows % 2 ? 1 : 2, expert_rows = n_rows / n_experts;
    const int32_t expert_books = cq_ceil_div(expert_rows, book_rows) * n_books;
    const int32_t n_groups = scale_cols ? cq_ceil_div(n_cols, scale_cols) : 0;
    sample s = {.data = guarded_new((size_t)n_rows * n_cols / 8 * bits),
                .centroids = guarded_new((size_t)n_experts * expert_books * k),
                .group_scales = guarded_new((size_t)n_rows * n_groups),
                .weights = malloc((size_t)n_rows * n_cols)};
    int8_t *centroids = s.centroids.data, *scales = s.group_scales.data;
    for (int32_t i = 0; i < n_experts * expert_books * k; i++)
        centroids[i] = (int8_t)(content == RANDOM ? random_between(-128, 127) : content == LARGEST ? 127 : -128);
    for (int32_t i = 0; i < n_rows * n_groups; i++)
        scales[i] = (int8_t)(content == RANDOM && random_u32() % 8 ? random_between(-127, 127) : 127);
    if (n_groups) scales[n_rows * n_groups - 1] = content == RANDOM ? 0 : 127;
    memset(s.data.data, 0, (size_t)n_rows * n_cols / 8 * bits);
    uint8_t *stored = malloc((size_t)n_rows * n_cols); /* [n_cols][n_rows] */
    for (int32_t r = 0; r < n_rows; r++)
        for (int32_t c = 0; c < n_cols; c++) {
            uint8_t *block = (uint8_t *)s.data.data + ((int64_t)r * n_cols + c) / 64 * 8 * bits;
            stored[(int64_t)c * n_rows + r] =
                (uint8_t)(content == RANDOM ? random_between(0, (1 << bits) - 1) : (1 << bits) - 1);
            put_index(block, type, c % 64, stored[(int64_t)c * n_rows + r]);
        }
    for (int32_t r = 0; r < n_rows; r++)
        for (int32_t c = 0; c < n_cols; c++) {
            const int32_t in_expert = r % expert_rows, in_set = in_expert % book_rows,
                          rest = expert_rows - in_expert + in_set;
            const uint8_t *set = stored + (int64_t)c * n_rows + r - in_set;
            const int32_t index = index_of(type, set, rest < book_rows ? rest : book_rows, in_set);
            const int32_t book = r / expert_rows * expert_books + in_expert / book_rows * n_books;
            int32_t weight = centroids[(book + c / codebook_cols) * k + index];
            if (scale_cols) weight = (int32_t)floor((weight * scales[r * n_groups + c / scale_cols] + 64) / 128.0);
            s.weights[(int64_t)r * n_cols + c] = (int8_t)weight;
        }
    free(stored);
    s.w = (cq_matrix){.type = type, .n_experts = n_experts, .n_rows = expert_rows, .n_cols = n_cols};
    s.w.codebook_rows = book_rows, s.w.codebook_cols = codebook_cols, s.w.scale_cols = scale_cols;
    s.w.data = s.data.data, s.w.centroids = centroids, s.w.group_scales = scale_cols ? scales : NULL;
    return s;
}

static void sample_free(sample s) {
    guarded_free(s.data), guarded_free(s.centroids), guarded_free(s.group_scales), free(s.weights);
}

static int32_t reference_dot(const int8_t *w, const int8_t *x, int32_t n) {
    int64_t sum = 0;
    for (int32_t i = 0; i < n; i++) sum += (int32_t)w[i] * x[i];
    return (int32_t)sum;
}

static void check_gemv(const sample *s, const int8_t *x, int32_t x_sum) {
    const int32_t n_rows = s->w.n_experts * s->w.n_rows;
    int32_t *acc = malloc(sizeof(int32_t) * (size_t)(n_rows + 1));
    for (int32_t first = 0; first < n_rows; first += 1 + first) {
        const int32_t n = n_rows - first;
        acc[n] = 12345;
        cq_kernels_current()->gemv(&s->w, first, n, x, x_sum, acc);
        for (int32_t r = 0; r < n; r++) {
            const int32_t want = reference_dot(s->weights + (int64_t)(first + r) * s->w.n_cols, x, s->w.n_cols);
            CHECK(acc[r] == want, "gemv type %d [%d][%d] codebook %d x %d scale %d row %d: %d, want %d", s->w.type,
                  n_rows, s->w.n_cols, s->w.codebook_rows, s->w.codebook_cols, s->w.scale_cols, first + r, acc[r],
                  want);
        }
        CHECK(acc[n] == 12345, "gemv wrote past its rows");
    }
    free(acc);
}

/* Packing what a panel's bytes mean gives the same panel. */
static void check_pack(const sample *s, int32_t first, int32_t n, const uint8_t *panel) {
    const size_t bytes = (size_t)cq_panel_bytes(cq_kernels_current(), s->w.n_cols);
    guarded rows = guarded_new((size_t)n * s->w.n_cols);
    uint8_t *packed = aligned_alloc(64, bytes);
    memcpy(rows.data, s->weights + (int64_t)first * s->w.n_cols, (size_t)n * s->w.n_cols);
    cq_kernels_current()->pack_panel(rows.data, s->w.n_cols, n, s->w.n_cols, packed);
    CHECK(memcmp(packed, panel, bytes) == 0, "pack_panel differs from decode_panel: type %d, %d rows from %d",
          s->w.type, n, first);
    guarded_free(rows), free(packed);
}

/* The scaled products are those of the accumulators. Later tokens come before earlier ones in memory, so that a row
 * written past its end shows in one that was finished before. */
static void check_scaled(const uint8_t *panel, int32_t n_cols, const int8_t *const *x, const int32_t *x_sum,
                         int32_t n_tokens, int32_t n_rows, const int32_t *acc) {
    const cq_kernels *kernels = cq_kernels_current();
    if (!kernels->gemm_panel_scaled) return;
    guarded memory = guarded_new((size_t)n_tokens * n_rows * 4), row_memory = guarded_new((size_t)n_rows * 4);
    float *out[64], token_scales[64], *row_scales = row_memory.data, want[64];
    int32_t *scratch = malloc(sizeof(int32_t) * (size_t)n_tokens * kernels->panel_rows);
    for (int32_t r = 0; r < n_rows; r++) row_scales[r] = 0.001f * (float)random_between(0, 1000);
    for (int32_t t = 0; t < n_tokens; t++) {
        out[t] = (float *)memory.data + (int64_t)(n_tokens - 1 - t) * n_rows;
        token_scales[t] = 0.001f * (float)random_between(1, 1000);
    }
    for (int32_t accumulate = 0; accumulate < 2; accumulate++) {
        for (int32_t i = 0; i < n_tokens * n_rows; i++) ((float *)memory.data)[i] = accumulate ? (float)i : NAN;
        const cq_scaling to = {out, row_scales, token_scales, n_rows, accumulate};
        kernels->gemm_panel_scaled(panel, n_cols, x, x_sum, n_tokens, scratch, &to);
        for (int32_t t = 0; t < n_tokens; t++) {
            for (int32_t r = 0; r < n_rows; r++) want[r] = (float)((n_tokens - 1 - t) * n_rows + r);
            kernels->scale_acc(acc + t * kernels->panel_rows, row_scales, token_scales[t], want, n_rows, accumulate);
            int32_t wrong = 0;
            for (int32_t r = 0; r < n_rows; r++) {
                const float before = accumulate ? (float)((n_tokens - 1 - t) * n_rows + r) : 0;
                const float units = before + fabsf(want[r] - before); /* a multiply-add may round once or twice */
                wrong += !(fabsf(out[t][r] - want[r]) <= (accumulate ? 0x1p-23f * units : 0));
            }
            CHECK(wrong == 0, "gemm_panel_scaled: %d of %d rows, token %d of %d, %s", wrong, n_rows, t, n_tokens,
                  accumulate ? "added" : "stored");
        }
    }
    free(scratch), guarded_free(memory), guarded_free(row_memory);
}

static void check_gemm(const sample *s, const int8_t *const *x, const int32_t *x_sum, int32_t n_tokens) {
    const cq_kernels *kernels = cq_kernels_current();
    const int32_t panel_rows = kernels->panel_rows, n_rows = s->w.n_experts * s->w.n_rows;
    const size_t panel_bytes = (size_t)cq_panel_bytes(kernels, s->w.n_cols);
    uint8_t *panel = aligned_alloc(64, panel_bytes + 64);
    int32_t *acc = malloc(sizeof(int32_t) * (size_t)(n_tokens * panel_rows + 1));
    for (int32_t first = 0; first < n_rows; first += panel_rows) {
        const int32_t n = n_rows - first < panel_rows ? n_rows - first : panel_rows;
        memset(panel, 99, panel_bytes + 64);
        acc[n_tokens * panel_rows] = 12345;
        kernels->decode_panel(&s->w, first, n, panel);
        CHECK(panel[panel_bytes] == 99, "decode_panel wrote past the panel");
        check_pack(s, first, n, panel);
        kernels->gemm_panel(panel, s->w.n_cols, x, x_sum, n_tokens, acc);
        for (int32_t t = 0; t < n_tokens; t++)
            for (int32_t r = 0; r < panel_rows; r++) {
                const int8_t *row = s->weights + (int64_t)(first + r) * s->w.n_cols;
                const int32_t want = r < n ? reference_dot(row, x[t], s->w.n_cols) : 0;
                CHECK(acc[t * panel_rows + r] == want,
                      "gemm type %d [%d][%d] codebook %d x %d scale %d token %d row %d: %d, want %d", s->w.type, n_rows,
                      s->w.n_cols, s->w.codebook_rows, s->w.codebook_cols, s->w.scale_cols, t, first + r,
                      acc[t * panel_rows + r], want);
            }
        CHECK(acc[n_tokens * panel_rows] == 12345, "gemm_panel wrote past its tokens");
        check_scaled(panel, s->w.n_cols, x, x_sum, n_tokens, n, acc);
    }
    free(panel), free(acc);
}

static void check_matrix(int32_t type, int32_t n_rows, int32_t n_cols, int32_t codebook_cols, int32_t scale_cols,
                         int32_t n_tokens, enum content content) {
    sample s = sample_new(type, n_rows, n_cols, codebook_cols, scale_cols, content);
    guarded memory = guarded_new((size_t)n_tokens * n_cols);
    const int8_t *x[64];
    int32_t x_sum[64] = {0};
    for (int32_t t = 0; t < n_tokens; t++) {
        int8_t *row = (int8_t *)memory.data + (int64_t)t * n_cols;
        for (int32_t c = 0; c < n_cols; c++) {
            row[c] = (int8_t)(content == RANDOM ? random_between(-127, 127) : t % 2 ? -127 : 127);
            x_sum[t] += row[c];
        }
        x[t] = row;
    }
    check_gemv(&s, x[n_tokens - 1], x_sum[n_tokens - 1]);
    check_gemm(&s, x, x_sum, n_tokens);
    guarded_free(memory);
    sample_free(s);
}

static void check_q8_0(int32_t n_blocks, int32_t extreme) {
    guarded w = guarded_new((size_t)n_blocks * 34), q = guarded_new((size_t)n_blocks * 32);
    guarded scales = guarded_new((size_t)n_blocks * 4);
    double want = 0, magnitude = 0;
    for (int32_t b = 0; b < n_blocks; b++) {
        uint8_t *block = (uint8_t *)w.data + b * 34;
        int8_t *weights = (int8_t *)block + 2, *x = (int8_t *)q.data + b * 32;
        const int32_t exponent = random_between(1, 14), mantissa = random_between(0, 1023);
        const uint16_t f16 = (uint16_t)(exponent << 10 | mantissa);
        const float scale = 0.01f * (float)random_between(1, 1000);
        memcpy(block, &f16, 2);
        memcpy((char *)scales.data + 4 * b, &scale, 4);
        for (int32_t i = 0; i < 32; i++) {
            weights[i] = (int8_t)(extreme ? -128 : random_between(-128, 127));
            x[i] = (int8_t)(extreme ? -127 : random_between(-127, 127));
        }
        const double term = (double)scale * ldexp(1 + mantissa / 1024.0, exponent - 15) * reference_dot(weights, x, 32);
        want += term;
        magnitude += fabs((double)scale * ldexp(2, exponent - 15)) * 32 * 128 * 127;
    }
    const float got = cq_kernels_current()->dot_q8_0(w.data, q.data, scales.data, n_blocks * 32);
    /* each block: two roundings of the scale, one product; then at most n_blocks + 8 additions */
    const double bound = magnitude * (n_blocks + 11) * 0x1p-24;
    CHECK(fabs(got - want) <= bound, "dot_q8_0 %d blocks: %g, want %g", n_blocks, got, want);
    guarded_free(w), guarded_free(q), guarded_free(scales);
}

void test_integers(void) {
#define CQ_NAME(name, id, bits, trellis) name,
    static const int32_t types[] = {CQ_CLUSTERED_TYPES(CQ_NAME)};
#undef CQ_NAME
    static const int32_t cols[] = {64, 128, 192, 576, 1088}, rows[] = {1, 2, 3, 4, 5, 31, 33};
    static const int32_t codebooks[] = {0, 64, 128, 1024}, scales[] = {0, 64, 128, 1024};
    for (int32_t t = 0; t < (int32_t)(sizeof types / sizeof *types); t++) {
        const int32_t type = types[t];
        for (int32_t c = 0; c < 5; c++)
            for (int32_t variant = 0; variant < 16; variant++) {
                const int32_t codebook = codebooks[variant % 4] ? codebooks[variant % 4] : cols[c];
                check_matrix(type, rows[(variant + c) % 7], cols[c], codebook, scales[variant / 4],
                             1 + (variant + 3 * c) % 13, RANDOM);
            }
        for (int32_t n_tokens = 1; n_tokens <= 13; n_tokens++)
            check_matrix(type, 3, 192, 192, n_tokens % 2 * 64, n_tokens, RANDOM);
        for (enum content content = RANDOM; content < N_CONTENTS; content++)
            for (int32_t scale = 0; scale <= 64; scale += 64) {
                check_matrix(type, 1, CQ_MAX_COLS, CQ_MAX_COLS, scale, 2, content);
                check_matrix(type, 5, 320, 128, scale, 3, content);
            }
        check_matrix(type, 33, 1088, 1088, 64, 50, RANDOM);
        check_matrix(type, 2, 2112, 2112, 64, 13, RANDOM);
        check_matrix(type, 18, 4096 + 192, CQ_MAX_COLS, 64, 14, RANDOM); /* more columns than a tile takes at once */
    }
    for (int32_t n_blocks = 1; n_blocks <= 40; n_blocks++) check_q8_0(n_blocks, n_blocks % 2);
}
