/* The C ABI of the native library: a program of operations over buffers that the caller owns.
 *
 * Python describes a forward pass once as an array of cq_op; cq_run executes it for one batch of tokens in a single
 * team of threads. Nothing here allocates, prints or exits; every function returns a cq_status. The caller checks
 * shapes: pointers and dimensions given here are trusted. This header is the cffi declaration, so it stays free of
 * macros. */
/* clang-format off */
#ifndef CQ_H
#define CQ_H
#include <stdint.h>

enum cq_status { CQ_OK = 0, CQ_ERR_ARGUMENT = 1, CQ_ERR_UNSUPPORTED = 2 };

/* Element types of a matrix, by GGUF's tensor type ids. */
enum cq_type {
    CQ_F32 = 0, CQ_F16 = 1, CQ_Q8_0 = 8, CQ_CQ2 = 17202, CQ_CQ3 = 17203, CQ_CQ4 = 17204, CQ_CQ5 = 17205,
    CQ_CQ2T = 17212, CQ_CQ3T = 17213, CQ_CQ4T = 17214 /* the index depends on the rows above too: docs/format.md */
};

/* Weights [n_experts][n_rows][n_cols] as they lie in the memory map (docs/format.md). */
typedef struct {
    int32_t type, n_experts, n_rows, n_cols;
    int32_t codebook_rows;      /* consecutive rows of an expert that share their codebooks: 1, 2, 4 or 8 */
    int32_t codebook_cols;      /* columns that share a codebook, a multiple of 64; n_cols: all */
    int32_t scale_cols;         /* columns that share a group scale, a multiple of 64; 0: no group scales */
    const uint8_t *data;        /* packed indices, or F32, F16, Q8_0 elements */
    const int8_t *centroids;    /* [n_experts][n_rows / codebook_rows][n_cols / codebook_cols][K], rounded up */
    const int8_t *group_scales; /* [n_experts][n_rows][n_cols / scale_cols, rounded up] */
    const float *scales;        /* [n_experts][n_rows] */
    const int32_t *experts;     /* [n_experts]: which of a routing's experts these are; NULL: all of them in order */
} cq_matrix;

/* Activations quantized per token (group 0: for CQ types) or per 32 columns (group 32: for Q8_0). */
typedef struct {
    int32_t bits, group; /* bits 8: -127..127, bits 4: -7..7 */
    int8_t *q;           /* [n_rows][n_cols] */
    float *scales;       /* [n_rows][1, or n_cols / 32] */
    int32_t *sums;       /* as scales: of the q that share one */
} cq_activation;

/* Which experts each token goes to. A slot is token * top_k + rank. */
typedef struct {
    int32_t n_experts, top_k;
    int32_t *ids;     /* [n_tokens][top_k], best first */
    float *weights;   /* [n_tokens][top_k] */
    int32_t *order;   /* [n_tokens * top_k]: slots sorted by expert, then by token */
    int32_t *offsets; /* [n_experts + 1]: where each expert's slots start in order */
} cq_routing;

enum cq_opcode {
    CQ_OP_EMBED, CQ_OP_RMS_NORM, CQ_OP_QUANTIZE, CQ_OP_LINEAR, CQ_OP_ROPE, CQ_OP_ATTENTION, CQ_OP_SWIGLU, CQ_OP_ROUTE,
    CQ_OP_COMBINE, CQ_OP_SELECT_OUTPUTS, CQ_OP_COPY, CQ_OP_COUNT
};

/* How many rows an operation works on: the batch's tokens, their expert slots (tokens * top_k), or the last n_outputs. */
enum cq_rows { CQ_ROWS_TOKENS, CQ_ROWS_SLOTS, CQ_ROWS_OUTPUTS };

typedef struct { const cq_matrix *table; float *out; } cq_embed;
/* bias [n] may be NULL. */
typedef struct { const float *x, *weight, *bias; float *out; int32_t n; float eps; } cq_rms_norm;
typedef struct { const float *x; cq_activation *out; int32_t n; } cq_quantize;
/* out (+)= x W^T (+ bias). With a routing, expert e multiplies its slots; the input row of a slot is its token if
 * gather is set, else the slot itself. Without one, row r is multiplied by matrix r % n_experts. CQ types and Q8_0 read
 * act, F16 and F32 read x. */
typedef struct {
    const cq_matrix *w; const float *x; const cq_activation *act; const float *bias; const cq_routing *routing;
    float *out; int32_t gather, accumulate;
} cq_linear;
/* cos_sin: [n_ctx][n_rot / 2][2]. interleaved: pairs (2i, 2i+1), else (i, i + n_rot/2). In place. */
typedef struct { float *x; const float *cos_sin; int32_t n_heads, head_dim, n_rot, interleaved; } cq_rope;
/* Appends k, v to the cache (F16, [n_kv_heads][n_ctx][head_dim, or value_dim]), then causal attention; window 0:
 * unlimited. v and v_cache NULL: the values are the first value_dim columns of the keys. */
typedef struct {
    const float *q, *k, *v; uint16_t *k_cache, *v_cache; float *out;
    int32_t n_heads, n_kv_heads, head_dim, value_dim, n_ctx, window; float scale;
} cq_attention;
/* hadamard: then every block of that many columns (a power of two that divides n) times the orthonormal Hadamard matrix;
 * 0: none. */
typedef struct { const float *gate, *up; float *out; int32_t n, hadamard; } cq_swiglu;
/* The top_k experts of largest score: softmax over all experts, or each one's sigmoid; normalize: their weights are
 * divided by their sum. SparseMixer: one after the other, each with its softmax over itself and those not chosen before
 * it that are at most 2 * jitter below it, relative to the larger of its logit and their magnitude. top_groups: only
 * experts of so many of the n_groups (at most 64) groups of consecutive experts, those with the best expert; 0: all.
 * scale: what the weights are multiplied by at last; 0: nothing. */
enum cq_scoring { CQ_SOFTMAX, CQ_SIGMOID, CQ_SPARSEMIXER };
typedef struct {
    const float *logits; cq_routing *routing; int32_t scoring, normalize, n_groups, top_groups; float scale, jitter;
} cq_route;
/* out[t] += sum over rank of weights[t][rank] * y[slot] */
typedef struct { const float *y; const cq_routing *routing; float *out; int32_t n; } cq_combine;
typedef struct { const float *x; float *out; int32_t n; } cq_select_outputs;
/* out[r][0 .. n - 1] = x[r][0 .. n - 1], the rows being x_width and out_width floats apart. */
typedef struct { const float *x; float *out; int32_t x_width, out_width, n; } cq_copy;

typedef struct {
    int32_t code, rows, top_k; /* top_k: slots per token where rows is CQ_ROWS_SLOTS */
    int32_t waits;             /* for all threads to have finished the operations before it */
    union {
        cq_embed embed; cq_rms_norm rms_norm; cq_quantize quantize; cq_linear linear; cq_rope rope; cq_attention attention;
        cq_swiglu swiglu; cq_route route; cq_combine combine; cq_select_outputs select_outputs; cq_copy copy;
    } u;
} cq_op;

typedef struct {
    const int32_t *tokens; /* [n_tokens] */
    int32_t n_tokens, position, n_outputs, n_threads;
    uint8_t *scratch; /* cq_scratch_bytes(ops, n_ops, n_threads) bytes, 64-byte aligned */
} cq_step;

int64_t cq_scratch_bytes(const cq_op *ops, int32_t n_ops, int32_t n_threads);
int cq_run(const cq_op *ops, int32_t n_ops, const cq_step *step);

/* Instruction sets: the names this host supports, best first, and all that are known, those of other hosts too; NULL past
 * the last. Choosing NULL takes the best. */
const char *cq_isa_known(int32_t index);
const char *cq_isa_name(int32_t index);
const char *cq_isa_current(void);
int cq_isa_choose(const char *name);

/* The integer core alone: acc[n_tokens][n_rows] = x[n_tokens][n_cols] times expert 0 of a CQ matrix, exact in int32.
 * sums[n_tokens]: each token's sum of x. scratch: n_threads * cq_gemm_scratch_bytes(w), 64-byte aligned. */
int cq_gemv_i32(const cq_matrix *w, const int8_t *x, const int32_t *sums, int32_t n_tokens, int32_t *acc,
                int32_t n_threads);
int cq_gemm_i32(const cq_matrix *w, const int8_t *x, const int32_t *sums, int32_t n_tokens, int32_t *acc,
                int32_t n_threads, uint8_t *scratch);
int64_t cq_gemm_scratch_bytes(const cq_matrix *w);

/* This machine's limits: bytes per second read from a buffer, and int8 multiply-adds per second of the current set. */
double cq_measure_bandwidth(const uint8_t *buffer, int64_t n_bytes, int32_t n_threads);
double cq_measure_peak(int32_t n_threads);

/* Codebooks and assignments of a float matrix, fitted to the int8 weights that the kernels multiply (cluster.c). */
typedef struct {
    int32_t n_rows, n_cols, n_centroids;
    int32_t trellis;                   /* whether indices are those of a type with T (trellis.h) */
    int32_t codebook_rows, codebook_cols, scale_cols; /* as in cq_matrix; at most 8 rows */
    int32_t n_iterations;              /* at most this many rounds of refitting after the exact k-means */
    const float *w;                    /* [n_rows][n_cols] */
    const float *weight;               /* [n_cols]: the loss of a row is the sum of weight * (w - effective weight)^2 */
    const float *row_weight;           /* [n_rows]: what the losses count where rows are fitted together */
    uint8_t *indices;                  /* [n_rows][n_cols] */
    int8_t *centroids, *group_scales;  /* as in cq_matrix; group_scales unused without scale_cols */
    float *scales;                     /* [n_rows] */
    double *loss;                      /* [n_rows] */
    int32_t hessian_width;             /* columns of the Hessian's squares along its diagonal: n_cols if it is whole */
    float *gradient_before, *gradient_after; /* [n_rows][n_cols] or NULL: of half the loss, at descent's two ends */
} cq_clustering;

int64_t cq_cluster_scratch_bytes(const cq_clustering *job); /* per thread */
int cq_cluster_rows(const cq_clustering *job, int32_t n_threads, uint8_t *scratch);
/* Under the Hessian X^T X, the inputs' second moments (descent.c), from what the job's arrays hold; hessian [n_cols]
 * [hessian_width]: row i has the columns of i's square, what lies outside the squares being zero. Feedback keeps the
 * codebooks and chooses the indices anew; cholesky, of the same shape: upper triangular V of hessian = V V^T. Descent then refits both, for at most n_iterations
 * rounds; loss becomes r^T hessian r. */
int64_t cq_descent_scratch_bytes(const cq_clustering *job); /* per thread */
int cq_feedback_rows(const cq_clustering *job, const float *cholesky, int32_t n_threads, uint8_t *scratch);
int cq_descend_rows(const cq_clustering *job, const float *hessian, int32_t n_threads, uint8_t *scratch);

/* out [n_rows][n_cols]: the weights the job's arrays stand for (weights.c). */
int cq_clustered_weights(const cq_clustering *job, float *out, int32_t n_threads);
#endif
