/* Linear layers with Q8_0 matrices (linear_q8_0.c). */
#ifndef CQ_LINEAR_Q8_0_H
#define CQ_LINEAR_Q8_0_H
#include "ops/linear_items.h"

/* Rows row .. row + n_rows - 1 of a Q8_0 matrix, whose outputs start at column out_col. */
void cq_q8_0_rows(const cq_worker *worker, const cq_items *it, int64_t row, int32_t n_rows, int32_t out_col);
int64_t cq_q8_0_scratch_bytes(const cq_kernels *kernels, const cq_matrix *w);
#endif
