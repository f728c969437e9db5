/* One thread's view of a running program, and the ways to share an operation's work among threads.
 *
 * Every output element is computed by one thread in an order that does not depend on the number of threads, so results
 * are bit-identical for any team. */
#ifndef CQ_WORKER_H
#define CQ_WORKER_H
#include "ops/barrier.h"
#include "kernels.h"
#include <omp.h>

typedef struct {
    const cq_kernels *kernels;
    const cq_step *step;
    int32_t thread, n_threads;
    cq_barrier *barrier;
    int32_t *counter; /* of the current operation: units handed out so far, shared by the team */
    float *partials;  /* of attention, shared by the team */
    uint8_t *scratch; /* this thread's own, 64-byte aligned */
} cq_worker;

static inline void cq_wait_for_all(const cq_worker *worker) { cq_barrier_wait(worker->barrier, worker->n_threads); }

typedef struct {
    int32_t begin, end;
} cq_range;

/* This thread's contiguous share of n equal items. */
static inline cq_range cq_share(const cq_worker *worker, int32_t n) {
    return (cq_range){(int32_t)((int64_t)n * worker->thread / worker->n_threads),
                      (int32_t)((int64_t)n * (worker->thread + 1) / worker->n_threads)};
}

/* The next unit of work that no thread has taken: units of unequal cost balance themselves. */
static inline int32_t cq_next_unit(const cq_worker *worker) {
    return __atomic_fetch_add(worker->counter, 1, __ATOMIC_RELAXED);
}

static inline int32_t cq_row_count(const cq_op *op, const cq_step *step) {
    switch (op->rows) {
    case CQ_ROWS_SLOTS:
        return step->n_tokens * op->top_k;
    case CQ_ROWS_OUTPUTS:
        return step->n_outputs;
    default:
        return step->n_tokens;
    }
}
#endif
