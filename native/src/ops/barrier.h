/* A barrier for the team of one cq_run. OpenMP's own wakes sleepers by a system call each time, even where all threads
 * spin: with ten barriers a layer that was a tenth of a decoded token. */
#ifndef CQ_BARRIER_H
#define CQ_BARRIER_H
#include <sched.h>
#include <stdint.h>

enum { CQ_BARRIER_SPINS = 2000 }; /* 0.1 ms, then others may have this core: 2.5 times as fast beside another job */

/* phase counts the barriers passed. Each on a line of its own: waiters read only the phase. */
typedef struct {
    int32_t arrived __attribute__((aligned(64)));
    int32_t phase __attribute__((aligned(64)));
} cq_barrier;

static inline void cq_pause(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* True for the last of n_threads, at once: it alone goes on, and opens the barrier. False for the others, once it has;
 * what all of them wrote before is then visible to them. */
static inline int cq_barrier_arrive(cq_barrier *barrier, int32_t n_threads) {
    const int32_t phase = __atomic_load_n(&barrier->phase, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&barrier->arrived, 1, __ATOMIC_ACQ_REL) == n_threads) return 1;
    for (int32_t spins = 0; __atomic_load_n(&barrier->phase, __ATOMIC_ACQUIRE) == phase;)
        if (spins < CQ_BARRIER_SPINS) {
            cq_pause();
            spins++;
        } else
            sched_yield();
    return 0;
}

static inline void cq_barrier_open(cq_barrier *barrier) {
    __atomic_store_n(&barrier->arrived, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&barrier->phase, barrier->phase + 1, __ATOMIC_RELEASE);
}

/* Returns when all n_threads have called it; what they wrote before is then visible to all. */
static inline void cq_barrier_wait(cq_barrier *barrier, int32_t n_threads) {
    if (cq_barrier_arrive(barrier, n_threads)) cq_barrier_open(barrier);
}
#endif
