#include "parallel.h"

#include <torch/csrc/stable/ops.h>

#include <atomic>

#include "denormals.h"

namespace pyprune {

int64_t thread_count() {
  return torch::stable::get_num_threads();
}

void share_tasks(int64_t count, const std::function<void(int64_t task, int64_t worker)>& body) {
  if (count <= 1 || thread_count() == 1) {
    for (int64_t task = 0; task < count; ++task) {
      body(task, 0);
    }
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, thread_count(), 1, [&](int64_t first_worker, int64_t) {
    const KeepDenormals exact;
    for (int64_t task = next.fetch_add(1); task < count; task = next.fetch_add(1)) {
      body(task, first_worker);
    }
  });
}

}  // namespace pyprune
