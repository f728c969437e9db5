/* The trellis of the types with T (docs/format.md): a codebook has four parts, and which of them a row takes follows
 * from one free bit u per row, part = (u[r] ^ u[r - 2]) + 2 u[r - 1] around the ring of rows that share the codebook.
 * This is the four-state code of Ungerboeck (1982) in the quantizer of Marcellin and Fischer (1990), closed to a ring.
 */
#ifndef CQ_TRELLIS_H
#define CQ_TRELLIS_H
#include "kernels.h"
#include <math.h>

typedef float cq_states __attribute__((vector_size(16), may_alias));
typedef int32_t cq_states_mask __attribute__((vector_size(16), may_alias));

/* part[n]: the way around a ring of n <= CQ_ROWS rows with the least sum of cost[r][part[r]] (Viterbi, once per state
 * to start from and to return to). A state is 2 u[r - 1] + u[r - 2]. */
static inline void cq_trellis_path(const float (*cost)[4], int32_t n, int32_t *part) {
    cq_states total[4];
    cq_states_mask from_odd[CQ_ROWS][4]; /* whether the better way into a state had u[r - 2] = 1 */
    for (int32_t start = 0; start < 4; start++) {
        total[start] = (cq_states){INFINITY, INFINITY, INFINITY, INFINITY};
        total[start][start] = 0;
    }
    for (int32_t r = 0; r < n; r++) {
        const float *c = cost[r];
        const cq_states even_cost = {c[0], c[2], c[1], c[3]}, odd_cost = {c[1], c[3], c[0], c[2]};
        for (int32_t start = 0; start < 4; start++) {
            const cq_states old = total[start];
            const cq_states even = __builtin_shufflevector(old, old, 0, 2, 0, 2) + even_cost;
            const cq_states odd = __builtin_shufflevector(old, old, 1, 3, 1, 3) + odd_cost;
            const cq_states_mask m = odd < even;
            total[start] = (cq_states)(((cq_states_mask)odd & m) | ((cq_states_mask)even & ~m));
            from_odd[r][start] = m;
        }
    }
    int32_t start = 0;
    for (int32_t s = 1; s < 4; s++)
        if (total[s][s] < total[start][start]) start = s;
    for (int32_t r = n - 1, state = start; r >= 0; r--) {
        const int32_t u = state >> 1, u1 = state & 1, u2 = from_odd[r][start][state] & 1;
        part[r] = (u ^ u2) + 2 * u1;
        state = 2 * u1 + u2;
    }
}
#endif
