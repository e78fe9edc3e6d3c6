// The one place where work is split over threads. Instruction-set units never include it: their kernels run over a
// range.
//
// Built with -fopenmp but not linked to an OpenMP runtime: torch has loaded its own for the whole process, so the team,
// its size and torch.set_num_threads() are torch's. Stand-alone C++ tests link libgomp.
#pragma once

#include <omp.h>

#include <cstdint>

namespace lowbit {

// Calls body(begin, end, thread) on at most `threads` contiguous parts of [0, count), each at least `grain` long.
template <class Body>
void parallel_for(int64_t count, int64_t grain, const Body& body) {
  const int64_t most = grain > 0 ? (count + grain - 1) / grain : count;
  const int64_t available = omp_in_parallel() ? 1 : omp_get_max_threads();
  const int64_t threads = most < available ? most : available;
  if (threads <= 1) {
    if (count > 0) body(int64_t{0}, count, 0);
    return;
  }
#pragma omp parallel num_threads(static_cast<int>(threads))
  {
    const int64_t team = omp_get_num_threads();
    const int64_t thread = omp_get_thread_num();
    const int64_t begin = count * thread / team;
    const int64_t end = count * (thread + 1) / team;
    if (begin < end) body(begin, end, static_cast<int>(thread));
  }
}

}  // namespace lowbit
