/* Linear layers of every matrix type (linear.c). */
#ifndef CQ_LINEAR_H
#define CQ_LINEAR_H
#include "ops/worker.h"

void cq_run_linear(const cq_worker *worker, const cq_linear *op, int32_t n_rows);

/* Bytes of scratch that a thread needs to multiply by w. */
int64_t cq_linear_scratch_bytes(const cq_kernels *kernels, const cq_matrix *w);

/* One row of an F32, F16 or Q8_0 matrix as floats. */
void cq_dequantize_row(const cq_kernels *kernels, const cq_matrix *w, int64_t row, float *out);
#endif
