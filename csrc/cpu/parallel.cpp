#include "parallel.h"

#include <torch/csrc/stable/ops.h>

#include <atomic>

#include "denormals.h"

namespace pyprune {

int64_t thread_count() {
  return torch::stable::get_num_threads();
}

void share_tasks(int64_t count, int64_t elements, const std::function<void(int64_t task, int64_t worker)>& body) {
  const int64_t together = tasks_at_a_time(count, elements);
  if (count <= together || thread_count() == 1) {
    for (int64_t task = 0; task < count; ++task) {
      body(task, 0);
    }
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, thread_count(), 1, [&](int64_t first_worker, int64_t) {
    const KeepDenormals exact;
    for (int64_t first = next.fetch_add(together); first < count; first = next.fetch_add(together)) {
      for (int64_t task = first; task < std::min(count, first + together); ++task) {
        body(task, first_worker);
      }
    }
  });
}

}  // namespace pyprune
