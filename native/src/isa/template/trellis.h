/* TEMPLATE. The trellis of the types with T (docs/format.md): a codebook has four subsets, and which of them a row
 * takes follows from one free bit u per row, subset = (u[r] ^ u[r - 2]) + 2 u[r - 1]. This is the four-state code of
 * Ungerboeck (1982) in the quantizer of Marcellin and Fischer (1990), tail-biting: the rows that share the codebook are
 * a set in which the last rows come before the first. */
#ifndef CQ_TRELLIS_H
#define CQ_TRELLIS_H
#include "isa/template/vectors.h"

enum { PATHS = 16, PATH_VECS = PATHS / CQ_LANES }; /* four states for each of four states to start from */

/* Lanes 2 l or, odd, 2 l + 1 of each group of four, twice. */
CQ_INLINE vec every_second(vec v, const int32_t odd) {
    int_vec from;
    for (int32_t lane = 0; lane < CQ_LANES; lane++) from[lane] = lane / 4 * 4 + lane % 2 * 2 + odd;
    return shuffle_lanes(v, v, from);
}

/* subset[n]: the path through a set of n <= CQ_MAX_CODEBOOK_ROWS rows that costs least (Viterbi, for all states to
 * start from and to return to at once). cost[n]: of subsets 0, 2, 1, 3. A state is 2 u[r - 1] + u[r - 2]. */
CQ_INLINE void trellis_path(const float (*cost)[4], int32_t n, int32_t *subset) {
    vec total[PATH_VECS];
    float sums[PATHS];
    int32_t from_odd[CQ_MAX_CODEBOOK_ROWS][PATHS]; /* whether the better path into a state had u[r - 2] = 1 */
    for (int32_t path = 0; path < PATHS; path++) sums[path] = path / 4 == path % 4 ? 0 : INFINITY;
    memcpy(total, sums, sizeof total);
    for (int32_t r = 0; r < n; r++) {
        const vec even_cost = repeat_four(cost[r]), odd_cost = swap_lanes(even_cost, 2); /* u[r - 2] = 0, or 1 */
        for (int32_t v = 0; v < PATH_VECS; v++) {
            const vec even = every_second(total[v], 0) + even_cost, odd = every_second(total[v], 1) + odd_cost;
            const int_vec better = odd < even;
            total[v] = min_vec(odd, even);
            memcpy(from_odd[r] + v * CQ_LANES, &better, sizeof better);
        }
    }
    memcpy(sums, total, sizeof total);
    int32_t start = 0;
    for (int32_t s = 1; s < 4; s++)
        if (sums[5 * s] < sums[5 * start]) start = s;
    for (int32_t r = n - 1, state = start; r >= 0; r--) {
        const int32_t u = state >> 1, u1 = state & 1, u2 = from_odd[r][4 * start + state] & 1;
        subset[r] = (u ^ u2) + 2 * u1;
        state = 2 * u1 + u2;
    }
}
#endif
