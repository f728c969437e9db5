/* This machine's two limits, measured on the threads that a program would use: read bandwidth and int8 multiply-adds. */
#include "kernels.h"
#include <omp.h>
#include <string.h>

enum { PASSES = 5, CALIBRATION = 1 << 16 };
static const double PEAK_SECONDS = 0.02;

/* Sums whole cache lines; the sum is returned so that the reads are not dropped. Reads only inside the buffer. */
static uint64_t sum_lines(const uint8_t *buffer, int64_t n_bytes) {
    uint64_t sum[8] = {0}, line[8];
    for (int64_t i = 0; i + 64 <= n_bytes; i += 64) {
        memcpy(line, buffer + i, 64);
        for (int32_t j = 0; j < 8; j++) sum[j] += line[j];
    }
    for (int32_t j = 1; j < 8; j++) sum[0] += sum[j];
    return sum[0];
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
