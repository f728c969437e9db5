/* This machine's two limits, measured on the threads that a program would use: read bandwidth and int8 multiply-adds.
 */
#include "kernels.h"
#include <omp.h>

enum { PASSES = 5, CALIBRATION = 1 << 16 };
static const double PEAK_SECONDS = 0.02;

typedef uint64_t pair __attribute__((vector_size(16)));
typedef uint64_t unaligned_pair __attribute__((vector_size(16), aligned(1), may_alias));

/* Sums whole cache lines in four chains; the sum is used, so that the reads are not dropped. */
static uint64_t sum_lines(const uint8_t *buffer, int64_t n_bytes) {
    pair a = {0}, b = {0}, c = {0}, d = {0};
    for (int64_t i = 0; i + 64 <= n_bytes; i += 64) {
        const unaligned_pair *line = (const unaligned_pair *)(buffer + i);
        a += line[0], b += line[1], c += line[2], d += line[3];
    }
    a = (a + b) + (c + d);
    return a[0] + a[1];
}

static volatile uint64_t sink;

double cq_measure_bandwidth(const uint8_t *buffer, int64_t n_bytes, int32_t n_threads) {
    double best = 0;
    for (int32_t pass = 0; pass < PASSES; pass++) {
        uint64_t sum = 0;
        const double start = omp_get_wtime();
#pragma omp parallel num_threads(n_threads) reduction(+ : sum)
        {
            const int64_t lines = n_bytes / 64, thread = omp_get_thread_num(), team = omp_get_num_threads();
            const int64_t begin = lines * thread / team * 64, end = lines * (thread + 1) / team * 64;
            sum += sum_lines(buffer + begin, end - begin);
        }
        const double rate = (double)(n_bytes / 64 * 64) / (omp_get_wtime() - start);
        sink = sum;
        if (rate > best) best = rate;
    }
    return best;
}

double cq_measure_peak(int32_t n_threads) {
    const cq_kernels *kernels = cq_kernels_current();
    if (!kernels) return 0;
    double start = omp_get_wtime(), best = 0;
    kernels->peak_macs(CALIBRATION);
    const double scale = PEAK_SECONDS / (omp_get_wtime() - start + 1e-9);
    const int32_t iterations = scale < 1 ? CALIBRATION : (int32_t)(CALIBRATION * (scale < 1000 ? scale : 1000));
    for (int32_t pass = 0; pass < PASSES; pass++) {
        int64_t macs = 0;
        start = omp_get_wtime();
#pragma omp parallel num_threads(n_threads) reduction(+ : macs)
        macs += kernels->peak_macs(iterations);
        const double rate = (double)macs / (omp_get_wtime() - start);
        if (rate > best) best = rate;
    }
    return best;
}
